"""The control plane: what to compute next, and what became of it. It imports no torch."""
