"""The pool of actors that write answers, with actors that die, hang and fail: no Ray, but what the pool calls of it."""

import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from teacher_cache.answer_pool import write_parts
from teacher_cache.answer_writing import WrittenPart, WrittenSample
from teacher_cache.answers_config import AnswersConfig
from teacher_cache.build_job import StopRequest
from teacher_cache.config import CacheConfig
from teacher_cache.errors import DataIncomplete, TeacherError
from teacher_cache.progress import PieceProgress

Signs = Iterator[Any]
Behaviour = Callable[[list[str]], Signs]


class RayError(Exception):
    """As Ray's own."""


class RayTaskError(RayError):
    """As Ray's own: holds what the task raised."""

    def __init__(self, cause: Exception) -> None:
        self.cause = cause


@dataclass
class Stream:
    """What a streaming call returns: its items are ready while ``signs`` gives any but None."""

    signs: Signs
    pending: Any = None

    def is_ready(self) -> bool:
        self.pending = self.pending if self.pending is not None else next(self.signs)
        return self.pending is not None

    def __next__(self) -> Any:
        item, self.pending = self.pending, None
        return item

    __hash__ = object.__hash__


class Ray:
    """The calls of the pool."""

    class exceptions:  # noqa: N801
        RayError, RayTaskError = RayError, RayTaskError

    def wait(
        self, streams: Sequence[Stream], *, num_returns: int = 1, timeout: float, fetch_local: bool
    ) -> tuple[list[Stream], list[Stream]]:
        ready = [stream for stream in streams if stream.is_ready()][:num_returns]
        if not ready and timeout:
            time.sleep(0.01)
        return ready, []

    def get(self, item: Any) -> Any:
        if isinstance(item, Exception):
            raise item
        return item


@dataclass
class Method:
    """A method without arguments, called as Ray's are."""

    signs: Callable[[], Signs]

    def remote(self) -> Stream:
        return Stream(self.signs())


class Actor:
    """An actor that does as it is told; its method can be called as Ray's are."""

    def __init__(self, behaviour: Behaviour) -> None:
        self.behaviour = behaviour
        self.write = self
        self.ready = Method(lambda: iter([True]))

    def options(self, *, num_returns: str) -> "Actor":
        return self

    def remote(self, samples: list[str]) -> Stream:
        return Stream(self.behaviour(samples))


@dataclass
class Placement:
    """Starts actors with the behaviours given, then with ones that work."""

    behaviours: list[Behaviour]
    started: list[Actor] = field(default_factory=list)
    stopped: list[Actor] = field(default_factory=list)
    avoided: list[str] = field(default_factory=list)

    def start(self, *_: Any) -> Actor:
        number = len(self.started)
        self.started.append(Actor(self.behaviours[number] if number < len(self.behaviours) else works))
        return self.started[-1]

    def stop(self, actor: Actor) -> None:
        self.stopped.append(actor)

    def node_of(self, actor: Actor) -> str:
        return "node"

    def avoid(self, node: str) -> None:
        self.avoided.append(node)

    def has_place(self) -> bool:
        return not self.avoided


@dataclass
class Job:
    """Three parts of two samples, which are their names."""

    parts: list[list[str]] = field(default_factory=lambda: [["a", "b"], ["c", "d"], ["e", "f"]])
    committed: list[int] = field(default_factory=list)
    teacher: str = "the driver's copy"

    def read(self, part: int) -> list[str]:
        return self.parts[part]

    def commit(self, part: int, samples: Sequence[WrittenSample]) -> None:
        assert [sample.sample_id for sample in samples] == self.parts[part]
        self.committed.append(part)


def works(samples: list[str]) -> Signs:
    yield PieceProgress(samples=1, tokens=5)
    written = [WrittenSample(sample_id=name, messages=(), original_answers=(), outcomes=()) for name in samples]
    yield WrittenPart(samples=tuple(written), tokens=10)


