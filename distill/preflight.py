"""What is looked at before DeepSpeed starts: build locks that nobody holds."""

import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

logger = logging.getLogger(__name__)


def warn_of_stale_locks(environment: Mapping[str, str]) -> None:
    """Log the build locks that nobody holds: nothing is compiled here, but other programs would wait for them."""
    locks = stale_build_locks(extension_folder(environment))
    if locks:
        logger.warning(
            "a dead build left its lock: %s. Nothing is compiled here; delete it unless another machine that shares "
            "this folder is compiling",
            ", ".join(map(str, locks)),
        )


def extension_folder(environment: Mapping[str, str]) -> Path:
    """Return where torch compiles extensions."""
    folder = environment.get("TORCH_EXTENSIONS_DIR")
    home = Path(environment.get("XDG_CACHE_HOME") or Path(environment.get("HOME", "/")) / ".cache")
    return Path(folder) if folder else home / "torch_extensions"


def stale_build_locks(folder: Path) -> list[Path]:
    """Return the locks of extension builds that no process of this machine has open; torch waits for them for ever."""
    locks = [path for pattern in ("*/lock", "*/*/lock") for path in sorted(folder.glob(pattern))]
    held = {*_open_files()} if locks else set()
    return [lock for lock in locks if str(lock.resolve()) not in held]


def _open_files() -> Iterator[str]:
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            yield os.readlink(descriptor)
        except OSError:  # of another user, or closed meanwhile
            continue
