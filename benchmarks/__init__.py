"""Sweeps that take too long for tests; `python -m benchmarks.coverage` is the one with a published table."""
