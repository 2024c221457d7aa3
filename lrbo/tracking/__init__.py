"""The journal, shown in MLflow."""
