"""What a model counts to: weights, operations, cache."""
