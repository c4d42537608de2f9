"""Messages in the Confluent wire format: a schema registry, Avro and Protobuf, decoded by column."""
