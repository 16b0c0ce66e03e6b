"""Use the winner: predict, export, MLflow model, registry."""
