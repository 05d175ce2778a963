"""A run from `genrecal submit slurm` to the exported student, on a real Slurm of two nodes on this machine."""

import getpass
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import yaml

from tests.launch.slurm_cluster import missing_programs, slurm_cluster
from tests.launch.small_run import write_small_run

pytestmark = [
    pytest.mark.timeout(1800),
    pytest.mark.skipif(
        bool(missing_programs()),
        reason=f"no {', '.join(missing_programs())}: apt-get install slurmctld slurmd slurm-client munge",
    ),
]

COMMENT = 'a "quoted" \\ # comment $HOME'
RESOURCES = {"gpus_per_node": 0, "cpus_per_process": 2, "sbatch": {"comment": COMMENT}}
PASSED = ["HF_HUB_OFFLINE", "SLURM_CONF", "OMP_NUM_THREADS"]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    with slurm_cluster(tmp_path_factory.mktemp("slurm")) as environment:
        yield environment


def genrecal(*arguments: str, environment: dict[str, str], cwd: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "launch.cli", *arguments],
        env=environment | {"PYTHONPATH": str(Path(__file__).parents[2])},
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def wait_for(condition: Callable[[], bool], *, what: str, logs: Path, limit_s: float = 600) -> None:
    end = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > end:
            texts = "\n".join(f"== {path.name}\n{path.read_text()[-3000:]}" for path in sorted(logs.glob("*.log")))
            raise TimeoutError(f"no {what} within {limit_s:.0f} s\n{texts}")
        time.sleep(0.5)


def trainer(rank: int, *, run_file: str) -> psutil.Process | None:
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if "train" in words and run_file in words and "bash" not in words[0]:
            try:
                if process.environ().get("SLURM_PROCID") == str(rank):
                    return process
            except psutil.Error:
                continue
    return None


@pytest.mark.slow
def test_a_run_survives_a_killed_trainer_and_is_not_run_twice(
    slurm: dict[str, str], tiny_qwen2_vl: Path, tiny_internvl: Path, digit_samples: Path, tmp_path: Path
) -> None:
    jobs = {kind: RESOURCES | {"nodes": 2} for kind in ("cache", "train")} | {"report": RESOURCES}
    cluster = {"slurm": {**jobs, "environment": PASSED, "setup": ['export MARK="set up"']}}
    run_file = write_small_run(
        tmp_path, teacher=tiny_qwen2_vl, student=tiny_internvl, data=digit_samples, cluster=cluster
    )
    output_dir, logs = tmp_path / "run", tmp_path / "run" / "submit" / "slurm" / "jobs"

    def submit() -> list[dict[str, object]]:
        return json.loads(genrecal("submit", "slurm", str(run_file), "--json", environment=slurm, cwd=tmp_path))

    def shown(job_id: str) -> str:
        command = ["scontrol", "show", "job", job_id]
        return subprocess.run(command, env=slurm, capture_output=True, text=True, check=False).stdout

    submitted = submit()
    assert [outcome["state"] for outcome in submitted] == ["submitted"] * 3
    ids = [str(outcome["job_id"]) for outcome in submitted]
    assert f"Comment={COMMENT}" in shown(ids[0])
    assert "Dependency" in shown(ids[1])
    assert [outcome["state"] for outcome in submit()] == ["under way already"] * 3
    assert not (output_dir / "training").exists(), "training began before the cache was complete"

    checkpoints = output_dir / "training" / "small" / "align"
    wait_for(lambda: any(checkpoints.rglob("COMMIT*")), what="checkpoint", logs=logs)
    frozen = str(next((output_dir / "submit" / "run-files").iterdir()))
    victim = trainer(1, run_file=frozen)
    assert victim is not None
    victim.send_signal(signal.SIGKILL)

    def standing() -> dict[str, dict[str, object]]:
        listed = json.loads(genrecal("jobs", str(tmp_path), "--json", environment=slurm, cwd=tmp_path))
        return {entry["submission"]["label"]: entry for entry in listed}

    wait_for(lambda: (output_dir / "report.html").exists(), what="report", logs=logs)
    wait_for(lambda: standing()["report"]["state"] == "COMPLETED", what="end of the last job", logs=logs)
    assert {label: entry["complete"] for label, entry in standing().items()} == {
        "cache": True,
        "train small": True,
        "report": True,
    }
    assert "Restarts=1" in shown(ids[1])
    assert (output_dir / "students" / "small" / "model.safetensors").is_file()
    assert not list(logs.glob("*.token"))
    assert [outcome["state"] for outcome in submit()] == ["complete already"] * 3
    text = run_file.read_text().replace("max_steps: 12", "max_steps: 13")
    run_file.write_text(text)
    plan = genrecal("submit", "slurm", str(run_file), "--plan", environment=slurm, cwd=tmp_path)
    assert "complete already: cache" in plan
    assert "STUDENTS=(small)" in plan


