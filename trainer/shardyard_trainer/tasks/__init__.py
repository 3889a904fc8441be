"""Tasks: one file each, with the head, the examples as tensors, the loss and the metrics."""
