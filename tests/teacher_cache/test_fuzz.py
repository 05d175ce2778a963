"""S5: whatever the documents and index of a cache say, with digests that fit, it is read or refused by our error."""

import gc
import resource
import shutil
import signal
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from teacher_cache.errors import CacheError, ConfigError
from tests.reliability.processes import quick_folder
from tests.teacher_cache.assault import uses
from tests.teacher_cache.mutations import Mutation, mutations
from tests.teacher_cache.store import build, make_samples
from tests.teacher_cache.watch import Watch

NIGHTLY_EXAMPLES = 100_000
CPU_LIMIT_S = 1.0
HANG_S = 20.0
MEMORY_LIMIT_BYTES = 256 * 1024**2
ADDRESS_LIMIT_BYTES = 4 * 1024**3
"""For threads and what is taken and not touched, beyond what the process has."""

SAMPLES = {sample.sample_id: sample for sample in make_samples(2)}
READS = ("read", "read", "read", "read incomplete", "read incomplete", "read unverified")
USES = (*READS, "quick", "quick", "rows", "full", "status", "find", "diff")
CHANGING = ("gc", "repair", "build")
ORDINARY = settings(
    database=None, deadline=None, phases=[Phase.generate, Phase.shrink], suppress_health_check=list(HealthCheck)
)


class Hang(BaseException):
    """An example that takes far too long."""


def fuzz(chosen: settings) -> Counter[str]:
    """Change a cache in many ways and use it in one way each; return how the uses ended."""
    ends: Counter[str] = Counter()
    with quick_folder() as folder, limits():
        template, root, outside = folder / "template", folder / "cache", folder / "outside"
        build(template, list(SAMPLES.values()), per_shard=2)
        shutil.copytree(template, root)
        outside.mkdir()
        (outside / "canary").write_bytes(b"canary")
        documents = {
            path: path.read_bytes() for path in root.rglob("*") if path.is_file() and "shards" not in path.parts
        }
        every_use = uses(SAMPLES)
        before = most_memory_bytes()

        @chosen
        @given(mutation=mutations(), use=st.sampled_from((*USES, *CHANGING)))
        def example(mutation: Mutation, use: str) -> None:
            mutation(root)
            try:
                ends[attempt(use)] += 1
            finally:
                if use in CHANGING:
                    shutil.rmtree(root)
                    shutil.copytree(template, root)
                for path, data in documents.items():
                    path.write_bytes(data)

        def attempt(use: str) -> str:
            start = time.process_time()
            signal.setitimer(signal.ITIMER_PROF, HANG_S)
            try:
                every_use[use](str(root))
                end = "done"
            except CacheError:
                end = "refused"
            except ConfigError:
                if use != "build":  # whose own plan may not fit the stored one
                    raise
                end = "refused"
            except AssertionError:
                if not use.startswith("read"):
                    raise
                end = "read as forged"  # only a trusted digest can tell
            finally:
                signal.setitimer(signal.ITIMER_PROF, 0)
            assert time.process_time() - start < CPU_LIMIT_S
            assert most_memory_bytes() - before < MEMORY_LIMIT_BYTES
            assert not watch.strange, watch.strange
            return end

        with Watch(folder, outside=outside) as watch:
            example()
        assert not watch.strange
        ends["MiB"] = (most_memory_bytes() - before) // 1024**2
    return ends


@contextmanager
def limits() -> Iterator[None]:
    def give_up(number: int, frame: FrameType | None) -> None:
        raise Hang

    handler, limit = signal.signal(signal.SIGPROF, give_up), resource.getrlimit(resource.RLIMIT_AS)
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (in_use + ADDRESS_LIMIT_BYTES, limit[1]))
    gc.collect()
    gc.freeze()  # what other tests have left in this process is not searched again on the example's time
    try:
        yield
    finally:
        gc.unfreeze()
        resource.setrlimit(resource.RLIMIT_AS, limit)
        signal.signal(signal.SIGPROF, handler)


def most_memory_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def require_many(ends: Counter[str], *, examples: int) -> None:
    total = ends["refused"] + ends["done"] + ends["read as forged"]
    assert total >= examples
    assert ends["refused"] > total // 4
    assert ends["done"] > total // 20
    print(
        f"S5: {total} examples: {ends['refused']} refused, {ends['done']} done, {ends['read as forged']} read as "
        f"forged; 0 other errors, {ends['MiB']} MiB taken (limit {MEMORY_LIMIT_BYTES // 1024**2})"
    )


@pytest.mark.parametrize("examples", [500, pytest.param(5_000, marks=pytest.mark.slow)])
def test_any_change_of_a_document_is_refused_or_harmless(examples: int) -> None:
    require_many(fuzz(settings(ORDINARY, max_examples=examples, derandomize=True)), examples=examples)


@pytest.mark.nightly
@pytest.mark.timeout(7200)
def test_many_more_changes_are_refused_or_harmless() -> None:
    require_many(fuzz(settings(ORDINARY, max_examples=NIGHTLY_EXAMPLES)), examples=NIGHTLY_EXAMPLES)
