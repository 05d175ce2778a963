"""When the cache of a run counts as complete: as it was created, or as a build found it."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch.cli import main
from launch.clusters.marks import cache_complete, mark_cache
from launch.run_config import RunConfig
from teacher_cache.build_job import BuildSummary
from teacher_cache.errors import CacheIncomplete
from teacher_cache.spot_check import SpotCheck
from tests.launch.test_submit_slurm import VALUES
from tests.teacher_cache.store import IDENTITY, build, make_samples

SAMPLES = make_samples(4)
CHANGES: list[dict[str, Any]] = [
    {"data": {"path": "train.parquet", "max_skipped_samples": 3}},
    {"data": {"path": "more.parquet"}},
    {"teacher": {"model": "/models/teacher"}},
]


def run_config(**cache: Any) -> RunConfig:
    targets = {"targets": IDENTITY["targets"]}
    return RunConfig.model_validate(VALUES | {"cache": VALUES["cache"] | targets | cache})


def create(config: RunConfig, **identity: Any) -> None:
    """Write the whole cache of a run, as its build would with another teacher."""
    provenance = {part: getattr(config.cache, part).model_dump(mode="json") for part in ("teacher", "data")}
    build(Path(config.cache.uri), SAMPLES, provenance=provenance, identity=IDENTITY | identity).complete()


@pytest.fixture
def created(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    monkeypatch.chdir(tmp_path)
    create(run_config())
    return run_config()


@pytest.fixture
def run_build(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`genrecal cache build` in which the build finds nothing left to do, or ends with an error."""

    def run(config: RunConfig, error: Exception | None = None) -> int:
        def build_cache(*_: object, **__: object) -> BuildSummary:
            if error is not None:
                raise error
            empty = dict.fromkeys(("shards", "shards_built", "samples", "tokens", "seconds", "tokens_per_s"), 0)
            names = {"uri": config.cache.uri, "engine": "test", "engine_version": "1"}
            return BuildSummary(**names, **empty, skipped=(), workers=(), spot_check=SpotCheck())

        monkeypatch.setattr("launch.cache_commands.setup_logging", lambda path: None)
        monkeypatch.setattr("teacher_cache.build.build_cache", build_cache)
        Path("run.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
        return main(["cache", "build", "run.yaml"])

    return run


def test_a_cache_is_complete_for_the_run_that_created_it(created: RunConfig) -> None:
    assert cache_complete(created)


@pytest.mark.parametrize("change", CHANGES)
def test_a_cache_is_complete_for_a_run_whose_build_succeeded(
    created: RunConfig, run_build: Any, change: dict[str, Any]
) -> None:
    config = run_config(**change)
    assert not cache_complete(config)
    assert run_build(config, CacheIncomplete("one shard is missing")) == 3
    assert not cache_complete(config), "a build that failed counts"
    assert run_build(config) == 0
    assert cache_complete(config)
    assert cache_complete(run_config(**change, build={"num_replicas": 1})), "how it is built is no part of it"
    assert cache_complete(created)
    assert not cache_complete(run_config(**change, samples_per_shard=7))
    assert not cache_complete(config.model_copy(update={"output_dir": "other"})), "the build of another run"


def test_a_build_that_succeeded_does_not_hide_what_is_missing(created: RunConfig, run_build: Any) -> None:
    config = run_config(**CHANGES[0])
    assert run_build(config) == 0
    next(Path(config.cache.uri, "commits").iterdir()).unlink()
    assert not cache_complete(config)
    shutil.rmtree(config.cache.uri)
    assert not cache_complete(config)


def test_a_mark_does_not_hold_for_another_cache_in_the_same_place(created: RunConfig) -> None:
    config = run_config(**CHANGES[0])
    mark_cache(config)
    shutil.rmtree(config.cache.uri)
    create(created, teacher={"weights": "another"})
    assert not cache_complete(config)
