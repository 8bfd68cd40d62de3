"""Benchmarks: ``python -m benchmarks.cpu`` on any machine; results of past runs in ``results/``."""
