"""How gangs and computations reach the cluster."""
