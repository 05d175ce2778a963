"""What a machine has to offer: GPUs, toolchain, a home to write to, safe file modes, no stale locks."""

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from launch.doctor.findings import Finding, ok, problem, warning
from launch.software import gpus, installed_version

LOCK_AGE_S = 600.0
"""A build of an extension takes two minutes; a lock much older than that has no owner."""
CPU_BUILD = "+cpu"


def check_machine() -> Iterator[Finding]:
    """Yield a finding for everything that does not depend on a run file."""
    yield check_gpus()
    yield check_toolchain()
    yield check_home(Path.home())
    yield check_umask()
    yield check_build_locks(extensions_folder())


def check_gpus() -> Finding:
    """Return which GPUs there are, and whether the installed torch can use them."""
    found, torch = gpus(), installed_version("torch") or ""
    if not found:
        return ok("GPUs", "none: the CPU computes")
    names = ", ".join(sorted({gpu.name for gpu in found}))
    text = f"{len(found)} x {names}, driver {found[0].driver}"
    if torch.endswith(CPU_BUILD):
        return problem(
            "GPUs",
            f"{text}, but torch {torch} uses none",
            remedy="remove .venv, then make install, with the driver at hand",
        )
    return ok("GPUs", text)


def check_toolchain() -> Finding:
    """Return whether C++ can be compiled, which DeepSpeed and vLLM do at their first start."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        return problem("toolchain", "no C++ compiler", remedy="on Debian: apt-get install build-essential python3-dev")
    if gpus() and shutil.which("nvcc") is None and "CUDA_HOME" not in os.environ:
        return warning(
            "toolchain",
            f"{compiler}, but no nvcc",
            remedy="install the CUDA toolkit or set CUDA_HOME, for kernels that are compiled at start",
        )
    return ok("toolchain", compiler)


def check_home(home: Path) -> Finding:
    """Return whether the home folder can be written, where libraries keep caches and compiled code."""
    try:
        with tempfile.TemporaryFile(dir=home):
            return ok("home", str(home))
    except OSError as error:
        return problem(
            "home",
            f"{home} cannot be written: {error.strerror}",
            remedy="set HOME, or HF_HOME, TRITON_CACHE_DIR and TORCH_EXTENSIONS_DIR, to a folder that can",
        )


def check_umask() -> Finding:
    """Return whether new files of this user may be changed by others."""
    mask = os.umask(0)
    os.umask(mask)
    if mask & 0o002:
        return ok("umask", f"{mask:03o}")
    return warning(
        "umask",
        f"{mask:03o}: every user may change new files outside caches and checkpoints",
        remedy="run umask 022 in the shell",
    )


def extensions_folder() -> Path:
    """Return where torch compiles extensions."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "torch_extensions"
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or default)


def check_build_locks(folder: Path) -> Finding:
    """Return whether a killed compilation left a lock, for which every later start waits without end."""
    locks = [*folder.glob("*/lock"), *folder.glob("*/*/lock")]
    stale = [lock for lock in locks if _age_s(lock) > LOCK_AGE_S]
    if stale:
        return problem(
            "build locks",
            f"{stale[0]} is {_age_s(stale[0]) / 3600:.1f} hours old ({len(stale)} in all)",
            remedy="remove these files when nothing is being compiled: " + " ".join(map(str, stale)),
        )
    return ok("build locks", f"none that is stale in {folder}")


def _age_s(path: Path) -> float:
    try:
        return time.time() - path.stat().st_mtime
    except OSError:
        return 0.0
