"""Which pending gang starts where: pure policy, and the loop that applies it."""
