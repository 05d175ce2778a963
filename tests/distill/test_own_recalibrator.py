"""Students that cannot have the Recalibrator that the run file asks for are refused before anything is read."""

from pathlib import Path
from typing import Any

import pytest
import transformers

from distill import trainer
from distill.config import StudentConfig, TrainConfig
from distill.own_recalibrator import check_recalibrator
from distill.trainer import train_student
from teacher_cache.config import CacheConfig, DataConfig, TeacherConfig
from teacher_cache.errors import ConfigError
from tests.distill.small_runs import student_config, train_config

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_hidden_layers": 4,
    "vocab_size": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FRESH, COPIED = ({"recalibrator": {"init_from_student": init}} for init in (False, True))
REFUSED = {
    "attention of its own": (transformers.GptOssConfig, FRESH, r"'gpt_oss'.* Take a student of another family"),
    "several rotary bases": (transformers.Gemma3TextConfig, FRESH, r"'gemma3_text'.*method sft, kd or uld"),
    "no attention": (transformers.MambaConfig, FRESH, r"'mamba'.*Take a student of another family"),
    "layers that blocks cannot start from": (
        transformers.Qwen3_5TextConfig,
        COPIED,
        r"other weights \(linear_attn.*Set train.recalibrator.init_from_student to false",
    ),
    "too few layers": (
        transformers.Qwen2Config,
        {"recalibrator": {"init_from_student": True, "num_blocks": 5}},
        r"5 Recalibrator blocks from 4 student layers.*init_from_student to false",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_student_that_cannot_have_a_recalibrator_is_refused(case: str, tmp_path: Path) -> None:
    family, options, message = REFUSED[case]
    family(**SMALL).save_pretrained(tmp_path)
    train = TrainConfig.model_validate(options)
    student = StudentConfig(name="s", model=str(tmp_path))
    with pytest.raises(ConfigError, match=message):
        check_recalibrator(tmp_path, student=student, train=train, stages=["align"])
    check_recalibrator(tmp_path, student=student, train=train, stages=["finetune"])
    other = student.model_copy(update={"method": "kd"})
    check_recalibrator(tmp_path, student=other, train=train, stages=["distill"])


@pytest.mark.parametrize("options", [FRESH, COPIED])
@pytest.mark.parametrize("family", ["tiny_qwen2_vl", "tiny_internvl", "tiny_llava", "tiny_qwen2"])
def test_supported_families_pass(family: str, options: dict[str, Any], request: pytest.FixtureRequest) -> None:
    path = request.getfixturevalue(family)
    student, train = StudentConfig(name="s", model=str(path)), TrainConfig.model_validate(options)
    check_recalibrator(path, student=student, train=train, stages=["align", "distill"])


def test_nothing_is_read_before_the_refusal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*_: Any, **__: Any) -> None:
        raise AssertionError("read")

    for name in ("load_processor", "open_cache", "scan_samples", "build_model"):
        monkeypatch.setattr(trainer, name, read)
    transformers.GptOssConfig(**SMALL).save_pretrained(tmp_path)
    cache = CacheConfig(
        uri=str(tmp_path / "cache"), teacher=TeacherConfig(model="none"), data=DataConfig(path=str(tmp_path / "data"))
    )
    with pytest.raises(ConfigError, match="gpt_oss"):
        train_student(cache=cache, student=student_config(tmp_path), train=train_config(), output_dir=tmp_path / "run")
