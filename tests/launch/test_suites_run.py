"""`genrecal eval --suite` through lmms-eval itself, in the environment that the project's installer makes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from distill.evaluate import EvaluationSettings, generate_answers, load_chat_model
from launch.demo.digits import generate_digit_vqa
from launch.suites.environment import INSTALLER, SuiteEnvironment, open_environment
from launch.suites.known import KNOWN_SUITES
from launch.suites.results import read_record
from teacher_cache.config import DataConfig
from teacher_cache.errors import ConfigError
from teacher_cache.samples import read_samples
from tests.launch.suite_task import write_task

ROOT = Path(__file__).parents[2]
ENVIRONMENT = ROOT / ".venv-suites"
CANARY = "canary-of-the-hub-42"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six questions about digit grids."""
    folder = tmp_path_factory.mktemp("digits")
    generate_digit_vqa(folder, num_train=1, num_test=6, seed=0)
    return folder / "test.parquet"


@pytest.fixture(scope="module")
def tasks(data: Path) -> Path:
    """The same questions as tasks of lmms-eval."""
    folder = data.parent / "tasks"
    write_task(folder, data=data)
    return folder


@pytest.fixture(scope="module")
def environment(tasks: Path) -> SuiteEnvironment:
    """The environment of lmms-eval, installed where it is not there yet, with the tasks of the test."""
    made = subprocess.run(
        [str(INSTALLER), str(ENVIRONMENT), sys.executable], capture_output=True, text=True, check=False
    )
    assert made.returncode == 0, (
        f"{INSTALLER} cannot make the environment of lmms-eval, which needs a package registry:\n"
        f"{made.stdout[-2000:]}{made.stderr[-4000:]}"
    )
    return open_environment(ENVIRONMENT, include=tasks)


def test_lmms_eval_knows_the_tasks_that_the_page_names(environment: SuiteEnvironment) -> None:
    for known in KNOWN_SUITES:
        assert environment.suite(known.name).task == known.task
    asking = {known.task for known in KNOWN_SUITES if environment.tasks[known.task]["judge"]}
    by_rules_all_the_same = {"mmbench_en_dev_static"}
    assert asking - by_rules_all_the_same == {known.task for known in KNOWN_SUITES if known.judge}
    assert environment.suite("mmmu_pro").parts == ("mmmu_pro_standard", "mmmu_pro_vision")


def test_tasks_of_a_folder_are_known_for_what_they_ask(environment: SuiteEnvironment) -> None:
    assert not environment.suite("digit_grids").judge
    assert environment.suite("judged_grids").judge
    with pytest.raises(ConfigError, match="likely_grids asks for multiple_choice"):
        environment.suite("likely_grids")


def test_a_student_answers_as_in_eval(
    environment: SuiteEnvironment, tiny_qwen2_vl: Path, data: Path, tasks: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "launch.cli", "eval", "--suite", "digit_grids", "--student", str(tiny_qwen2_vl)]
    command += ["--suite-env", str(environment.folder), "--include-path", str(tasks), "--output", str(tmp_path)]
    command += ["--dtype", "float32", "--batch-size", "3"]
    done = subprocess.run(
        command, env=os.environ | {"HF_TOKEN": CANARY}, capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-5000:]

    settings = EvaluationSettings(batch_size=3, max_new_tokens=12, device="cpu")
    samples = read_samples(DataConfig(path=str(data), max_length=512)).samples
    own = generate_answers(load_chat_model(tiny_qwen2_vl, settings=settings), samples=samples, settings=settings)
    (written,) = tmp_path.glob("suites/*/digit_grids/results/student/*_samples_digit_grids.jsonl")
    answers = {row["doc_id"]: row["filtered_resps"] for row in map(json.loads, written.read_text().splitlines())}
    assert [answers[place] for place in range(len(samples))] == [own[sample.sample_id] for sample in samples]
    assert all(own.values())

    (result,) = read_record(tmp_path / "suites.json").results
    figures = {figure.metric: figure for figure in result.figures}
    assert figures.keys() == {"characters", "exact"}
    assert figures["characters"].value == pytest.approx(sum(map(len, own.values())) / len(own))
    assert figures["characters"].stderr is not None
    assert {(one.version, one.num_samples, one.task) for one in result.figures} == {("3.0", 6, "digit_grids")}
    assert (result.lmms_eval, result.judge, result.limit) == ("0.7.3", None, None)

    # lmms-eval prints the token that it is given
    assert "'token': '***'" in "".join(path.read_text() for path in tmp_path.glob("logs/suite-*.log"))
    told = [done.stdout, done.stderr, *(path.read_text() for path in tmp_path.rglob("*.*") if path.is_file())]
    assert not any(CANARY in text for text in told)
