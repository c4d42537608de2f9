"""Avro bodies: schema, columns of a whole block, one row at a time, and evolution to the reader's schema."""
