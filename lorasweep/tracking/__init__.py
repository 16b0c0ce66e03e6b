"""Events to the folder and to MLflow."""
