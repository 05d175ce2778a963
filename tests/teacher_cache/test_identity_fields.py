"""R11: a run whose teacher, processing, targets or data differ in anything that decides a cache's content is refused.

From the run file of a user to the refusal; no teacher runs.
"""

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from launch.run_config import load_run_config
from teacher_cache import build_plan
from teacher_cache.errors import CacheMismatch
from teacher_cache.samples import read_samples
from teacher_cache.writer import CacheWriter

RUN_FILE, MODEL, DATA, IMAGES = "run.yaml", "model", "data.jsonl", "images"
VALUE = r"\"?[0-9a-f]{64}\"?|nothing|\"\w+\"|[\d.]+"


@dataclass(frozen=True)
class Project:
    """What a user has: a run file, a teacher's checkpoint, conversations and images."""

    folder: Path

    def open(self, *arguments: str) -> CacheWriter:
        """Create the cache of the run file, or go on with it, as `genrecal cache build` does before it starts Ray."""
        config = load_run_config(self.folder / RUN_FILE, arguments).cache
        return build_plan.open_builder(config, read_samples(config.data))

    def edit_run(self, section: str, **changes: object) -> None:
        run = yaml.safe_load((self.folder / RUN_FILE).read_text())
        run["cache"][section] |= changes
        (self.folder / RUN_FILE).write_text(yaml.safe_dump(run))

    def edit_json(self, name: str, **changes: object) -> None:
        path = self.folder / MODEL / name
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    def rows(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / DATA).read_text().splitlines()]

    def write_rows(self, rows: list[dict[str, Any]]) -> None:
        (self.folder / DATA).write_text("".join(json.dumps(row) + "\n" for row in rows))


def conversation(number: int) -> dict[str, Any]:
    turns = [("<image>Which digit is the largest?", "seven"), ("Is any digit repeated?", "no")]
    messages = [{"role": "system", "content": "Answer with one word."}]
    for question, answer in turns:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"id": f"row-{number}", "messages": messages, "images": [f"{IMAGES}/{number}.png"]}


