"""The model architectures, their configuration and their weights."""
