"""R17: damage to a checkpoint is always noticed, and the newest intact one is resumed instead."""

import logging
import random
import shutil
from pathlib import Path

import numpy as np
import pytest

from distill.checkpoint import RECORD, Record, find_checkpoint, save_checkpoint
from distill.export_checkpoint import LONE
from teacher_cache.errors import CheckpointError
from tests.reliability.processes import quick_folder

IDENTITY = {"stage": "align", "seed": 0}
LAYOUT = {"backend": "zero3", "world_size": 2}
FLIPS = 600
FILES = ("rank_0_model.pt", "rank_1_model.pt", "rank_0_optim.pt", "rank_1_optim.pt")


class FourFiles:
    """Saves what differs per step, as two ZeRO-3 processes do: four files of different lengths."""

    def __init__(self, step: int) -> None:
        self._rng = np.random.default_rng(step)

    def save(self, directory: Path) -> None:
        for number, name in enumerate(FILES):
            (directory / name).write_bytes(self._rng.bytes(3_000 + 20_000 * number))


def save(folder: Path, *, step: int, keep: int = 3) -> Path:
    record = Record(step=step, identity=IDENTITY, layout=LAYOUT, origin={}, state={"faults": {}})
    save_checkpoint(FourFiles(step), folder, record=record, processes=LONE, keep=keep)  # type: ignore[arg-type]
    return folder / f"step-{step:08d}"


def found_step(folder: Path) -> int | None:
    checkpoint = find_checkpoint(folder, identity=IDENTITY, layout=LAYOUT, processes=LONE)
    return None if checkpoint is None else checkpoint.step


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    for step in (2, 4, 6):
        save(tmp_path / "checkpoints", step=step)
    return tmp_path / "checkpoints"


def test_every_flipped_bit_is_noticed(saved: Path, caplog: pytest.LogCaptureFixture) -> None:
    chooser = random.Random(0)
    caplog.set_level(logging.ERROR)  # 600 warnings would fill the report
    newest = saved / "step-00000006"
    files = sorted(newest.iterdir())
    noticed = 0
    for number in range(FLIPS):
        path = newest / files[number % len(files)].name
        data = bytearray(path.read_bytes())
        place, bit = chooser.randrange(len(data)), 1 << chooser.randrange(8)
        data[place] ^= bit
        path.write_bytes(data)
        noticed += found_step(saved) == 4
        (saved / f"damaged-{newest.name}").rename(newest)
        data[place] ^= bit
        path.write_bytes(data)
    assert found_step(saved) == 6
    print(f"R17: {noticed} of {FLIPS} flipped bits in {len(files)} files noticed, each time the tag before was taken")
    assert noticed == FLIPS


def test_files_that_are_cut_gone_or_another_tags(saved: Path, caplog: pytest.LogCaptureFixture) -> None:
    damages = {
        "emptied": lambda path: path.write_bytes(b""),
        "cut": lambda path: path.write_bytes(path.read_bytes()[:-1]),
        "extended": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
        "gone": lambda path: path.unlink(),
        "of the tag before": lambda path: shutil.copy(path.parents[1] / "step-00000004" / path.name, path),
    }
    count = 0
    for name in (*FILES, RECORD):
        for kind, damage in damages.items():
            with quick_folder() as place:
                folder = place / "checkpoints"
                shutil.copytree(saved, folder)
                damage(folder / "step-00000006" / name)
                caplog.clear()
                assert found_step(folder) == 4, (name, kind)
                # without its record a tag was never committed
                assert ("step-00000006 is damaged" in caplog.text) == ((name, kind) != (RECORD, "gone"))
                count += 1
    print(f"R17: {count} of {count} files emptied, cut, extended, deleted or of another tag noticed")


def test_damaged_tags_are_put_aside_and_two_intact_ones_kept(saved: Path) -> None:
    (saved / "step-00000006" / FILES[0]).unlink()
    assert found_step(saved) == 4
    assert sorted(path.name for path in saved.iterdir()) == [
        "damaged-step-00000006",
        "step-00000002",
        "step-00000004",
    ]
    save(saved, step=6, keep=2)
    assert found_step(saved) == 6
    (saved / "step-00000006" / FILES[0]).unlink()
    assert found_step(saved) == 4


def test_two_damaged_tags_fall_back_to_the_third_and_three_to_none(saved: Path) -> None:
    for step in (6, 4):
        (saved / f"step-{step:08d}" / RECORD).write_bytes(b"{}")
    assert found_step(saved) == 2
    (saved / "step-00000002" / FILES[1]).write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"all 1 checkpoints .* damaged") as raised:
        found_step(saved)
    assert raised.value.exit_code == 4


def test_a_leftover_of_the_same_step_is_replaced(saved: Path) -> None:
    leftover = saved / "step-00000008"
    leftover.mkdir()
    (leftover / "rank_7_model.pt").write_bytes(b"of a run with more processes")
    save(saved, step=8)
    assert not (leftover / "rank_7_model.pt").exists()
    assert found_step(saved) == 8


@pytest.mark.parametrize(
    ("stored", "asked", "message"),
    [
        ({"identity": {"seed": 1}}, {}, "seed: stored 1, asked 0"),
        ({"layout": LAYOUT | {"world_size": 4}}, {}, "4 processes, and this run has 2: .*genrecal reshard"),
        ({"layout": LAYOUT | {"backend": "torch"}}, {}, "by backend torch, which backend zero3 cannot read"),
    ],
)
def test_other_runs_and_layouts_are_refused(
    stored: dict[str, dict[str, object]], asked: dict[str, object], message: str, tmp_path: Path
) -> None:
    fields = {"identity": IDENTITY | stored.get("identity", {}), "layout": stored.get("layout", LAYOUT)}
    record = Record(step=2, origin={}, state={}, **fields)  # type: ignore[arg-type]
    save_checkpoint(FourFiles(2), tmp_path, record=record, processes=LONE, keep=2)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match=message) as raised:
        found_step(tmp_path)
    assert raised.value.exit_code == 4


def test_a_tag_for_any_number_of_processes_is_taken_by_all(tmp_path: Path) -> None:
    record = Record(step=2, identity=IDENTITY, layout=LAYOUT | {"world_size": "any"}, origin={}, state={})
    save_checkpoint(FourFiles(2), tmp_path, record=record, processes=LONE, keep=2)  # type: ignore[arg-type]
    assert found_step(tmp_path) == 2
