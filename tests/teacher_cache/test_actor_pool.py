"""The pool of actors on clusters with bad nodes and under a driver that is held up: neither Ray nor a clock."""

import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from teacher_cache import actor_pool
from teacher_cache.actor_pool import ActorPool
from teacher_cache.config import BuildConfig
from teacher_cache.errors import CacheMismatch, ConfigError, GenrecalError, SpotCheckMismatch, TeacherError
from teacher_cache.pool_work import PieceQueue
from teacher_cache.progress import PieceProgress

START_S, SHARD_S = 600, 600
DONE = SimpleNamespace(tokens=1)
SIGN = PieceProgress(samples=0, tokens=0)


class RayError(Exception):
    """As Ray's own."""


class RayTaskError(RayError):
    """As Ray's own: holds what the task raised."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(str(cause))
        self.cause = cause


@dataclass
class Clock:
    """Advances when somebody waits."""

    now: float = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@dataclass(eq=False)
class Told:
    """What an actor tells, and when."""

    signs: deque[tuple[float, Any]]

    def __next__(self) -> Any:
        return self.signs.popleft()[1]


@dataclass
class Ray:
    """The calls of the pool."""

    clock: Clock

    class exceptions:  # noqa: N801
        RayError, RayTaskError = RayError, RayTaskError

    def wait(
        self, waitables: Sequence[Told], *, num_returns: int = 1, timeout: float, fetch_local: bool
    ) -> tuple[list[Told], list[Told]]:
        due = min((told.signs[0][0] for told in waitables if told.signs), default=float("inf"))
        self.clock.now = max(self.clock.now, min(due, self.clock.now + timeout))
        return [t for t in waitables if t.signs and t.signs[0][0] <= self.clock.now][:num_returns], []

    def get(self, item: Any) -> Any:
        item = next(item) if isinstance(item, Told) else item
        if isinstance(item, Exception):
            raise item
        return item


Behaviour = Callable[["Actor", int], list[tuple[float, Any]]]
"""What an actor tells of a piece: seconds from now, and a sign or an error."""


def builds(actor: "Actor", piece: int) -> list[tuple[float, Any]]:
    start = 0 if actor.pieces else START_S
    return [(start, SIGN), (start + SHARD_S, DONE)]


def fails_at_work(actor: "Actor", piece: int) -> list[tuple[float, Any]]:
    return [(1, SIGN), (2, RayTaskError(TeacherError("a shifted row")))]


def fails_to_start(actor: "Actor", piece: int) -> list[tuple[float, Any]]:
    return [(20, RayTaskError(TeacherError("uncorrectable ECC error")))]


def breaks_down(actor: "Actor", piece: int) -> list[tuple[float, Any]]:
    return [(START_S, SIGN), (START_S + 60, RayTaskError(RuntimeError("uncorrectable ECC error")))]


def has_no_model(actor: "Actor", piece: int) -> list[tuple[float, Any]]:
    return [(5, RayTaskError(ConfigError("the teacher is no directory")))]


@dataclass(eq=False)
class Actor:
    """An actor on a node; its methods are called as Ray's are."""

    node: str
    clock: Clock
    pieces: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        placed = RayError("cannot import the actor") if self.node == "unable" else None
        self.ready = SimpleNamespace(remote=lambda: Told(deque([(self.clock.now + 1, placed)])))


@dataclass
class Cluster:
    """Nodes with places for one replica each; actors go to the first free one, as Ray's may."""

    clock: Clock
    free: list[str]
    behaviours: dict[str, Behaviour]
    started: int = 0
    avoided: set[str] = field(default_factory=set)

    def start(self) -> Actor:
        self.started += 1
        node = next((node for node in self.free if node not in self.avoided), None)
        if node is None:
            waiting = Actor("nowhere", self.clock)
            waiting.ready = SimpleNamespace(remote=lambda: Told(deque()))
            return waiting
        self.free.remove(node)
        return Actor(node, self.clock)

    def stop(self, actor: Actor) -> None:
        self.free.insert(0, actor.node)

    def node_of(self, actor: Actor) -> str:
        return actor.node

    def avoid(self, node: str) -> None:
        self.avoided.add(node)

    def has_place(self) -> bool:
        return not set(self.behaviours) <= self.avoided