@pytest.fixture(scope="module")
def template(tiny_qwen2_vl: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose cache has been created."""
    folder = tmp_path_factory.mktemp("identity") / "project"
    shutil.copytree(tiny_qwen2_vl, folder / MODEL)
    (folder / IMAGES).mkdir()
    for number in range(3):
        Image.new("RGB", (16, 16), (40 * number, 0, 0)).save(folder / IMAGES / f"{number}.png")
    Project(folder).write_rows([conversation(number) for number in range(3)])
    run = {
        "output_dir": str(folder),
        "cache": {
            "uri": str(folder / "cache"),
            "teacher": {"model": str(folder / MODEL), "dtype": "float32"},
            "data": {"path": str(folder / DATA), "max_length": 512},
            "targets": {"topk": 8, "question_fraction": 0.5},
            "build": {"engine": "transformers"},
            "samples_per_shard": 2,
        },
        "students": [{"name": "student", "model": str(folder / MODEL)}],
    }
    (folder / RUN_FILE).write_text(yaml.safe_dump(run))
    return folder


@pytest.fixture
def project(template: Path, tmp_path: Path) -> Project:
    """A copy of the project at another place, whose cache has been created."""
    folder = Path(shutil.copytree(template, tmp_path / "project"))
    run_file = folder / RUN_FILE
    run_file.write_text(run_file.read_text().replace(str(template), str(folder)))
    project = Project(folder)
    assert len(project.open().missing_shards()) == 2
    return project


def change_a_byte(path: Path, *, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def change_weights(project: Project) -> None:
    change_a_byte(project.folder / MODEL / "model.safetensors", at=-1)


def change_tokenizer(project: Project) -> None:
    tokenizer = project.folder / MODEL / "tokenizer.json"
    text = tokenizer.read_text()
    tokenizer.write_text(text.replace("<|image_pad|>", "<|image_bad|>"))


def change_template(project: Project) -> None:
    path = project.folder / MODEL / "chat_template.jinja"
    path.write_text("{# a system prompt of its own #}" + path.read_text())


def add_file(name: str, content: str) -> Callable[[Project], None]:
    def add(project: Project) -> None:
        path = project.folder / MODEL / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(content)

    return add


def change_processor(project: Project) -> None:
    name = "processor_config.json"
    settings = json.loads((project.folder / MODEL / name).read_text())
    settings["image_processor"]["size"]["longest_edge"] //= 2
    project.edit_json(name, **settings)


def in_run(section: str, **changes: object) -> Callable[[Project], None]:
    return lambda project: project.edit_run(section, **changes)


def in_row(change: Callable[[dict[str, Any]], object]) -> Callable[[Project], None]:
    def edit(project: Project) -> None:
        rows = project.rows()
        change(rows[1])
        project.write_rows(rows)

    return edit


def swap_questions(row: dict[str, Any]) -> None:
    first, second = row["messages"][1:3], row["messages"][3:5]
    row["messages"][1:5] = second + first


def move_the_image(row: dict[str, Any]) -> None:
    row["messages"][1]["content"] = row["messages"][1]["content"].removeprefix("<image>") + "<image>"


FIELDS: dict[str, tuple[str, Callable[[Project], None]]] = {
    "weights, one byte": ("teacher.weights", change_weights),
    "config.json": ("teacher.config", lambda project: project.edit_json("config.json", rms_norm_eps=1e-5)),
    "dtype": ("teacher.dtype", in_run("teacher", dtype="bfloat16")),
    "quantization beside config.json": ("teacher.quantization", add_file("quantize_config.json", '{"bits": 4}')),
    "tokenizer": ("processing.tokenizer", change_tokenizer),
    "another form of tokenizer": ("processing.tokenizer", add_file("tekken.json", "{}")),
    "image size": ("processing.processor", change_processor),
    "chat template and its system prompt": ("processing.chat_template", change_template),
    "additional template": ("processing.chat_template", add_file("additional_chat_templates/tools.jinja", "{{ x }}")),
    "max_length": ("processing.max_length", in_run("data", max_length=513)),
    "top-k": ("targets.topk", in_run("targets", topk=9)),
    "question fraction": ("targets.question_fraction", in_run("targets", question_fraction=0.6)),
    "codec": ("codec", in_run("targets", codec="fp8")),
    "system prompt": ("row-1", in_row(lambda row: row["messages"][0].update(content="Answer with two word."))),
    "question of the same length": (
        "row-1",
        in_row(lambda row: row["messages"][3].update(content="Is any digit repeatee?")),
    ),
    "answer": ("row-1", in_row(lambda row: row["messages"][-1].update(content="No"))),
    "question order": ("row-1", in_row(swap_questions)),
    "role": ("row-1", in_row(lambda row: row["messages"][0].update(role="user"))),
    "place of the image": ("row-1", in_row(move_the_image)),
    "another image": ("row-1", in_row(lambda row: row.update(images=[f"{IMAGES}/2.png"]))),
    "image bytes of the same length": (
        "row-1",
        lambda project: change_a_byte(project.folder / IMAGES / "1.png", at=-1),
    ),
}
"""What is changed, and the field or sample that the refusal must name."""


@pytest.mark.parametrize("name", FIELDS)
def test_a_change_of_content_is_refused_by_name(project: Project, name: str) -> None:
    field, change = FIELDS[name]
    sizes = {path: path.stat().st_size for path in project.folder.rglob("*") if path.is_file()}
    change(project)
    if "one byte" in name or "same length" in name:
        assert {path: path.stat().st_size for path in sizes} == sizes
    before = sorted((project.folder / "cache").rglob("*"))
    with pytest.raises(CacheMismatch) as caught:
        project.open()
    lines = [line.strip() for line in str(caught.value).splitlines() if ": stored " in line]
    assert [re.sub(rf": stored ({VALUE}), asked ({VALUE})", "", line) for line in lines] == [field]
    stored, asked = lines[0].removeprefix(f"{field}: stored ").split(", asked ")
    assert stored != asked
    assert caught.value.exit_code == 4
    assert sorted((project.folder / "cache").rglob("*")) == before, "a refused run leaves something in the cache"
    print(f"R11: {name}: refused, {field} named with both values")


@pytest.mark.parametrize("name", ["TAP", "SPANS_VERSION"])
def test_a_change_of_our_own_rules_is_refused(project: Project, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_plan, name, "other")
    with pytest.raises(CacheMismatch, match=rf'{name.lower()}: stored \S+, asked "other"'):
        project.open()
    print(f"R11: {name}: refused")


def test_code_that_comes_with_the_checkpoint_is_content(project: Project) -> None:
    shutil.rmtree(project.folder / "cache")
    add_file("modeling_own.py", "# first")(project)
    project.edit_run("teacher", trust_remote_code=True)
    project.open()
    add_file("modeling_own.py", "# other")(project)
    with pytest.raises(CacheMismatch, match=r'teacher\.code: stored "[0-9a-f]{64}", asked "[0-9a-f]{64}"'):
        project.open()
    print("R11: code of the checkpoint: refused, teacher.code named with both values")


def touch_all(project: Project) -> None:
    for path in project.folder.rglob("*"):
        os.utime(path, (1, 1))


def move(project: Project) -> None:
    """Rename the checkpoint, the data file and the images' folder; the cache stays."""
    (project.folder / MODEL).rename(project.folder / "teacher")
    (project.folder / "elsewhere").mkdir()
    (project.folder / IMAGES).rename(project.folder / "elsewhere" / IMAGES)
    (project.folder / DATA).rename(project.folder / "elsewhere" / "renamed.jsonl")
    project.edit_run("teacher", model=str(project.folder / "teacher"))
    project.edit_run("data", path=str(project.folder / "elsewhere" / "renamed.jsonl"))


def describe_differently(project: Project) -> None:
    project.edit_json("config.json", transformers_version="0.0", _name_or_path="elsewhere")
    add_file("README.md", "a note")(project)
    add_file("script.py", "# nobody trusts it")(project)


NO_CONTENT: dict[str, Callable[[Project], None]] = {
    "nothing": lambda project: None,
    "file dates": touch_all,
    "paths": move,
    "notes of the checkpoint": describe_differently,
    "engine": in_run("build", engine="vllm"),
    "parallel layout": in_run("build", num_replicas=4, tensor_parallel_size=8, max_batched_tokens=1024),
    "compression": in_run("build", compression="zstd"),
    "skip budget": in_run("data", max_skipped_samples=3),
    "row order": lambda project: project.write_rows(project.rows()[::-1]),
    "fewer rows": lambda project: project.write_rows(project.rows()[1:]),
}


@pytest.mark.parametrize("name", NO_CONTENT)
def test_what_decides_no_content_is_no_reason_to_refuse(
    project: Project, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = project.folder / "cache"
    files = {path: path.read_bytes() for path in cache.rglob("*") if path.is_file()}
    NO_CONTENT[name](project)
    monkeypatch.setattr(build_plan, "engine_version", lambda engine: "99.0")
    writer = project.open("--cache.samples-per-shard", "3")
    assert [shard.shard_id for shard in writer.missing_shards()] == ["shard-000000", "shard-000001"]
    assert {path: path.read_bytes() for path in cache.rglob("*") if path.is_file()} == files
    print(f"R11: {name}: the cache is reused")
