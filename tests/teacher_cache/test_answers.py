"""Answers written by the teacher: what is asked, what is taken, what the file holds, and runs that are interrupted."""

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import yaml

from launch.cli import main
from launch.demo.digits import NUMBER_WORDS, generate_digit_vqa
from teacher_cache.answer_file import METADATA_KEY, AnswerCounts
from teacher_cache.answer_job import AnswerJob
from teacher_cache.answer_writing import (
    AnswerRequest,
    AnswerWriter,
    GeneratedAnswer,
    WrittenPart,
    WrittenSample,
)
from teacher_cache.answers_config import AnswersConfig
from teacher_cache.chat import Processor, load_processor, tokenizer_of
from teacher_cache.config import CacheConfig, DataConfig, TeacherConfig
from teacher_cache.errors import ConfigError, DataError, DataMismatch, SampleError
from teacher_cache.progress import PieceProgress
from teacher_cache.samples import parse_row, read_samples
from teacher_cache.schema import Message, Sample
from tests.reliability.processes import run_in_child
from tests.teacher_cache.test_samples import png, write_jsonl, write_parquet

Row = dict[str, Any]
MAX_LENGTH = 300
INSTRUCTION = "Describe the top row."
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 3}}}


class ScriptedEngine:
    """Answers by a function of the prompt's text and the request, two requests per step, the last come first."""

    def __init__(self, processor: Processor, script: Callable[[str, AnswerRequest], str | None]) -> None:
        self.tokenizer = tokenizer_of(processor)
        self.script = script
        self.prompts: list[str] = []
        self.requests: list[AnswerRequest] = []
        self.waiting: list[GeneratedAnswer] = []

    @property
    def num_unfinished(self) -> int:
        return len(self.waiting)

    def submit(self, request: AnswerRequest) -> None:
        prompt = self.tokenizer.decode(request.prompt_token_ids)
        text = self.script(prompt, request)
        self.prompts.append(prompt)
        self.requests.append(request)
        if text is None:
            raise SampleError("refused", sample_id=request.sample_id, reason="engine-refused")
        whole = not text.endswith("...")
        self.waiting.append(GeneratedAnswer(sample_id=request.sample_id, text=text, num_tokens=7, is_whole=whole))

    def step(self) -> list[GeneratedAnswer]:
        done, self.waiting = self.waiting[-2:], self.waiting[:-2]
        return done

    def close(self) -> None:
        pass


@pytest.fixture(scope="module")
def processor(tiny_qwen2_vl: Path) -> Processor:
    return load_processor(str(tiny_qwen2_vl))


def sample_of(*messages: Row, images: int = 0) -> Sample:
    row = {"id": f"s{images}", "messages": list(messages), "images": [png(shade=index) for index in range(images)]}
    return parse_row(row, place=0, image_root=Path())


def asked(text: str) -> Row:
    return {"role": "user", "content": text}


def said(text: str, **more: Any) -> Row:
    return {"role": "assistant", "content": text, **more}


def written(
    processor: Processor, script: Callable[[str, AnswerRequest], str | None], *samples: Sample, **config: Any
) -> tuple[tuple[WrittenSample, ...], ScriptedEngine, list[PieceProgress]]:
    engine = ScriptedEngine(processor, script)
    settings = AnswersConfig(**{"source": "-", "instruction": INSTRUCTION, "attempts": 2} | config)
    writer = AnswerWriter(engine, processor=processor, config=settings, max_length=MAX_LENGTH)
    *signs, result = writer.write(samples)
    assert isinstance(result, WrittenPart)
    return result.samples, engine, [sign for sign in signs if isinstance(sign, PieceProgress)]


REASONED = "Three and four make seven.\nAnswer: seven"


def test_very_short_answers_are_replaced_and_later_turns_see_them(processor: Processor) -> None:
    long = "It is the sum of both digits."
    sample = sample_of(
        asked("<image>Sum?"), said("seven"), asked("Why?"), said(long), asked("Sure?"), said("yes"), images=1
    )
    answers = {"Sum?": f" {REASONED}\n", "Sure?": "It is certain.\nAnswer: yes"}
    (result,), engine, signs = written(
        processor,
        lambda prompt, _: next(text for question, text in reversed(answers.items()) if question in prompt),
        sample,
    )
    assert [message.text for message in result.messages if message.role == "assistant"] == [
        REASONED, long, answers["Sure?"],
    ]  # fmt: skip
    assert result.outcomes == ("replaced", "kept", "replaced")
    assert result.original_answers == ("seven", long, "yes")
    assert [message for message in result.messages if message.role != "assistant"] == [
        message for message in sample.messages if message.role != "assistant"
    ], "questions stay as they were"
    first, second = engine.prompts
    assert first.endswith(f"Sum?\n{INSTRUCTION}<|im_end|>\n<|im_start|>assistant\n")
    assert f"{REASONED}<|im_end|>" in second
    assert second.count(INSTRUCTION) == 1
    assert [len(request.images) for request in engine.requests] == [1, 1]
    assert (signs[-1].samples, signs[-1].tokens) == (1, 14)


