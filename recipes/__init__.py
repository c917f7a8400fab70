"""Whole jobs on real input: run one with ``python -m recipes.<name>`` from the project's root."""
