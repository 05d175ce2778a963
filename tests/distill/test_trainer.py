"""Whole runs in this process on the plain-torch backend: stages, resume, export."""

import itertools
import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from distill import step
from distill.metrics import learning_rate
from distill.student import load_student, name_parts
from distill.trainer import train_student
from teacher_cache.chat import load_processor
from teacher_cache.config import CacheConfig
from teacher_cache.errors import ConfigError
from teacher_cache.reader import TeacherCache
from teacher_cache.schema import TeacherHead
from tests.distill.small_cache import build_small_cache, write_data
from tests.distill.small_runs import (
    GAPS,
    STAGE,
    numbers,
    read_metrics,
    student_config,
    train_config,
)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, tiny_qwen2_vl: Path) -> CacheConfig:
    folder = tmp_path_factory.mktemp("trainer")
    data = write_data(folder / "data", num_samples=13, text_only=(3, 9), multi_turn=(2, 7))
    return build_small_cache(folder, teacher=tiny_qwen2_vl, data=data, without_question_rows=("s001", "s005"))


def test_what_is_drawn_on_the_cpu_is_seeded_beside_a_gpu_too(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.Generator()
    monkeypatch.setattr(torch.cuda, "default_generators", (gpu,))
    step._seed_dropout(7, device=torch.device("cuda", 0))
    assert torch.default_generator.initial_seed() == gpu.initial_seed() == 7


def moved(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


def weights(path: Path) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in load_student(path, dtype="float32").named_parameters()}


@pytest.mark.parametrize("family", ["tiny_qwen2_vl", "tiny_internvl", "tiny_llava"])
def test_every_stage_moves_exactly_its_parts_and_exports_a_student(
    cache: CacheConfig, family: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    base = request.getfixturevalue(family)
    train_student(cache=cache, student=student_config(base), train=train_config(), output_dir=tmp_path)
    training = tmp_path / "training" / "tiny"
    exports = [base, *(training / stage / "export" for stage in ("align", "distill", "finetune"))]
    states = [weights(path) for path in exports]
    parts = name_parts(load_student(base, dtype="float32"))
    names = {part: {name for name in parts if parts[name] == part} for part in parts.values()}
    assert moved(states[0], states[1]) == set()
    assert moved(states[1], states[2]) == names["body"]
    assert moved(states[2], states[3]) == names["body"] | names["embeddings"] | names["head"] | names["projector"]
    recalibrators = [load_file(training / stage / "recalibrator.safetensors") for stage in ("align", "distill")]
    assert moved(*recalibrators) == set(recalibrators[0])
    assert not (training / "finetune" / "recalibrator.safetensors").exists()
    _check_published(tmp_path / "students" / "tiny", base)
    for stage in ("align", "distill"):
        first = load_file(training / stage / "features_first.safetensors")
        last = load_file(training / stage / "features_last.safetensors")
        assert {name: rows.shape[0] for name, rows in first.items()} == dict.fromkeys(("z_s", "r_s", "z_l", "r_l"), 11)
        assert torch.equal(first["z_l"], last["z_l"])
        assert not torch.equal(first["r_s"], last["r_s"])


def _check_published(path: Path, base: Path) -> None:
    own = {name for file in path.glob("*.safetensors") for name in load_file(file)}
    original = {name for file in base.glob("*.safetensors") for name in load_file(file)}
    assert own == original
    assert not [file.name for file in path.rglob("*") if "recalibrator" in file.name]
    processor = load_processor(str(path))
    assert processor.chat_template == load_processor(str(base)).chat_template
    model = transformers.AutoModelForImageTextToText.from_pretrained(path)
    prompt = processor.apply_chat_template([{"role": "user", "content": "Hi"}], add_generation_prompt=True)
    inputs = processor(text=[prompt], return_tensors="pt")
    assert model.generate(**inputs, max_new_tokens=3, do_sample=False).shape[1] > inputs["input_ids"].shape[1]
    config, original_config = (json.loads((folder / "config.json").read_text()) for folder in (path, base))
    assert config == original_config


def test_metrics_of_each_stage(cache: CacheConfig, tiny_llava: Path, tmp_path: Path) -> None:
    train_student(cache=cache, student=student_config(tiny_llava), train=train_config(), output_dir=tmp_path)
    always = {
        "global_step",
        "train/loss",
        "optim/lr",
        "optim/grad_norm",
        "data/wait_fraction",
        "throughput/tokens_per_s",
    }
    distillation = {"train/ce_loss", "train/kl_loss", "train/boundary_ce", "train/rest_ce"}
    expected = {
        "align": distillation | {"train/regularization_loss"},
        "distill": distillation | {"train/sft_loss"},
        "finetune": {"train/sft_loss"},
    }
    for stage, names in expected.items():
        records = read_metrics(tmp_path, stage)
        assert [record["global_step"] for record in records] == [1, 2, 3]
        for record in records:
            assert always | names <= set(record)
            losses = {name for name in record if name.startswith("train/")}
            assert losses - GAPS == names | {"train/loss"}
        with_gap = [record["global_step"] for record in records if "train/question_shuffle_gap" in record]
        assert with_gap == ([] if stage == "finetune" else [2, 3])
        assert records[0]["optim/lr"] == pytest.approx(1e-3)
        assert records[-1]["optim/lr"] == pytest.approx(1e-5)


def test_micro_batches_do_not_change_the_update(cache: CacheConfig, tiny_internvl: Path, tmp_path: Path) -> None:
    runs = []
    for size in (1, 6):
        stage = STAGE | {"micro_batch_size": size}
        config = train_config(align=stage, distill=stage, finetune=stage)
        output_dir = tmp_path / str(size)
        train_student(cache=cache, student=student_config(tiny_internvl), train=config, output_dir=output_dir)
        runs.append([numbers(read_metrics(output_dir, stage)) for stage in ("align", "distill", "finetune")])
    for one, six in zip(*runs, strict=True):
        for left, right in zip(one, six, strict=True):
            right = {name: value for name, value in right.items() if name not in GAPS}
            assert left == pytest.approx(right, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("method", ["sft", "kd", "uld"])
def test_baselines_have_no_align_stage(method: str, cache: CacheConfig, tiny_qwen2_vl: Path, tmp_path: Path) -> None:
    student = student_config(tiny_qwen2_vl, method=method)
    with pytest.raises(ConfigError, match="no stage align"):
        train_student(cache=cache, student=student, train=train_config(), output_dir=tmp_path, stages=["align"])
    train_student(cache=cache, student=student, train=train_config(), output_dir=tmp_path)
    assert sorted(path.parent.name for path in (tmp_path / "training" / "tiny").glob("*/DONE.json")) == [
        "distill",
        "finetune",
    ]
    record = read_metrics(tmp_path, "distill")[0]
    assert {name for name in record if name.startswith("train/")} == {"train/loss", "train/sft_loss"} | (
        set() if method == "sft" else {f"train/{method}_loss"}
    )
    assert "train/ce_loss" not in record
    assert (tmp_path / "students" / "tiny" / "config.json").exists()


def test_a_stage_needs_the_one_before_it(cache: CacheConfig, tiny_llava: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="align"):
        train_student(
            cache=cache,
            student=student_config(tiny_llava),
            train=train_config(),
            output_dir=tmp_path,
            stages=["distill"],
        )


def test_stages_one_by_one_equal_all_at_once(cache: CacheConfig, tiny_llava: Path, tmp_path: Path) -> None:
    student = student_config(tiny_llava)
    train_student(cache=cache, student=student, train=train_config(), output_dir=tmp_path / "all")
    for stage in ("align", "distill", "finetune"):
        assert not (tmp_path / "single" / "students").exists()
        train_student(
            cache=cache, student=student, train=train_config(), output_dir=tmp_path / "single", stages=[stage]
        )
    for stage in ("align", "distill", "finetune"):
        assert numbers(read_metrics(tmp_path / "single", stage)) == numbers(read_metrics(tmp_path / "all", stage))
    assert moved(weights(tmp_path / "all/students/tiny"), weights(tmp_path / "single/students/tiny")) == set()


def interrupt_after(path: Path, *, lines: int) -> None:
    """Send this process SIGTERM once a file has so many lines."""

    def watch() -> None:
        while not path.exists() or len(path.read_text().splitlines()) < lines:
            time.sleep(0.002)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def test_resume_after_sigterm_is_bit_identical(cache: CacheConfig, tiny_internvl: Path, tmp_path: Path) -> None:
    student, train = student_config(tiny_internvl), train_config(align=STAGE | {"max_steps": 40, "learning_rate": 1e-2})
    whole, halted = tmp_path / "whole", tmp_path / "halted"
    train_student(cache=cache, student=student, train=train, output_dir=whole, stages=["align"])
    interrupt_after(halted / "training/tiny/align/metrics.jsonl", lines=3)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stopped:
        train_student(cache=cache, student=student, train=train, output_dir=halted, stages=["align"])
    assert stopped.value.code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == before
    done_before = len(read_metrics(halted, "align"))
    assert 3 <= done_before < 40
    train_student(cache=cache, student=student, train=train, output_dir=halted, stages=["align"])
    assert numbers(read_metrics(halted, "align")) == numbers(read_metrics(whole, "align"))
    name = "training/tiny/align/recalibrator.safetensors"
    assert moved(load_file(whole / name), load_file(halted / name)) == set()


def test_learning_rate_is_linear_between_its_ends() -> None:
    config = train_config(align=STAGE | {"max_steps": 11, "warmup_steps": 2}).align
    rates = [learning_rate(config, step=step, max_steps=11) for step in range(11)]
    assert rates[:3] == pytest.approx([0.5e-3, 1e-3, 1e-3])
    assert rates[-1] == pytest.approx(1e-5)
    steps = [a - b for a, b in itertools.pairwise(rates[2:])]
    assert steps == pytest.approx([steps[0]] * len(steps))


def test_all_stages_train_where_the_teacher_is_gone(cache: CacheConfig, tiny_internvl: Path, tmp_path: Path) -> None:
    """The cache is all that is read: a path to nowhere stands in for the teacher."""
    gone = cache.teacher.model_copy(update={"model": str(tmp_path / "nowhere")})
    train_student(
        cache=cache.model_copy(update={"teacher": gone}),
        student=student_config(tiny_internvl),
        train=train_config(),
        output_dir=tmp_path,
    )
    assert (tmp_path / "students" / "tiny" / "config.json").exists()


def test_tier_l_alone_trains_a_student_without_the_teachers_head(
    cache: CacheConfig, tiny_qwen2_vl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_head(self: TeacherCache) -> TeacherHead:
        raise AssertionError("the teacher's head was read")

    monkeypatch.setattr(TeacherCache, "teacher_head", no_head)
    divergence = {}
    for method in ("kd", "sft"):
        folder = tmp_path / method
        settings = train_config(distill=STAGE | {"max_steps": 80, "learning_rate": 1e-2})
        student = student_config(tiny_qwen2_vl, method=method)
        train_student(cache=cache, student=student, train=settings, output_dir=folder, stages=("distill",))
        trained = student_config(folder / "training" / "tiny" / "distill" / "export", method="kd")
        measured = folder / "measured"  # the first record is from before the first update
        train_student(cache=cache, student=trained, train=train_config(), output_dir=measured, stages=("distill",))
        divergence[method] = read_metrics(measured, "distill")[0]["train/kd_loss"]
    assert divergence["kd"] < 0.95 * divergence["sft"]