def test_attempts_differ_and_the_original_is_kept_when_all_fail(processor: Processor) -> None:
    samples = [sample_of(asked("Sum?"), said("seven")), sample_of(asked("<image>Sum?"), said("eight"), images=1)]
    result, engine, _ = written(
        processor,
        lambda _, request: REASONED if len(engine_seeds(request)) > 2 else "It is nine, I think.",
        *samples,
        attempts=3,
    )
    assert [one.outcomes for one in result] == [("replaced",), ("unverified",)]
    assert result[1].messages == samples[1].messages
    assert len(engine.requests) == 6
    assert len({request.seed for request in engine.requests}) == 6
    again = written(processor, lambda *_: None, *samples)[1]
    assert [request.seed for request in again.requests] == [
        next(one.seed for one in engine.requests if one.sample_id == name) for name in ("s0", "s1")
    ], "a seed follows from sample, turn and attempt"


SEEN: dict[str, set[int]] = {}


def engine_seeds(request: AnswerRequest) -> set[int]:
    """The seeds that a sample was asked with so far."""
    seeds = SEEN.setdefault(request.sample_id, set())
    seeds.add(request.seed)
    return seeds


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("Answer: seven", id="not reasoned"),
        pytest.param("A first step, and then...", id="cut off"),
        pytest.param(f"{REASONED} <image>", id="an image mark"),
        pytest.param(f"{'so ' * MAX_LENGTH}{REASONED}", id="too long for the build"),
        pytest.param(f"{'seven ' * 9} no", id="another answer"),
    ],
)
def test_answers_that_serve_no_build_are_refused(processor: Processor, text: str) -> None:
    (result,), engine, _ = written(processor, lambda *_: text, sample_of(asked("Sum?"), said("seven")))
    assert result.outcomes == ("unverified",)
    assert len(engine.requests) == 2


def test_thinking_of_the_teacher_is_not_kept(processor: Processor) -> None:
    sample = sample_of(asked("Sum?"), said("seven"))
    (result,), _, _ = written(processor, lambda *_: f"<think>hm</think>\n\n{REASONED}", sample)
    assert result.messages[-1] == Message(role="assistant", content=(REASONED,))


def test_what_is_no_plain_answer_to_a_question_stays(processor: Processor) -> None:
    sample = sample_of(
        asked("Sum?"), said("seven", reasoning_content="three and four"),
        asked("Sum?"), said("<think>hm</think>seven"),
        asked("Sum?"), said("", tool_calls=[CALL]),
        {"role": "tool", "content": "7"}, said("seven"),
    )  # fmt: skip
    (result,), engine, _ = written(processor, lambda *_: REASONED, sample)
    assert result.outcomes == ("kept",) * 4
    assert result.messages == sample.messages
    assert engine.requests == []


def test_a_refused_request_costs_its_answer_alone(processor: Processor) -> None:
    sample = sample_of(asked("Bad?"), said("seven"), asked("Good?"), said("seven"))
    (result,), _, signs = written(processor, lambda prompt, _: REASONED if "Good?" in prompt else None, sample)
    assert result.outcomes == ("unverified", "replaced")
    assert signs[-1].samples == 1


# The file


def rows() -> list[Row]:
    question = "<image>Which digit?"
    made = [{"id": f"s{n}", "messages": [asked(question), said("seven")], "images": ["a.png"]} for n in range(7)]
    made[1]["messages"] = [asked([{"type": "text", "text": "Say <image>"}, {"type": "image"}]), said(f"{REASONED}.")]
    made[2] = {
        "id": "s2",
        "messages": [asked("Sum?"), said("", tool_calls=[CALL])],
        "images": [],
        "tools": [{"name": "add"}],
    }
    made[3]["messages"].append(asked("And?"))
    made[4]["messages"][-1] = said("7", reasoning_content="hm")
    del made[5]["id"]
    made[6]["images"] = ["nowhere.png"]
    return made


