"""R3: real power cuts on ext4, after which the kernel replays the journal. Needs root and loop devices."""

import fcntl
import gc
import os
import random
import shutil
import signal
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from tests.reliability.checks import finish, require_kept
from tests.reliability.processes import quick_folder, run_in_child, spread
from tests.reliability.scenarios import SCENARIOS, Acknowledge, Scenario
from tests.reliability.shim import Point, React, Step, intercept, one_thread, points_of
from tests.reliability.test_kill import steps_of

LOG_FLUSHED, LOG_LOST = 1, 2
"""Whether the journal still gets what is in memory, as if it had been written just before the cut."""

IMAGE_BYTES = 16 * 1024**2
_SHUTDOWN = 0x8004587D


@dataclass(frozen=True, kw_only=True)
class Cut:
    """When the power fails, and how."""

    scenario: Scenario
    point: Point
    flag: int


def run(*command: object) -> None:
    """Run a command.

    Raises:
        CalledProcessError: it failed.
    """
    subprocess.run([str(word) for word in command], check=True, capture_output=True)


@contextmanager
def mounted(image: Path) -> Iterator[Path]:
    """Mount an image beside itself; give the folder."""
    folder = image.with_suffix(".mounted")
    folder.mkdir(exist_ok=True)
    run("mount", "-o", "loop", image, folder)
    try:
        yield folder
    finally:
        gc.collect()  # a cache that is not in use any more keeps its files open until then
        if subprocess.run(["umount", folder], check=False, capture_output=True).returncode:
            run("umount", "--lazy", folder)


def new_image(image: Path) -> None:
    """Make an empty file system."""
    with image.open("wb") as file:
        file.truncate(IMAGE_BYTES)
    run("mkfs.ext4", "-q", "-F", image)


@cache
def obstacle() -> str | None:
    """Return why this machine cannot mount an image, or None."""
    try:
        with quick_folder() as folder:
            new_image(folder / "disk.ext4")
            with mounted(folder / "disk.ext4"):
                return None
    except FileNotFoundError as error:
        return str(error)
    except subprocess.CalledProcessError as error:
        return f"{error.cmd[0]}: {error.stderr.decode(errors='replace').strip()}"


def cut_power_at(point: Point, *, disk: Path, flag: int) -> React:
    """Return a reaction that shuts a file system down at a point, and ends the process."""

    def react(step: Step) -> None:
        if point.is_at(step):
            fcntl.ioctl(os.open(disk, os.O_RDONLY), _SHUTDOWN, struct.pack("I", flag))
            os.kill(os.getpid(), signal.SIGKILL)

    return react


def prepare_image(scenario: Scenario, image: Path) -> list[Point]:
    """Make an image with the cache as a scenario finds it; return the points of its run."""
    new_image(image)
    with quick_folder() as folder:
        scenario.prepare(folder / "cache")
        with mounted(image) as disk:
            if (folder / "cache").exists():
                shutil.copytree(folder / "cache", disk / "cache")
        return points_of(steps_of(scenario, folder / "cache"))


def survive(cut: Cut, place: Path, *, images: Path) -> None:
    """Cut the power during a run, and check what is there afterwards and that the work can be finished."""
    image = place / "disk.ext4"
    run("cp", "--sparse=always", images / f"{cut.scenario.name}.ext4", image)
    with mounted(image) as disk:

        def doomed(acknowledge: Acknowledge) -> None:
            with intercept(cut_power_at(cut.point, disk=disk, flag=cut.flag), durable=True):
                cut.scenario.act(disk / "cache", acknowledge)

        status, told = run_in_child(doomed)
    assert status == -signal.SIGKILL
    with mounted(image) as disk:
        require_kept(disk / "cache", cut.scenario, acknowledged=cut.scenario.acknowledged | set(told))
        finish(disk / "cache", cut.scenario)


def cut_power(*, cuts: int | None) -> int:
    """Cut the power at random points of all scenarios, or with None at every point; return how often."""
    with one_thread(), quick_folder() as images:
        chosen = [
            Cut(scenario=scenario, point=point, flag=flag)
            for scenario in SCENARIOS.values()
            for point in prepare_image(scenario, images / f"{scenario.name}.ext4")
            for flag in (LOG_FLUSHED, LOG_LOST)
        ]
        if cuts is not None:
            chosen = random.Random(0).sample(chosen, cuts)
        spread(chosen, lambda cut, place: survive(cut, place, images=images))
    return len(chosen)


@pytest.mark.slow
@pytest.mark.parametrize(
    "cuts", [pytest.param(80, id="random"), pytest.param(None, id="every-step", marks=pytest.mark.nightly)]
)
def test_a_power_cut_on_ext4_loses_nothing(cuts: int | None) -> None:
    if (reason := obstacle()) is not None:
        pytest.skip(f"cannot mount an ext4 image: {reason}")
    done = cut_power(cuts=cuts)
    assert done >= 60
    print(f"R3: {done} power cuts on ext4, with and without a last flush of the journal: 0 lost, 0 corrupt")
