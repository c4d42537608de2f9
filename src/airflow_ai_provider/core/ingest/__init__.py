"""Ingest: take a span of rows once, decode, validate, and land them with every row accounted for."""
