"""Batch scripts: golden files, hostile values, what is skipped, and the decision to queue a job again."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from launch.clusters.config import OWN_SBATCH_OPTIONS, SlurmConfig, SlurmJobConfig
from launch.clusters.jobs import Job, run_jobs
from launch.clusters.slurm import (
    Places,
    assignment,
    cache_script,
    directive,
    filename_pattern,
    report_script,
    train_script,
)
from launch.clusters.slurm_scripts import PRELUDE, TRAIN
from launch.clusters.slurm_submit import plan_slurm, sbatch_command
from launch.run_config import RunConfig, load_run_config
from teacher_cache.errors import ConfigError
from tests.launch.golden import compare
from tests.launch.hostile import HOSTILE

ROOT = Path(__file__).parents[2]
PLACES = Places(
    run_file=Path("/shared/run/submit/run-files/run.yaml"),
    state_dir=Path("/shared/run/submit/slurm/jobs"),
    working_dir=Path("/shared"),
    bin_dir=Path("/shared/.venv/bin"),
)
VALUES = {
    "output_dir": "run",
    "cache": {
        "uri": "run/cache",
        "teacher": {"model": "teacher"},
        "data": {"path": "train.parquet"},
        "build": {"num_replicas": 4, "tensor_parallel_size": 4},
    },
    "answers": {"source": "original.parquet"},
    "students": [{"name": "internvl", "model": "a"}, {"name": "qwen2-vl", "model": "b"}],
    "train": {"num_processes": 16},
    "evaluation": {"data": "test.parquet"},
    "cluster": {
        "slurm": {
            "cache": {"partition": "gpu", "account": "vision", "time": "1-00:00:00", "sbatch": {"exclusive": ""}},
            "train": {"partition": "gpu", "qos": "high", "time": "12:00:00", "sbatch": {"comment": "a long one"}},
            "setup": ["module load cuda/12.9", "source /shared/.venv/bin/activate"],
            "environment": ["HF_HOME", "HF_TOKEN"],
        }
    },
}


def run_config(**cluster: object) -> RunConfig:
    return RunConfig.model_validate(VALUES | ({"cluster": {"slurm": cluster}} if cluster else {}))


def jobs_of(config: RunConfig) -> tuple[Job, list[Job], Job]:
    cache, *students, report = run_jobs(config)
    return cache, students, report


def test_scripts_are_those_that_were_reviewed() -> None:
    config = run_config()
    cache, students, report = jobs_of(config)
    compare("slurm/cache.sbatch", cache_script(config, cache, places=PLACES).text)
    compare("slurm/train.sbatch", train_script(config, students, places=PLACES).text)
    compare("slurm/report.sbatch", report_script(config, report, places=PLACES).text)


def read_directive(line: str) -> str:
    """Take one #SBATCH line apart as sbatch does: quotes, backslashes, comments."""
    text, value, quote, characters = line.removeprefix("#SBATCH "), "", "", iter(line.removeprefix("#SBATCH "))
    assert text != line
    for character in characters:
        if character == "\\":
            value += next(characters)
        elif quote:
            quote, value = ("", value) if character == quote else (quote, value + character)
        elif character in "\"'":
            quote = character
        else:
            assert not character.isspace()
            assert character != "#"
            value += character
    assert not quote
    return value


def check_directive(value: str) -> None:
    if not value.isprintable():
        with pytest.raises(ConfigError, match="one line of printable characters"):
            directive("comment", value)
        return
    line = directive("comment", value)
    assert "\n" not in line
    assert read_directive(line) == (f"--comment={value}" if value else "--comment")


@pytest.mark.parametrize("value", HOSTILE)
def test_hostile_options_stay_one_directive(value: str) -> None:
    check_directive(value)


@settings(deadline=None)
@given(st.text())
def test_any_text_stays_one_directive(value: str) -> None:
    check_directive(value)


def shell_value(line: str) -> str:
    script = f'{line}\nprintf %s "$VALUE"'
    done = subprocess.run(["bash", "-c", script], capture_output=True, check=True)
    return done.stdout.decode()


@pytest.mark.parametrize("value", HOSTILE)
def test_hostile_values_arrive_in_the_shell(value: str) -> None:
    assert shell_value(assignment("VALUE", value)) == value