@pytest.fixture
def stand_in(
    slurm: dict[str, str], tiny_internvl: Path, digit_samples: Path, tmp_path: Path
) -> Callable[[str], subprocess.Popen[str]]:
    """Submits the script of the training with a stand-in for `genrecal`, and waits for its end."""

    def submit(program: str, *, students: int = 1) -> subprocess.Popen[str]:
        cluster = {"slurm": {"train": RESOURCES | {"nodes": 2}}}
        run_file = write_small_run(
            tmp_path, teacher=tiny_internvl, student=tiny_internvl, data=digit_samples, cluster=cluster
        )
        values = yaml.safe_load(run_file.read_text())
        values["students"] = [values["students"][0] | {"name": f"small{index}"} for index in range(students)]
        run_file.write_text(yaml.safe_dump(values))
        folder = tmp_path / "bin"
        folder.mkdir()
        (folder / "genrecal").write_text(f"#!/bin/bash\ncd {tmp_path}\n{program}\n")
        (folder / "genrecal").chmod(0o755)
        plan = genrecal("submit", "slurm", str(run_file), "--plan", environment=slurm, cwd=tmp_path)
        script = next(part for part in plan.split("# ==> ") if "train.sbatch\n" in part).partition("\n")[2]
        (tmp_path / "run" / "submit" / "slurm" / "jobs").mkdir(parents=True)
        script = script.replace(f"PATH={Path(sys.executable).parent}:", f"PATH={folder}:")
        (tmp_path / "train.sbatch").write_text(script)
        command = ["sbatch", "--parsable", "--wait", "train.sbatch"]
        return subprocess.Popen(command, cwd=tmp_path, env=slurm, stdout=subprocess.PIPE, text=True)

    return submit


def both_ready(folder: Path) -> bool:
    return all((folder / f"ready{rank}").exists() for rank in (0, 1))


def starts(folder: Path) -> int:
    return len((folder / "starts").read_text().splitlines()) if (folder / "starts").exists() else 0


READY = "touch ready$SLURM_PROCID\n"
FIRST = '[ "$SLURM_PROCID" = 0 ] && echo "$SLURM_RESTART_COUNT" >>starts\n'


def test_a_refused_job_is_not_queued_again(stand_in: Callable[[str], subprocess.Popen[str]], tmp_path: Path) -> None:
    """The trainer exits 4 in one task; srun reports the signal that ended the other."""
    job = stand_in(FIRST + '[ "$SLURM_PROCID" = 0 ] && exit 4\nsleep 60')
    job.communicate(timeout=300)
    assert job.returncode == 4
    assert starts(tmp_path) == 1


@pytest.mark.slow
def test_a_killed_task_queues_the_job_again_once(
    stand_in: Callable[[str], subprocess.Popen[str]], tmp_path: Path
) -> None:
    first_run_of_one = '[ -z "$SLURM_RESTART_COUNT" ] && [ "$SLURM_PROCID" = 1 ]'
    other_has_started = "until [ -s starts ]; do sleep 0.1; done"
    job = stand_in(f"{FIRST}if {first_run_of_one}; then\n{other_has_started}\nkill -9 $$\nfi\nsleep 20")
    job.communicate(timeout=300)
    assert job.returncode == 0
    assert starts(tmp_path) == 2, "what stopped the first run has met the second"


