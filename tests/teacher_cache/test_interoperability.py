"""Shards as zarr-python, zarrs and tensorstore read them, against the targets that were stored."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr

from teacher_cache.codec import AXES, HIDDEN, Layout, scales_name, stored_fields
from teacher_cache.row_codec import quantize_rows
from teacher_cache.schema import Span, TeacherTargets
from tests.teacher_cache.foreign_readers import PARTS, READERS
from tests.teacher_cache.store import TOPK, build, make_samples, make_targets

LAYOUTS: dict[str, dict[str, Any]] = {
    "bfloat16": {},
    "float16": {"dtype": torch.float16},
    "float32-zstd": {"dtype": torch.float32, "compression": "zstd"},
    "bfloat16-zstd": {"compression": "zstd"},
    "fp8": {"codec": "fp8"},
    "fp8-zstd": {"codec": "fp8", "compression": "zstd"},
}


def samples_of(dtype: torch.dtype) -> list[TeacherTargets]:
    """Return samples of which one fills several inner chunks of each array."""
    long = make_targets("long", spans=[Span(900, 3100)], num_tokens=4500, dtype=dtype, seed=9)
    return [*make_samples(2, dtype=dtype), long, make_targets("last", dtype=dtype, seed=10)]


def expected_arrays(samples: list[TeacherTargets], *, fp8: bool) -> dict[str, np.ndarray]:
    """Return what a shard's arrays hold, from the targets alone."""
    arrays: dict[str, list[np.ndarray]] = {}
    for sample in samples:
        parts: dict[str, Any] = {"spans": np.array(sample.spans), "token_ids": sample.token_ids.numpy()}
        parts |= {name: getattr(sample, name).numpy() for name in ("topk_ids", "topk_logprobs")}
        parts |= {name: getattr(sample, name).numpy() for name in ("logsumexp", "target_logprobs", "answer_byte_ends")}
        for name in HIDDEN:
            if (rows := getattr(sample, name)) is None:
                continue
            if fp8:
                parts[name], parts[scales_name(name)] = quantize_rows(rows).codes.numpy(), quantize_rows(rows).scales
            else:
                parts[name] = rows.view(torch.uint16).numpy() if rows.dtype == torch.bfloat16 else rows.numpy()
        for name, part in parts.items():
            arrays.setdefault(name, []).append(np.asarray(part))
    return {name: np.concatenate(parts) for name, parts in arrays.items()}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return the folder of a shard per layout."""
    found = {}
    for name, options in LAYOUTS.items():
        root = tmp_path_factory.mktemp(name) / "cache"
        rest = {key: value for key, value in options.items() if key != "dtype"}
        build(root, samples_of(options.get("dtype", torch.bfloat16)), per_shard=4, **rest)
        (found[name],) = (root / "shards").iterdir()
    return found


@pytest.mark.parametrize("library", READERS)
def test_other_libraries_read_the_same_rows(library: str, shards: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "found.npz"
    command = [sys.executable, "-W", "error", "-m", "tests.teacher_cache.foreign_readers", library, str(out)]
    finished = subprocess.run(
        [*command, *map(str, shards.values())], check=False, capture_output=True, text=True, timeout=800
    )
    assert finished.returncode == 0, finished.stderr
    found, compared = np.load(out, allow_pickle=False), 0
    for number, options in enumerate(LAYOUTS.values()):
        samples = samples_of(options.get("dtype", torch.bfloat16))
        expected = expected_arrays(samples, fp8=options.get("codec") == "fp8")
        for name, rows in expected.items():
            for part, chosen in PARTS.items():
                read = found[f"{number}/{name}/{part}"]
                assert read.shape == rows[chosen].shape, (library, number, name, part)
                assert read.tobytes() == rows[chosen].astype(read.dtype).tobytes(), (library, number, name, part)
                compared += 1
    assert compared == len(found.files) - len(LAYOUTS) * len(PARTS), "the table of offsets is compared below"
    print(f"interoperability: {library} {finished.stdout.strip()}: {compared} reads of {len(LAYOUTS)} layouts equal")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_group_says_where_each_sample_lies(layout: str, shards: dict[str, Path]) -> None:
    options = LAYOUTS[layout]
    samples = samples_of(options.get("dtype", torch.bfloat16))
    group = zarr.open_group(shards[layout], mode="r")
    assert group.attrs["sample_ids"] == [sample.sample_id for sample in samples]
    offsets = zarr.open_array(shards[layout] / "offsets", mode="r")
    assert offsets.attrs["columns"] == list(AXES)
    columns = dict(zip(AXES, np.asarray(offsets[:]).T, strict=True))
    answers = [sum(span.stop - span.start for span in sample.spans) for sample in samples]
    turns = [len(sample.spans) for sample in samples]
    rows = [0 if x.question_hidden_states is None else len(x.question_hidden_states) for x in samples]
    assert np.diff(columns["tokens"]).tolist() == [len(sample.token_ids) for sample in samples]
    assert np.diff(columns["turns"]).tolist() == turns
    assert np.diff(columns["tier_a"]).tolist() == [a + t for a, t in zip(answers, turns, strict=True)]
    assert np.diff(columns["tier_q"]).tolist() == rows
    assert np.diff(columns["answer_tokens"]).tolist() == answers


def test_what_zarr_has_no_type_for_is_named(shards: dict[str, Path]) -> None:
    for layout, named in {"bfloat16": "bfloat16", "fp8-zstd": "float8_e4m3fn", "float16": None}.items():
        array = zarr.open_group(shards[layout], mode="r")["hidden_states"]
        assert array.attrs.get("genrecal_dtype") == named


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_shard_holds_the_arrays_of_the_format_and_no_more(layout: str, shards: dict[str, Path]) -> None:
    options = LAYOUTS[layout]
    expected = stored_fields(
        Layout(
            dtype=str(options.get("dtype", torch.bfloat16)).removeprefix("torch."),  # type: ignore[arg-type]
            codec=options.get("codec", "exact"),
            compression=options.get("compression", "none"),
            hidden_size=8,
            topk=TOPK,
        )
    )
    group = zarr.open_group(shards[layout], mode="r")
    assert {*group.array_keys()} == {*expected, "offsets"}
    assert list(group.group_keys()) == []