def dies(samples: list[str]) -> Signs:
    yield PieceProgress(samples=1, tokens=7)
    yield RayError("the actor died")


def fails(samples: list[str]) -> Signs:
    yield RayTaskError(TeacherError("no memory"))


def hangs(samples: list[str]) -> Signs:
    yield PieceProgress(samples=1, tokens=7)
    while True:
        yield None


def never_starts(samples: list[str]) -> Signs:
    while True:
        yield None


def fails_at_work(samples: list[str]) -> Signs:
    yield PieceProgress(samples=0, tokens=3)
    yield from fails(samples)


def fails_with_c(samples: list[str]) -> Signs:
    yield from fails_at_work(samples) if "c" in samples else works(samples)


def run(*behaviours: Behaviour, stop: StopRequest | None = None, **build: Any) -> tuple[Job, Placement, int]:
    values = {"uri": "c", "teacher": {"model": "t"}, "data": {"path": "new.parquet"}, "build": build}
    job, placement = Job(), Placement([*behaviours])
    try:
        tokens = write_parts(
            job,  # type: ignore[arg-type]
            [0, 1, 2],
            cache=CacheConfig.model_validate(values),
            answers=AnswersConfig(source="old.parquet"),
            stop=stop or StopRequest(),
            ray=Ray(),  # type: ignore[arg-type]
            placement=placement,  # type: ignore[arg-type]
            log_dir=Path("logs"),
        )
    except (DataIncomplete, TeacherError) as error:
        error.add_note(str(sorted(job.committed)))
        raise
    finally:
        assert {*placement.stopped} == {*placement.started}, "every actor is stopped"
    return job, placement, tokens


@pytest.mark.parametrize("replicas", [1, 2])
def test_parts_are_written_once_by_few_actors(replicas: int) -> None:
    job, placement, tokens = run(num_replicas=replicas)
    assert sorted(job.committed) == [0, 1, 2]
    assert len(placement.started) == replicas
    assert tokens == 30


@pytest.mark.parametrize("behaviour", [dies, fails, hangs, never_starts])
def test_a_part_whose_actor_is_lost_goes_to_a_fresh_one(behaviour: Behaviour) -> None:
    job, placement, tokens = run(behaviour, stall_timeout_s=2.0, start_timeout_s=2.0)
    assert sorted(job.committed) == [0, 1, 2]
    assert len(placement.started) == 2
    assert tokens == 30, "what a lost attempt has told is taken back"


def test_a_part_that_always_fails_is_left_out_and_named() -> None:
    with pytest.raises(
        DataIncomplete, match=r"1 part\(s\) of new\.parquet failed 2 times:\n  part 1: no memory"
    ) as caught:
        run(*[fails_with_c] * 9, max_attempts=2)
    assert caught.value.exit_code == 3
    assert caught.value.__notes__ == ["[0, 2]"]


def test_a_teacher_that_writes_nothing_is_given_up() -> None:
    with pytest.raises(TeacherError, match=r"no part was finished in 2 attempts, .* with: no memory.*logs are in logs"):
        run(*[fails_at_work] * 9, max_attempts=2)


@pytest.mark.parametrize(
    ("behaviour", "start_timeout_s", "why"),
    [(fails, 60.0, "no memory"), (never_starts, 0.05, "has not started its engine")],
)
def test_an_engine_that_does_not_start_ends_the_run(behaviour: Behaviour, start_timeout_s: float, why: str) -> None:
    with pytest.raises(TeacherError, match=rf"no replica starts on any node, 3 part.*: .*{why}.*logs are in logs"):
        run(*[behaviour] * 9, max_attempts=2, start_timeout_s=start_timeout_s)


def test_a_signal_ends_the_run_as_incomplete() -> None:
    stop = StopRequest()
    stop.signal = signal.SIGTERM
    with pytest.raises(DataIncomplete, match=r"stopped by SIGTERM with 3 part\(s\) of new\.parquet missing"):
        run(stop=stop)
