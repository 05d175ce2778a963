"""What the processes bring to a step's forward passes is compared before the first of them, in one exchange."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from distill import step
from distill.data import RankBatch
from distill.processes import Processes
from distill.signals import Signals
from distill.stage_sums import Counts
from distill.step import Agreement, _agree
from distill.zero import ZeroEngine
from teacher_cache.errors import GenrecalError
from tests.reliability.processes import run_ranks

TEXT, IMAGE = ({name: torch.zeros(1) for name in names} for names in (("ids",), ("ids", "pixels")))
NO_COUNTS = Counts(*[0.0] * len(Counts._fields))


@contextmanager
def counted_exchanges() -> Iterator[list[Sequence[float]]]:
    exchanges, gather = list[Sequence[float]](), Processes.gather

    def counting(processes: Processes, values: Sequence[float]) -> list[list[float]]:
        exchanges.append(values)
        return gather(processes, values)

    with mock.patch.object(Processes, "gather", counting):
        yield exchanges


def agree(micro_batches: Sequence[Any], processes: Processes, *, filler: Any) -> Agreement | None:
    loop: Any = SimpleNamespace(processes=processes, signals=Signals())
    batches: Any = SimpleNamespace(on_device=lambda given, *, num: [*given, *[filler] * (num - len(given))])
    with mock.patch.object(step, "batch_counts", return_value=NO_COUNTS):
        return _agree(loop, RankBatch(micro_batches=tuple(micro_batches), skipped=()), batches)


@pytest.mark.parametrize(
    ("parts", "filler", "exchanges"),
    [
        (([IMAGE] * 5, [IMAGE] * 5), IMAGE, 1),
        (([IMAGE] * 5, [IMAGE] * 3), IMAGE, 2),
        (([IMAGE], []), IMAGE, 2),
        (([TEXT, IMAGE], [TEXT, IMAGE]), IMAGE, 2),
    ],
    ids=["alike", "fillers", "nothing but fillers", "alike pass by pass"],
)
def test_passes_that_are_alike_cost_one_exchange(
    parts: tuple[list[Any], list[Any]], filler: Any, exchanges: int, tmp_path: Path
) -> None:
    def act(processes: Processes) -> None:
        with counted_exchanges() as found:
            agreed = agree(parts[processes.rank], processes, filler=filler)
        assert agreed is not None
        assert agreed.micro_batches == len(parts[0])
        assert len(found) == exchanges

    run_ranks(act, tmp_path)


@pytest.mark.parametrize(
    ("parts", "filler", "number"),
    [
        (([IMAGE, IMAGE], [IMAGE, TEXT]), IMAGE, 2),
        (([IMAGE, IMAGE], [TEXT, TEXT]), IMAGE, 1),
        (([IMAGE, TEXT], [TEXT, IMAGE]), IMAGE, 1),
        (([IMAGE, IMAGE], [IMAGE]), TEXT, 2),
    ],
    ids=["one pass", "all passes", "another order", "filler"],
)
def test_one_process_that_would_call_other_modules_ends_all_before_the_first_pass(
    parts: tuple[list[Any], list[Any]], filler: Any, number: int, tmp_path: Path
) -> None:
    def act(processes: Processes) -> None:
        with pytest.raises(GenrecalError, match=f"^processes 1 bring other inputs to forward pass {number} of 2 "):
            agree(parts[processes.rank], processes, filler=filler)

    run_ranks(act, tmp_path)


def test_a_step_s_passes_are_not_compared_again_and_all_others_are(tmp_path: Path) -> None:
    def act(processes: Processes) -> None:
        engine: Any = SimpleNamespace(_processes=processes, _engine=lambda **_: None)
        with counted_exchanges() as found:
            ZeroEngine.forward(engine, batch=IMAGE, counts=NO_COUNTS)
            assert found == []
            ZeroEngine.forward(engine, batch=IMAGE, task="features")
            assert len(found) == 1
            with pytest.raises(GenrecalError, match=r"forward pass 1 of 1 .* has \.batch\.ids"):
                ZeroEngine.forward(engine, batch=TEXT if processes.rank else IMAGE, task="question_shuffle")

    run_ranks(act, tmp_path)
