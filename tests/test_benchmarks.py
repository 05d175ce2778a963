"""The benchmark of the cache runs whole in its quick form, and its exact figures meet their bars."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow
SECTIONS = {"write", "read", "peers", "object store", "open", "verify", "size"}


@pytest.fixture(scope="module")
def quick_run(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("benchmark")
    output = folder / "figures.json"
    options = ["--quick", "--json", "--details", str(output), "--folder", str(folder)]
    command = [sys.executable, "benchmarks/cache.py", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in folder.iterdir()] == ["figures.json"], "scratch files stay"
    document: dict[str, Any] = json.loads(output.read_text())
    values = {f"{one['section']}: {one['name']}": one["value"] for one in document["figures"]}
    assert json.loads(done.stdout) == values
    return document


def figure(document: dict[str, Any], *words: str) -> dict[str, Any]:
    named = [one for one in document["figures"] if all(word in f"{one['section']}: {one['name']}" for word in words)]
    assert len(named) == 1, (words, [one["name"] for one in named])
    return dict(named[0])


def test_all_parts_give_figures(quick_run: dict[str, Any]) -> None:
    assert quick_run["quick"] is True
    assert {one["section"] for one in quick_run["figures"]} == SECTIONS
    assert quick_run["machine"]["processor"]
    assert quick_run["machine"]["kernel"]
    assert {"torch", "zarr", "safetensors"} <= quick_run["versions"].keys()
    for one in quick_run["figures"]:
        if one["value"] is not None and one["low"] is not None:
            assert one["low"] <= one["value"] <= one["high"]
            assert one["pairs"] >= 1
        if one["bar"] is not None and one["value"] is not None:
            kept = one["value"] <= one["bar"] if one["at_most"] else one["value"] >= one["bar"]
            assert one["met"] is kept


def test_each_sample_and_array_is_one_request_and_nothing_is_listed(quick_run: dict[str, Any]) -> None:
    assert figure(quick_run, "requests per sample and array")["value"] == 1
    assert figure(quick_run, "LISTs")["value"] == 0


@pytest.mark.parametrize(("codec", "limit"), [("bf16", 16_900), ("8-bit", 8_500)])
def test_short_answers_cost_little_more_than_their_rows(quick_run: dict[str, Any], codec: str, limit: int) -> None:
    stored = figure(quick_run, codec, "bytes per answer token")
    rows = 8192 * (2 if codec == "bf16" else 1) * 201 / 200
    assert stored["bar"] == limit
    assert rows < stored["value"] <= limit
    assert 0 < figure(quick_run, codec, "beside the rows")["value"] <= 0.03


def test_lossless_compression_is_near_the_entropy_bound(quick_run: dict[str, Any]) -> None:
    assert 0.95 <= figure(quick_run, "lossless", "simulated")["value"] <= 1.05


def test_cold_reads_are_cold(quick_run: dict[str, Any]) -> None:
    cold = figure(quick_run, "share of the files in memory when cold")
    if quick_run["machine"]["filesystem"] in ("tmpfs", "ramfs"):
        assert cold["value"] == 1
        assert figure(quick_run, "cold, 1 process, 1 thread, one sample", ", verified")["value"] is None
    else:
        assert cold["value"] == 0
        assert figure(quick_run, "cold, 1 process, 1 thread, one sample", ", verified")["value"] > 0


def test_only_checksums_notice_flipped_bits(quick_run: dict[str, Any]) -> None:
    assert figure(quick_run, "genrecal: flipped bits")["value"] == 24
    assert figure(quick_run, "safetensors", "flipped bits")["value"] == 0
    assert figure(quick_run, "zarr-python", "flipped bits")["value"] == 24
