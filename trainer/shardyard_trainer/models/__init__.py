"""Which model a spec means: sources, folders, weights, configurations."""
