import hashlib
import io
import json
from pathlib import Path
from typing import Any

import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from teacher_cache.config import DataConfig
from teacher_cache.errors import DataError, SampleError
from teacher_cache.samples import decode_image, parse_row, read_samples
from teacher_cache.schema import Message


def png(width: int = 16, height: int = 16, *, shade: int = 100) -> bytes:
    buffer = io.BytesIO()
    PIL.Image.new("L", (width, height), shade).save(buffer, "PNG")
    return buffer.getvalue()


def row(
    name: str, *, answer: str = "seven", images: Any = None, question: str = "<image>Which digit?"
) -> dict[str, Any]:
    return {
        "id": name,
        "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}],
        "images": [png()] if images is None else images,
    }


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in rows))
    return path


def test_parquet_and_jsonl_give_the_same_samples(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png())
    typed = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Which digit?"}]}
    as_path = row("x", images=["a.png"]) | {"messages": [typed, {"role": "assistant", "content": "seven"}]}
    from_jsonl = read_samples(DataConfig(path=str(write_jsonl(tmp_path / "a.jsonl", [as_path]))))
    from_parquet = read_samples(DataConfig(path=str(write_parquet(tmp_path / "a.parquet", [row("x")]))))
    assert from_jsonl.samples == from_parquet.samples
    assert from_jsonl.samples[0].messages[0].content == (None, "Which digit?")


def test_digest_follows_content_and_not_the_id_or_path(tmp_path: Path) -> None:
    rows = [row("a"), row("b"), row("c", answer="eight"), row("d", images=[png(shade=101)])]
    digests = [
        s.digest for s in read_samples(DataConfig(path=str(write_parquet(tmp_path / "a.parquet", rows)))).samples
    ]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3


BAD_ROWS = {
    "missing-image": row("bad", images=["nowhere.png"]),
    "empty-answer": row("bad", answer="  ", images=[{"path": "g.png"}]),
    "no-answer": {"id": "bad", "messages": [{"role": "user", "content": "Hello"}], "images": []},
    "bad-row": {"id": "bad", "text": "Hello"},
}


@pytest.mark.parametrize("reason", BAD_ROWS)
def test_a_bad_row_stops_the_read_or_is_skipped_and_listed(tmp_path: Path, reason: str) -> None:
    rows = [row("good-1", images=[{"path": "g.png"}]), BAD_ROWS[reason], row("good-2", images=[{"path": "g.png"}])]
    (tmp_path / "g.png").write_bytes(png())
    path = str(write_jsonl(tmp_path / "a.jsonl", rows))
    with pytest.raises(DataError, match=f"bad: {reason}"):
        read_samples(DataConfig(path=path))
    read = read_samples(DataConfig(path=path, max_skipped_samples=1))
    assert [sample.sample_id for sample in read.samples] == ["good-1", "good-2"]
    assert [(bad.sample_id, bad.reason) for bad in read.skipped] == [("bad", reason)]


@pytest.mark.parametrize(
    ("images", "reason"),
    [
        ([b"not an image"], "corrupt-image"),
        ([], "bad-row"),
        (["../secret.png"], "bad-row"),
        (["/etc/passwd"], "bad-row"),
        (["https://example.com/a.png"], "bad-row"),
    ],
)
def test_unusable_images_are_named(tmp_path: Path, images: list[Any], reason: str) -> None:
    path = write_parquet(tmp_path / "a.parquet", [row("bad", images=images)])
    with pytest.raises(DataError, match=f"bad: {reason}"):
        read_samples(DataConfig(path=str(path)))


