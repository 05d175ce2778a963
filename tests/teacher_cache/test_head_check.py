"""The check of a shard's rows against the teacher's head: which rows it takes, when it works, how it stops a commit."""

import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from teacher_cache import head_check, open_cache
from teacher_cache.build_plan import open_builder
from teacher_cache.errors import TeacherError
from teacher_cache.head_check import HEAD_CHECK_ROWS, HeadCheck, ScoredRows, head_logprobs
from teacher_cache.ledger import COMMITS, SHARDS
from teacher_cache.samples import read_samples
from teacher_cache.schema import Span, TeacherHead, TeacherTargets, predicting_rows
from teacher_cache.shard_worker import ShardReport, ShardWorker
from tests.teacher_cache.store import make_head, make_targets
from tests.teacher_cache.test_build import make_config

SPAN = Span(3, 23)


def scored(place: int, *, head: TeacherHead, spans: tuple[Span, ...] = (SPAN,)) -> TeacherTargets:
    """Random rows of which the engine says what the head does."""
    targets = make_targets(f"sample-{place}", spans=spans, seed=place)
    predicting = predicting_rows(targets.spans)
    rows = targets.hidden_states[: len(predicting)]
    logprobs = head_logprobs(rows, target_ids=targets.token_ids[predicting + 1], head=head)
    return replace(targets, target_logprobs=logprobs)


def is_checking() -> bool:
    return any(thread.name.startswith("head-check") for thread in threading.enumerate())


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> list[ScoredRows]:
    """What the check was given, in order."""
    parts: list[ScoredRows] = []
    check = head_check.check_head_agrees

    def remember(given: list[ScoredRows], **options: Any) -> float:
        parts.extend(given)
        return check(given, **options)

    monkeypatch.setattr(head_check, "check_head_agrees", remember)
    return parts


@pytest.mark.parametrize("num_samples", [1, 3, 100, 255, 256, 257, 1024, 5000])
def test_a_shard_gives_as_many_rows_whatever_its_size(num_samples: int, checked: list[ScoredRows]) -> None:
    head = make_head()
    targets = scored(0, head=head)
    with HeadCheck(head, num_samples=num_samples) as check:
        for place in range(num_samples):
            check.add(replace(targets, sample_id=str(place)), place=place)
        assert check.result() < 1e-5
    assert sum(len(part.rows) for part in checked) == min(HEAD_CHECK_ROWS, num_samples * (SPAN.stop - SPAN.start))
    gaps = np.diff([int(part.sample_id) for part in checked])
    assert set(gaps) <= {max(num_samples // HEAD_CHECK_ROWS, 1), -(-num_samples // HEAD_CHECK_ROWS)}


def test_samples_that_give_no_rows_are_made_up_for(checked: list[ScoredRows]) -> None:
    head = make_head()
    long, short = scored(0, head=head), scored(1, head=head, spans=(Span(2, 3),))
    with HeadCheck(head, num_samples=100) as check:
        for place in (place for place in range(100) if place % 4):  # each fourth is skipped
            check.add(replace(short if place % 2 else long, sample_id=str(place)), place=place)
        check.result()
    rows = {int(part.sample_id): len(part.rows) for part in checked}
    assert sum(rows.values()) == HEAD_CHECK_ROWS - 1, "two are left to the last sample, which has one"
    assert {rows[place] for place in rows if place % 2} == {1}


def test_one_row_of_each_sample_is_not_always_the_same(checked: list[ScoredRows]) -> None:
    head = make_head()
    targets = scored(0, head=head)
    with HeadCheck(head, num_samples=1024) as check:
        for place in range(1024):
            check.add(targets, place=place)
        check.result()
    chosen = torch.cat([part.target_logprobs for part in checked])
    assert targets.target_logprobs is not None
    counts = (chosen[:, None] == targets.target_logprobs[None]).sum(dim=0)
    assert counts.min() >= 10, "of 256 rows among 20 places"


def test_the_rows_of_a_part_follow_its_phase() -> None:
    targets = scored(0, head=make_head())

    def places(count: int, phase: float) -> list[int]:
        part = ScoredRows.of(targets, count=count, phase=phase)
        assert targets.target_logprobs is not None
        return [targets.target_logprobs.tolist().index(value) for value in part.target_logprobs.tolist()]

    assert places(4, 0.0) == [0, 5, 10, 15]
    assert places(4, 0.999) == [4, 9, 14, 19]
    assert places(50, 0.999) == list(range(20))
    assert places(0, 0.5) == []


def test_rows_are_checked_while_later_samples_come(checked: list[ScoredRows]) -> None:
    head = make_head()
    with HeadCheck(head, num_samples=1024) as check:
        for place in range(512):
            check.add(scored(place, head=head), place=place)
        deadline = time.monotonic() + 30
        while len(checked) < 128 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert len(checked) == 128
        check.result()
    assert not is_checking()


def test_a_row_that_disagrees_ends_the_check_at_once_and_its_thread() -> None:
    head = make_head()
    wrong = scored(9, head=head)
    assert wrong.target_logprobs is not None
    wrong = replace(wrong, target_logprobs=wrong.target_logprobs + 0.1)

    added = []

    def run() -> None:
        with HeadCheck(head, num_samples=64) as check:
            for place in range(64):
                check.add(wrong if place == 9 else scored(place, head=head), place=place)
                added.append(place)
                time.sleep(0.05)

    with pytest.raises(TeacherError, match=r"differ by 0\.1.* nats in sample sample-9"):
        run()
    assert max(added) < 63
    assert not is_checking()

    with HeadCheck(head, num_samples=1) as last:
        last.add(wrong, place=0)
        with pytest.raises(TeacherError, match="in sample sample-9"):
            last.result()


def test_leaving_early_leaves_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    head, calls = make_head(), []

    def check_slowly(*_: Any, **__: Any) -> float:
        calls.append(time.sleep(0.2))
        return 0.0

    def run() -> None:
        with HeadCheck(head, num_samples=256) as check:
            for place in range(256):
                check.add(targets, place=place)
            raise KeyboardInterrupt

    targets = scored(0, head=head)
    monkeypatch.setattr(head_check, "check_head_agrees", check_slowly)
    with pytest.raises(KeyboardInterrupt):
        run()
    assert not is_checking()
    assert len(calls) < 8, "what had not begun is dropped"


def test_a_shard_of_another_head_is_not_committed(tiny_qwen2_vl: Path, digit_samples: Path, tmp_path: Path) -> None:
    config = make_config(tmp_path / "cache", model=tiny_qwen2_vl, data=digit_samples)
    config = config.model_copy(update={"samples_per_shard": 28})
    samples = read_samples(config.data)
    worker = ShardWorker(config, writer=open_builder(config, samples), identity={}, log_file=None)
    right = worker.head
    worker.head = replace(right, weight=right.weight.roll(1, dims=0))
    with pytest.raises(TeacherError, match="the head read from the checkpoint is not the one that the engine uses"):
        list(worker.build("shard-000000", samples.samples))
    assert list((tmp_path / "cache").glob(f"{COMMITS}/*")) == []
    assert list((tmp_path / "cache").glob(f"{SHARDS}/*")) == []
    assert not is_checking()

    worker.head = right
    *_, report = worker.build("shard-000000", samples.samples)
    assert isinstance(report, ShardReport)
    assert 0 < report.head_difference_nats < 1e-4
    assert worker.writer.complete()
    assert len(open_cache(config.uri)) == 28
