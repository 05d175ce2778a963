"""Claims: which builder is at work on which shard, so that several builders of one cache share the work.

A claim saves work and decides nothing: two attempts at one shard are harmless, for commits are create-only. A lease
is measured by the observer's own monotonic clock against the claim's beat, a counter that its owner raises, so no two
clocks are ever compared.
"""

import json
import logging
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from teacher_cache.errors import CacheError, GenrecalError
from teacher_cache.plan import SHARD_ID
from teacher_cache.storage import Store

logger = logging.getLogger(__name__)

CLAIMS: Final = "claims"
_BEATS_PER_LEASE = 4


@dataclass(frozen=True, kw_only=True)
class _Seen:
    """What an observer last saw of another's claim, and since when."""

    name: str
    content: bytes
    since_s: float


def claim_name(shard_id: str, number: int) -> str:
    """Return where the n-th claim of a shard lies."""
    return f"{CLAIMS}/{shard_id}.{number}.json"


def claim_shard_id(name: str) -> str | None:
    """Return the shard that a claim's name belongs to."""
    shard_id, _, number = name.removeprefix(f"{CLAIMS}/").removesuffix(".json").rpartition(".")
    return shard_id if number.isdigit() and SHARD_ID.fullmatch(shard_id) else None


class Claims:
    """The claims of one builder. Thread-safe; a thread of its own keeps them alive until :meth:`close`."""

    def __init__(self, store: Store, *, lease_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        """Take part in sharing a cache's shards.

        Args:
            store: The cache.
            lease_s: Time without a beat after which another builder's claim is taken over.
            clock: Monotonic seconds.
        """
        self._store = store
        self._lease_s = lease_s
        self._clock = clock
        self._owner = uuid.uuid4().hex
        self._held: dict[str, int] = {}
        self._seen: dict[str, _Seen] = {}
        self._beat = 0
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def take(self, shard_id: str) -> bool:
        """Claim a shard; return False while another builder is at work on it.

        Raises:
            CacheError: the store refused a step.
        """
        try:
            number = self._latest(shard_id)
            if number is not None:
                if self._held.get(shard_id) == number:
                    return True
                if not self._expired(shard_id, number):
                    return False
            new = 0 if number is None else number + 1
            if not self._store.create(claim_name(shard_id, new), self._content()):
                return False
        except OSError as error:
            raise CacheError(
                f"shard {shard_id}: cannot claim it in {self._store.uri}/{CLAIMS}: {error}; free space or mend the "
                "store, then run the build again"
            ) from error
        with self._lock:
            self._held[shard_id] = new
            self._seen.pop(shard_id, None)
            if self._thread is None:
                self._thread = threading.Thread(target=self._keep_alive, name="claims", daemon=True)
                self._thread.start()
        return True

    def release(self, shard_id: str) -> None:
        """Give up a claim, with the expired ones before it."""
        with self._lock:
            number = self._held.pop(shard_id, None)
            try:
                for old in range(-1 if number is None else number, -1, -1):
                    self._store.remove(claim_name(shard_id, old))
            except OSError as error:
                logger.warning("the claim of shard %s stays until its lease ends: %s", shard_id, error)

    def beat(self) -> None:
        """Show that this builder is alive; one whose claim was taken over lets go of it.

        Raises:
            OSError: the store refused a step.
        """
        with self._lock:  # a claim that is being released must not be written again
            self._beat += 1
            for shard_id, number in list(self._held.items()):
                if self._store.size(claim_name(shard_id, number + 1)) is not None:
                    logger.warning("shard %s: another builder took the claim over; going on all the same", shard_id)
                    del self._held[shard_id]
                else:
                    self._store.replace(claim_name(shard_id, number), self._content())

    def close(self) -> None:
        """Give up all claims."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        for shard_id in list(self._held):
            self.release(shard_id)

    def __enter__(self) -> "Claims":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _keep_alive(self) -> None:
        while not self._stop.wait(self._lease_s / _BEATS_PER_LEASE):
            try:
                self.beat()
            except (OSError, GenrecalError) as error:
                logger.warning("cannot renew the claims in %s: %s", self._store.uri, error)

    def _content(self) -> bytes:
        return json.dumps({"owner": self._owner, "beat": self._beat}).encode()

    def _latest(self, shard_id: str) -> int | None:
        number = None
        while self._store.size(claim_name(shard_id, 0 if number is None else number + 1)) is not None:
            number = 0 if number is None else number + 1
        return number

    def _expired(self, shard_id: str, number: int) -> bool:
        name = claim_name(shard_id, number)
        try:
            content = self._store.read(name)
        except FileNotFoundError:
            self._seen.pop(shard_id, None)
            return False  # released at this moment: the next look decides
        seen = self._seen.get(shard_id)
        if seen is None or (seen.name, seen.content) != (name, content):
            self._seen[shard_id] = _Seen(name=name, content=content, since_s=self._clock())
            return False
        return self._clock() - seen.since_s >= self._lease_s
