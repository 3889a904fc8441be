"""Data: sources, tokenisation, packing, and samplers with an exact position."""
