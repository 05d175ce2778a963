"""A pool of Ray actors: each holds one engine and does one piece of work at a time; lost and hung ones are replaced."""

import logging
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Final, Generic, TypeGuard

from teacher_cache.build_metrics import BuildMetrics
from teacher_cache.build_placement import ReplicaPlacement
from teacher_cache.config import BuildConfig
from teacher_cache.errors import CacheError, GenrecalError, TeacherError
from teacher_cache.node_failures import NodeFailures
from teacher_cache.pool_work import Piece, PieceQueue, Work
from teacher_cache.progress import PieceProgress, Progress

logger = logging.getLogger(__name__)

POLL_S: Final = 0.5
WAIT_NOTICE_S: Final = 60.0


@dataclass(kw_only=True)
class _Replica:
    """An actor that Ray has placed."""

    actor: Any
    node: str
    has_engine: bool = False
    """Whether its engine has started: it has given a sign."""


@dataclass(kw_only=True)
class _Attempt(Generic[Piece]):
    """A replica at work on a piece."""

    replica: _Replica
    piece: Piece
    last_sign_s: float
    samples: int = 0
    tokens: int = 0


class ActorPool(Generic[Piece]):
    """Hands out pieces to ``num_replicas`` actors until all are done or given up.

    An engine that does not start costs its node, not the piece, whatever the error: the node may lack what others have.
    After ``max_attempts`` such starts in a row no further actor goes to the node, nor after as many attempts at pieces
    that failed there in a row while other nodes did theirs.
    """

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
        self._idle: list[_Replica] = []
        self._running: dict[Any, _Attempt[Piece]] = {}
        self._attempts: Counter[str] = Counter()
        self._nodes = NodeFailures(allowed=build.max_attempts)
        self._failed_placings = 0
        self._start_error: BaseException | None = None
        self._start_node = ""
        """Where that was, as messages say it."""
        self._attempt_error: tuple[str, BaseException] | None = None
        """Of the attempt that failed last: what it was at, and where."""
        self._started = self._notice = self._looked_s = time.monotonic()
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
            TeacherError: Attempts failed everywhere and no piece was done, or engines start nowhere.
            GenrecalError: What another attempt cannot mend, or a request to stop.
        """
        try:
            while self._queue or self._running:
                self._work.check_stop(num_missing=self.num_missing)
                self._start_actors()
                self._hand_out()
                bar.update(self._queue.drop_done_elsewhere(), **self._figures())
                self._wait(bar)
                self._replace_hung(bar)
                self._check_any_finished()
        finally:
            replicas = [*self._idle, *(attempt.replica for attempt in self._running.values())]
            for actor in [*self._starting.values(), *(replica.actor for replica in replicas)]:
                self._placement.stop(actor)

    def _start_actors(self) -> None:
        """Start as many actors as there is work for; none where too many were lost before they had a place."""
        wanted = min(self._build.num_replicas, self.num_missing)
        may_start = self._failed_placings < self._build.max_attempts and self._placement.has_place()
        while may_start and len(self._starting) + len(self._idle) + len(self._running) < wanted:
            actor = self._work.start_actor()
            self._starting[actor.ready.remote()] = actor
        # those that wait for a place wait in vain where every node is avoided
        if not (self._idle or self._running) and not (self._starting and self._placement.has_place()):
            # an error of ours keeps its class, and so its exit code: a job that is submitted may stop at it
            kind = type(self._start_error) if _is_final(self._start_error) else TeacherError
            raise kind(
                f"no replica starts on any node, {self.num_missing} {self._work.unit}(s) are missing; "
                f"{self._start_node}the last start failed with: {self._start_error}. Engine logs are in {self._log_dir}"
            ) from self._start_error

    def _hand_out(self) -> None:
        for replica in [replica for replica in reversed(self._idle) if self._may_work(replica)]:
            if (piece := self._queue.take()) is None:
                return
            stream = self._work.begin(replica.actor, piece)
            self._idle.remove(replica)
            self._running[stream] = _Attempt(replica=replica, piece=piece, last_sign_s=time.monotonic())

    def _may_work(self, replica: _Replica) -> bool:
        """Tell whether a replica gets pieces: until one was done, not where attempts fail; those that run will tell."""
        return self.finished > 0 or (not self.failures and self._nodes.may_work(replica.node))

    def _wait(self, bar: Progress) -> None:
        """Take in what actors have told: all of it, since a driver that was held up has many signs to read."""
        waitables = [*self._running, *self._starting]
        if not waitables:
            time.sleep(POLL_S)  # all that is left is done by others
            return
        self._ray.wait(waitables, timeout=POLL_S, fetch_local=False)
        self._looked_s = time.monotonic()
        ready, _ = self._ray.wait(waitables, num_returns=len(waitables), timeout=0, fetch_local=False)
        for told in ready:
            if told in self._starting:
                self._take_actor(told)
            else:
                self._take_sign(told, bar)
        waits = self._starting and not self._running and not self._idle
        if waits and time.monotonic() - self._notice > WAIT_NOTICE_S:
            self._notice = time.monotonic()
            logger.warning(
                "no replica is ready: %d start, or wait for Ray to find free resources for them", len(self._starting)
            )

    def _take_actor(self, ready: Any) -> None:
        actor = self._starting.pop(ready)
        try:
            self._ray.get(ready)
            node = self._placement.node_of(actor)
        except self._ray.exceptions.RayError as error:
            logger.warning("a replica died before it had work: %s", error)
            self._placement.stop(actor)
            self._failed_placings += 1
            self._start_error, self._start_node = error, ""
        else:
            self._failed_placings = 0
            self._idle.append(_Replica(actor=actor, node=node))

    def _take_sign(self, stream: Any, bar: Progress) -> None:
        attempt = self._running[stream]
        try:
            sign = self._ray.get(next(stream))
        except self._ray.exceptions.RayError as error:
            cause = error.cause if isinstance(error, self._ray.exceptions.RayTaskError) else error
            self._failed(stream, cause, bar)
            return
        attempt.last_sign_s = time.monotonic()
        if not attempt.replica.has_engine:
            attempt.replica.has_engine = True
            self._nodes.start_succeeded(attempt.replica.node)
        if isinstance(sign, PieceProgress):
            self._advance(attempt, bar, samples=sign.samples, tokens=sign.tokens)
            return
        del self._running[stream]
        self._idle.append(attempt.replica)
        self.finished += 1
        self._nodes.attempt_succeeded(attempt.replica.node)
        self._failed_placings = 0
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
        """Kill the replicas that had given no sign for too long when signs were last looked for."""
        for stream, attempt in list(self._running.items()):
            has_engine = attempt.replica.has_engine
            limit = self._build.stall_timeout_s if has_engine else self._build.start_timeout_s
            if self._looked_s - attempt.last_sign_s > limit:
                what = "has given no sign" if has_engine else "has not started its engine"
                self._failed(stream, TeacherError(f"its replica {what} for {limit:g} s and was killed"), bar)

    def _failed(self, stream: Any, error: BaseException, bar: Progress) -> None:
        """End an attempt, take back what it has counted, and decide what becomes of its piece."""
        attempt = self._running.pop(stream)
        self._advance(attempt, bar, samples=0, tokens=0)
        if self._metrics is not None:
            self._metrics.failed()
        self._placement.stop(attempt.replica.actor)
        node = attempt.replica.node
        if not attempt.replica.has_engine:
            self._start_error, self._start_node = error, f"on node {node} "
            if self._nodes.start_failed(node, error):
                self._placement.avoid(node)
            self._queue.put_back(attempt.piece)
            return
        unit, name = self._work.unit, self._work.name(attempt.piece)
        if _is_final(error):
            logger.error("%s %s on node %s ends the work: %s", unit, name, node, error)
            raise error
        self._attempts[name] += 1
        failed, allowed = self._attempts[name], self._build.max_attempts
        logger.warning("%s %s on node %s: attempt %d of %d failed: %s", unit, name, node, failed, allowed, error)
        self._attempt_error = f"{unit} {name} on node {node}", error
        if self._nodes.attempt_failed(node):
            self._placement.avoid(node)
        if failed < allowed:
            self._queue.put_back(attempt.piece)
        else:
            self.failures[name] = error
            self._work.give_up(attempt.piece)

    def _check_any_finished(self) -> None:
        """Raise TeacherError where no piece was done and none can be tried any more."""
        if self.finished or self._running or self._attempt_error is None:
            return
        if self.failures or (self._idle and not any(self._may_work(replica) for replica in self._idle)):
            where, error = self._attempt_error
            raise TeacherError(
                f"no {self._work.unit} was finished in {self._attempts.total()} attempts, of which the last, {where}, "
                f"failed with: {error}. Engine logs are in {self._log_dir}"
            ) from error


def _is_final(error: BaseException | None) -> TypeGuard[GenrecalError]:
    """Tell whether no further attempt can mend an error."""
    # a CacheError proper is a refused write; its subclasses, as other errors of ours, stay when tried again
    return isinstance(error, GenrecalError) and type(error) not in (TeacherError, CacheError)
