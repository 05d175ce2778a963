"""Distil students from a teacher cache: data, losses, stages, trainer, evaluation."""
