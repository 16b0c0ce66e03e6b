"""MLflow models saved before serving/mlflow_model.py had its place name this module as their loader."""

from lorasweep.serving.mlflow_model import _load_pyfunc as _load_pyfunc
