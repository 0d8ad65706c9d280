"""Trackers: what the journals say goes to TensorBoard, MLflow or Weights & Biases too."""