@pytest.fixture
def cache(tmp_path: Path, tiny_qwen2_vl: Path) -> CacheConfig:
    (tmp_path / "a.png").write_bytes(png())
    write_jsonl(tmp_path / "source.jsonl", rows())
    return CacheConfig(
        uri=str(tmp_path / "cache"),
        teacher=TeacherConfig(model=str(tiny_qwen2_vl), dtype="float32"),
        data=DataConfig(path=str(tmp_path / "data.parquet"), max_length=MAX_LENGTH, max_skipped_samples=1),
    )


def settings(cache: CacheConfig, **changes: Any) -> AnswersConfig:
    source = str(Path(cache.data.path).with_name("source.jsonl"))
    return AnswersConfig(**{"source": source, "samples_per_part": 2} | changes)


def replaced(sample: Sample) -> WrittenSample:
    """What a teacher would make of a sample that has one plain answer."""
    is_plain = sample.messages[-1].answer == "seven"
    last = Message(role="assistant", content=(REASONED,)) if is_plain else sample.messages[-1]
    return WrittenSample(
        sample_id=sample.sample_id,
        messages=(*sample.messages[:-1], last),
        original_answers=tuple(message.text for message in sample.messages if message.role == "assistant"),
        outcomes=("replaced" if is_plain else "kept",),
    )


def run(cache: CacheConfig, answers: AnswersConfig, *, parts: int | None = None) -> AnswerCounts | None:
    """Write parts as the job does, without an engine."""
    job = AnswerJob(cache, answers=answers)
    if (counts := job.file.finished()) is None:
        with job.file.claimed():
            for part in job.file.missing_parts()[:parts]:
                job.commit(part, [replaced(sample) for sample in job.read(part)])
            if parts is not None:
                return None
            counts = job.finish()
    job.file.remove_parts()
    return counts


def test_the_file_holds_both_texts_and_changes_nothing_else(cache: CacheConfig, tmp_path: Path) -> None:
    assert run(cache, settings(cache)) == AnswerCounts(samples=6, replaced=2, unverified=0, kept=4)
    source = read_samples(cache.data.model_copy(update={"path": settings(cache).source})).samples
    found = read_samples(cache.data).samples
    assert [sample.sample_id for sample in found] == [sample.sample_id for sample in source]
    for before, after in zip(source, found, strict=True):
        if before.messages[-1].answer == "seven":
            assert after.messages == (*before.messages[:-1], Message(role="assistant", content=(REASONED,)))
            assert after.digest != before.digest
        else:
            assert after == before
        assert after.images == before.images
    table = pyarrow.parquet.read_table(cache.data.path)
    assert table["original_answers"].to_pylist()[0] == ["seven"]
    assert table["answer_outcomes"].to_pylist() == [["replaced"], *[["kept"]] * 4, ["replaced"]]
    record = json.loads(table.schema.metadata[METADATA_KEY])
    assert [(bad["sample_id"], bad["reason"]) for bad in record["skipped_rows"]] == [("s6", "missing-image")]
    assert not list(tmp_path.glob("*.parts"))


def test_images_in_parquet_are_kept(cache: CacheConfig, tmp_path: Path) -> None:
    messages = [asked("<image>Which?"), said("seven")]
    source = write_parquet(tmp_path / "source.parquet", [{"id": "s", "messages": messages, "images": [png(shade=3)]}])
    run(cache, settings(cache, source=str(source)))
    assert read_samples(cache.data).samples[0].images == (png(shade=3),)


def test_a_run_goes_on_where_it_was_and_a_finished_one_does_nothing(cache: CacheConfig, tmp_path: Path) -> None:
    answers = settings(cache)
    run(cache, answers, parts=2)
    assert AnswerJob(cache, answers=answers).file.missing_parts() == [2]
    assert run(cache, answers) == AnswerCounts(samples=6, replaced=2, unverified=0, kept=4)
    before = Path(cache.data.path).stat()
    assert run(cache, answers) == AnswerCounts(samples=6, replaced=2, unverified=0, kept=4)
    after = Path(cache.data.path).stat()
    assert (after.st_mtime_ns, after.st_ino) == (before.st_mtime_ns, before.st_ino)


def changes(cache: CacheConfig) -> Iterator[tuple[str, CacheConfig, AnswersConfig]]:
    """Every change that makes another file, by the name that a refusal gives."""
    fields = {"max_characters": 9, "instruction": "Go.", "accept": "anywhere", "attempts": 1, "temperature": 0.1,
              "max_new_tokens": 8, "seed": 1, "samples_per_part": 3}  # fmt: skip
    assert {*fields, "source"} == set(AnswersConfig.model_fields)
    for name, value in fields.items():
        yield f"settings.{name}", cache, settings(cache, **{name: value})
    other = cache.model_copy(update={"teacher": cache.teacher.model_copy(update={"dtype": "bfloat16"})})
    yield "teacher.dtype", other, settings(cache)
    longer = cache.model_copy(update={"data": cache.data.model_copy(update={"max_length": MAX_LENGTH + 1})})
    yield "processing.max_length", longer, settings(cache)
    fewer = cache.model_copy(update={"data": cache.data.model_copy(update={"max_samples": 5})})
    yield "source", fewer, settings(cache)


