"""The example pipelines and their material, run as a user runs them."""
