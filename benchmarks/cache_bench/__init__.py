"""The parts of ``benchmarks/cache.py``: one module per question, and what they share."""
