"""From what people bring to tensors, the same way in training and in answering."""
