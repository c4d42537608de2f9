"""A pipeline as its author writes it (spec) and as the tasks that it becomes (plan): values, without Airflow."""