@pytest.mark.parametrize("parts", [1, None], ids=["begun", "finished"])
def test_other_settings_and_other_content_are_refused_by_name(cache: CacheConfig, parts: int | None) -> None:
    run(cache, settings(cache), parts=parts)
    for name, other, answers in changes(cache):
        with pytest.raises(DataMismatch, match=rf"(?s)data\.parquet.* was written from other content .*{name}: stored"):
            run(other, answers)
    run(cache, settings(cache))


def test_a_file_of_somebody_else_is_refused(cache: CacheConfig, tmp_path: Path) -> None:
    write_parquet(Path(cache.data.path), [{"id": "s", "messages": [asked("Sum?"), said("seven")]}])
    with pytest.raises(DataMismatch, match="holds no written answers"):
        run(cache, settings(cache))
    Path(cache.data.path).write_bytes(b"PAR1 but not really")
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        run(cache, settings(cache))


def test_paths_that_do_not_go_together_are_refused(cache: CacheConfig, tmp_path: Path) -> None:
    def at(path: Path) -> CacheConfig:
        return cache.model_copy(update={"data": cache.data.model_copy(update={"path": str(path)})})

    with pytest.raises(ConfigError, match="names a new Parquet file"):
        run(at(tmp_path / "data.jsonl"), settings(cache))
    with pytest.raises(ConfigError, match=r"set `cache\.data\.image_root`"):
        run(at(tmp_path / "elsewhere" / "data.parquet"), settings(cache))


def test_two_runs_do_not_write_one_file(cache: CacheConfig) -> None:
    answers = settings(cache)
    with AnswerJob(cache, answers=answers).file.claimed(), pytest.raises(DataError, match="another process is writing"):
        run(cache, answers)


def committed(cache: CacheConfig) -> dict[str, int]:
    return {path.name: path.stat().st_ino for path in Path(f"{cache.data.path}.parts").glob("part-*.parquet")}


def test_a_run_killed_at_any_step_is_taken_up_again(cache: CacheConfig, tmp_path: Path) -> None:
    answers = settings(cache)
    run(cache, answers)
    expected = Path(cache.data.path).read_bytes()
    for step in itertools.count():
        Path(cache.data.path).unlink()
        code, _ = run_in_child(partial(_run_killed, cache, answers, step=step))
        if code == 0:
            break
        assert code == -signal.SIGKILL
        if not Path(cache.data.path).exists():
            before = committed(cache)
            run(cache, answers, parts=0)
            assert committed(cache) == before, "what is committed stays as it is"
        assert run(cache, answers) == AnswerCounts(samples=6, replaced=2, unverified=0, kept=4)
        assert Path(cache.data.path).read_bytes() == expected
        assert not list(tmp_path.glob("data.parquet.*"))
    assert Path(cache.data.path).read_bytes() == expected
    assert step >= 25
    print(f"answers: killed at each of {step} steps: taken up again, the same file to the byte")


def _run_killed(cache: CacheConfig, answers: AnswersConfig, _: object, *, step: int) -> None:
    """Kill this process before its given step on the file that it writes."""
    left = step

    def watch(event: str, arguments: Sequence[Any]) -> None:
        nonlocal left
        is_ours = event in ("os.remove", "os.rmdir", "fcntl.flock") or "data.parquet" in str(arguments[:1])
        if is_ours and event in ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "fcntl.flock"):
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1

    sys.addaudithook(watch)
    run(cache, answers)


# The job, with Ray, vLLM and the demo's trained teacher

TEACHER = Path(__file__).parents[2] / "launch" / "demo" / "teacher"
STYLE = re.compile(r" (?:Answer|Reply) [^.?]*\.$")
WRONG_EVERY = 4


def digit_rows(folder: Path, *, count: int) -> list[Row]:
    """Questions about digits with an answer of one word; every fourth answer is wrong."""
    generate_digit_vqa(folder, num_train=4 * count, num_test=7, seed=0)
    made: list[Row] = []
    for row in pyarrow.parquet.read_table(folder / "train.parquet").to_pylist():
        if row["family"] in ("position", "largest", "sum") and len(made) < count:
            question = STYLE.sub("", row["messages"][-2]["content"].removeprefix("<image>"))
            number = int(row["facts"][-1]) + (len(made) % WRONG_EVERY == 0)
            messages = [asked(f"<image>{question}"), said(NUMBER_WORDS[number])]
            made.append({"id": row["id"], "messages": messages, "images": row["images"]})
    assert len(made) == count
    return made


