"""The calls that warm processes answer: inspect a folder, predict, embed."""
