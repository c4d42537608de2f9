"""Protobuf bodies: the schema's text made into message classes, and their decoding."""
