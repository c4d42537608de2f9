"""Triggers: what is worth waiting for away from a worker. Each is a wake-up and carries no rows."""
