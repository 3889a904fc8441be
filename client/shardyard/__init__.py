"""The Shardyard SDK: submit, watch and use training jobs."""
