"""Measures fastopt against stock and peers: ``python -m bench --help``."""
