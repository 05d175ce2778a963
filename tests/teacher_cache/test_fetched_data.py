"""S10: data files whose images were URLs: what was fetched is data as any, the rest is named."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest

from launch.cli import main
from teacher_cache import fetched_data
from teacher_cache.config import DataConfig
from teacher_cache.errors import ConfigError, DataError
from teacher_cache.fetched_data import fetch_data
from teacher_cache.image_fetch import ImageFetcher
from teacher_cache.samples import read_samples
from tests.teacher_cache.image_server import HOST, IMAGE, Server, fetcher

MESSAGES = [{"role": "user", "content": "<image>What is it?"}, {"role": "assistant", "content": "A digit."}]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_fetched_data_is_as_if_the_files_had_been_there(suffix: str, port: int, pem: Path, tmp_path: Path) -> None:
    (tmp_path / "local.png").write_bytes(IMAGE)
    urls = [f"https://{HOST}/{number}.png" for number in range(70)]
    paths = [*urls, "local.png", f"https://{HOST}/gone"]
    given = [path if suffix == ".jsonl" else {"bytes": None, "path": path} for path in paths]
    rows = [{"id": f"s{number}", "messages": MESSAGES, "images": [image]} for number, image in enumerate(given)]
    rows.append({"id": "text", "messages": [{"role": "user", "content": "Hi?"}, MESSAGES[1]], "images": None})
    source, target = tmp_path / f"original{suffix}", tmp_path / f"train{suffix}"
    if suffix == ".jsonl":
        source.write_text("".join(json.dumps(row) + "\n" for row in rows) + "no row\n")
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), source)
    summary = fetch_data(source, target, fetcher=fetcher(port, pem))
    assert (summary.fetched, summary.present, list(summary.refused)) == (70, 0, [f"https://{HOST}/gone"])
    assert summary.rows == (74 if suffix == ".jsonl" else 73)
    found = read_samples(DataConfig(path=str(target), max_skipped_samples=2))
    assert [sample.sample_id for sample in found.samples] == [*(f"s{number}" for number in range(71)), "text"]
    assert len({sample.digest for sample in found.samples[:71]}) == 1
    assert found.samples[0].images == (IMAGE,)
    assert found.skipped[0].sample_id == "s71"

    Server.asked.clear()
    again = fetch_data(source, target, fetcher=fetcher(port, pem))
    assert (again.fetched, again.present) == (0, 70)
    assert Server.asked == ["/gone"]


def test_a_url_counts_once_and_only_images_are_kept(port: int, pem: Path, tmp_path: Path) -> None:
    good, bad = f"https://{HOST}/image.png", f"https://{HOST}/no-image"
    rows: list[Any] = [{"images": [good]} for _ in range(70)]
    rows += [{"images": [bad]}, {"images": 5}, {"images": good}, {"images": {"path": good}}, []]
    source, target = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary = fetch_data(source, target, fetcher=fetcher(port, pem))
    assert (summary.rows, summary.fetched, summary.present) == (75, 1, 0)
    assert summary.refused == {bad: "an image of 0 bytes is none that Pillow knows"}
    written = [json.loads(line) for line in target.read_text().splitlines()]
    assert written[70:] == rows[70:]
    assert [path.name for path in (tmp_path / "b-images").iterdir()] == [Path(written[0]["images"][0]).name]


@pytest.mark.parametrize("content", [None, b"no Parquet"])
def test_a_source_that_cannot_be_read_leaves_nothing(content: bytes | None, tmp_path: Path) -> None:
    source, target = tmp_path / "a.parquet", tmp_path / "b.parquet"
    if content is not None:
        source.write_bytes(content)
    before = list(tmp_path.iterdir())
    with pytest.raises(DataError, match=r"a\.parquet"):
        fetch_data(source, target, fetcher=ImageFetcher(hosts=frozenset(), max_bytes=1, timeout_s=1, attempts=1))
    assert list(tmp_path.iterdir()) == before


def test_the_written_file_is_durable_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target, steps = tmp_path / "a.jsonl", tmp_path / "b.jsonl", []
    source.write_text("{}\n")
    monkeypatch.setattr(fetched_data, "sync_file", lambda path: steps.append((path.read_bytes(), target.exists())))
    monkeypatch.setattr(fetched_data, "sync_folder", lambda path: steps.append((path, target.exists())))
    fetch_data(source, target, fetcher=ImageFetcher(hosts=frozenset(), max_bytes=1, timeout_s=1, attempts=1))
    assert steps == [(b"{}\n", False), (tmp_path, True)]


def test_the_command_names_what_it_did_not_fetch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    url = "https://other.example.org/image.png?token=canary-123456"
    source.write_text(json.dumps({"id": "a", "messages": MESSAGES, "images": [url]}) + "\n")
    command = ["data", "fetch", str(source), str(target)]
    assert main([*command, "--host", HOST]) == 3
    printed = capsys.readouterr().out
    assert "the host other.example.org is not among those that are allowed" in printed
    assert "canary" not in printed
    assert main([*command, "--host", HOST, "--json"]) == 3
    printed = capsys.readouterr().out
    assert json.loads(printed)["refused"][0]["url"] == url.partition("?")[0]
    assert "canary" not in printed
    assert json.loads(target.read_text())["images"] == [url]
    assert main(command) == 2
    assert main([*command, "--host", HOST, "--attempts", "0"]) == 2
    assert main([*command, "--host", f"https://{HOST}/"]) == 2
    with pytest.raises(ConfigError, match="must lie beside"):
        fetch_data(
            source,
            tmp_path / "c" / "b.jsonl",
            fetcher=ImageFetcher(hosts=frozenset(), max_bytes=1, timeout_s=1, attempts=1),
        )
