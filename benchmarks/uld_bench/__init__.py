"""Parts of ``benchmarks/uld.py``."""
