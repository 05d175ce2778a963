"""The parts of losses.py."""