@settings(deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")))
def test_any_text_is_one_word_of_the_shell(value: str) -> None:
    assert shlex.split(assignment("VALUE", value)) == [f"VALUE={value}"]


def test_a_zero_byte_is_refused() -> None:
    with pytest.raises(ConfigError, match="zero byte"):
        assignment("VALUE", "a\0b")


@pytest.mark.parametrize("value", [value for value in HOSTILE if value.isprintable() and "\\" not in value])
def test_scripts_with_hostile_paths_are_whole(value: str) -> None:
    """Everything outside of the lines that set variables is the same text, whatever the paths are."""
    config = run_config()
    cache, students, report = jobs_of(config)
    folder = Path("/shared") / f"x{value}x"
    places = Places(run_file=folder / "run.yaml", state_dir=folder, working_dir=folder, bin_dir=folder)
    for name, script in (
        ("cache", cache_script(config, cache, places=places)),
        ("train", train_script(config, students, places=places)),
        ("report", report_script(config, report, places=places)),
    ):
        golden = (ROOT / "tests" / "fixtures" / "submit" / "slurm" / f"{name}.sbatch").read_text()
        assert body(script.text) == body(golden)
        subprocess.run(["bash", "-n"], input=script.text, text=True, check=True)
        lines = {line.partition("=")[0]: line for line in script.text.splitlines()}
        assert shlex.split(lines["RUN_FILE"]) == [f"RUN_FILE={folder}/run.yaml"]
        assert read_directive(lines["#SBATCH --chdir"]) == f"--chdir={folder}"
        written = read_directive(lines["#SBATCH --output"]).removeprefix("--output=")
        assert written.replace("%%", "%") == f"{folder}/%x-%j.log"


def body(text: str) -> str:
    return text.partition("set -uo pipefail")[2]


@pytest.mark.parametrize("folder", ["/a\\b", "/a\nb", "/a\x1bb"])
def test_folders_that_slurm_cannot_write_are_refused(folder: str) -> None:
    with pytest.raises(ConfigError, match="backslash or control"):
        filename_pattern(Path(folder))


def test_no_expansion_of_the_scripts_is_unquoted() -> None:
    config = run_config()
    cache, students, report = jobs_of(config)
    for script in (
        cache_script(config, cache, places=PLACES),
        train_script(config, students, places=PLACES),
        report_script(config, report, places=PLACES),
    ):
        for line in body(script.text).splitlines():
            code = re.sub(r"\s# .*", "", line)
            # what is left once plain assignments, arithmetic and everything in double quotes are gone
            rest = re.sub(r'"[^"]*"', "", code)
            rest = re.sub(r"\$\(\([^)]*\)\)|\$\(|[a-z_]+=\$[1?!]", "", rest)
            assert "$" not in rest.replace("$ports $cores", ""), line


@pytest.mark.parametrize("value", HOSTILE)
def test_hostile_names_are_refused_or_plain(value: str) -> None:
    for field in ("partition", "account", "qos", "time"):
        try:
            accepted = getattr(SlurmJobConfig.model_validate({field: value}), field)
        except ValidationError:
            continue
        assert re.fullmatch(r"[A-Za-z0-9._,:=@+/-]+", accepted)
        assert not accepted.startswith("-")
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", value):
        with pytest.raises(ValidationError):
            SlurmConfig.model_validate({"environment": [value]})
    with pytest.raises(ValidationError):
        SlurmJobConfig.model_validate({"sbatch": {f"{value} ": "x"}})


@pytest.mark.parametrize("option", [*OWN_SBATCH_OPTIONS, "partition", "cpus-per-task", "Bad", "--comment", "a b", ""])
def test_options_of_the_scripts_themselves_are_refused(option: str) -> None:
    with pytest.raises(ValidationError, match="sbatch option"):
        SlurmJobConfig.model_validate({"sbatch": {option: "x"}})


def test_setup_that_is_no_shell_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = run_config(setup=["if true"])
    with pytest.raises(ConfigError, match=r"no valid shell script.*cluster\.slurm\.setup"):
        plan_slurm(config, run_jobs(config))
    with pytest.raises(ValidationError, match="one line of printable"):
        run_config(setup=["true\n#SBATCH --wrap=id"])


def test_a_time_that_yaml_took_for_a_number_is_explained() -> None:
    with pytest.raises(ValidationError, match="write '12:00:00'"):
        SlurmJobConfig.model_validate(yaml.safe_load("time: 12:00:00"))


def test_processes_that_do_not_spread_evenly_are_refused() -> None:
    config = run_config(train={"nodes": 3})
    with pytest.raises(ConfigError, match=r"16.*3 node\(s\) of 8 GPU\(s\).*cluster\.slurm\.train\.nodes"):
        train_script(config, jobs_of(config)[1], places=PLACES)
    few = run_config(train={"nodes": 1})
    with pytest.raises(ConfigError, match="at most one per GPU"):
        train_script(few, jobs_of(few)[1], places=PLACES)


@pytest.mark.parametrize(
    ("processes", "train", "expected"),
    [(16, {"nodes": 4}, "4"), (1, {}, "1"), (16, {}, "8"), (2, {"gpus_per_node": 0}, None)],
)
def test_a_training_asks_for_the_gpus_that_it_uses(processes: int, train: dict[str, int], expected: str | None) -> None:
    config = RunConfig.model_validate(
        VALUES | {"train": {"num_processes": processes}, "cluster": {"slurm": {"train": train}}}
    )
    text = train_script(config, jobs_of(config)[1], places=PLACES).text
    found = re.findall(r"^#SBATCH --(?:gpus-per-node|ntasks-per-node)=(\d+)$", text, re.MULTILINE)
    assert found == ([expected, expected] if expected else [str(processes)])


def test_values_of_named_variables_are_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", "canary-5f1e")
    config = run_config()
    for batch in plan_slurm(config, run_jobs(config)):
        assert "#SBATCH --export=HOME,PATH,USER,HF_HOME,HF_TOKEN" in batch.script.text
        assert "canary" not in batch.script.text


def test_a_job_waits_for_the_success_of_the_one_before() -> None:
    assert sbatch_command(Path("/x y"), after=[]) == ["sbatch", "--parsable", "/x y"]
    assert "--dependency=afterok:17_1:18" in sbatch_command(Path("x"), after=["17_1", "18"])


DECISIONS = [
    # exit code, refused file, signal, restarts, Slurm's state -> exit code, queued again
    (0, "", "", 0, "RUNNING", 0, False),
    (3, "", "", 0, "RUNNING", 3, True),
    (137, "", "", 0, "RUNNING", 3, True),
    (143, "", "TERM", 0, "RUNNING", 3, True),
    (143, "", "USR1", 1, "RUNNING", 3, True),
    (1, "", "USR1", 0, "RUNNING", 3, True),
    (1, "", "", 0, "RUNNING", 1, False),
    (2, "", "", 0, "RUNNING", 2, False),
    (4, "", "", 0, "RUNNING", 4, False),
    (137, "4", "", 0, "RUNNING", 4, False),
    (137, "4", "USR1", 0, "RUNNING", 4, False),
    (143, "", "TERM", 0, "COMPLETING", 3, False),
    (3, "", "", 2, "RUNNING", 3, False),
]


@pytest.mark.parametrize(("code", "refused", "stop", "restarts", "state", "expected", "again"), DECISIONS)
def test_what_is_queued_again(
    code: int, refused: str, stop: str, restarts: int, state: str, expected: int, again: bool, tmp_path: Path
) -> None:
    for name, text in (
        ("scontrol", f'echo "$@" >>{tmp_path}/calls; echo node1'),
        ("squeue", f"echo {state}"),
        ("sleep", ":"),
    ):
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "refused").write_text(refused)
    script = f'{PRELUDE}\nrefused={tmp_path}/refused\nstop="{stop}"\nend_job {code}\n'
    environment = os.environ | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "STATE_DIR": str(tmp_path),
        "MAX_REQUEUES": "2",
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NAME": "job",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_RESTART_COUNT": str(restarts),
    }
    done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == expected, done.stderr
    assert ("requeue 7" in (tmp_path / "calls").read_text()) is again


