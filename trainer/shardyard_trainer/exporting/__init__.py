"""Further formats of a trained model: written, loaded afresh, and measured beside the model itself."""
