"""Installed versions against the oldest ones that are safe, and against what this project asks for."""

import platform
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata

from packaging.requirements import Requirement
from packaging.version import InvalidVersion, Version

from launch.doctor.findings import Finding, ok, problem, warning
from launch.software import installed_version

PROJECT = "genrecal"


@dataclass(frozen=True, kw_only=True)
class Floor:
    """The oldest version of a package that may be used, and what is wrong with older ones."""

    version: str
    reason: str
    needed_for: str = ""
    """What works without the package; empty where nothing does."""


FLOORS = {
    "torch": Floor(
        version="2.10",
        reason="older ones corrupt memory or run code from a checkpoint even with weights_only "
        "(CVE-2025-32434, CVE-2026-24747)",
    ),
    "vllm": Floor(
        version="0.18",
        reason="older ones run a checkpoint's Python code although trust_remote_code is off "
        "(CVE-2025-66448, CVE-2026-22807, CVE-2026-27893)",
        needed_for="building a cache",
    ),
    "ray": Floor(
        version="2.54",
        reason="older ones leave parts of the jobs interface open without a token (CVE-2023-48022, CVE-2026-27482)",
        needed_for="building a cache",
    ),
    "numcodecs": Floor(version="0.16.6", reason="older ones run code from a crafted Zarr file"),
    "deepspeed": Floor(
        version="0.19.8", reason="older ones are not tested with this trainer", needed_for="training with ZeRO-3"
    ),
    "transformers": Floor(version="5.16.1", reason="older ones lack classes that the students need"),
    "zarr": Floor(version="3.1.6", reason="older ones write shards in another form"),
}
PYTHON_FLOOR = (3, 11)


def check_versions(find: Callable[[str], str | None] = installed_version) -> Iterator[Finding]:
    """Yield a finding for Python and for each package with a floor."""
    found = platform.python_version()
    if sys.version_info < PYTHON_FLOOR:
        yield problem("Python", found, remedy=f"use Python {'.'.join(map(str, PYTHON_FLOOR))} or newer")
    else:
        yield ok("Python", found)
    for name, floor in FLOORS.items():
        yield _check_floor(name, find(name), floor)


def check_requirements(find: Callable[[str], str | None] = installed_version) -> Finding:
    """Return whether every package that this project asks for is there in a version that it asks for."""
    requirements = map(Requirement, metadata.requires(PROJECT) or [])
    wanted = [item for item in requirements if item.marker is None or item.marker.evaluate({"extra": ""})]
    unmet = [
        f"{item.name} {find(item.name) or 'missing'} (needs {item.specifier})" for item in wanted if _unmet(item, find)
    ]
    if unmet:
        return problem("requirements", ", ".join(unmet), remedy="install the project again: make install")
    return ok("requirements", f"all {len(wanted)} packages are there")


def _check_floor(name: str, found: str | None, floor: Floor) -> Finding:
    if found is None:
        if floor.needed_for:
            return warning(name, "not installed", remedy=f"install it on machines for {floor.needed_for}")
        return problem(name, "not installed", remedy="install the project: make install")
    try:
        too_old = Version(found) < Version(floor.version)
    except InvalidVersion:
        return warning(name, found, remedy=f"check by hand that this is at least {floor.version}: {floor.reason}")
    if too_old:
        return problem(
            name,
            f"{found}, expected at least {floor.version}: {floor.reason}",
            remedy=f"pip install '{name}>={floor.version}'",
        )
    return ok(name, found)


def _unmet(item: Requirement, find: Callable[[str], str | None]) -> bool:
    found = find(item.name)
    return found is None or not item.specifier.contains(found, prereleases=True)
