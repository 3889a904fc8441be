"""Generated code of the protos `shardyard.worker.v1`: never edited by hand."""
