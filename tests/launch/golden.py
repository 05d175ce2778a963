"""Golden files: what renderers wrote when somebody last looked at it.

``GENRECAL_WRITE_GOLDEN=1 pytest tests/launch/test_submit*.py`` writes them
anew; look at the difference before a commit.
"""

import os
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "fixtures" / "submit"


def compare(name: str, text: str) -> None:
    """Compare a text with its golden file, or write the file where the environment asks for it."""
    path = FOLDER / name
    if os.environ.get("GENRECAL_WRITE_GOLDEN"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8"), f"{path} differs; {__doc__}"
