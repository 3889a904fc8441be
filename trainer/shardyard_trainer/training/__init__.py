"""One attempt on one rank: engine, loop, evaluation, checkpoint, export."""
