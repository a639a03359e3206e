"""The mathematics of averages over training steps, without a tensor."""
