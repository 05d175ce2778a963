"""Logging: our own lines on the console, everything that libraries say in a log file."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from launch.secrets import redact

OUR_LOGGERS = ("teacher_cache", "recalibrator", "distill", "launch")


class RedactingFormatter(logging.Formatter):
    """Formatter that hides secrets, in tracebacks too."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line of a record."""
        return redact(super().format(record))


def setup_logging(log_file: Path, *, console: bool = True) -> None:
    """Send this project's INFO lines to standard error (``console``), and them and all library output to a file."""
    logging.captureWarnings(capture=True)
    root = logging.getLogger()
    root.handlers = []
    root.setLevel(logging.INFO)
    if console:
        short = logging.StreamHandler(sys.stderr)
        short.setFormatter(RedactingFormatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
        short.addFilter(lambda record: record.name.split(".")[0] in OUR_LOGGERS)
        root.addHandler(short)
    log_file.parent.mkdir(parents=True, exist_ok=True)
    full = logging.FileHandler(log_file)
    full.setFormatter(RedactingFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root.addHandler(full)
    # libraries that print on their own: progress of small files, and warnings about the CPU
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


@contextmanager
def console_logging() -> Iterator[None]:
    """Send INFO lines about the cache to standard error within the block, for commands that keep no log file."""
    logger = logging.getLogger("teacher_cache")
    handler, level = logging.StreamHandler(sys.stderr), logger.level
    handler.setFormatter(RedactingFormatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
