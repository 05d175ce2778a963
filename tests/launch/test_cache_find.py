"""`genrecal cache find` over caches of a real teacher: which serve a run, which do not, and why."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch.cli import main
from launch.run_config import load_run_config
from teacher_cache.build_plan import open_builder
from teacher_cache.config import CacheConfig
from teacher_cache.gc import collect_garbage
from teacher_cache.samples import read_samples
from teacher_cache.shard_worker import ShardWorker

ANSWERS = ("seven", "Yes, the digit five.", "three", "No.")


def write_data(path: Path, answers: tuple[str, ...] = ANSWERS) -> Path:
    rows = [
        {"id": f"row-{number}", "messages": [{"role": "user", "content": "Which digit?"}, answer_of(answer)]}
        for number, answer in enumerate(answers)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def answer_of(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def fill(config: CacheConfig, *, shards: int | None = None) -> None:
    """Build the first shards of a cache, all by default, in this process."""
    samples = read_samples(config.data)
    writer = open_builder(config, samples)
    worker = ShardWorker(config, writer=writer, identity={}, log_file=None)
    by_id = {sample.sample_id: sample for sample in samples.samples}
    for shard in writer.missing_shards()[:shards]:
        list(worker.build(shard.shard_id, [by_id[sample_id] for sample_id in shard.sample_ids]))
    writer.complete()
    worker.close()


@pytest.fixture(scope="module")
def run_file(tmp_path_factory: pytest.TempPathFactory, tiny_qwen2: Path) -> Path:
    """A run file beside a folder with five caches."""
    folder = tmp_path_factory.mktemp("find")
    values: dict[str, Any] = {
        "output_dir": str(folder / "run"),
        "cache": {
            "uri": str(folder / "mine"),
            "teacher": {"model": str(tiny_qwen2), "dtype": "float32"},
            "data": {"path": str(write_data(folder / "data.jsonl")), "max_length": 128},
            "targets": {"topk": 8, "question_fraction": 1.0},
            "samples_per_shard": 2,
            "build": {"engine": "transformers"},
        },
        "students": [{"name": "small", "model": "student"}],
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(values))

    def config(name: str, *overrides: str) -> CacheConfig:
        return load_run_config(path, ["--cache.uri", str(folder / "caches" / name), *overrides]).cache

    fill(config("whole"))
    fill(config("begun"), shards=1)
    fill(config("other-topk", "--cache.targets.topk", "4"))
    fill(config("shorter", "--cache.data.max-samples", "2"))
    changed = write_data(folder / "changed.jsonl", ("eight", *ANSWERS[1:]))
    fill(config("changed", "--cache.data.path", str(changed)))
    return path


def caches(run_file: Path) -> Path:
    return run_file.parent / "caches"


def find(capsys: pytest.CaptureFixture[str], run_file: Path, *options: str) -> tuple[int, dict[str, list[str]]]:
    """The exit code, and per cache its verdict and the lines below it."""
    code = main(["cache", "find", str(caches(run_file)), str(run_file), *options])
    found: dict[str, list[str]] = {}
    for line in capsys.readouterr().out.splitlines():
        if line.startswith(" "):
            found[next(reversed(found))].append(line.strip())
        else:
            uri, verdict = line.split("  ")
            found[Path(uri).name] = [verdict]
    return code, found


def test_each_cache_gets_a_verdict_and_the_next_step(capsys: pytest.CaptureFixture[str], run_file: Path) -> None:
    code, found = find(capsys, run_file)
    assert code == 0
    assert list(found)[:2] == ["whole", "begun"]
    folder = caches(run_file)
    assert found["whole"] == ["serves: complete, 4 samples", f"reuse it: set `cache.uri: {folder}/whole`"]
    build = f"`genrecal cache build {run_file} --cache.uri {folder}"
    assert found["begun"] == ["serves: not complete yet, 4 samples", f"complete it: {build}/begun`"]
    assert found["other-topk"] == ["does not serve", "differs in targets.topk: stored 4, asked 8"]
    shorter = ["does not serve: lacks 2 samples of the run", f"add the samples to it: {build}/shorter"]
    assert found["shorter"] == [shorter[0], shorter[1] + " --cache.build.extend`"]
    assert found["changed"] == ["does not serve: holds 1 sample with another text or other images"]


def test_the_advice_can_be_followed(run_file: Path, tmp_path: Path) -> None:
    config = load_run_config(run_file, ["--cache.uri", str(caches(run_file) / "whole"), "--cache.build.extend"])
    assert open_builder(config.cache, read_samples(config.cache.data)).missing_shards() == []


def test_overrides_change_what_serves(capsys: pytest.CaptureFixture[str], run_file: Path) -> None:
    code, found = find(capsys, run_file, "--cache.targets.topk", "4")
    assert code == 0
    assert found["other-topk"][0] == "serves: complete, 4 samples"
    assert found["whole"] == ["does not serve", "differs in targets.topk: stored 8, asked 4"]


@pytest.mark.parametrize(("kept", "code"), [("whole", 0), ("begun", 3), ("other-topk", 4), (None, 4)])
def test_exit_codes(
    capsys: pytest.CaptureFixture[str], run_file: Path, tmp_path: Path, kept: str | None, code: int
) -> None:
    if kept is not None:
        (tmp_path / "cache").symlink_to(caches(run_file) / kept)
    folder = tmp_path if kept is None else tmp_path / "cache"
    assert main(["cache", "find", str(folder), str(run_file)]) == code
    assert ("no cache under" in capsys.readouterr().out) == (kept is None)


def test_damaged_and_smaller_caches_are_told_from_others(
    capsys: pytest.CaptureFixture[str], run_file: Path, tmp_path: Path
) -> None:
    config = load_run_config(run_file, ["--cache.uri", str(tmp_path / "cache")]).cache
    fill(config)
    collect_garbage(config.uri, drop_question_rows=True)
    assert main(["cache", "find", str(tmp_path), str(run_file)]) == 0
    assert "its tier Q was dropped" in capsys.readouterr().out
    (tmp_path / "cache" / "CACHE.json").write_text("{}")
    assert main(["cache", "find", str(tmp_path), str(run_file), "--json"]) == 4
    (found,) = json.loads(capsys.readouterr().out)
    assert "format None" in found["differences"][0]
