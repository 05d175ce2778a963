"""Tell this project's console lines from what libraries print."""

import re

OURS = re.compile(
    r"^(\d\d:\d\d:\d\d .*|genrecal .*|\s*)$"  # log lines, errors
)


def library_noise(stderr: str) -> list[str]:
    """Return the lines of standard error that no line of ours explains."""
    return [line for line in stderr.splitlines() if not OURS.match(line)]