@pytest.mark.parametrize("error", [RuntimeError("Missing or empty image item"), NotImplementedError("a codec")])
def test_an_image_that_pillow_fails_at_is_skipped_and_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    opened, bad = PIL.Image.open, png(shade=1)

    def open_or_fail(file: io.BytesIO) -> PIL.Image.Image:
        if file.getvalue() == bad:
            raise error
        return opened(file)

    monkeypatch.setattr(PIL.Image, "open", open_or_fail)
    path = write_parquet(tmp_path / "a.parquet", [row("good"), row("bad", images=[bad])])
    read = read_samples(DataConfig(path=str(path), max_skipped_samples=1))
    assert [sample.sample_id for sample in read.samples] == ["good"]
    assert [(bad.sample_id, bad.reason) for bad in read.skipped] == [("bad", "corrupt-image")]


@pytest.mark.parametrize("error", [RuntimeError("decoder error"), NotImplementedError("a codec")])
def test_an_image_that_pillow_fails_to_decode_is_named(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(PIL.Image.Image, "convert", fail)
    with pytest.raises(SampleError, match=f"{type(error).__name__}") as caught:
        decode_image(png(), sample_id="odd")
    assert (caught.value.sample_id, caught.value.reason) == ("odd", "corrupt-image")


def test_duplicate_ids_are_bad_rows(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", [row("same"), row("same", answer="nine")])
    with pytest.raises(DataError, match="the id occurs twice"):
        read_samples(DataConfig(path=str(path)))


def test_an_id_is_what_is_given_and_the_digest_where_none_is(tmp_path: Path) -> None:
    ids = (0, 7, 0.5, "x", "", None)
    talks = [{**talk({"role": "assistant", "content": f"{number}"}), "id": id_} for number, id_ in enumerate(ids)]
    samples = read_samples(DataConfig(path=str(write_jsonl(tmp_path / "a.jsonl", talks)))).samples
    given = [sample.sample_id for sample in samples]
    assert given == ["0", "7", "0.5", "x", samples[4].digest[:32], samples[5].digest[:32]]


@pytest.mark.parametrize("where", ["row", "id", "role", "arguments"])
def test_a_row_that_is_nested_too_deeply_is_bad(where: str) -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    call = {"name": "add", "arguments": {"a": deep if where == "arguments" else 1}}
    question = {"role": deep if where == "role" else "user", "content": "Sum?"}
    row = {
        "id": deep if where == "id" else "x",
        "messages": [question, {"role": "assistant", "content": "", "tool_calls": [call]}],
    }
    with pytest.raises(SampleError, match="the row at 3 is nested too deeply") as raised:
        parse_row(deep if where == "row" else row, place=3, image_root=Path())
    assert (raised.value.reason, raised.value.sample_id) == ("bad-row", "row-3")


def test_a_truncated_image_is_found_when_decoded() -> None:
    with pytest.raises(SampleError) as caught:
        decode_image(png(64, 64)[:-30], sample_id="torn")
    assert (caught.value.sample_id, caught.value.reason) == ("torn", "corrupt-image")


def test_a_decompression_bomb_is_refused_from_its_header() -> None:
    with pytest.raises(SampleError, match="exceeds 89478485 pixels"):
        decode_image(png(13_000, 13_000), sample_id="bomb")


def test_unknown_file_kind_and_missing_file(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("id,text\n")
    with pytest.raises(DataError, match=r"neither \.parquet nor \.jsonl"):
        read_samples(DataConfig(path=str(tmp_path / "a.csv")))
    with pytest.raises(DataError, match="no data file"):
        read_samples(DataConfig(path=str(tmp_path / "b.parquet")))


CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 3}}}
CALLING = {"role": "assistant", "content": None, "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": "7"}


def talk(*messages: Any, **columns: Any) -> dict[str, Any]:
    return {"id": "x", "messages": [{"role": "user", "content": "Sum?"}, *messages], "images": [], **columns}


