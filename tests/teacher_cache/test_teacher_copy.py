"""Nodes load the copy of the teacher that the driver has hashed, or none."""

import json
import pickle
import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path

import huggingface_hub.constants
import pytest

from teacher_cache import answer_pool, shard_worker, spot_check_job
from teacher_cache.answers_config import AnswersConfig
from teacher_cache.build_plan import cache_identity, open_builder
from teacher_cache.config import TeacherConfig
from teacher_cache.errors import ConfigError
from teacher_cache.samples import read_samples
from teacher_cache.shard_worker import ShardWorker
from teacher_cache.teacher_copy import BLOCK_BYTES, BLOCKS, at_commit, describe_copy, require_same_copy
from tests.teacher_cache.test_build import make_config

OLD, NEW = "a" * 40, "b" * 40
REPOSITORY = "someone/teacher"


def config_of(model: Path) -> TeacherConfig:
    return TeacherConfig(model=str(model), dtype="float32")


def flip(path: Path, *, byte: int) -> None:
    data = bytearray(path.read_bytes())
    data[byte] ^= 1
    path.write_bytes(data)


@pytest.fixture
def copies(tiny_qwen2_vl: Path, tmp_path: Path) -> tuple[Path, Path]:
    """The driver's folder and a node's."""
    driver, node = tmp_path / "driver", tmp_path / "node"
    for folder in (driver, node):
        shutil.copytree(tiny_qwen2_vl, folder)
    return driver, node


CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "weights": (lambda node: flip(node / "model.safetensors", byte=-1), r"model\.safetensors \(other content\)"),
    "shorter weights": (
        lambda node: (node / "model.safetensors").write_bytes((node / "model.safetensors").read_bytes()[:-1]),
        r"model\.safetensors \(other content\)",
    ),
    "other weight files": (
        lambda node: (node / "model.safetensors").rename(node / "model-00001-of-00001.safetensors"),
        r"2 file\(s\) are not the same: model-00001-of-00001\.safetensors \(only here\), model\.safetensors \(missing",
    ),
    "config": (
        lambda node: (node / "config.json").write_text((node / "config.json").read_text() + " "),
        r"1 file.*: config\.json \(other content\)",
    ),
    "template": (
        lambda node: (node / "chat_template.jinja").write_text("{{ messages }}"),
        r"chat_template\.jinja \(\w+ \w+\)",
    ),
    "tokenizer": (lambda node: (node / "tokenizer.json").unlink(), r"tokenizer\.json \(missing here\)"),
    "image processor": (
        lambda node: (node / "preprocessor_config.json").write_text("{}"),
        r"preprocessor_config\.json \(\w+ \w+\)",
    ),
    "generation": (
        lambda node: (node / "generation_config.json").write_text('{"temperature": 2}'),
        r"generation_config\.json \(\w+ \w+\)",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_copy_is_refused_with_what_differs(change: str, copies: tuple[Path, Path]) -> None:
    driver, node = copies
    expected = describe_copy(config_of(driver))
    assert require_same_copy(config_of(node), expected=expected) == config_of(node)
    (node / "README.md").write_text("not of the teacher")
    require_same_copy(config_of(node), expected=expected)
    make, message = CHANGES[change]
    make(node)
    with pytest.raises(ConfigError, match=message) as refused:
        require_same_copy(config_of(node), expected=expected)
    assert str(refused.value).startswith(f"{socket.gethostname()}:{node} is another teacher than ")
    assert str(driver) in str(refused.value)
    assert "copy the checkpoint to this node again" in str(refused.value)


def test_references_and_answers_are_of_the_drivers_copy_too(copies: tuple[Path, Path], digit_samples: Path) -> None:
    driver, node = copies
    expected = describe_copy(config_of(driver))
    flip(node / "model.safetensors", byte=-1)
    config = make_config(node.parent / "cache", model=node, data=digit_samples)
    answers = AnswersConfig(source=str(digit_samples))
    reference = spot_check_job._Actor(config, expected, 0)
    answering = answer_pool._Actor(config, answers, expected, node.parent)
    for start in (reference._load, answering._start):
        with pytest.raises(ConfigError, match="is another teacher than"):
            start()


@pytest.mark.parametrize("block", range(BLOCKS))
def test_blocks_are_spread_over_large_weights(block: int, copies: tuple[Path, Path]) -> None:
    size = 8 * BLOCKS * BLOCK_BYTES + 12_345
    for folder in copies:
        with (folder / "model.safetensors").open("r+b") as file:
            file.truncate(size)
    expected = describe_copy(config_of(copies[0]))
    require_same_copy(config_of(copies[1]), expected=expected)
    # the last byte of each part but the first, and the first byte of the file
    byte = 0 if block == 0 else (size - BLOCK_BYTES) * block // (BLOCKS - 1) + BLOCK_BYTES - 1
    with (copies[1] / "model.safetensors").open("r+b") as file:
        file.seek(byte)
        value = file.read(1)[0]
        file.seek(byte)
        file.write(bytes([value ^ 1]))
    with pytest.raises(ConfigError, match=r"model\.safetensors"):
        require_same_copy(config_of(copies[1]), expected=expected)


def test_a_hundred_gigabytes_take_no_second(copies: tuple[Path, Path]) -> None:
    folder = copies[0]
    names = [f"model-{number:05}-of-00020.safetensors" for number in range(1, 21)]
    for name in names:
        with (folder / name).open("wb") as file:
            file.truncate(5 * 10**9)  # holes: no disk is needed for them
    index = {"weight_map": dict(zip(names, names, strict=True))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    started = time.process_time()
    copy = describe_copy(config_of(folder))
    assert time.process_time() - started < 1.0
    assert set(names) < copy.files.keys()


def test_code_counts_where_it_is_trusted(copies: tuple[Path, Path]) -> None:
    driver, node = copies
    for folder in copies:
        (folder / "modeling.py").write_text("SCALE = 1")
    plain = describe_copy(config_of(driver))
    trusting = describe_copy(config_of(driver).model_copy(update={"trust_remote_code": True}))
    (node / "modeling.py").write_text("SCALE = 2")
    require_same_copy(config_of(node), expected=plain)
    with pytest.raises(ConfigError, match=r"modeling\.py \(other content\)"):
        require_same_copy(config_of(node).model_copy(update={"trust_remote_code": True}), expected=trusting)


@pytest.fixture
def hub(tiny_qwen2_vl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The Hub's cache of a machine, without the Hub, in which a branch has moved from one commit to another."""
    cache = tmp_path / "hub"
    folder = cache / "models--someone--teacher"
    for commit in (OLD, NEW):
        shutil.copytree(tiny_qwen2_vl, folder / "snapshots" / commit)
    flip(folder / "snapshots" / NEW / "model.safetensors", byte=-1)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(OLD)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    return folder


@pytest.mark.parametrize("revision", [None, "main", OLD])
def test_a_repository_stands_for_one_commit(revision: str | None, hub: Path) -> None:
    config = TeacherConfig(model=REPOSITORY, revision=revision)
    resolved = at_commit(config)
    assert resolved.revision == OLD
    expected = describe_copy(resolved)
    (hub / "refs" / "main").write_text(NEW)
    assert require_same_copy(config, expected=expected) == resolved
    assert at_commit(TeacherConfig(model=REPOSITORY)).revision == NEW

    shutil.rmtree(hub / "snapshots" / OLD)
    with pytest.raises(ConfigError, match=r"'someone/teacher' is neither a directory nor a repository"):
        require_same_copy(config, expected=expected)


def test_a_worker_takes_the_commit_of_the_driver(
    hub: Path, digit_samples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(tmp_path / "cache", model=Path("model"), data=digit_samples)
    config = config.model_copy(update={"teacher": TeacherConfig(model=REPOSITORY, dtype="float32")})
    writer = open_builder(config, read_samples(config.data))
    assert writer.manifest.provenance["teacher"]["revision"] == OLD
    (hub / "refs" / "main").write_text(NEW)
    assert cache_identity(config) != writer.manifest.identity, "what a worker would compute by itself"

    loaded = []
    start = shard_worker.start_teacher
    monkeypatch.setattr(
        shard_worker, "start_teacher", lambda *a, **b: loaded.append(a[0].teacher.revision) or start(*a, **b)
    )
    worker = ShardWorker(config, writer=pickle.loads(pickle.dumps(writer)), identity={}, log_file=None)
    worker.close()
    assert loaded == [OLD]

    flip(hub / "snapshots" / OLD / "model.safetensors", byte=-1)
    with pytest.raises(ConfigError, match=rf"snapshots/{OLD} is another teacher than .*model\.safetensors"):
        ShardWorker(config, writer=pickle.loads(pickle.dumps(writer)), identity={}, log_file=None)
    assert loaded == [OLD], "no engine was started"