def test_a_task_of_an_array_speaks_of_itself_alone(tmp_path: Path) -> None:
    """The task that starts last has the number of the array as its own."""
    for name, text in (
        ("scontrol", f'echo "scontrol $*" >>{tmp_path}/calls; echo node1'),
        ("scancel", f'echo "scancel $*" >>{tmp_path}/calls'),
        ("squeue", "[[ $* == *--jobs=7_1* ]] || echo RUNNING; echo RUNNING"),
        ("srun", "kill -USR1 $PPID; exit 143"),
    ):
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    environment = os.environ | {
        "STATE_DIR": str(tmp_path),
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_ARRAY_JOB_ID": "7",
        "SLURM_ARRAY_TASK_ID": "1",
        "SLURM_CPUS_PER_TASK": "1",
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NAME": "job",
        "SLURM_JOB_NODELIST": "node1",
    }
    script = f"RUN_FILE=x\nSTUDENTS=(a b)\nMAX_REQUEUES=2\n{PRELUDE}{TRAIN}"
    done = subprocess.run(
        ["bash", "-c", script.replace("sleep 60", "true")], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 3, done.stderr
    assert (tmp_path / "calls").read_text().splitlines() == [
        "scontrol show hostnames node1",
        "scancel --signal=TERM 7_1",
        "scontrol requeue 7_1",
    ]


@pytest.mark.parametrize("run_file", sorted(ROOT.glob("examples/*_from_qwen2-vl-72b.yaml")), ids=lambda path: path.stem)
def test_plans_of_the_large_examples_need_no_heavy_library_and_write_nothing(run_file: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from launch.cli import main\n"
        f"codes = [main(['submit', name, {str(run_file)!r}, '--plan']) for name in ('slurm', 'ray', 'kuberay')]\n"
        "heavy = {'torch', 'ray', 'vllm', 'deepspeed', 'transformers', 'zarr'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else sum(codes))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=15,
    )
    assert done.returncode == 0, done.stderr
    assert "#SBATCH --nodes=4\n" in done.stdout
    assert not list(tmp_path.iterdir())


def test_the_key_of_a_job_follows_what_it_makes(tmp_path: Path) -> None:
    def keys(values: dict[str, object]) -> list[str]:
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(VALUES | values))
        return [job.key for job in run_jobs(load_run_config(path))]

    first = keys({})
    assert keys({"cluster": {}}) == first
    assert len(set(first)) == len(first)
    longer = keys({"train": {"num_processes": 16, "seed": 1}})
    assert longer[0] == first[0]
    assert not set(longer[1:]) & set(first[1:])
    other = keys({"cache": {**VALUES["cache"], "teacher": {"model": "other"}}})
    assert not set(other) & set(first)
