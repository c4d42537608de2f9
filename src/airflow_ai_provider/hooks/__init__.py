"""Airflow connections and the task's context → what core needs. Hooks do not import each other."""
