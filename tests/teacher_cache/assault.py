"""Every way to use a cache, tried on one that an attacker has written, in a process that is watched."""

import gc
import resource
import shutil
import signal
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

from teacher_cache import open_cache
from teacher_cache.errors import CacheError, GenrecalError
from teacher_cache.gc import collect_garbage
from teacher_cache.inspect import cache_status, compare_caches, find_caches
from teacher_cache.reader import TeacherCache
from teacher_cache.repair import repair_cache
from teacher_cache.schema import TeacherTargets
from teacher_cache.verify import VerifyReport, verify_cache
from tests.reliability.processes import quick_folder
from tests.teacher_cache.store import IDENTITY, assert_same, build
from tests.teacher_cache.watch import Watch

HANG_S = 60
CPU_LIMIT_S = 1.0
MEMORY_LIMIT_BYTES = 64 * 1024**2
ADDRESS_LIMIT_BYTES = 3 * 1024**3
"""More than the threads' stacks need; memory that is taken and never touched shows in no other way."""

Attack = Callable[[Path], None]
"""Changes the cache in a folder; the folder beside it, ``outside``, must stay as it is."""
Use = Callable[[str], object]
"""Does something with the cache at a URI."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of an attack."""

    answers: dict[str, str]
    """Per use: ``refused``, ``problems``, ``done``, or what went wrong."""
    strange: tuple[str, ...] = ()
    """What must not happen: something outside was touched, or code was run."""
    grown_bytes: int = 0
    """Memory that was taken at most."""
    cpu_s: float = 0.0
    """Of the longest use."""

    @property
    def noticed(self) -> bool:
        """Whether a reader or a full verification sees that something is wrong."""
        return self.answers["read"] == "refused" or self.answers["full"] in ("refused", "problems")

    @property
    def wrong(self) -> list[str]:
        """What must not be."""
        good = ("refused", "problems", "done")
        wrong = [f"{use}: {answer}" for use, answer in self.answers.items() if answer not in good]
        if self.grown_bytes > MEMORY_LIMIT_BYTES:
            wrong.append(f"{self.grown_bytes} bytes of memory")
        if self.cpu_s > CPU_LIMIT_S:
            wrong.append(f"{self.cpu_s} s")
        return [*wrong, *self.strange]


def assault(
    template: Path,
    attacks: Mapping[str, Attack],
    *,
    samples: Mapping[str, TeacherTargets],
    chosen: Collection[str] = (),
) -> Iterator[tuple[str, Outcome]]:
    """Attack one copy of a cache after the other and try every use of it, or the chosen ones, in a child process."""
    left = list(attacks)
    with quick_folder() as place:
        while left:
            receive, send = get_context("fork").Pipe(duplex=False)
            attacks_left = {name: attacks[name] for name in left}
            every_use = {name: use for name, use in uses(samples).items() if not chosen or name in chosen}
            child = get_context("fork").Process(
                target=_attack_each, args=(send, place, template, attacks_left, every_use)
            )
            child.start()
            send.close()
            try:
                while left:
                    yield left[0], receive.recv()
                    del left[0]
            except EOFError:
                child.join()
                yield left.pop(0), Outcome(answers={"read": "", "full": f"the process died: {child.exitcode}"})
            child.join()


def read_everything(cache: TeacherCache, *, samples: Mapping[str, TeacherTargets], verify: bool = True) -> None:
    """Use all that a cache offers; what is read with verification must be what was stored."""
    for threads in (1, 2):
        for found in cache.read(cache.sample_ids, verify=verify, threads=threads):
            if verify:
                assert_same(found, samples[found.sample_id])
    for sample_id in cache.sample_ids:
        cache.sample_digest(sample_id), cache.num_tokens(sample_id), cache.answer_tokens(sample_id)
    for use in ("skipped", "provenance", "fingerprint", "identity", "vocab_size", "hidden_size", "shard_ids"):
        getattr(cache, use)
    cache.tier_bytes()
    cache.teacher_head()


def uses(samples: Mapping[str, TeacherTargets]) -> dict[str, Use]:
    """Return every use of a cache, those last that change it."""
    return {
        "read": lambda uri: read_everything(open_cache(uri), samples=samples),
        "read incomplete": lambda uri: read_everything(open_cache(uri, allow_incomplete=True), samples=samples),
        "read unverified": lambda uri: read_everything(open_cache(uri), samples=samples, verify=False),
        "quick": lambda uri: verify_cache(uri, level="quick"),
        "rows": lambda uri: verify_cache(uri, level="rows"),
        "full": verify_cache,
        "status": cache_status,
        "diff": lambda uri: compare_caches(uri, uri),
        "find": lambda uri: find_caches(Path(uri), identity=IDENTITY, digests={}),
        "gc": collect_garbage,
        "repair": repair_cache,
        "build": lambda uri: build(Path(uri), list(samples.values()), per_shard=1),
    }


def _attack_each(
    send: Connection, place: Path, template: Path, attacks: Mapping[str, Attack], every_use: Mapping[str, Use]
) -> None:
    gc.freeze()  # what was there before the fork is not searched for garbage on the attack's time
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (in_use + ADDRESS_LIMIT_BYTES,) * 2)
    root, outside = place / "cache", place / "outside"
    for attack in attacks.values():
        for folder in (root, outside):
            shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(template, root)
        outside.mkdir()
        (outside / "canary").write_bytes(b"canary")
        attack(root)
        signal.alarm(HANG_S)
        send.send(_try_uses(every_use, root, outside=outside))
        signal.alarm(0)


def _try_uses(every_use: Mapping[str, Use], root: Path, *, outside: Path) -> Outcome:
    answers, longest = {}, 0.0
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from what is in use now
    start = _most_memory_bytes()
    with Watch(root, outside=outside) as watch:
        for name, use in every_use.items():
            before = time.process_time()
            answers[name] = _answer(use, str(root))
            longest = max(longest, time.process_time() - before)
    grown = _most_memory_bytes() - start
    return Outcome(answers=answers, strange=tuple(watch.strange), grown_bytes=grown, cpu_s=longest)


def _answer(use: Use, uri: str) -> str:
    try:
        result = use(uri)
    except CacheError:
        return "refused"
    except GenrecalError as error:
        return f"{type(error).__name__}, no CacheError: {error}"
    except BaseException as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    return "problems" if isinstance(result, VerifyReport) and not result.ok else "done"


def _most_memory_bytes() -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024
