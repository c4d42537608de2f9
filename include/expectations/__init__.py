"""Expectation suites of the examples, as JSON; ``python -m include.expectations.derive`` derives them."""
