"""A pool of Ray actors: each holds one engine and does one piece of work at a time; lost and hung ones are replaced."""

import logging
import time
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Final, Generic, Protocol, TypeVar

from teacher_cache.build_metrics import BuildMetrics
from teacher_cache.build_placement import ReplicaPlacement
from teacher_cache.config import BuildConfig
from teacher_cache.errors import CacheError, GenrecalError, TeacherError
from teacher_cache.progress import PieceProgress, Progress

logger = logging.getLogger(__name__)

Piece = TypeVar("Piece")
GivenPiece = TypeVar("GivenPiece", contravariant=True)

POLL_S: Final = 0.5
WAIT_NOTICE_S: Final = 60.0


class PieceQueue(Generic[Piece]):
    """The pieces that nobody works on."""

    def __init__(self, pieces: Iterable[Piece]) -> None:
        self.pieces = deque(pieces)

    def __len__(self) -> int:
        return len(self.pieces)

    def take(self) -> Piece | None:
        """Take the next piece; None while there is none to work on."""
        return self.pieces.popleft() if self.pieces else None

    def put_back(self, piece: Piece) -> None:
        """Have a piece tried again."""
        self.pieces.appendleft(piece)

    def drop_done_elsewhere(self) -> int:
        """Forget the pieces that others have done; return the number of their samples."""
        return 0


class Work(Protocol[GivenPiece]):
    """What a pool does."""

    unit: str
    """What a piece is called."""

    def start_actor(self) -> Any:
        """Return a new actor whose ``ready`` ends once Ray has placed it."""
        ...

    def begin(self, actor: Any, piece: GivenPiece) -> Any:
        """Return the stream of an actor's signs: any number of PieceProgress, then a result with ``tokens``."""
        ...

    def num_samples(self, piece: GivenPiece) -> int:
        """Return the samples of a piece."""
        ...

    def name(self, piece: GivenPiece) -> str:
        """Return how messages call a piece."""
        ...

    def finish(self, piece: GivenPiece, result: Any) -> None:
        """Take in a piece that is done."""
        ...

    def give_up(self, piece: GivenPiece) -> None:
        """Let go of a piece that failed too often."""
        ...

    def figures(self) -> dict[str, int]:
        """Return what progress shows beside the rate and the missing pieces."""
        ...

    def check_stop(self, *, num_missing: int) -> None:
        """Raise where the work is to end early."""
        ...


@dataclass(kw_only=True)
class _Attempt(Generic[Piece]):
    """An actor at work on a piece."""

    actor: Any
    piece: Piece
    last_sign_s: float
    has_started: bool = False
    samples: int = 0
    tokens: int = 0