def test_tool_calls_come_as_records_or_as_json_text(tmp_path: Path) -> None:
    as_text = {"function": {"name": "add", "arguments": json.dumps({"a": 3})}}
    forms = [[CALL], [as_text], [{"name": "add", "arguments": {"a": 3}}], json.dumps([CALL])]
    tool = {"type": "function", "function": {"name": "add"}}
    lines = [
        talk({**CALLING, "tool_calls": form}, RESULT, {"role": "assistant", "content": "7"}, tools=tools)
        | {"id": f"{n}"}
        for n, (form, tools) in enumerate(zip(forms, [[tool], json.dumps([tool])] * 2, strict=True))
    ]
    samples = read_samples(DataConfig(path=str(write_jsonl(tmp_path / "a.jsonl", lines)))).samples
    assert len({(sample.messages, sample.tools, sample.digest) for sample in samples}) == 1
    (call,) = samples[0].messages[1].tool_calls
    assert (call.name, json.loads(call.arguments), json.loads(samples[0].tools)) == ("add", {"a": 3}, [tool])


def test_thinking_tool_calls_and_tools_are_content_and_plain_samples_keep_their_digest(tmp_path: Path) -> None:
    answer = {"role": "assistant", "content": "seven"}
    lines = [
        talk(answer),
        talk({**answer, "reasoning_content": "three and four"}),
        talk({**answer, "reasoning_content": "four and three"}),
        talk({**answer, "tool_calls": [CALL]}),
        talk({**answer, "tool_calls": [CALL, CALL]}),
        talk(answer, tools=[{"name": "add"}]),
    ]
    lines = [line | {"id": f"{number}"} for number, line in enumerate(lines)]
    samples = read_samples(DataConfig(path=str(write_jsonl(tmp_path / "a.jsonl", lines)))).samples
    assert len({sample.digest for sample in samples}) == len(lines)
    plain = '{"messages":[["user",["Sum?"]],["assistant",["seven"]]],"images":[]}'
    assert samples[0].digest == hashlib.sha256(plain.encode()).hexdigest()
    assert [sample.messages[1].thinking for sample in samples[:3]] == ["", "three and four", "four and three"]


def test_the_answer_is_what_follows_the_thinking() -> None:
    message = Message(role="assistant", content=("<think>\nthree\n</think>\n\n", " seven "))
    assert (message.thinking, message.answer, message.text) == ("three", "seven", "<think>\nthree\n</think>\n\n seven ")
    assert Message(role="assistant", content=(" seven ",)).answer == "seven"


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([{"role": "assistant", "content": "<think>hm</think> "}], "empty-answer"),
        ([{"role": "assistant", "content": "", "reasoning_content": "hm"}], "empty-answer"),
        ([{"role": "assistant", "content": "", "tool_calls": []}], "empty-answer"),
        ([{"role": "assistant", "content": None}], "bad-row"),
        ([{"role": "assistant", "content": "7", "reasoning_content": ["hm"]}], "bad-row"),
        ([{**CALLING, "tool_calls": [{"name": "add", "arguments": "[1]"}]}], "bad-row"),
        ([{**CALLING, "tool_calls": [{"name": "add", "arguments": "{"}]}], "bad-row"),
        ([{**CALLING, "tool_calls": [{"name": " ", "arguments": {}}]}], "bad-row"),
        ([{**CALLING, "tool_calls": [{"arguments": {}}]}], "bad-row"),
        ([{**CALLING, "tool_calls": "add(3)"}], "bad-row"),
        ([{**RESULT, "tool_calls": [CALL]}, {"role": "assistant", "content": "7"}], "bad-row"),
    ],
)
def test_thinking_and_tool_calls_of_other_forms_are_named(tmp_path: Path, messages: list[Any], reason: str) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [talk(*messages)])
    with pytest.raises(DataError, match=f"x: {reason}"):
        read_samples(DataConfig(path=str(path)))
    tools = talk({"role": "assistant", "content": "7"}, tools=["add"])
    with pytest.raises(DataError, match="x: bad-row: `tools`"):
        read_samples(DataConfig(path=str(write_jsonl(tmp_path / "b.jsonl", [tools]))))
