"""The run files in examples/: strict, complete, with the paper's settings, and students of known sizes."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, PreTrainedConfig, Qwen2Config, Qwen2VLTextConfig, Qwen3Config, Qwen3VLTextConfig

from launch.demo.make_models import STUDENTS as DEMO_STUDENTS
from launch.demo.run import FULL, run_file
from launch.field_comments import annotate
from launch.run_config import RunConfig, load_run_config
from recalibrator import Recalibrator, RecalibratorConfig

FOLDER = Path(__file__).parents[2] / "examples"
EXAMPLES = {path.stem: path for path in FOLDER.glob("*_from_*.yaml")}
CPU_DEMO = FOLDER / "cpu-demo.yaml"
PAIRS = {
    "internvl2_5-8b_from_qwen2-vl-72b",
    "qwen2-vl-2b_from_qwen2-vl-72b",
    "qwen2-vl-7b_from_qwen2-vl-72b",
    "internvl2_5-8b_from_internvl2_5-78b",
    "internvl2_5-4b_from_internvl2_5-78b",
    "internvl2_5-2b_from_internvl2_5-78b",
    "internvl2_5-1b_from_internvl2_5-78b",
    "qwen3-vl-8b_from_qwen3-vl-32b",
    "internvl3_5-8b_from_internvl3_5-38b",
    "many-students_from_qwen2-vl-72b",
    "qwen2-7b_from_llama-3-70b",
}
TEACHER_HIDDEN = {
    "qwen2-vl-72b": 8192,
    "internvl2_5-78b": 8192,
    "qwen3-vl-32b": 5120,
    "internvl3_5-38b": 5120,
    "llama-3-70b": 8192,
}


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """A student's text model, as its published config.json states it."""

    config_class: type[PreTrainedConfig]
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    qkv_bias: bool = False
    qk_norm: bool = False

    def config(self) -> PreTrainedConfig:
        """Return the configuration of these sizes."""
        options = {"head_dim": self.head_dim} if self.qk_norm else {}
        return self.config_class(
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            **options,
        )

    def block_parameters(self) -> int:
        """Return the parameters of one decoder block, counted by hand."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        attention = 2 * self.hidden * queries + 2 * self.hidden * keys
        biases = (queries + 2 * keys) * self.qkv_bias
        norms = 2 * self.hidden + 2 * self.head_dim * self.qk_norm
        return attention + biases + norms + 3 * self.hidden * self.intermediate


QWEN2_7B = Sizes(
    config_class=Qwen2Config,
    hidden=3584,
    intermediate=18944,
    layers=28,
    heads=28,
    kv_heads=4,
    head_dim=128,
    qkv_bias=True,
)
QWEN3_8B = Sizes(
    config_class=Qwen3Config,
    hidden=4096,
    intermediate=12288,
    layers=36,
    heads=32,
    kv_heads=8,
    head_dim=128,
    qk_norm=True,
)
STUDENTS = {
    "qwen2-vl-2b": Sizes(
        config_class=Qwen2VLTextConfig,
        hidden=1536,
        intermediate=8960,
        layers=28,
        heads=12,
        kv_heads=2,
        head_dim=128,
        qkv_bias=True,
    ),
    "qwen2-vl-7b": Sizes(**vars(QWEN2_7B) | {"config_class": Qwen2VLTextConfig}),
    "qwen2-7b": QWEN2_7B,
    "qwen3-vl-8b": Sizes(**vars(QWEN3_8B) | {"config_class": Qwen3VLTextConfig}),
    "internvl3_5-8b": QWEN3_8B,
    # the InternVL2.5 of 2B and 8B have InternLM2 bodies, which transformers stores as Llama
    "internvl2_5-1b": Sizes(
        config_class=Qwen2Config,
        hidden=896,
        intermediate=4864,
        layers=24,
        heads=14,
        kv_heads=2,
        head_dim=64,
        qkv_bias=True,
    ),
    "internvl2_5-2b": Sizes(
        config_class=LlamaConfig, hidden=2048, intermediate=8192, layers=24, heads=16, kv_heads=8, head_dim=128
    ),
    "internvl2_5-4b": Sizes(
        config_class=Qwen2Config,
        hidden=2048,
        intermediate=11008,
        layers=36,
        heads=16,
        kv_heads=2,
        head_dim=128,
        qkv_bias=True,
    ),
    "internvl2_5-8b": Sizes(
        config_class=LlamaConfig, hidden=4096, intermediate=14336, layers=32, heads=32, kv_heads=8, head_dim=128
    ),
}


def test_every_pair_has_its_run_file() -> None:
    assert set(EXAMPLES) == PAIRS


@pytest.mark.parametrize("path", [*EXAMPLES.values(), CPU_DEMO], ids=lambda path: path.stem)
def test_comments_about_fields_are_those_of_the_fields(path: Path) -> None:
    text = path.read_text()
    assert text == annotate(text), f"run python -m launch.field_comments {path}"
    assert text.startswith("# yaml-language-server: $schema=run.schema.json\n")
    assert not set(text) & set("{}"), "block style gives every field its comment"


def test_the_cpu_demo_is_the_demos_own_run() -> None:
    student = next(iter(DEMO_STUDENTS))
    assert load_run_config(CPU_DEMO) == run_file(Path("runs/demo"), student=student, size=FULL)


@pytest.fixture(params=sorted(PAIRS))
def example(request: pytest.FixtureRequest) -> RunConfig:
    return load_run_config(EXAMPLES[request.param])


def test_a_run_file_has_the_papers_settings(example: RunConfig, request: pytest.FixtureRequest) -> None:
    stages = [example.train.stage(name) for name in ("align", "distill", "finetune")]
    assert [stage.global_batch_size for stage in stages] == [8192, 4096, 8192]
    assert {(stage.learning_rate, stage.final_learning_rate, stage.max_steps) for stage in stages} == {
        (1e-4, 1e-5, None)
    }
    for stage in stages:
        assert stage.global_batch_size % (stage.micro_batch_size * example.train.num_processes) == 0
    assert example.cache.targets.question_fraction > 0  # align's regularization reads question rows
    assert example.train.align.regularization_weight == 1.0
    assert example.train.recalibrator.num_blocks == 2
    name = request.node.callspec.params["example"]
    assert example.output_dir == f"runs/{name}"
    student = name.partition("_from_")[0]
    assert len(example.students) > 1 if student == "many-students" else [s.name for s in example.students] == [student]


def test_runs_with_one_teacher_and_one_kind_of_data_share_a_cache() -> None:
    caches = {name: load_run_config(path).cache for name, path in EXAMPLES.items()}
    for teacher in TEACHER_HIDDEN:
        same = [cache for name, cache in caches.items() if name.endswith(f"_from_{teacher}")]
        assert same
        assert all(cache == same[0] for cache in same)
    assert len({cache.uri for cache in caches.values()}) == len(TEACHER_HIDDEN)


def test_each_students_recalibrator_has_the_parameters_counted_by_hand(
    example: RunConfig, request: pytest.FixtureRequest
) -> None:
    teacher_hidden = TEACHER_HIDDEN[request.node.callspec.params["example"].partition("_from_")[2]]
    for student in example.students:
        sizes = STUDENTS[student.name]
        config = RecalibratorConfig(student_config=sizes.config(), teacher_hidden=teacher_hidden)
        with torch.device("meta"):
            recalibrator = Recalibrator(config)
        found = sum(parameter.numel() for parameter in recalibrator.parameters())
        expected = 2 * sizes.block_parameters() + 2 * sizes.hidden * teacher_hidden + 2 * teacher_hidden
        print(f"FAMILY: {student.name} with a teacher of width {teacher_hidden}: {found:,} parameters")
        assert found == expected
