"""Programs of schedulers, called without a shell; their faults become errors that name the program."""

import shutil
import subprocess
from collections.abc import Sequence

from teacher_cache.errors import ConfigError, GenrecalError

TIME_LIMIT_S = 60


def run_program(command: Sequence[str], *, text: str | None = None) -> str:
    """Run a program and return its standard output.

    Raises:
        ConfigError: There is no such program here.
        GenrecalError: It failed or did not answer.
    """
    if shutil.which(command[0]) is None:
        raise ConfigError(f"no program {command[0]!r} on PATH: run this where the scheduler's tools are installed")
    try:
        done = subprocess.run(command, input=text, capture_output=True, text=True, check=False, timeout=TIME_LIMIT_S)
    except subprocess.TimeoutExpired as error:
        raise GenrecalError(f"{command[0]} did not answer within {TIME_LIMIT_S} s") from error
    if done.returncode != 0:
        raise GenrecalError(f"{command[0]} failed with exit code {done.returncode}: {done.stderr.strip()}")
    return done.stdout
