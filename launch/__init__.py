"""Command line, run files, pipeline, clusters, demo and report."""
