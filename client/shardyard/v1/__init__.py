"""Generated code of the protos `shardyard.v1`: never edited by hand."""