@dataclass
class Work:
    """Shards by number."""

    cluster: Cluster
    done: list[int] = field(default_factory=list)
    given_up: list[int] = field(default_factory=list)
    held_up_at: int | None = None
    """The hand-out that takes the driver 1000 seconds."""
    handed_out: int = 0
    unit: str = "shard"

    def start_actor(self) -> Actor:
        assert self.cluster.started < 100, "actors without end"
        return self.cluster.start()

    def begin(self, actor: Actor, piece: int) -> Told:
        self.handed_out += 1
        clock = self.cluster.clock
        clock.now += 1000 if self.handed_out == self.held_up_at else 0
        told = self.cluster.behaviours[actor.node](actor, piece)
        actor.pieces.append(piece)
        return Told(deque((clock.now + after, sign) for after, sign in told))

    def num_samples(self, piece: int) -> int:
        return 1

    def name(self, piece: int) -> str:
        return str(piece)

    def finish(self, piece: int, result: Any) -> None:
        self.done.append(piece)

    def give_up(self, piece: int) -> None:
        self.given_up.append(piece)

    def figures(self) -> dict[str, int]:
        return {}

    def check_stop(self, *, num_missing: int) -> None:
        self.cluster.clock.now += 1e-3
        assert self.cluster.clock.now < 1e6, "the pool does not end"


