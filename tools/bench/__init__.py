"""Benchmarks against what people use otherwise: `python -m tools.bench [names]`."""
