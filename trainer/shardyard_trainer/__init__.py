"""The trainer: a plain SPMD program that trains one model on a gang of ranks, and functions that look into models and data."""
