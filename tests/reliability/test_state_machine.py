"""R13: whatever users do to a cache, in any order, it holds what a plain dictionary says it must hold."""

import pickle
import random
import uuid
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from teacher_cache import open_cache
from teacher_cache.errors import CacheCorrupt, CacheError, CacheIncomplete, CacheMismatch, GenrecalError
from teacher_cache.gc import collect_garbage
from teacher_cache.manifest import read_manifest
from teacher_cache.plan import read_plan
from teacher_cache.reader import TeacherCache
from teacher_cache.repair import repair_cache
from teacher_cache.schema import TIERS, SkippedSample, Span, TeacherTargets, Tier
from teacher_cache.shard_attempt import ShardAttempt
from teacher_cache.snapshot import INDEX
from teacher_cache.storage import open_store
from teacher_cache.verify import verify_cache
from teacher_cache.writer import CacheWriter
from tests.reliability.checks import without_questions
from tests.reliability.processes import quick_folder
from tests.reliability.shim import Killed, Point, intercept, one_thread, stop_at
from tests.teacher_cache.store import IDENTITY, assert_same, digest_of, make_targets, open_builder

PER_SHARD, MOST_SHARDS = 2, 4
SAMPLES = {
    f"sample-{number}": make_targets(
        f"sample-{number}", spans=(Span(2, 4), Span(5, 6)), num_tokens=8, questions=number % 3 != 1, seed=number
    )
    for number in range(PER_SHARD * MOST_SHARDS)
}
IDS = list(SAMPLES)
TIER_L = ("topk_ids", "topk_logprobs", "logsumexp", "target_logprobs", "answer_byte_ends")
LAST_STEP = 90
"""About as many steps as an extension by one shard takes, with its snapshot."""
FIRST_ROWS_BYTES = 40
IRREPLACEABLE = ("CACHE.json", "plans/", "teacher_head")
"""What no repair writes again: users restore it from a copy."""

State = dict[str, TeacherTargets]
"""What a complete cache holds, by sample id."""


def put(path: Path, data: bytes) -> None:
    """Give a file other bytes; an index gets them as a new file, for readers that have opened it map it into memory."""
    if path.parent.name == INDEX:
        new = path.with_name("new")
        new.write_bytes(data)
        new.replace(path)
    else:
        path.write_bytes(data)


@dataclass
class Reader:
    cache: TeacherCache
    state: State
    is_exact: bool = True
    """Nothing has happened since to the files that it reads."""


class Counts:
    """What happened in all runs."""

    def __init__(self) -> None:
        self.runs = self.steps = self.killed = self.damaged = self.withdrawn = self.refused = self.read = 0


COUNTS = Counts()


def shard_name(number: int) -> str:
    return f"{number:05d}"


def shard_samples(number: int) -> list[str]:
    return IDS[number * PER_SHARD : (number + 1) * PER_SHARD]


def as_read(sample: TeacherTargets, tiers: Collection[Tier]) -> TeacherTargets:
    """Return what a reader that asks for some tiers gets."""
    if "Q" not in tiers:
        sample = without_questions(sample)
    if "L" not in tiers:
        sample = replace(sample, **dict.fromkeys(TIER_L))
    return sample


