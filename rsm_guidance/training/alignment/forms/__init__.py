"""Forms: how credit becomes a loss on the model; `reverse`, `forward` and `implicit`."""
