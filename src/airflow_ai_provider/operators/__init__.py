"""The verbs as Airflow operators: thin, one per verb; the work is done in core."""
