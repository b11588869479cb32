"""Benchmarks: each writes benchmarks/results/NAME.json, the only place figures are quoted from."""
