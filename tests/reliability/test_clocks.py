"""R15: commits, claims and the collection of garbage go by no wall clock, whatever it shows and however it jumps."""

import datetime
import itertools
import os
import random
import re
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from teacher_cache.claims import Claims, claim_name
from teacher_cache.gc import collect_garbage
from teacher_cache.repair import repair_cache
from teacher_cache.storage import open_store
from teacher_cache.verify import verify_cache
from tests.reliability.checks import leftovers
from tests.reliability.processes import quick_folder, run_together
from tests.reliability.shim import CHANGES, READS, Killed, Step, intercept, one_thread
from tests.teacher_cache.store import build, commit, flip_bit, make_samples, open_builder

DAY_S, HOUR_S = 86_400.0, 3_600.0
LEASE_S = 1000.0
SAMPLES = make_samples(4)
KILL_AFTER = 230
"""Steps: within the second shard."""
_TELLERS = (time.time, time.time_ns, time.localtime, time.gmtime, time.ctime, time.asctime, time.clock_gettime)
_DATES = (datetime.datetime, datetime.date)

Clock = Callable[[float], float]
"""What a wall clock shows at a true time."""


def jumping() -> Clock:
    chooser = random.Random(0)
    return lambda now: now + chooser.uniform(-3 * DAY_S, 3 * DAY_S)


CLOCKS: dict[str, Callable[[], Clock]] = {
    "right": lambda: lambda now: now,
    "3 days late": lambda: lambda now: now - 3 * DAY_S,
    "3 days early": lambda: lambda now: now + 3 * DAY_S,
    "stopped": lambda: lambda now: 0.0,
    "jumping": jumping,
}


@contextmanager
def wall_clock(clock: Clock) -> Iterator[Callable[[], float]]:
    """Let this process see another wall clock; gives what reads it."""
    true_time = time.time

    def read() -> float:
        return clock(true_time())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "time", read)
        patch.setattr(time, "time_ns", lambda: int(read() * 1e9))
        yield read


class Decisions:
    """Notes the steps of a cache's life in phases, and dates each file that they touch by the wall clock."""

    def __init__(self, read_clock: Callable[[], float]) -> None:
        self.phases: list[Counter[tuple[str, str]]] = []
        self.kill_after: int | None = None
        self._read_clock = read_clock

    def __call__(self, step: Step) -> None:
        now = self._read_clock()
        with suppress(FileNotFoundError):
            os.utime(step.path, (now, now))
        if self.kill_after is not None and self.phases[-1].total() >= self.kill_after:
            raise Killed
        self.phases[-1][step.kind, nameless(str(step.target or step.path))] += 1

    def begin(self, *, kill_after: int | None = None) -> None:
        """Begin a phase, which may end like a killed process."""
        self.phases.append(Counter())
        self.kill_after = kill_after


def nameless(path: str) -> str:
    """Take the nonces and digests out of a path."""
    return re.sub("[0-9a-f]{16,}", "nonce", path.partition("/cache/")[2])


def work(root: Path) -> None:
    """Build under claims; those of builders that do not move are taken over at the second look."""
    builder = open_builder(root, SAMPLES[:3], per_shard=1)
    monotonic = itertools.count(step=LEASE_S)
    with Claims(open_store(str(root)), lease_s=LEASE_S, clock=lambda: next(monotonic)) as claims:
        for shard in builder.missing_shards():
            if claims.take(shard.shard_id) or claims.take(shard.shard_id):
                commit(builder, shard, SAMPLES)
                claims.release(shard.shard_id)


def leave_orphans(root: Path) -> None:
    """Leave a temporary file, and an attempt at a committed shard, which is lost."""
    (root / "staging" / f"00000.0.json.{uuid.uuid4().hex}").touch()
    attempt = root / "shards" / f"00000-{uuid.uuid4().hex}"
    attempt.mkdir()
    (attempt / "zarr.json").touch()


def live(root: Path, begin: Callable[..., None]) -> list[str]:
    """Let a cache live: a killed builder, another one, garbage, an extension, a repair; return what went as garbage."""
    begin(kill_after=KILL_AFTER)
    with suppress(Killed):
        work(root)
    begin()
    leave_orphans(root)
    removed = [*collect_garbage(str(root)).removed]
    begin()
    work(root)
    begin()
    build(root, SAMPLES, per_shard=1, extend=True)
    (path,) = root.glob("shards/00001-*/hidden_states/c.0.0")
    flip_bit(path, byte=3, bit=1)
    begin()
    assert repair_cache(str(root)).withdrawn_shards == ("00001",)
    begin()
    build(root, SAMPLES, per_shard=1)
    leave_orphans(root)
    removed += collect_garbage(str(root)).removed
    assert verify_cache(str(root)).problems == ()
    assert leftovers(root) == []
    return sorted(nameless(f"/cache/{name}") for name in removed)