@pytest.mark.slow
def test_a_job_that_is_told_of_its_end_saves_and_is_queued_again(
    stand_in: Callable[[str], subprocess.Popen[str]], slurm: dict[str, str], tmp_path: Path
) -> None:
    job = stand_in(
        "trap 'touch saved$SLURM_PROCID; until [ -e saved0 ] && [ -e saved1 ]; do sleep 0.1; done; exit 143' TERM\n"
        + FIRST
        + READY
        + '[ -n "$SLURM_RESTART_COUNT" ] && exit 0\n'
        "for _ in {1..600}; do sleep 0.1; done"
    )
    wait_for(lambda: both_ready(tmp_path), what="start", logs=tmp_path)
    command = ["squeue", "--noheader", "--format=%A", "--states=RUNNING"]
    number = subprocess.run(command, env=slurm, capture_output=True, text=True, check=True).stdout.strip()
    subprocess.run(["scancel", "--batch", "--signal=USR1", number], env=slurm, check=True)
    job.communicate(timeout=300)
    assert job.returncode == 0
    assert (tmp_path / "saved0").exists()
    assert (tmp_path / "saved1").exists()
    assert starts(tmp_path) == 2


@pytest.mark.slow
def test_a_student_that_is_queued_again_leaves_the_others_alone(
    stand_in: Callable[..., subprocess.Popen[str]], slurm: dict[str, str], tmp_path: Path
) -> None:
    job = stand_in(
        "trap 'exit 143' TERM\n"
        '[ "$SLURM_PROCID" = 0 ] && echo >>"starts$SLURM_ARRAY_TASK_ID"\n'
        'touch "ready$SLURM_ARRAY_TASK_ID-$SLURM_PROCID"\n'
        '[ -n "$SLURM_RESTART_COUNT" ] && exit 0\n'
        "for _ in {1..1200}; do [ -e finish ] && exit 0; sleep 0.1; done",
        students=2,
    )
    wait_for(lambda: len(list(tmp_path.glob("ready*"))) == 4, what="start", logs=tmp_path)
    command = ["squeue", "--noheader", "--format=%A %F %K", "--states=RUNNING"]
    rows = subprocess.run(command, env=slurm, capture_output=True, text=True, check=True).stdout.splitlines()
    ((array, last),) = [(array, task) for number, array, task in map(str.split, rows) if number == array]
    subprocess.run(["scancel", "--batch", "--signal=USR1", f"{array}_{last}"], env=slurm, check=True)

    def started(task: str) -> int:
        return len((tmp_path / f"starts{task}").read_text().splitlines())

    wait_for(lambda: started(last) == 2, what="second start", logs=tmp_path, limit_s=300)
    (tmp_path / "finish").touch()
    job.communicate(timeout=300)
    assert job.returncode == 0
    assert {task: started(task) for task in ("0", "1")} == {"0": 1, "1": 1} | {last: 2}


@pytest.mark.slow
def test_a_cancelled_job_is_not_queued_again(
    stand_in: Callable[[str], subprocess.Popen[str]], slurm: dict[str, str], tmp_path: Path
) -> None:
    job = stand_in("trap 'exit 143' TERM\n" + FIRST + READY + "for _ in {1..600}; do sleep 0.1; done")
    wait_for(lambda: both_ready(tmp_path), what="start", logs=tmp_path)
    subprocess.run(["scancel", "--state=RUNNING", f"--user={getpass.getuser()}"], env=slurm, check=True)
    number, _ = job.communicate(timeout=300)
    # not by the exit code, which sbatch gives as 0 now and then
    command = ["scontrol", "show", "job", number.strip()]
    shown = subprocess.run(command, env=slurm, capture_output=True, text=True, check=True).stdout
    assert "JobState=CANCELLED" in shown
    assert starts(tmp_path) == 1


def test_the_environment_of_a_job_holds_no_more_than_was_named(slurm: dict[str, str], tmp_path: Path) -> None:
    script = tmp_path / "print.sbatch"
    script.write_text(f"#!/bin/bash\n#SBATCH --export=HOME,PATH,USER,NAMED\n#SBATCH --output={tmp_path}/out\nenv\n")
    environment = slurm | {"NAMED": "yes", "OTHER_SECRET": "no"}
    subprocess.run(["sbatch", "--wait", str(script)], env=environment, check=True, capture_output=True, timeout=300)
    printed = (tmp_path / "out").read_text()
    assert "NAMED=yes" in printed
    assert "OTHER_SECRET" not in printed
    assert os.environ["HOME"] in printed
