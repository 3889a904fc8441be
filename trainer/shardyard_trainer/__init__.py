"""The trainer: a plain SPMD program that trains one model on a gang of ranks, and looks into models and data."""
