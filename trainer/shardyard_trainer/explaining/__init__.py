"""Explanations: which parts of an input an output of a model comes from."""