class CacheMachine(RuleBasedStateMachine):
    """A cache, and what it must hold."""

    def __init__(self) -> None:
        super().__init__()
        COUNTS.runs += 1
        self.stack = ExitStack()
        numbers = count(1)
        patch = self.stack.enter_context(pytest.MonkeyPatch.context())
        patch.setattr(uuid, "uuid4", lambda: uuid.UUID(int=next(numbers)))  # a run is the same each time
        self.root = self.stack.enter_context(quick_folder()) / "cache"
        self.uri = str(self.root)
        self.planned = 0
        self.committed: dict[int, State] = {}
        self.snapshots: dict[int, State] = {}
        self.is_latest_known = False
        """The latest snapshot is of what is committed, or else the last of ``snapshots``."""
        self.copies: dict[str, bytes] = {}
        """The damaged files as they were."""
        self.must_be_noticed = False
        self.readers: list[Reader] = []
        self.attempt: tuple[int, ShardAttempt] | None = None

    def teardown(self) -> None:
        self.end_attempt()
        self.readers.clear()
        self.stack.close()

    # what must hold

    @property
    def is_damaged(self) -> bool:
        return bool(self.copies)

    @property
    def is_whole(self) -> bool:
        return len(self.committed) == self.planned

    @property
    def state(self) -> State:
        return {id_: sample for number in sorted(self.committed) for id_, sample in self.committed[number].items()}

    def require_same(self, cache: TeacherCache, state: State, *, tiers: Collection[Tier] = TIERS) -> None:
        assert list(cache.sample_ids) == list(state)
        for found in cache.read(state, tiers=tiers):
            assert_same(found, as_read(state[found.sample_id], tiers))
        COUNTS.read += len(state)

    def require_no_lie(self, cache: TeacherCache) -> None:
        """Check that all that a cache of uncertain state returns was once stored."""
        assert set(cache.sample_ids) <= set(IDS[: PER_SHARD * self.planned])
        assert len(set(cache.sample_ids)) == len(cache)
        for sample_id in cache.sample_ids:
            try:
                (found,) = cache.read([sample_id])
            except CacheCorrupt:
                COUNTS.refused += 1
                continue
            known = SAMPLES[sample_id]
            assert_same(found, without_questions(known) if found.question_hidden_states is None else known)
            COUNTS.read += 1

    def observe(self, *, may_lose: Collection[int] = (), may_win: Collection[int] = ()) -> None:
        """Take in what is committed after a step of uncertain end, within the bounds of what it may be."""
        cache = open_cache(self.uri, allow_incomplete=True)
        self.require_no_lie(cache)
        now = {int(shard_id) for shard_id in cache.shard_ids}
        assert self.committed.keys() - now <= set(may_lose), "intact shards are lost"
        assert now - self.committed.keys() <= set(may_win)
        stored = {found.sample_id: found for found in cache.read(cache.sample_ids)}
        self.committed = {
            number: {id_: stored[id_] for id_ in shard_samples(number) if id_ in stored} for number in sorted(now)
        }
        self.is_latest_known = False

    def settle(self) -> None:
        """Take in that a builder has been opened, which publishes a complete cache."""
        if self.is_whole:
            cache = open_cache(self.uri)
            assert list(cache.sample_ids) == list(self.state)
            assert cache.snapshot is not None
            assert cache.snapshot >= max(self.snapshots, default=0)
            self.snapshots[cache.snapshot] = self.state
            self.is_latest_known = True

    def unsettle(self) -> None:
        """Take in that older states may have lost files."""
        self.snapshots.clear()
        self.is_latest_known = False
        for reader in self.readers:
            reader.is_exact = False

    # what builders do

    def builder(self, shards: int, **options: Any) -> CacheWriter:
        return open_builder(self.root, [SAMPLES[id_] for id_ in IDS[: PER_SHARD * shards]], **options)

    def fill(self, attempt: ShardAttempt, ids: Collection[str]) -> None:
        for sample_id in ids:
            attempt.append(SAMPLES[sample_id])

    def commit(self, writer: CacheWriter, number: int, *, skip: bool) -> None:
        ids = shard_samples(number)
        kept = ids[1:] if skip else ids
        writer.commit_shard(
            shard_name(number),
            [SAMPLES[id_] for id_ in reversed(kept)],
            sample_digests={id_: digest_of(id_) for id_ in kept},
            skipped=[SkippedSample(sample_id=id_, reason="too-long", message="m") for id_ in ids if id_ not in kept],
            provenance={},
        )
        self.committed[number] = {id_: SAMPLES[id_] for id_ in kept}

    def missing(self) -> list[int]:
        return [number for number in range(self.planned) if number not in self.committed]

    @initialize(shards=st.integers(1, 2))
    def create(self, shards: int) -> None:
        self.builder(shards)
        self.planned = shards

    @precondition(lambda self: not self.is_damaged and not self.is_whole)
    @rule(most=st.integers(1, 3), skip=st.booleans(), pickled=st.booleans())
    def build(self, most: int, skip: bool, pickled: bool) -> None:
        COUNTS.steps += 1
        writer = self.builder(self.planned)
        writer = pickle.loads(pickle.dumps(writer)) if pickled else writer
        assert [int(shard.shard_id) for shard in writer.missing_shards()] == self.missing()
        for number in self.missing()[:most]:
            self.commit(writer, number, skip=skip and number % 2 == 1)
        self.settle()

    @precondition(lambda self: not self.is_damaged and self.planned < MOST_SHARDS)
    @rule(build=st.booleans())
    def extend(self, build: bool) -> None:
        COUNTS.steps += 1
        with pytest.raises(CacheMismatch, match="are not stored"):
            self.builder(self.planned + 1)
        writer = self.builder(self.planned + 1, extend=True)
        self.planned += 1
        if build:
            self.commit(writer, self.planned - 1, skip=False)
            self.builder(self.planned)
            self.settle()

    @precondition(lambda self: not self.is_damaged)
    @rule(
        work=st.sampled_from(["build", "extend", "drop", "gc"]),
        step=st.integers(1, LAST_STEP),
        torn=st.booleans(),
    )
    def kill(self, work: str, step: int, torn: bool) -> None:
        """A builder dies somewhere in its work."""
        COUNTS.steps += 1
        wanted = self.planned + (work == "extend" and self.planned < MOST_SHARDS)
        before = dict(self.committed)
        try:
            with intercept(stop_at(Point(number=step, torn=torn))):
                if work in ("drop", "gc"):
                    collect_garbage(self.uri, drop_question_rows=work == "drop")
                else:
                    writer = self.builder(wanted, extend=True)
                    for shard in writer.missing_shards():
                        self.commit(writer, int(shard.shard_id), skip=False)
        except Killed:
            COUNTS.killed += 1
        except CacheIncomplete:
            assert work == "drop"
        acknowledged, self.committed = self.committed, before
        if work == "drop":
            self.unsettle()
        self.planned = len(read_plan(open_store(self.uri), read_manifest(open_store(self.uri))).shards)
        assert self.planned in (wanted, wanted - 1)
        self.observe(may_win=set(range(wanted)))
        assert acknowledged.keys() <= self.committed.keys(), "acknowledged shards are lost"

    @precondition(lambda self: self.attempt is None and not self.is_damaged)
    @rule(pick=st.integers(0, MOST_SHARDS - 1))
    def start_attempt(self, pick: int) -> None:
        """Another builder begins with a shard, whether or not it is committed."""
        COUNTS.steps += 1
        number = pick % self.planned
        attempt = self.builder(self.planned).start_shard(shard_name(number))
        self.settle()
        self.attempt = number, attempt
        self.fill(attempt, shard_samples(number)[:1])

    @precondition(lambda self: self.attempt is not None)
    @rule(give_up=st.booleans())
    def finish_attempt(self, give_up: bool) -> None:
        """The other builder goes on: it commits its shard, or finds that others were first."""
        COUNTS.steps += 1
        assert self.attempt is not None
        number, attempt = self.attempt
        if not give_up:
            try:
                self.fill(attempt, shard_samples(number)[1:])
                attempt.commit(skipped=(), provenance={})
            except CacheError:
                assert self.is_damaged
        self.end_attempt()
        if not self.is_damaged:
            self.observe(may_win=[number])

    def end_attempt(self) -> None:
        if self.attempt is not None:
            self.attempt[1].__exit__(None, None, None)
        self.attempt = None

    @precondition(lambda self: not self.is_damaged)
    @rule(number=st.integers(1, MOST_SHARDS), per_shard=st.integers(1, 3))
    def reuse(self, number: int, per_shard: int) -> None:
        """A run asks for the same content, in another grouping or only a part of it."""
        COUNTS.steps += 1
        writer = self.builder(min(number, self.planned), per_shard=per_shard, extend=True)
        assert [int(shard.shard_id) for shard in writer.missing_shards()] == self.missing()
        self.settle()

    @precondition(lambda self: "CACHE.json" not in self.copies)
    @rule(field=st.sampled_from(["teacher", "tap", "targets"]))
    def ask_for_other_content(self, field: str) -> None:
        COUNTS.steps += 1
        with pytest.raises(GenrecalError) as caught:
            self.builder(self.planned, identity={**IDENTITY, field: "other"})
        assert self.is_damaged or (caught.type is CacheMismatch and f'{field}: stored nothing, asked "other"')

    # what users do

    @rule(pick=st.integers(0, 9), tiers=st.sets(st.sampled_from(TIERS)), threads=st.integers(1, 2))
    def read(self, pick: int, tiers: set[Tier], threads: int) -> None:
        """Read one sample of what is committed now."""
        COUNTS.steps += 1
        cache = self.try_to(lambda: open_cache(self.uri, allow_incomplete=True))
        if cache is None:
            return
        if self.is_damaged:
            self.require_no_lie(cache)
            return
        state = self.state
        assert list(cache.sample_ids) == list(state)
        assert cache.shard_ids == {shard_name(number) for number in self.committed}
        for sample_id in [*state][pick % 4 :: 4]:
            (found,) = cache.read([sample_id], tiers=tiers, threads=threads)
            assert_same(found, as_read(state[sample_id], tiers))
            COUNTS.read += 1

    @rule(tiers=st.sets(st.sampled_from(TIERS)))
    def read_the_latest(self, tiers: set[Tier]) -> None:
        COUNTS.steps += 1
        try:
            cache = open_cache(self.uri)
        except CacheIncomplete:
            assert self.is_damaged or not (self.snapshots or (self.is_whole and self.is_latest_known))
            return
        except CacheError:
            assert self.is_damaged
            return
        if self.is_damaged or not self.is_latest_known:
            self.require_no_lie(cache)
        else:
            latest = self.snapshots[max(self.snapshots)]
            assert not self.is_whole or latest == self.state
            self.require_same(cache, latest, tiers=tiers)

    @precondition(lambda self: self.snapshots)
    @rule(pick=st.integers(0, 9))
    def read_an_old_snapshot(self, pick: int) -> None:
        COUNTS.steps += 1
        number = [*self.snapshots][pick % len(self.snapshots)]
        cache = self.try_to(lambda: open_cache(self.uri, snapshot=number))
        if cache is not None:
            if self.is_damaged:
                self.require_no_lie(cache)
            else:
                self.require_same(cache, self.snapshots[number])

    @precondition(lambda self: self.is_latest_known and not self.is_damaged and len(self.readers) < 3)
    @rule(pickled=st.booleans())
    def open_reader(self, pickled: bool) -> None:
        COUNTS.steps += 1
        cache = open_cache(self.uri)
        cache = pickle.loads(pickle.dumps(cache)) if pickled else cache
        self.readers.append(Reader(cache, self.snapshots[max(self.snapshots)]))

    @precondition(lambda self: self.readers)
    @rule(pick=st.integers(0, 2), close=st.booleans(), pickled=st.booleans())
    def read_by_reader(self, pick: int, close: bool, pickled: bool) -> None:
        """A reader that was opened before sees the state that it opened."""
        COUNTS.steps += 1
        reader = self.readers[pick % len(self.readers)]
        cache: TeacherCache | None = reader.cache
        if pickled:
            cache = self.try_to(lambda: pickle.loads(pickle.dumps(reader.cache)), also=not reader.is_exact)
        if cache is not None:
            if reader.is_exact:
                self.require_same(cache, reader.state)
            else:
                self.require_no_lie(cache)
        if close:
            self.readers.remove(reader)

    def try_to(self, act: Callable[[], Any], *, also: bool = False) -> Any:
        """Return what an act returns, or None when it refuses a cache that is damaged."""
        try:
            return act()
        except CacheError:
            assert self.is_damaged or also
            COUNTS.refused += 1
            return None

    @rule(level=st.sampled_from(["full", "rows", "quick"]))
    def verify(self, level: Any) -> None:
        COUNTS.steps += 1
        report = self.try_to(lambda: verify_cache(self.uri, level=level))
        if report is None:
            return
        if self.is_damaged:
            assert not (report.ok and self.must_be_noticed and level == "full")
            return
        # a kill leaves files that nothing names, and a snapshot that the next builder writes
        serious = [problem for problem in report.problems if problem.kind != "extra"]
        assert not serious or (
            [problem.path for problem in serious] == ["snapshots/00000000.json"] and self.is_whole
        ), serious
        assert [int(shard_id) for shard_id in report.missing_shards] == self.missing()
        assert report.samples == len(self.state)

    @rule(drop=st.booleans())
    def gc(self, drop: bool) -> None:
        COUNTS.steps += 1
        if self.is_damaged:
            self.must_be_noticed = False
            self.try_to(lambda: collect_garbage(self.uri))
            return
        drop = drop and self.is_whole
        if not drop:
            collect_garbage(self.uri)
            self.settle()
            return
        self.unsettle()
        collect_garbage(self.uri, drop_question_rows=True)
        self.committed = {
            number: {id_: without_questions(sample) for id_, sample in state.items()}
            for number, state in self.committed.items()
        }
        self.settle()

    @precondition(lambda self: not self.is_damaged and not self.is_whole)
    @rule()
    def drop_from_an_incomplete_cache(self) -> None:
        COUNTS.steps += 1
        with pytest.raises(CacheIncomplete, match="finish the build"):
            collect_garbage(self.uri, drop_question_rows=True)

    # damage

    def files(self) -> Iterator[str]:
        for path in sorted(self.root.rglob("*")):
            name = path.relative_to(self.root).as_posix()
            if path.is_file() and path.stat().st_size and not name.startswith(("staging/", "claims/")):
                yield name

    def vital_files(self) -> set[str]:
        """Return the files of what is committed, and of its snapshot."""
        cache = open_cache(self.uri, allow_incomplete=True)
        entries = cache._index.shards
        names = {entry.record_name for entry in entries}
        names |= {name for name in self.files() if name.startswith((*IRREPLACEABLE, *(e.folder for e in entries)))}
        if self.is_latest_known and self.is_whole:
            names.add(f"snapshots/{max(self.snapshots):08}.json")
        return names

    @precondition(lambda self: len(self.copies) < 2)
    @rule(seed=st.integers(0, 2**32 - 1), how=st.sampled_from(["flip", "delete", "truncate"]))
    def damage(self, seed: int, how: str) -> None:
        COUNTS.steps += 1
        chooser = random.Random(seed)
        first = not self.is_damaged
        kinds: dict[str, list[str]] = {}
        for name in self.files():
            if name not in self.copies:
                kinds.setdefault("rows" if "/c." in name else name.split("/")[0], []).append(name)
        name = chooser.choice(kinds["rows" if "rows" in kinds and chooser.random() < 0.4 else chooser.choice([*kinds])])
        path, data = self.root / name, (self.root / name).read_bytes()
        if first:
            # without a snapshot, a record or a part of the plan that is gone was never there
            self.must_be_noticed = name in self.vital_files() and (
                how != "delete" or (self.is_whole and self.is_latest_known)
            )
        elif any(damaged.startswith("snapshots/") for damaged in (name, *self.copies)):
            self.must_be_noticed = False  # whatever else is gone, an older state was whole
        if how == "delete":
            path.unlink()
        elif how == "truncate":
            put(path, data[: chooser.randrange(len(data))])
        else:
            # most of a small array's chunk is padding
            at = chooser.randrange(min(len(data), chooser.choice([FIRST_ROWS_BYTES, len(data)])))
            put(path, data[:at] + bytes([data[at] ^ 1 << chooser.randrange(8)]) + data[at + 1 :])
        self.copies[name] = data
        COUNTS.damaged += 1
        for reader in self.readers:
            reader.is_exact = False

    @precondition(lambda self: self.is_damaged)
    @rule(skip=st.booleans())
    def build_in_ignorance(self, skip: bool) -> None:
        """A builder comes before anybody has noticed."""
        COUNTS.steps += 1
        self.must_be_noticed = False
        known = dict(self.committed)
        try:
            writer = self.builder(self.planned)
            for shard in writer.missing_shards():
                self.commit(writer, int(shard.shard_id), skip=skip)
        except GenrecalError:
            COUNTS.refused += 1
        self.committed = known

    @precondition(lambda self: self.is_damaged)
    @rule()
    def repair(self) -> None:
        COUNTS.steps += 1
        lost = [name for name in self.copies if name.startswith(IRREPLACEABLE)]
        if lost:
            report = self.try_to(lambda: repair_cache(self.uri))
            back = all((self.root / name).is_file() and self.is_intact(name) for name in lost)
            assert report is None or report.beyond_repair or back or not self.must_be_noticed
        for name in lost:
            (self.root / name).write_bytes(self.copies[name])
        report = repair_cache(self.uri)
        assert report.beyond_repair == ()
        touched = {int(Path(name).parts[1][:5]) for name in self.copies if name.startswith(("shards/", "commits/"))}
        assert {int(shard_id) for shard_id in report.withdrawn_shards} <= touched, "an intact shard was given up"
        COUNTS.withdrawn += len(report.withdrawn_shards)
        self.copies.clear()
        self.must_be_noticed = False
        self.unsettle()
        self.observe(may_lose=touched, may_win=range(self.planned))

    def is_intact(self, name: str) -> bool:
        return (self.root / name).read_bytes() == self.copies[name]


@pytest.mark.parametrize(
    ("runs", "steps"),
    [
        (25, 50),
        pytest.param(200, 50, marks=pytest.mark.slow),
        pytest.param(1000, 100, marks=[pytest.mark.nightly, pytest.mark.timeout(7200)]),
    ],
)
def test_a_cache_is_what_a_dictionary_says(runs: int, steps: int) -> None:
    COUNTS.__init__()  # type: ignore[misc]
    plan = settings(
        max_examples=runs * 8 // 5,  # some are cut short
        stateful_step_count=steps,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],  # to shrink a failure takes minutes
        report_multiple_bugs=False,
    )
    with one_thread():
        run_state_machine_as_test(CacheMachine, settings=plan)
    counts = COUNTS
    assert counts.steps >= runs * steps
    assert min(counts.killed, counts.damaged, counts.withdrawn, counts.refused) > runs / 10
    print(
        f"R13: {counts.runs} runs, {counts.steps} steps, of them {counts.killed} kills and {counts.damaged} damaged "
        f"files: 0 violations; {counts.read} samples read right, damage refused {counts.refused} times, "
        f"{counts.withdrawn} shards given up and built again"
    )
