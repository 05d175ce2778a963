"""The cache commands as an operator runs them: what they print, what they change, and their exit codes."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from launch.cli import main
from teacher_cache import open_cache
from teacher_cache.config import LEVELS
from teacher_cache.local_files import LocalReader
from teacher_cache.verify import snapshot_digest
from tests.teacher_cache.store import IDENTITY, build, commit, flip_bit, make_samples, open_builder

SAMPLES = make_samples(6)
"""In three shards of two."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """What one command did."""

    code: int
    out: str
    err: str

    @property
    def facts(self) -> dict[str, str]:
        """The second column by the words of the first; only the first line of each value."""
        rows = (line.partition("  ") for line in self.out.splitlines() if not line.startswith(" "))
        return {name: value.strip() for name, _, value in rows}


Command = Callable[..., Run]


@pytest.fixture
def genrecal(capsys: pytest.CaptureFixture[str]) -> Command:
    def run(*arguments: str | Path) -> Run:
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Run(code=code, out=captured.out, err=captured.err)

    return run


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    build(tmp_path / "cache", SAMPLES)
    return tmp_path / "cache"


@pytest.fixture
def started(tmp_path: Path) -> Path:
    """A cache of which one shard of three is committed."""
    writer = open_builder(tmp_path / "started", SAMPLES)
    commit(writer, writer.missing_shards()[0], SAMPLES)
    return tmp_path / "started"


def damage(cache: Path, *, shard: str = "00001") -> Path:
    (folder,) = (cache / "shards").glob(f"{shard}-*")
    path = folder / "hidden_states" / "c.0.0"
    flip_bit(path, byte=5, bit=3)
    return path


def drop_snapshot(cache: Path) -> None:
    """Leave what a build leaves that is killed between its last shard and the snapshot."""
    shutil.rmtree(cache / "snapshots")
    shutil.rmtree(cache / "index")


@pytest.mark.parametrize("level", LEVELS)
def test_an_intact_cache_passes_every_command(genrecal: Command, cache: Path, level: str) -> None:
    status = genrecal("cache", "status", cache)
    assert (status.code, status.facts["state"], status.facts["snapshot"]) == (0, "complete", "0")
    assert status.facts["shards"] == "3 of 3 committed"
    verified = genrecal("cache", "verify", cache, "--level", level)
    assert (verified.code, verified.facts["result"]) == (0, "intact")
    assert verified.facts["samples"] == "6 intact"
    repaired = genrecal("cache", "repair", cache)
    assert (repaired.code, repaired.facts["result"]) == (0, "nothing to repair")


def test_an_incomplete_cache_says_what_to_run(genrecal: Command, started: Path) -> None:
    for command in ("status", "verify", "repair"):
        done = genrecal("cache", command, started)
        assert done.code == 3, command
        assert "genrecal cache build CONFIG" in done.facts["next"]
    assert genrecal("cache", "status", started).facts["missing"] == "00001, 00002"


def test_a_state_without_snapshot_is_not_called_complete(genrecal: Command, cache: Path) -> None:
    drop_snapshot(cache)
    status = genrecal("cache", "status", cache)
    assert (status.code, status.facts["snapshot"]) == (3, "none")
    assert "writes the snapshot" in status.facts["next"]
    build(cache, SAMPLES)
    assert genrecal("cache", "status", cache).code == 0


def test_a_rebuilt_shard_counts_once_a_snapshot_names_it(genrecal: Command, cache: Path) -> None:
    damage(cache)
    assert genrecal("cache", "repair", cache).code == 3
    build(cache, SAMPLES)
    newest = cache / "snapshots" / "00000001.json"
    (cache / json.loads(newest.read_text())["index"]).unlink()
    newest.unlink()
    for command in ("status", "verify"):
        assert genrecal("cache", command, cache).code == 3, command
    build(cache, SAMPLES)
    assert newest.exists()
    assert genrecal("cache", "verify", cache).code == 0


def test_damage_is_named_repaired_and_built_again(genrecal: Command, cache: Path) -> None:
    path = damage(cache)
    found = genrecal("cache", "verify", cache)
    assert (found.code, found.facts["result"]) == (4, "NOT intact: 1 problem")
    assert found.facts["problems"].startswith("changed: shard 00001")
    assert str(path.relative_to(cache)) in found.out
    assert f"genrecal cache repair {cache}" in found.facts["next"]
    repaired = genrecal("cache", "repair", cache)
    assert (repaired.code, repaired.facts["withdrawn"]) == (3, "00001")
    assert "computes 1 shard" in repaired.facts["next"]
    assert genrecal("cache", "status", cache).facts["withdrawn"] == "00001"
    build(cache, SAMPLES)
    assert genrecal("cache", "verify", cache).code == 0
    assert len(open_cache(str(cache)).read([SAMPLES[2].sample_id])) == 1


def test_levels_differ_in_what_they_see(genrecal: Command, cache: Path) -> None:
    damage(cache)
    codes = {level: genrecal("cache", "verify", cache, "--level", level).code for level in LEVELS}
    assert codes == {"full": 4, "rows": 4, "quick": 0}


def test_many_problems_are_cut_for_people_and_whole_as_json(genrecal: Command, cache: Path) -> None:
    for number in range(25):
        (cache / f"stray-{number:02}").write_text("x")
    found = genrecal("cache", "verify", cache)
    assert found.code == 4
    assert found.out.count("extra: ") == 10
    assert "... and 15 more" in found.out
    assert f"genrecal cache gc {cache}" in found.facts["next"]
    report = json.loads(genrecal("cache", "verify", cache, "--json").out)
    assert len(report["problems"]) == 25
    assert {problem["kind"] for problem in report["problems"]} == {"extra"}


def test_a_head_that_was_changed_is_beyond_repair(genrecal: Command, cache: Path) -> None:
    (head,) = cache.glob("teacher_head-*")
    flip_bit(head, byte=200, bit=0)
    assert genrecal("cache", "verify", cache).code == 4
    repaired = genrecal("cache", "repair", cache)
    assert repaired.code == 4
    assert head.name in repaired.facts["beyond"]
    assert "from a copy" in repaired.facts["next"]


def test_files_that_cannot_be_read_are_no_damage(
    genrecal: Command, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = LocalReader.read_into

    def read_or_fail(reader: LocalReader, *arguments: Any) -> None:
        if reader.size_bytes > 10_000:
            raise OSError(5, "Input/output error")
        read(reader, *arguments)

    monkeypatch.setattr(LocalReader, "read_into", read_or_fail)
    found = genrecal("cache", "verify", cache)
    assert found.code == 1
    assert "mend the store" in found.facts["next"]
    assert genrecal("cache", "repair", cache).code == 1
    monkeypatch.undo()
    assert genrecal("cache", "verify", cache).code == 0


def test_the_digest_that_inspect_shows_is_the_one_to_trust(genrecal: Command, cache: Path, tmp_path: Path) -> None:
    shown = genrecal("cache", "inspect", cache)
    assert (shown.code, shown.facts["snapshot"]) == (0, "0")
    digest = shown.facts["digest"]
    assert digest == snapshot_digest(str(cache))
    copy = shutil.copytree(cache, tmp_path / "copy")
    assert genrecal("cache", "verify", copy, "--trusted-digest", digest.upper()).code == 0
    build(tmp_path / "other", make_samples(4))
    refused = genrecal("cache", "verify", tmp_path / "other", "--trusted-digest", digest)
    assert refused.code == 4
    assert refused.facts["problems"].startswith("untrusted: ")
    assert "repair" not in refused.out


def test_inspect_shows_identity_origin_and_one_sample(genrecal: Command, cache: Path, started: Path) -> None:
    shown = genrecal("cache", "inspect", cache).facts
    assert shown["identity targets.topk"] == str(IDENTITY["targets"]["topk"])
    assert (shown["origin release"], shown["shards engine"]) == ("0.1.0", "test")
    sample = genrecal("cache", "inspect", cache, "--sample", "sample-1")
    assert sample.facts["hidden_states"] == "bfloat16 2 x 8"
    assert sample.facts["question_hidden_states"] == "not stored"
    assert genrecal("cache", "inspect", cache, "--sample", "nobody").code == 1
    assert genrecal("cache", "inspect", started).facts["snapshot"].startswith("none")


def test_gc_removes_what_lost_attempts_left(genrecal: Command, cache: Path) -> None:
    (kept,) = (cache / "shards").glob("00000-*")
    lost = cache / "shards" / f"00000-{'0' * 32}"
    shutil.copytree(kept, lost)
    assert genrecal("cache", "verify", cache).code == 4
    done = genrecal("cache", "gc", cache)
    assert (done.code, done.facts["removed"]) == (0, f"shards/{lost.name}")
    assert not lost.exists()
    assert genrecal("cache", "verify", cache).code == 0
    assert genrecal("cache", "gc", cache).facts["freed"] == "0 B in 0 items"


def test_gc_keeps_the_attempts_of_shards_that_are_not_committed(genrecal: Command, started: Path) -> None:
    attempt = started / "shards" / f"00001-{'0' * 32}"
    attempt.mkdir()
    done = genrecal("cache", "gc", started)
    assert done.code == 0
    assert done.facts["kept"].startswith(f"shards/{attempt.name}")
    assert attempt.exists()


def test_tier_q_is_dropped_from_a_complete_cache_only(genrecal: Command, cache: Path, started: Path) -> None:
    assert genrecal("cache", "gc", started, "--drop-question-rows").code == 3
    whole = json.loads(genrecal("cache", "status", cache, "--json").out)
    done = genrecal("cache", "gc", cache, "--drop-question-rows")
    assert done.code == 0
    smaller = json.loads(genrecal("cache", "status", cache, "--json").out)
    assert (smaller["tier_bytes"]["Q"], smaller["snapshot"]) == (0, 1)
    assert smaller["tier_bytes"]["A"] == whole["tier_bytes"]["A"]
    assert genrecal("cache", "verify", cache).code == 0
    assert open_cache(str(cache)).read(["sample-0"])[0].question_hidden_states is None


def test_diff_names_the_field_that_differs(genrecal: Command, cache: Path, tmp_path: Path) -> None:
    other = {**IDENTITY, "targets": {**IDENTITY["targets"], "question_fraction": 0.25}}
    build(tmp_path / "other", SAMPLES, identity=other)
    done = genrecal("cache", "diff", cache, tmp_path / "other")
    assert done.code == 4
    assert done.facts["identity"] == "targets.question_fraction: left 0.5, right 0.25"
    assert [line.split()[0] for line in done.out.splitlines() if "topk" in line] == []


def test_diff_compares_samples_tiers_and_completeness(
    genrecal: Command, cache: Path, started: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(cache, tmp_path / "copy")
    same = genrecal("cache", "diff", cache, copy)
    assert (same.code, same.facts["samples"]) == (0, "the same 6")
    assert genrecal("cache", "diff", cache, started).code == 3
    build(tmp_path / "part", SAMPLES[:4])
    part = genrecal("cache", "diff", cache, tmp_path / "part")
    assert (part.code, part.facts["samples only left"]) == (4, "sample-4")
    genrecal("cache", "gc", copy, "--drop-question-rows")
    dropped = genrecal("cache", "diff", cache, copy)
    assert (dropped.code, dropped.facts["tiers"]) == (4, "only one side stores Q")


@pytest.mark.parametrize(
    "arguments",
    [("status",), ("inspect",), ("inspect", "--sample", "sample-0"), ("verify",), ("repair",), ("gc",)],
)
def test_standard_output_is_nothing_but_json_on_request(
    genrecal: Command, cache: Path, arguments: tuple[str, ...]
) -> None:
    command, *options = arguments
    assert isinstance(json.loads(genrecal("cache", command, cache, *options, "--json").out), dict)
    assert json.loads(genrecal("cache", "diff", cache, cache, "--json").out)["same"] is True


def test_progress_goes_to_standard_error(genrecal: Command, cache: Path) -> None:
    assert "cache verify, full: 3/3 shards" in genrecal("cache", "verify", cache).err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("verify", "CACHE", "--levle", "full"), "did you mean '--level'?"),
        (("verify", "CACHE", "--level", "fast"), "'full', 'rows', 'quick'"),
        (("verify", "CACHE", "--trusted-digest", "abc"), "expected 64 hexadecimal digits"),
        (("gc", "CACHE", "--drop-question-row"), "did you mean '--drop-question-rows'?"),
        (("status", "CACHE", "CACHE"), "unexpected argument"),
        (("status", "ftp://host/cache"), "scheme 'ftp' is not supported"),
        (("diff", "CACHE"), "arguments are required: URI"),
        (("repair",), "arguments are required: URI"),
        (("find", "nowhere", "run.yaml"), "genrecal cache find FOLDER CONFIG"),
        (("build",), "arguments are required: CONFIG"),
        (("verfy", "CACHE"), "did you mean 'cache verify'?"),
    ],
)
def test_usage_errors_say_what_is_right(
    genrecal: Command, cache: Path, arguments: tuple[str, ...], message: str
) -> None:
    done = genrecal("cache", *(str(cache) if argument == "CACHE" else argument for argument in arguments))
    assert done.code == 2
    assert message in done.err
    assert done.out == ""


@pytest.mark.parametrize("command", ["status", "inspect", "verify", "repair", "gc"])
def test_a_place_without_a_cache_is_named(genrecal: Command, tmp_path: Path, command: str) -> None:
    done = genrecal("cache", command, tmp_path / "nothing")
    assert done.code == 1
    assert f"no cache at {tmp_path}/nothing" in done.err
