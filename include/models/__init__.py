"""Scripts that train the example models and register them; run one with ``python -m include.models.NAME``."""
