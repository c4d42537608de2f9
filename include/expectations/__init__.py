"""Expectation suites of the examples, as JSON, and the script that derives them: ``python -m include.expectations.derive``."""