class ActorPool(Generic[Piece]):
    """Hands out pieces to ``num_replicas`` actors until all are done or given up."""

    def __init__(
        self,
        work: Work[Piece],
        queue: PieceQueue[Piece],
        *,
        build: BuildConfig,
        placement: ReplicaPlacement,
        ray: ModuleType,
        log_dir: Path,
        metrics: BuildMetrics | None = None,
    ) -> None:
        self._work = work
        self._queue = queue
        self._build = build
        self._placement = placement
        self._ray = ray
        self._log_dir = log_dir
        self._metrics = metrics
        self._starting: dict[Any, Any] = {}
        self._idle: list[Any] = []
        self._running: dict[Any, _Attempt[Piece]] = {}
        self._attempts: Counter[str] = Counter()
        self._started = self._notice = time.monotonic()
        self.failures: dict[str, BaseException] = {}
        """Names of pieces that failed ``max_attempts`` times, with their last error."""
        self.finished = 0
        """Pieces done by this pool."""
        self.tokens = 0
        """Computed so far."""

    @property
    def num_missing(self) -> int:
        """Pieces that wait or are worked on."""
        return len(self._queue) + len(self._running)

    def run(self, bar: Progress) -> None:
        """Work until no piece is left but those in ``failures``.

        Raises:
            TeacherError: A piece failed ``max_attempts`` times before any was done.
            GenrecalError: What another attempt cannot mend, or a request to stop.
        """
        try:
            for _ in range(min(len(self._queue), self._build.num_replicas)):
                self._start_actor()
            while self._queue or self._running:
                self._work.check_stop(num_missing=self.num_missing)
                self._hand_out()
                bar.update(self._queue.drop_done_elsewhere(), **self._figures())
                self._wait(bar)
                self._replace_hung(bar)
        finally:
            for actor in [*self._starting.values(), *self._idle, *(one.actor for one in self._running.values())]:
                self._placement.stop(actor)

    def _start_actor(self) -> None:
        actor = self._work.start_actor()
        self._starting[actor.ready.remote()] = actor

    def _hand_out(self) -> None:
        while self._idle and (piece := self._queue.take()) is not None:
            actor = self._idle.pop()
            self._attempts[self._work.name(piece)] += 1
            stream = self._work.begin(actor, piece)
            self._running[stream] = _Attempt(actor=actor, piece=piece, last_sign_s=time.monotonic())

    def _wait(self, bar: Progress) -> None:
        """Take in what actors have told."""
        waitables = [*self._running, *self._starting]
        if not waitables:
            time.sleep(POLL_S)  # all that is left is done by others
            return
        ready, _ = self._ray.wait(waitables, timeout=POLL_S, fetch_local=False)
        for told in ready:
            if told in self._starting:
                self._take_actor(told)
            else:
                self._take_sign(told, bar)
        if not self._running and not self._idle and time.monotonic() - self._notice > WAIT_NOTICE_S:
            self._notice = time.monotonic()
            logger.warning("waiting for Ray to place %d replica(s): are there free resources?", len(self._starting))

    def _take_actor(self, ready: Any) -> None:
        actor = self._starting.pop(ready)
        try:
            self._ray.get(ready)
        except self._ray.exceptions.RayError as error:
            logger.warning("a replica died before it had work: %s", error)
            self._placement.stop(actor)
            self._start_actor()
        else:
            self._idle.append(actor)

    def _take_sign(self, stream: Any, bar: Progress) -> None:
        attempt = self._running[stream]
        try:
            sign = self._ray.get(next(stream))
        except self._ray.exceptions.RayError as error:
            self._give_up(stream, bar)
            self._failed(attempt.piece, error.cause if isinstance(error, self._ray.exceptions.RayTaskError) else error)
            return
        attempt.last_sign_s, attempt.has_started = time.monotonic(), True
        if isinstance(sign, PieceProgress):
            self._advance(attempt, bar, samples=sign.samples, tokens=sign.tokens)
            return
        del self._running[stream]
        self._idle.append(attempt.actor)
        self.finished += 1
        self._advance(attempt, bar, samples=self._work.num_samples(attempt.piece), tokens=sign.tokens)
        self._work.finish(attempt.piece, sign)

    def _advance(self, attempt: _Attempt[Piece], bar: Progress, *, samples: int, tokens: int) -> None:
        new_samples, new_tokens = samples - attempt.samples, tokens - attempt.tokens
        attempt.samples, attempt.tokens = samples, tokens
        self.tokens += new_tokens
        if self._metrics is not None and new_samples > 0:
            self._metrics.advanced(samples=new_samples, tokens=new_tokens)
        bar.update(new_samples, **self._figures())

    def _figures(self) -> dict[str, int]:
        if self._metrics is not None:
            self._metrics.state(missing_shards=self.num_missing, running_replicas=len(self._running))
        rate = self.tokens / (time.monotonic() - self._started)
        return {"tokens_per_s": round(rate), f"missing_{self._work.unit}s": self.num_missing, **self._work.figures()}

    def _replace_hung(self, bar: Progress) -> None:
        for stream, attempt in list(self._running.items()):
            limit = self._build.stall_timeout_s if attempt.has_started else self._build.start_timeout_s
            if time.monotonic() - attempt.last_sign_s > limit:
                self._give_up(stream, bar)
                what = "has given no sign" if attempt.has_started else "has not started its engine"
                self._failed(attempt.piece, TeacherError(f"its replica {what} for {limit:g} s and was killed"))

    def _give_up(self, stream: Any, bar: Progress) -> None:
        """Take back what an attempt has counted, and put a fresh actor in the place of its own."""
        attempt = self._running.pop(stream)
        self._advance(attempt, bar, samples=0, tokens=0)
        if self._metrics is not None:
            self._metrics.failed()
        self._placement.stop(attempt.actor)
        self._start_actor()

    def _failed(self, piece: Piece, error: BaseException) -> None:
        # a CacheError proper is a refused write; its subclasses, as other errors of ours, stay when tried again
        retryable = not isinstance(error, GenrecalError) or type(error) in (TeacherError, CacheError)
        if not retryable:
            raise error
        unit, name = self._work.unit, self._work.name(piece)
        attempts, allowed = self._attempts[name], self._build.max_attempts
        logger.warning("%s %s: attempt %d of %d failed: %s", unit, name, attempts, allowed, error)
        if attempts < allowed:
            self._queue.put_back(piece)
        elif not self.finished:
            raise TeacherError(
                f"no {unit} was finished; {unit} {name} failed {attempts} times, the last time with: {error}. Engine "
                f"logs are in {self._log_dir}"
            ) from error
        else:
            self.failures[name] = error
            self._work.give_up(piece)
