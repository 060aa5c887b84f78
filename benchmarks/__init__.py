"""Measurements against peers: `python -m benchmarks.mappings`, `...losses`, `...accuracy`."""
