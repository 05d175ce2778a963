"""Logging: our own lines on the console, everything that libraries say in a log file."""

import logging
import sys
from pathlib import Path

OUR_LOGGERS = ("teacher_cache", "recalibrator", "distill", "launch")


def setup_logging(log_file: Path | None = None) -> None:
    """Send this project's INFO lines to standard error and, with them, all library output to ``log_file``."""
    logging.captureWarnings(capture=True)
    root = logging.getLogger()
    root.handlers = []
    root.setLevel(logging.INFO)
    console = logging.StreamHandler(sys.stderr)
    console.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    console.addFilter(lambda record: record.name.split(".")[0] in OUR_LOGGERS)
    root.addHandler(console)
    if log_file is not None:
        log_file.parent.mkdir(parents=True, exist_ok=True)
        full = logging.FileHandler(log_file)
        full.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        root.addHandler(full)