class Bar:
    """Takes its time, as any call does."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def update(self, *_: Any, **__: Any) -> None:
        self.clock.now += 1e-3


def run(
    monkeypatch: pytest.MonkeyPatch,
    places: list[str],
    behaviours: dict[str, Behaviour],
    *,
    pieces: int,
    replicas: int,
    held_up_at: int | None = None,
    **build: Any,
) -> tuple[ActorPool[int], Work]:
    clock = Clock()
    monkeypatch.setattr(actor_pool, "time", clock)
    cluster = Cluster(clock, list(places), behaviours)
    work = Work(cluster, held_up_at=held_up_at)
    pool: ActorPool[int] = ActorPool(
        work,
        PieceQueue(range(pieces)),
        build=BuildConfig(num_replicas=replicas, **build),
        placement=cluster,  # type: ignore[arg-type]
        ray=Ray(clock),  # type: ignore[arg-type]
        log_dir=Path("logs"),
    )
    pool.run(Bar(clock))
    return pool, work


def test_a_node_where_no_engine_starts_costs_its_replica_and_no_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    pool, work = run(
        monkeypatch,
        ["bad", *["good"] * 7],
        {"bad": fails_to_start, "good": builds},
        pieces=40,
        replicas=8,
    )
    assert sorted(work.done) == list(range(40))
    assert not pool.failures
    assert work.cluster.avoided == {"bad"}
    assert work.cluster.started == 8 + 3, "three starts failed, and the last replacement waits for another node"


def test_a_bad_node_burns_no_attempt_of_the_last_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    behaviours: dict[str, Behaviour] = {"bad": fails_to_start, "good": builds}
    pool, work = run(monkeypatch, ["bad", "good"], behaviours, pieces=2, replicas=2, max_attempts=1)
    assert sorted(work.done) == [0, 1]
    assert not pool.failures


def test_an_engine_that_starts_nowhere_ends_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    behaviours: dict[str, Behaviour] = {"a": fails_to_start, "b": fails_to_start}
    with pytest.raises(TeacherError, match=r"no replica starts on any node, 9 shard.* uncorrectable ECC.* in logs"):
        run(monkeypatch, ["a", "a", "b", "b"], behaviours, pieces=9, replicas=4)


@pytest.mark.parametrize("replicas", [1, 8])
def test_actors_that_are_lost_before_they_have_work_end_it(monkeypatch: pytest.MonkeyPatch, replicas: int) -> None:
    with pytest.raises(TeacherError, match=r"no replica starts on any node, 9 shard.* cannot import the actor"):
        run(monkeypatch, ["unable"] * 8, {"unable": builds}, pieces=9, replicas=replicas)


def test_a_shard_that_fails_first_waits_for_those_that_are_being_built(monkeypatch: pytest.MonkeyPatch) -> None:
    def one_fails(actor: Actor, piece: int) -> list[tuple[float, Any]]:
        return fails_at_work(actor, piece) if piece == 0 else builds(actor, piece)

    pool, work = run(monkeypatch, ["a", "a"], {"a": one_fails}, pieces=9, replicas=2)
    assert sorted(work.done) == list(range(1, 9))
    assert [*pool.failures] == ["0"]
    assert work.given_up == [0]


def test_shards_that_all_fail_end_the_work_before_each_was_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TeacherError, match=r"no shard was finished in [3-6] attempts, .*: a shifted row"):
        run(monkeypatch, ["a"] * 4, {"a": fails_at_work}, pieces=90, replicas=4)


def test_a_gpu_that_breaks_down_at_work_costs_its_node_and_no_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    good = [f"node-{number}" for number in range(15)]
    behaviours: dict[str, Behaviour] = {"bad": breaks_down, **dict.fromkeys(good, builds)}
    pool, work = run(monkeypatch, ["bad", *good], behaviours, pieces=160, replicas=16)
    assert sorted(work.done) == list(range(160))
    assert not pool.failures
    assert work.cluster.avoided == {"bad"}
    assert work.handed_out - len(work.done) <= 4, "three attempts in a row, and one until others were done"


def test_shards_that_fail_everywhere_cost_no_node(monkeypatch: pytest.MonkeyPatch) -> None:
    def some_fail(actor: Actor, piece: int) -> list[tuple[float, Any]]:
        return breaks_down(actor, piece) if piece in range(4, 8) else builds(actor, piece)

    pool, work = run(monkeypatch, ["a"], {"a": some_fail}, pieces=12, replicas=1)
    assert sorted(work.done) == [0, 1, 2, 3, 8, 9, 10, 11]
    assert sorted(pool.failures) == ["4", "5", "6", "7"]
    assert work.cluster.avoided == set()


def test_a_node_without_the_model_costs_its_replica_and_no_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    behaviours: dict[str, Behaviour] = {"bad": has_no_model, "good": builds}
    pool, work = run(monkeypatch, ["bad", "good"], behaviours, pieces=9, replicas=2)
    assert sorted(work.done) == list(range(9))
    assert not pool.failures
    assert work.cluster.avoided == {"bad"}


def test_a_model_that_no_node_has_ends_the_work_with_the_error_of_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    behaviours: dict[str, Behaviour] = {"a": has_no_model, "b": has_no_model}
    with pytest.raises(ConfigError, match=r"9 shard.* on node [ab] the last start failed with: the teacher is no dir"):
        run(monkeypatch, ["a", "b"], behaviours, pieces=9, replicas=2)


@pytest.mark.parametrize("kind", [CacheMismatch, SpotCheckMismatch])
def test_what_no_attempt_mends_ends_the_work(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, kind: type[GenrecalError]
) -> None:
    def differs(actor: Actor, piece: int) -> list[tuple[float, Any]]:
        return [(1, SIGN), (2, RayTaskError(kind("other states")))] if piece == 5 else builds(actor, piece)

    with pytest.raises(kind, match="other states"):
        run(monkeypatch, ["a"], {"a": differs}, pieces=9, replicas=1)
    assert "shard 5 on node a ends the work: other states" in caplog.text


def test_a_driver_that_was_held_up_reads_all_signs_before_it_judges(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def tells_each_second(actor: Actor, piece: int) -> list[tuple[float, Any]]:
        seconds = 100 if piece == 0 else 2000
        return [(second, SIGN) for second in range(seconds)] + [(seconds, DONE)]

    with caplog.at_level(logging.WARNING):
        _, work = run(monkeypatch, ["a"] * 8, {"a": tells_each_second}, pieces=9, replicas=8, held_up_at=9)
    assert sorted(work.done) == list(range(9))
    assert work.cluster.started == 8, "none was killed"
    assert not caplog.records


def test_a_replica_that_is_silent_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([5000, 5000, SHARD_S, SHARD_S])

    def is_silent_twice(actor: Actor, piece: int) -> list[tuple[float, Any]]:
        return [(1, SIGN), (next(seconds), DONE)]

    _, work = run(monkeypatch, ["a"], {"a": is_silent_twice}, pieces=2, replicas=1)
    assert (work.done, work.cluster.started) == ([0, 1], 3)
