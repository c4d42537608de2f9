"""Plain Python: what the provider does, without Airflow. Nothing here imports airflow."""
