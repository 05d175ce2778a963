"""What is looked at before DeepSpeed starts: build locks that nobody holds, and what NVMe offload has to compile."""

import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from teacher_cache.errors import ConfigError

logger = logging.getLogger(__name__)


def check_machine(config: Mapping[str, Any], *, environment: Mapping[str, str]) -> None:
    """Check what a DeepSpeed configuration needs of this machine; only NVMe offload compiles anything.

    Raises:
        ConfigError: NVMe offload cannot be compiled here or would wait for a build that is dead, or its folder is not
            writable.
    """
    offloads = {
        name: section
        for name, section in config["zero_optimization"].items()
        if name in ("offload_optimizer", "offload_param") and section and section.get("device") == "nvme"
    }
    locks = stale_build_locks(extension_folder(environment))
    named = ", ".join(map(str, locks))
    advice = "delete it unless another machine that shares this folder is compiling"
    if locks and offloads:
        raise ConfigError(f"a dead build left its lock, and NVMe offload would wait for it for ever: {named}; {advice}")
    if locks:
        logger.warning("a dead build left its lock: %s. Nothing is compiled here; %s", named, advice)
    faults = [*_missing_for_nvme()] if offloads else []
    for name, section in offloads.items():
        folder = section.get("nvme_path")
        if folder is None or not os.access(folder, os.W_OK | os.X_OK):
            faults.append(f"zero_optimization.{name}.nvme_path: expected a writable folder, found {folder}")
    if faults:
        listed = "\n".join(f"  {fault}" for fault in faults)
        raise ConfigError(f"NVMe offload cannot start here:\n{listed}\nMend these, or offload to cpu.")


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


def _missing_for_nvme() -> Iterator[str]:
    """Yield what DeepSpeed's asynchronous I/O, which is compiled at the start, lacks on this machine."""
    compiler = os.environ.get("CXX", "c++")
    missing = [name for name in (compiler, "ninja") if shutil.which(name) is None]
    for name in missing:
        yield f"{name} is not on PATH: the asynchronous I/O is compiled at the start (apt-get install build-essential)"
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not missing and not AsyncIOBuilder().is_compatible(verbose=False):
        yield "libaio is not found: apt-get install libaio-dev"