def decisions_by(make_clock: Callable[[], Clock]) -> tuple[object, ...]:
    """Return all that is decided in a cache's life while the wall clock is this one."""
    with quick_folder() as folder, one_thread(), wall_clock(make_clock()) as read_clock:
        decisions = Decisions(read_clock)
        with intercept(decisions, kinds=[*CHANGES, *READS]):
            removed = live(folder / "cache", decisions.begin)
    return removed, decisions.phases


def test_every_decision_is_the_same_by_any_wall_clock() -> None:
    expected, *others = (decisions_by(make_clock) for make_clock in CLOCKS.values())
    removed, phases = expected
    assert len(removed) >= 4
    assert all(phases)
    for name, found in zip([*CLOCKS][1:], others, strict=True):
        assert found == expected, name
    steps = sum(phase.total() for phase in phases)
    print(f"R15: {steps} steps and {len(removed)} removals, the same by {len(CLOCKS)} wall clocks: {', '.join(CLOCKS)}")


def claims_between(first: Clock, second: Clock) -> list[bool]:
    """Return what two builders with these wall clocks may claim of one another."""
    monotonic = 0.0
    told = []
    with quick_folder() as folder:
        store = open_store(str(folder))
        with (
            Claims(store, lease_s=LEASE_S, clock=lambda: monotonic) as one,
            Claims(store, lease_s=LEASE_S, clock=lambda: monotonic) as other,
        ):
            for minutes in (0, 5, 5, 5, 5, 1, 20):
                monotonic += minutes * 60
                for clock, claims in ((first, one), (second, other)):
                    with wall_clock(clock) as read_clock:
                        told.append(claims.take("00000"))
                        if minutes == 5:
                            one.beat()
                        date_claims(folder, read_clock())
    return told


def date_claims(folder: Path, now: float) -> None:
    for number in range(2):
        with suppress(FileNotFoundError):
            os.utime(folder / claim_name("00000", number), (now, now))


def test_builders_with_other_clocks_share_the_work_alike() -> None:
    expected = claims_between(CLOCKS["right"](), CLOCKS["right"]())
    assert any(expected[1::2]), "the claim of a dead builder is left alone"
    assert not any(expected[1:11:2]), "a claim was taken from a builder that is alive"
    clocks = [*(make() for make in CLOCKS.values()), lambda now: now - HOUR_S, lambda now: now + HOUR_S]
    pairs = list(itertools.product(clocks, repeat=2))
    for first, second in pairs:
        assert claims_between(first, second) == expected
    print(f"R15: {len(pairs)} pairs of builders, up to 6 days apart: each claim decided alike")


def test_builders_an_hour_apart_build_one_cache() -> None:
    def act(root: Path, shift_s: float) -> None:
        with wall_clock(lambda now: now + shift_s):
            build(root, SAMPLES, per_shard=1)

    with quick_folder() as folder:
        root = folder / "cache"
        run_together([partial(act, root, shift_s) for shift_s in (0.0, HOUR_S)], on_failure=lambda: None)
        assert verify_cache(str(root)).problems == ()
        assert len(list((root / "commits").iterdir())) == len(SAMPLES)
    print("R15: 2 builders an hour apart: each shard committed once")


def is_one_of(found: object, wanted: Sequence[object]) -> bool:
    """Tell whether it is one of them; arrays, which also pass by here, cannot be compared."""
    return any(found is one for one in wanted)


@contextmanager
def noting_readers_of_clocks(readers: set[str]) -> Iterator[None]:
    """Note which functions of the store ask what time it is, in whatever way."""

    def note(frame: FrameType, event: str, callee: Any) -> None:
        tells_time = is_one_of(callee, _TELLERS) or is_one_of(getattr(callee, "__self__", None), _DATES)
        module = frame.f_globals.get("__name__", "")
        if event == "c_call" and tells_time and module.startswith("teacher_cache."):
            readers.add(f"{module}.{frame.f_code.co_name}")

    threading.setprofile(note)
    sys.setprofile(note)
    try:
        yield
    finally:
        sys.setprofile(None)
        threading.setprofile(None)


@pytest.mark.parametrize("call", ["time.time()", "datetime.datetime.now()", "datetime.date.today()"])
def test_a_reader_of_the_wall_clock_is_noted(call: str) -> None:
    namespace = {"__name__": "teacher_cache.store", "time": time, "datetime": datetime}
    exec(f"def decide(): {call}", namespace)
    readers: set[str] = set()
    with noting_readers_of_clocks(readers):
        namespace["decide"]()  # type: ignore[operator]
    assert readers == {"teacher_cache.store.decide"}


def test_the_store_asks_no_wall_clock() -> None:
    readers: set[str] = set()
    with quick_folder() as folder, noting_readers_of_clocks(readers):
        live(folder / "cache", lambda **_: None)
    assert readers == set()
    print("R15: no function of the store asked for the time of day in the life of a cache")
