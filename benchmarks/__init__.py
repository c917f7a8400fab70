"""Benchmarks: run from the project root, raw results under results/, a dated log in LOG.md."""
