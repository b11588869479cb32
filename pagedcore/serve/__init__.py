"""Getting from a bare machine to a running server: the default model, tritonserver and the `make serve` launcher."""
