"""What warm processes do: inspect folders, answer predictions, give embeddings."""
