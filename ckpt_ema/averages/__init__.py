"""The mathematics of averages over training steps; no tensor of a model is read, and only `solver` needs torch."""
