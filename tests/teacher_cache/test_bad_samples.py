"""R22: a bad sample costs itself alone, is listed with its reason, and leaves all others bit for bit as they were."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import PIL.Image
import pytest

from teacher_cache import open_cache
from teacher_cache.build_plan import open_builder
from teacher_cache.config import CacheConfig
from teacher_cache.errors import DataError
from teacher_cache.sample_file import SampleFile, scan_samples
from teacher_cache.schema import TeacherTargets
from teacher_cache.shard_worker import ShardWorker
from tests.teacher_cache.store import assert_same
from tests.teacher_cache.test_build import make_config, with_data
from tests.teacher_cache.test_samples import png

SHARDS = PER_SHARD = 4
"""Shard n has its bad sample in place n."""
Row = dict[str, Any]
MAX_LENGTH = 200


def image(kind: str, size: tuple[int, int], mode: str = "RGB", **options: Any) -> bytes:
    buffer = io.BytesIO()
    PIL.Image.new(mode, size, 90).save(buffer, kind, **options)
    return buffer.getvalue()


def row(name: str, *, answer: Any = "seven", question: Any = "<image>Which digit?", images: Any = ("good.png",)) -> Row:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"id": name, "messages": messages, "images": list(images)}


def with_image(data: bytes | None, name: str = "odd.png") -> Callable[[Path, str], Row]:
    def make(folder: Path, id_: str) -> Row:
        if data is not None:
            (folder / name).write_bytes(data)
        return row(id_, images=[name])

    return make


def with_row(**changes: Any) -> Callable[[Path, str], Row]:
    return lambda _, id_: {**row(id_), **changes}


def with_text(**changes: Any) -> Callable[[Path, str], Row]:
    return lambda _, id_: row(id_, **changes)


def with_line(line: str) -> Callable[[Path, str], str]:
    return lambda _, __: line


def linked(folder: Path, id_: str) -> Row:
    if not (folder / "link.png").is_symlink():
        (folder / "link.png").symlink_to("/etc/hostname")
    return row(id_, images=["link.png"])


TURN = {"role": "user", "content": "Which digit?"}
BAD: dict[str, tuple[Callable[[Path, str], Row | str], str]] = {
    "an image of no bytes": (with_image(b""), "corrupt-image"),
    "an image that is text": (with_image(b"no image at all"), "corrupt-image"),
    "a PNG cut in its pixels": (with_image(png(64, 64)[:-30]), "corrupt-image"),
    "a JPEG cut in its pixels": (with_image(image("JPEG", (64, 64), quality=95)[:500]), "corrupt-image"),
    "a PNG with a flipped header": (with_image(b"\x89PNG" + png()[4:12] + b"\xff" * 40), "corrupt-image"),
    "an image of 169 megapixels": (with_image(png(13_000, 13_000)), "corrupt-image"),
    "an image of 1 x 400 pixels": (with_image(png(1, 400)), "not-encodable"),
    "an image that is not there": (with_image(None, "nowhere.png"), "missing-image"),
    "an image outside the folder": (with_text(images=["../outside.png"]), "bad-row"),
    "a link that leads outside": (linked, "bad-row"),
    "an image by URL": (with_text(images=["https://example.com/a.png"]), "bad-row"),
    "a folder as an image": (with_text(images=["."]), "bad-row"),
    "a number as an image": (with_text(images=[7]), "bad-row"),
    "more images than places": (with_text(images=["good.png", "good.png"]), "bad-row"),
    "fewer images than places": (with_text(images=[]), "bad-row"),
    "an image in the answer": (with_text(answer="<image>seven", question="Which?"), "bad-row"),
    "an empty answer": (with_text(answer=""), "empty-answer"),
    "an answer of white space": (with_text(answer=" \n\t\u00a0"), "empty-answer"),
    "no answer": (with_row(messages=[TURN], images=[]), "no-answer"),
    "no messages": (with_row(messages=[], images=[]), "no-answer"),
    "messages that are text": (with_row(messages="Which digit? Seven."), "bad-row"),
    "no key `messages`": (lambda _, id_: {"id": id_, "text": "seven"}, "bad-row"),
    "an unknown role": (with_row(messages=[{"role": "critic", "content": "7"}]), "bad-row"),
    "an answer before any question": (with_row(messages=[{"role": "assistant", "content": "7"}], images=[]), "bad-row"),
    "a content of another kind": (with_text(answer=[{"type": "video", "video": "a.mp4"}]), "bad-row"),
    "a content that is a number": (with_text(answer=7), "bad-row"),
    "a text part that is a number": (with_text(answer=[{"type": "text", "text": 5}]), "bad-row"),
    "a text part of null": (with_text(question=[{"type": "text", "text": None}]), "bad-row"),
    "image bytes that are none": (with_text(images=[{"bytes": [300], "path": None}]), "bad-row"),
    "more tokens than allowed": (with_text(answer="seven " * MAX_LENGTH), "too-long"),
    "the image token in the text": (with_text(question="<image>Which <|image_pad|> digit?"), "bad-row"),
    "a line that is no JSON": (with_line('{"id": "x", "messages": ['), "bad-row"),
    "a line that is a list": (with_line("[1, 2]"), "bad-row"),
    "a line of 200,000 brackets": (with_line("[" * 200_000), "bad-row"),
    "a line of bytes that are no text": (with_line("\udcff\udcfe"), "bad-row"),
}
ODD: dict[str, Callable[[Path, str], Row | str]] = {
    "an image of 1 x 1 pixel": with_image(png(1, 1)),
    "a CMYK JPEG": with_image(image("JPEG", (16, 16), "CMYK"), "odd.jpg"),
    "a GIF with two frames": with_image(
        image("GIF", (16, 16), "P", save_all=True, append_images=[PIL.Image.new("P", (16, 16))]), "odd.gif"
    ),
    "a grey PNG of 16 bits": with_image(image("PNG", (16, 16), "I;16")),
    "right to left, combining and astral characters": with_text(answer="\u05e9\u05d1\u05e2 e\u0301 \U0001f3b2"),
    "a NUL and other controls": with_text(answer="seven\x00\x07\u200b"),
    "the end-of-turn token as text": with_text(answer="seven <|im_end|> eight"),
    "an id with strange characters": with_row(id="a/../b \u00fc\n"),
}


def write_data(path: Path, make: Callable[[Path, str], Row | str] | None) -> Path:
    lines = []
    for shard in range(SHARDS):
        for place in range(PER_SHARD):
            name = f"{shard}-{place}"
            if shard != place:
                lines.append(row(name, answer=f"The digit {name}."))
            elif make is not None:
                lines.append(make(path.parent, f"odd-{shard}"))
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_bytes("".join(f"{text}\n" for text in texts).encode(errors="surrogateescape"))
    return path


@pytest.fixture(scope="module")
def worker_config(tiny_qwen2_vl: Path, tmp_path_factory: pytest.TempPathFactory) -> CacheConfig:
    folder = tmp_path_factory.mktemp("bad")
    (folder / "good.png").write_bytes(png())
    return make_config(folder / "cache", model=tiny_qwen2_vl, data=folder / "data.jsonl").model_copy(
        update={"samples_per_shard": PER_SHARD}
    )


@pytest.fixture(scope="module")
def worker(worker_config: CacheConfig) -> ShardWorker:
    """One engine for all builds."""
    write_data(Path(worker_config.data.path), None)
    writer = open_builder(worker_config, scan_samples(worker_config.data))
    return ShardWorker(worker_config, writer=writer, identity={}, log_file=None)


def build(config: CacheConfig, worker: ShardWorker) -> None:
    table = scan_samples(config.data)
    entries = {sample.sample_id: sample for sample in table.samples}
    worker.config, worker.writer = config, open_builder(config, table)
    with SampleFile(config.data) as file:
        for shard in worker.writer.missing_shards():
            list(worker.build(shard.shard_id, file.read([entries[sample_id] for sample_id in shard.sample_ids])))
    worker.writer.complete()


@pytest.fixture(scope="module")
def clean(worker_config: CacheConfig, worker: ShardWorker) -> dict[str, TeacherTargets]:
    """What the good samples give without any other."""
    config = with_data(worker_config, max_length=MAX_LENGTH)
    config = config.model_copy(update={"uri": f"{config.uri}-clean"})
    write_data(Path(config.data.path), None)
    build(config, worker)
    cache = open_cache(config.uri)
    return {sample.sample_id: sample for sample in cache.read(cache.sample_ids)}


def built_with(
    make: Callable[[Path, str], Row | str], *, config: CacheConfig, worker: ShardWorker, uri: Path, allowed: int
) -> CacheConfig:
    write_data(Path(config.data.path), make)
    config = with_data(config, max_length=MAX_LENGTH, max_skipped_samples=allowed)
    config = config.model_copy(update={"uri": str(uri)})
    build(config, worker)
    return config


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_sample_is_left_out_and_listed(
    kind: str, clean: dict[str, TeacherTargets], worker_config: CacheConfig, worker: ShardWorker, tmp_path: Path
) -> None:
    make, reason = BAD[kind]
    config = built_with(make, config=worker_config, worker=worker, uri=tmp_path / "cache", allowed=SHARDS)
    cache = open_cache(config.uri)
    skipped = [*scan_samples(config.data).skipped, *cache.skipped]
    assert [bad.reason for bad in skipped] == [reason] * SHARDS
    assert all(bad.message and bad.sample_id for bad in skipped)
    assert set(cache.sample_ids) == clean.keys()
    for found in cache.read(cache.sample_ids):
        assert_same(found, clean[found.sample_id])


@pytest.mark.parametrize("kind", ODD)
def test_an_odd_sample_is_a_sample(
    kind: str, clean: dict[str, TeacherTargets], worker_config: CacheConfig, worker: ShardWorker, tmp_path: Path
) -> None:
    make = ODD[kind]

    def numbered(folder: Path, id_: str) -> Row | str:
        made = make(folder, id_)
        assert isinstance(made, dict)
        return {**made, "id": f"{made['id']}{id_}"}

    config = built_with(numbered, config=worker_config, worker=worker, uri=tmp_path / "cache", allowed=0)
    cache = open_cache(config.uri)
    assert len(cache) == len(clean) + SHARDS
    for found in cache.read(clean):
        assert_same(found, clean[found.sample_id])


def test_one_bad_sample_more_than_allowed_stops_the_build(worker_config: CacheConfig, tmp_path: Path) -> None:
    write_data(Path(worker_config.data.path), with_text(answer=""))
    config = with_data(worker_config, max_skipped_samples=SHARDS - 1)
    with pytest.raises(DataError, match=r"4 bad sample\(s\) .* allowed are 3:\n  odd-0: empty-answer"):
        scan_samples(config.data)


def test_the_same_id_twice_is_a_bad_row(worker_config: CacheConfig) -> None:
    write_data(Path(worker_config.data.path), lambda _, __: row("1-0"))
    table = scan_samples(with_data(worker_config, max_skipped_samples=SHARDS).data)
    assert [bad.sample_id for bad in table.skipped] == ["1-0"] * SHARDS
    print(f"R22: {len(BAD) + 1} kinds of bad samples in {SHARDS} places and {len(ODD)} odd ones: others bit-equal")