def write_run_file(folder: Path, *, data: str, count: int) -> Path:
    """A run whose teacher writes sentences, in parts of eight samples."""
    write_parquet(folder / "source.parquet", digit_rows(folder, count=count))
    values = {
        "output_dir": str(folder / "run"),
        "cache": {
            "uri": str(folder / "cache"),
            "teacher": {"model": str(TEACHER), "dtype": "float32"},
            "data": {"path": str(folder / data), "max_length": MAX_LENGTH},
            "build": {"num_replicas": 1, "kv_cache_gib": 0.0625, "max_batched_tokens": 2048},
        },
        "answers": {
            "source": str(folder / "source.parquet"),
            "instruction": "Answer in a sentence.",
            "accept": "ending",
            "attempts": 2,
            "max_new_tokens": 48,
            "samples_per_part": 8,
        },
        "students": [{"name": "s", "model": "m"}],
    }
    path = folder / f"{data}.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def command(run_file: Path) -> list[str]:
    return [sys.executable, "-m", "launch.cli", "cache", "answers", str(run_file), "--json"]


def check_written(path: Path, *, count: int) -> AnswerCounts:
    table = pyarrow.parquet.read_table(path).to_pylist()
    assert len(table) == count
    outcomes = [row["answer_outcomes"] for row in table]
    for number, row in enumerate(table):
        (original,), text = row["original_answers"], row["messages"][-1]["content"][0]["text"]
        if row["answer_outcomes"] == ["replaced"]:
            assert len(text) > 16
            assert text.lower().rstrip(".").endswith(f" {original}")
            assert number % WRONG_EVERY, "a wrong answer was taken for verified"
        else:
            assert row["answer_outcomes"] == ["unverified"]
            assert text == original
    replaced = outcomes.count(["replaced"])
    assert replaced > count * (1 - 1 / WRONG_EVERY) / 2
    return AnswerCounts(samples=count, replaced=replaced, unverified=count - replaced, kept=0)


@pytest.mark.slow
def test_the_teacher_writes_answers_through_ray_and_vllm(tmp_path: Path) -> None:
    run_file = write_run_file(tmp_path, data="data.parquet", count=16)
    done = subprocess.run(command(run_file), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    counts = check_written(tmp_path / "data.parquet", count=16)
    assert AnswerCounts(**summary["counts"]) == counts
    assert (summary["parts"], summary["parts_written"]) == (2, 2)
    assert summary["tokens"] > 16 * 4
    print(f"answers: {counts.replaced} of 16 replaced by the demo's teacher, {counts.unverified} kept, 4 of them wrong")


@pytest.mark.nightly
@pytest.mark.timeout(7200)
def test_an_interrupted_job_makes_the_same_file(tmp_path: Path) -> None:
    subprocess.run(command(write_run_file(tmp_path, data="quiet.parquet", count=64)), check=True)
    run_file = write_run_file(tmp_path, data="data.parquet", count=64)
    parts = tmp_path / "data.parquet.parts"
    for number, code in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 3)):
        seen = len(list(parts.glob("part-*.parquet")))
        job = subprocess.Popen(command(run_file), start_new_session=True)
        while len(list(parts.glob("part-*.parquet"))) <= seen:
            assert job.poll() is None
            time.sleep(0.02)
        before = {path: path.stat().st_ino for path in parts.glob("part-*.parquet")}
        os.killpg(job.pid, number) if number == signal.SIGKILL else job.send_signal(number)
        assert job.wait() == code
        assert before.items() <= {path: path.stat().st_ino for path in parts.glob("part-*.parquet")}.items()
        assert not (tmp_path / "data.parquet").exists()
    subprocess.run(command(run_file), check=True)
    assert not parts.exists()
    assert (tmp_path / "data.parquet").read_bytes() == (tmp_path / "quiet.parquet").read_bytes()


def test_a_run_file_without_the_section_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_file = tmp_path / "run.yaml"
    cache = {"uri": "c", "teacher": {"model": "t"}, "data": {"path": "d.parquet"}}
    run_file.write_text(yaml.safe_dump({"output_dir": "o", "cache": cache, "students": [{"name": "s", "model": "m"}]}))
    assert main(["cache", "answers", str(run_file)]) == 2
    assert "has no section `answers`" in capsys.readouterr().err
