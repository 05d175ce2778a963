"""What the figures were measured on."""

import importlib.metadata
import os
import platform
import time
from pathlib import Path

LIBRARIES = ("genrecal", "torch", "numpy", "zarr", "numcodecs", "crc32c", "blake3", "obstore", "pyarrow", "safetensors")
PEER_LIBRARIES = ("h5py", "tensorstore", "pylance", "mosaicml-streaming", "trl")


def describe(folder: Path) -> dict[str, str]:
    """Return processor, memory, kernel, file system of the folder and load."""
    device, kind = _mount(folder)
    return {
        "date": time.strftime("%Y-%m-%d"),
        "processor": f"{os.cpu_count()} x {_field('/proc/cpuinfo', 'model name')}",
        "memory": f"{int(_field('/proc/meminfo', 'MemTotal').split()[0]) / 2**20:.0f} GiB",
        "kernel": f"{platform.system()} {platform.release()}",
        "filesystem": kind,
        "disk": device,
        "load": f"{os.getloadavg()[0]:.1f}",
        "python": platform.python_version(),
    }


def versions() -> dict[str, str]:
    """Return the versions of the libraries that take part."""
    found = {}
    for name in (*LIBRARIES, *PEER_LIBRARIES):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _field(path: str, name: str) -> str:
    for line in Path(path).read_text().splitlines():
        if line.startswith(name):
            return line.partition(":")[2].strip()
    return "0"


def _mount(folder: Path) -> tuple[str, str]:
    device = os.stat(folder).st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields = line.split()
        if fields[2] == number:
            kind, source = fields[fields.index("-") + 1 :][:2]
            return source, kind
    return "unknown", "unknown"
