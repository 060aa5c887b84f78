"""Measurements against peers: `python -m benchmarks.mappings`, `python -m benchmarks.accuracy`."""
