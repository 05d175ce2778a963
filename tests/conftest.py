"""Fixtures for all tests: offline and quiet libraries, tiny model directories, a small data file."""

import os

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_gcs_server_port_wait_time_s": "120",
    "OMP_NUM_THREADS": "1",
}

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from xdist.scheduler import LoadFileScheduling

from launch.demo.digits import generate_digit_vqa
from launch.demo.models import ModelSpec, create_model_directory

settings.register_profile("genrecal", deadline=None)  # a busy machine is no fault of the code
settings.load_profile("genrecal")

DEMO = ("tests/launch/test_demo.py", "tests/launch/test_provenance.py", "tests/launch/test_readme.py")
"""The files whose tests look at the one run of the demo."""
LONGEST_FIRST = (
    *DEMO,
    "tests/launch/test_study.py",
    "tests/teacher_cache/test_build.py",
    "tests/teacher_cache/test_build_chaos.py",
    "tests/launch/test_submit_slurm_cluster.py",
    "tests/launch/test_submit_ray_cluster.py",
    "tests/launch/test_launchers.py",
    "tests/launch/test_suites_run.py",
    "tests/reliability/test_mutants.py",
    "tests/reliability/test_training_kill.py",
    "tests/distill/test_zero.py",
    "tests/test_train_benchmarks.py",
    "tests/distill/test_reshard.py",
    "tests/teacher_cache/test_build_pool.py",
    "tests/families/test_teachers.py",
    "tests/reliability/test_power_loss.py",
    "tests/reliability/test_disk_full.py",
    "tests/teacher_cache/test_fuzz.py",
)
"""The files that take minutes, so that none of them begins when the other processes are about to end."""
RAY_WITHIN = (
    "tests/teacher_cache/test_build.py",
    "tests/teacher_cache/test_build_chaos.py",
    "tests/teacher_cache/test_build_pool.py",
    "tests/teacher_cache/test_answer_pool.py",
    "tests/teacher_cache/test_answers.py",
    "tests/launch/test_ray_privacy.py",
    "tests/launch/test_launchers.py",
    "tests/launch/test_submit_ray.py",
)
"""The files that run Ray or gRPC in the tests' own process: threads stay that no fork survives, so they come last."""


class _FilesAndTheDemo(LoadFileScheduling):
    """Keeps the tests of a file in one process, and those that share the one run of the demo."""

    def _split_scope(self, nodeid: str) -> str:
        scope: str = super()._split_scope(nodeid)
        return "the demo" if scope in DEMO else scope


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Share the suite out among processes."""
    return _FilesAndTheDemo(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what takes the longest, and end with what spoils a process for forks."""
    place = {path: number for number, path in enumerate(LONGEST_FIRST)}
    path_of = {item: item.nodeid.partition("::")[0] for item in items}
    items.sort(key=lambda item: (path_of[item] in RAY_WITHIN, place.get(path_of[item], len(place))))
    for item in items:
        if "demo" in getattr(item, "fixturenames", ()) and item.nodeid.partition("::")[0] not in DEMO:
            raise pytest.UsageError(f"{item.nodeid} uses the fixture demo: add its file to DEMO, lest it runs twice")


@pytest.fixture(autouse=True)
def _nothing_launched() -> Iterator[None]:
    """Take back what an engine in the tests' process (vLLM's, on a CPU) tells the processes that later tests start."""
    yield
    os.environ.pop("LOCAL_WORLD_SIZE", None)


CORPUS = (
    "Which digit is in the top left corner? Answer with one word.",
    "How many digits are greater than four? Answer in a sentence.",
    "What is the sum of the top row? Answer with a numeral.",
    "Which digit is the largest? Is any digit repeated? Describe the image.",
    "The top row has seven and three, the bottom row has zero and nine.",
    "The sum is twelve.",
    "Yes, the digit five occurs twice.",
    "No, all digits are different.",
    "0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18",
) * 4


def _directory(tmp_path_factory: pytest.TempPathFactory, spec: ModelSpec, *, seed: int) -> Path:
    path = tmp_path_factory.mktemp(spec.family) / "model"
    create_model_directory(spec, path, corpus=CORPUS, seed=seed)
    return path


@pytest.fixture(scope="session")
def tiny_qwen2_vl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Qwen2-VL, byte-level BPE, 384 rows in the vocabulary, 4 tokens for a 16 x 16 image, more for larger ones."""
    return _directory(tmp_path_factory, ModelSpec(family="qwen2-vl", tokenizer="byte-bpe", vocab_size=384), seed=1)


@pytest.fixture(scope="session")
def tiny_internvl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """InternVL with a Qwen2 body, Unigram, 224 rows, 4 tiles and a thumbnail of 4 tokens each."""
    spec = ModelSpec(family="internvl", tokenizer="unigram", vocab_size=224, tiles=4)
    return _directory(tmp_path_factory, spec, seed=2)


@pytest.fixture(scope="session")
def tiny_llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LLaVA with a CLIP tower and a Llama body, BPE over words with a space mark, 256 rows, 16 tokens per image."""
    return _directory(tmp_path_factory, ModelSpec(family="llava", tokenizer="metaspace-bpe", vocab_size=256), seed=3)


@pytest.fixture(scope="session")
def tiny_qwen2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Qwen2 without vision, byte-level BPE, 320 rows."""
    return _directory(tmp_path_factory, ModelSpec(family="qwen2", tokenizer="byte-bpe", vocab_size=320), seed=4)


@pytest.fixture(scope="session")
def digit_samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Parquet file with 28 rows of 1 to 3 turns about 16 x 16 images, all question families."""
    folder = tmp_path_factory.mktemp("digits")
    generate_digit_vqa(folder, num_train=28, num_test=7, seed=0)
    return folder / "train.parquet"
