"""`genrecal eval --suite` without lmms-eval: command lines, results, refusals, what is run again."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch.cli import main
from launch.processes import FATE_SHARED, LAUNCHER_VARIABLES
from launch.provenance import run_file_path
from launch.report import write_report
from launch.suites import command, harness
from launch.suites.environment import INDEX, open_environment, require_judge
from launch.suites.harness import SuiteFailed, SuiteSettings, SuiteStudent, run_logged, run_suite, suite_command
from launch.suites.identity import folder_digest, suite_identity
from launch.suites.known import KNOWN_SUITES, known_suite
from launch.suites.results import read_figures, read_record
from teacher_cache.errors import ConfigError, DataError
from tests.launch.small_run import write_small_run

PAGE = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text()
SETTINGS = SuiteSettings(dtype="float32", batch_size=4, limit=None, timeout_s=60.0)
RESULTS: dict[str, Any] = {
    "results": {
        "mmmu_val": {"alias": "mmmu_val", "mmmu_acc,none": 0.5, "mmmu_acc_stderr,none": "N/A"}
        | {"mmmu_acc_stderr_clt,none": 0.02, "submission,none": None, "rank,none": "first"}
    },
    "versions": {"mmmu_val": 0.0},
    "n-samples": {"mmmu_val": {"original": 900, "effective": 900}},
}
FAKE = """#!{python}
import json, os, sys, time
from pathlib import Path

asked = sys.argv[sys.argv.index("--tasks") + 1]
print("token", os.environ.get("HF_TOKEN"), flush=True)
print("judged" if "OPENAI_API_KEY" in os.environ else "no judge", flush=True)
print("launched", sorted(os.environ.keys() & {launcher!r}), "by", os.environ[{parent!r}], flush=True)
with open({calls!r}, "a") as file:
    file.write(asked + "\\n")
if asked == "mmstar":
    sys.exit("no room on the device")
if asked == "ai2d":
    sys.exit(0)
folder = Path("results") / "student"
folder.mkdir(parents=True)
assert (Path("student") / "config.json").exists()
(folder / "1_results.json").write_text({results!r})
"""


FLEXIBLE = {"task": "mmmu_val", "version": "0", "metric": "mmmu_acc", "filter": "flexible"} | {
    "value": 0.25,
    "stderr": None,
    "num_samples": 900,
}


@pytest.fixture(autouse=True)
def _no_log_of_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the logging of the test's own process alone."""
    monkeypatch.setattr(command, "setup_logging", lambda path: None)


@pytest.fixture
def environment_folder(tmp_path: Path) -> Path:
    """An environment whose interpreter stands in for lmms-eval."""
    folder = tmp_path / "venv"
    (folder / "bin").mkdir(parents=True)
    python = folder / "bin" / "python"
    names = {"launcher": LAUNCHER_VARIABLES, "parent": FATE_SHARED, "calls": str(tmp_path / "calls")}
    python.write_text(FAKE.format(python=sys.executable, results=json.dumps(RESULTS), **names))
    python.chmod(0o755)
    tasks = {
        suite.task: {"parts": [suite.task], "judge": False, "output_types": ["generate_until"]}
        for suite in KNOWN_SUITES
    }
    tasks["likely"] = {"parts": ["likely"], "judge": False, "output_types": ["multiple_choice"]}
    tasks["mathverse"] = {"parts": ["mathverse"], "judge": True, "output_types": ["generate_until"]}
    (folder / INDEX).write_text(json.dumps({"lmms_eval": "0.7.3", "models": ["genrecal"], "tasks": tasks}))
    return folder


@pytest.fixture
def student(tmp_path: Path) -> Path:
    folder = tmp_path / "run, a=b" / "students" / "small"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


def evaluate(student: Path, environment: Path, suites: str, *more: str) -> int:
    return main(["eval", "--suite", suites, "--student", str(student), "--suite-env", str(environment), *more])


def calls(student: Path) -> list[str]:
    path = student.parents[2] / "calls"
    return path.read_text().split() if path.exists() else []


def test_a_command_line_names_no_path_of_the_student(environment_folder: Path, student: Path) -> None:
    environment = open_environment(environment_folder)
    asked = SuiteStudent(name="small", model=str(student), path=student, trust_remote_code=True)
    limited = SuiteSettings(dtype="bfloat16", batch_size=2, limit=5, timeout_s=1.0)
    line = suite_command(environment.suite("MMMU"), student=asked, environment=environment, settings=limited)
    assert line[:3] == [str(environment_folder / "bin" / "python"), "-m", "lmms_eval"]
    options = {word: line[place + 1] for place, word in enumerate(line[:-1]) if word.startswith("--")}
    assert options["--model_args"] == "pretrained=student,dtype=bfloat16,trust_remote_code=True"
    assert (options["--model"], options["--tasks"], options["--limit"]) == ("genrecal", "mmmu_val", "5")
    assert not any(str(student) in word for word in line)


def test_names_of_papers_are_found_however_they_are_spelt() -> None:
    for suite in KNOWN_SUITES:
        for name in (suite.name, suite.name.lower(), suite.name.replace("-", "_")):
            assert known_suite(name) == suite
    assert known_suite("mmmu_val") is None


def test_the_page_lists_exactly_the_known_names() -> None:
    rows = re.findall(r"^\| ([\w-]+) \| `(\w+)` \| `(\w+)` \| (\d+) \| (yes|-) \|$", PAGE, re.MULTILINE)
    known = [
        (one.name, one.task, one.metric, f"{one.full_score:g}", "yes" if one.judge else "-") for one in KNOWN_SUITES
    ]
    assert rows == known


@pytest.mark.parametrize(
    ("suites", "words"),
    [
        ("mmstr", "did you mean 'mmstar'?"),
        ("likely", "asks for multiple_choice"),
        ("mmvet", "OPENAI_API_KEY is not set"),
        (",", "names no benchmark"),
    ],
)
def test_what_cannot_run_is_refused_before_anything_does(
    suites: str,
    words: str,
    student: Path,
    environment_folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    assert evaluate(student, environment_folder, suites) == 2
    assert words in capsys.readouterr().err
    assert calls(student) == []


@pytest.fixture
def judged(environment_folder: Path) -> None:
    """The stand-in scores MM-Vet."""
    python = environment_folder / "bin" / "python"
    python.write_text(python.read_text().replace("mmmu_val", "mmvet").replace("mmmu_acc", "gpt_eval_score"))


@pytest.mark.usefixtures("judged")
def test_a_suite_runs_without_its_judge_on_request(
    student: Path, environment_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = student.parents[1]
    log, record = run_dir / "logs" / "suite-small-mmvet.log", run_dir / "suites.json"
    monkeypatch.setenv("OPENAI_API_KEY", "canary-of-the-judge")
    assert evaluate(student, environment_folder, "mmvet", "--without-judge") == 0
    assert "no judge" in log.read_text()
    assert [one.judge for one in read_record(record).results] == [None]
    assert (
        "Without a judge model, so that answers count as wrong or guessed: MM-Vet." in write_report(run_dir).read_text()
    )
    # what no judge has read is not what the judge says
    assert evaluate(student, environment_folder, "mmvet") == 0
    assert "judged" in log.read_text()
    assert [one.judge for one in read_record(record).results] == ["gpt-4o-2024-11-20 (openai)"]
    assert calls(student) == ["mmvet", "mmvet"]


def test_a_try_does_not_replace_a_full_result(
    student: Path, environment_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate(student, environment_folder, "mmmu", "--limit", "3") == 0
    assert evaluate(student, environment_folder, "mmmu") == 0
    assert evaluate(student, environment_folder, "mmmu", "--limit", "3") == 2
    assert "--output" in capsys.readouterr().err
    assert [one.limit for one in read_record(student.parents[1] / "suites.json").results] == [None]
    assert evaluate(student, environment_folder, "mmmu", "--limit", "3", "--output", str(tmp_path / "try")) == 0
    assert len(calls(student)) == 3


def test_a_student_that_lies_in_no_run_needs_a_folder_for_its_figures(
    student: Path, environment_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = student.rename(tmp_path / "alone")
    assert evaluate(alone, environment_folder, "mmmu") == 2
    assert "lies in no run" in capsys.readouterr().err


def test_a_judge_is_asked_for_by_the_interface_in_use(environment_folder: Path) -> None:
    environment = open_environment(environment_folder)
    suites = [environment.suite("mmmu"), environment.suite("mathverse"), environment.suite("mmb-static")]
    assert [suite.judge for suite in suites] == [False, True, False]
    assert require_judge(suites[:1], environment={}) is None
    found = require_judge(suites, environment={"OPENAI_API_KEY": "k", "MODEL_VERSION": "mine"})
    assert found == "mine (openai)"
    with pytest.raises(ConfigError, match=r"mathverse.*AZURE_API_KEY and AZURE_ENDPOINT"):
        require_judge(suites, environment={"API_TYPE": "azure", "OPENAI_API_KEY": "k"})
    with pytest.raises(ConfigError, match=r"mathverse.*'bedrock'.*openai and azure"):
        require_judge(suites, environment={"API_TYPE": "bedrock", "OPENAI_API_KEY": "k"})


def test_a_task_of_the_user_is_not_the_one_whose_name_it_has(
    student: Path, environment_folder: Path, tmp_path: Path
) -> None:
    python = environment_folder / "bin" / "python"
    tasks = {
        name: {"parts": [name], "judge": False, "output_types": ["generate_until"]} for name in ("mmvet", "mmmu_val")
    }
    listing = f"if 'launch.suites.task_index' in sys.argv:\n    sys.exit(print({json.dumps({'tasks': tasks})!r}))\n"
    python.write_text(python.read_text().replace("asked =", f"{listing}asked =", 1))
    include = tmp_path / "own"
    include.mkdir()
    suite = open_environment(environment_folder, include=include).suite("mmvet")
    assert (suite.judge, suite.known) == (False, None)
    assert evaluate(student, environment_folder, "mmmu", "--include-path", str(include)) == 0
    page = write_report(student.parents[1]).read_text()
    assert "<th>mmmu_val</th>" in page
    assert "MMMU" not in page
    assert "50.0\u202f%" not in page


@pytest.mark.parametrize("damage", ["none", "no index", "no plug-in"])
def test_an_environment_that_is_not_whole_says_how_to_make_it(
    damage: str, environment_folder: Path, tmp_path: Path
) -> None:
    if damage == "no index":
        (environment_folder / INDEX).write_text("{}")
    elif damage == "no plug-in":
        (environment_folder / INDEX).write_text(json.dumps({"lmms_eval": "0.7.3", "models": [], "tasks": {}}))
    folder = tmp_path / "nothing" if damage == "none" else environment_folder
    with pytest.raises(ConfigError, match=rf"install\.sh {folder} {sys.executable}"):
        open_environment(folder)


def test_outcomes_are_kept_and_only_what_is_missing_runs_again(
    student: Path, environment_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "canary-in-a-coal-mine")
    assert evaluate(student, environment_folder, "mmmu,mmstar,ai2d,mmmu_val") == 3
    said = capsys.readouterr()
    assert "2 of 3 came to no result" in said.err
    assert "no room on the device" in said.err
    assert re.search(r"small +mmmu_val +mmmu_acc +0\.5 +0\.02 +900", said.out)
    run_dir = student.parents[1]
    record = read_record(run_dir / "suites.json")
    assert [(one.student, one.suite) for one in record.results] == [("small", "mmmu_val")]
    assert [one.suite for one in record.failures] == ["mmstar", "ai2d"]
    assert "exit code 0" in record.failures[1].reason  # lmms-eval hides exceptions behind it
    assert evaluate(student, environment_folder, "mmmu,mmstar") == 3
    assert calls(student) == ["mmmu_val", "mmstar", "ai2d", "mmstar"]
    (student / "model.safetensors").write_bytes(b"other weights")
    assert evaluate(student, environment_folder, "mmmu") == 0
    assert calls(student)[4:] == ["mmmu_val"]
    kept = [path for path in run_dir.rglob("*") if path.is_file()]
    assert not any(b"canary-in" in path.read_bytes() for path in kept)
    assert "canary-in" not in said.err + said.out
    assert "token ***" in (run_dir / "logs" / "suite-small-mmmu_val.log").read_text()
    page = write_report(run_dir).read_text()
    assert all(words in page for words in ("50.0\u202f%", "of 900", "no room on the device"))


def test_what_decides_the_figures_is_in_the_identity(
    student: Path, environment_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = open_environment(environment_folder)
    own = tmp_path / "own"
    own.mkdir()

    def identity(task: str = "mmvet", *, settings: SuiteSettings = SETTINGS, included: bool = False) -> str:
        return suite_identity(
            environment.suite(task),
            student=folder_digest(student),
            tasks=folder_digest(own) if included else None,
            lmms_eval=environment.version,
            settings=settings,
        )

    seen = [identity(), identity("mmmu"), identity(included=True)]
    (own / "task.yaml").write_text("task: mine")
    seen.append(identity(included=True))
    seen.append(identity(settings=replace(SETTINGS, dtype="bfloat16")))
    seen.append(identity(settings=replace(SETTINGS, limit=3)))
    seen.append(identity(settings=replace(SETTINGS, without_judge=True)))
    assert identity(settings=replace(SETTINGS, batch_size=9, timeout_s=1.0)) == seen[0]
    assert identity("mmmu", settings=replace(SETTINGS, without_judge=True)) == seen[1]
    monkeypatch.setenv("MODEL_VERSION", "another judge")
    assert identity("mmmu") == seen[1]
    seen.append(identity())
    monkeypatch.setenv("OPENAI_API_URL", "https://judge.example/v1")
    assert identity("mmmu") == seen[1]
    seen.append(identity())
    monkeypatch.setenv("OPENAI_API_URL", "https://user:password@judge.example/v1?token=secret")
    assert identity() == seen[-1]
    (student / "chat_template.jinja").write_text("other")
    seen.append(identity())
    assert len(set(seen)) == len(seen)


def test_figures_are_the_numbers_of_the_tasks_of_the_suite(environment_folder: Path, tmp_path: Path) -> None:
    suite = open_environment(environment_folder).suite("mmmu")
    path = tmp_path / "results.json"
    path.write_text(json.dumps(RESULTS))
    (figure,) = read_figures(path, suite=suite)
    assert (figure.metric, figure.filter, figure.value, figure.stderr) == ("mmmu_acc", "none", 0.5, 0.02)
    assert (figure.task, figure.version, figure.num_samples) == ("mmmu_val", "0.0", 900)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "no result of lmms-eval"),
        ("[]", "no result of lmms-eval"),
        ('{"results": {}}', "no result of lmms-eval"),
        ('{"results": {}, "versions": {}, "n-samples": {}}', "lacks mmmu_val"),
        ('{"results": {"mmmu_val": {"a,none": null}}, "versions": {}, "n-samples": {}}', "no figure"),
        ('{"results": {"mmmu_val": {"a,none": NaN}}, "versions": {}, "n-samples": {}}', "is nan"),
    ],
)
def test_results_that_say_nothing_are_no_figures(
    text: str, words: str, environment_folder: Path, tmp_path: Path
) -> None:
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(DataError, match=words):
        read_figures(path, suite=open_environment(environment_folder).suite("mmmu"))


def test_a_suite_that_takes_too_long_ends_with_all_its_processes(
    environment_folder: Path, student: Path, tmp_path: Path
) -> None:
    marker = tmp_path / "child"
    python = environment_folder / "bin" / "python"
    python.write_text(f"#!/bin/sh\nsleep 300 &\necho $! > '{marker}'\nwait\n")
    environment = open_environment(environment_folder)
    short = replace(SETTINGS, timeout_s=5.0)
    with pytest.raises(SuiteFailed, match="longer than"):
        run_suite(
            environment.suite("mmmu"),
            student=SuiteStudent(name="small", model=str(student), path=student),
            work_dir=tmp_path / "work",
            log=tmp_path / "log",
            environment=environment,
            settings=short,
        )
    child = int(marker.read_text())
    deadline = time.monotonic() + 10
    while is_running(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(child)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_bars_go_to_the_console_and_lines_to_the_log_too(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    script = "import sys; sys.stdout.write('first\\r\\n\\r 10%\\r 50%\\rlast'); sys.exit(5)"
    line, log = [sys.executable, "-c", script], tmp_path / "log"
    assert run_logged(line, cwd=tmp_path, log=log, timeout_s=60, environment=os.environ) == 5
    assert log.read_text() == "first\nlast\n"
    assert capfd.readouterr().err.splitlines() == ["first", " 10%", "last"]


def test_a_process_that_left_its_group_does_not_hold_up_the_next_suite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness, "READER_TIMEOUT_S", 2.0)
    left, over = tmp_path / "left", tmp_path / "over"
    script = (
        "import subprocess\n"
        "left = subprocess.Popen(['sh', '-c', 'sleep 60; echo > over'], start_new_session=True)\n"
        f"open({str(left)!r}, 'w').write(str(left.pid))\n"
        "print('done', flush=True)\n"
    )
    log = tmp_path / "log"
    assert run_logged([sys.executable, "-c", script], cwd=tmp_path, log=log, timeout_s=60, environment=os.environ) == 0
    assert not over.exists()
    os.killpg(int(left.read_text()), signal.SIGKILL)
    assert log.read_text() == "done\n"


def test_lmms_eval_knows_its_parent_and_no_launcher(
    student: Path, environment_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in LAUNCHER_VARIABLES:
        monkeypatch.setenv(name, "1")
    assert evaluate(student, environment_folder, "mmmu") == 0
    log = student.parents[1] / "logs" / "suite-small-mmmu_val.log"
    assert f"launched [] by {os.getpid()}" in log.read_text()


def test_lmms_eval_ends_before_it_begins_where_its_parent_is_gone(tmp_path: Path) -> None:
    registry = tmp_path / "lmms_eval" / "models" / "registry_v2.py"
    registry.parent.mkdir(parents=True)
    registry.write_text("ModelManifest = dict")
    script = "from launch.suites.plugin import manifest; print(manifest()['model_id'])"
    gone = subprocess.Popen(["true"])
    gone.wait()
    ends = {}
    for parent in (os.getpid(), gone.pid):
        variables = os.environ | {"PYTHONPATH": str(tmp_path), FATE_SHARED: str(parent)}
        done = subprocess.run(
            [sys.executable, "-c", script], env=variables, capture_output=True, text=True, check=False
        )
        ends[parent] = (done.returncode, done.stdout)
    assert ends == {os.getpid(): (0, "genrecal\n"), gone.pid: (-signal.SIGKILL, "")}


def test_figures_of_several_filters_have_a_row_each(student: Path, environment_folder: Path) -> None:
    evaluate(student, environment_folder, "mmmu")
    path = student.parents[1] / "suites.json"
    path.write_text(path.read_text().replace('"figures": [', '"figures": [' + json.dumps(FLEXIBLE) + ","))
    page = write_report(student.parents[1]).read_text()
    assert all(words in page for words in ("50.0\u202f%", "25.0\u202f%", "mmmu_acc (flexible)"))


def test_figures_go_with_the_weights_that_gave_them(student: Path, environment_folder: Path) -> None:
    path, python = student.parents[1] / "suites.json", environment_folder / "bin" / "python"
    assert evaluate(student, environment_folder, "mmmu") == 0
    before, works = read_record(path), python.read_text()
    (student / "model.safetensors").write_bytes(b"other weights")
    python.write_text(works.replace('asked == "mmstar"', 'asked == "mmmu_val"'))
    assert evaluate(student, environment_folder, "mmmu") == 3
    failed = read_record(path)
    assert failed.results == ()
    assert [one.suite for one in failed.failures] == ["mmmu_val"]
    assert failed.failures[0].identity != before.results[0].identity
    (student / "model.safetensors").write_bytes(b"weights")
    python.write_text(works)
    assert evaluate(student, environment_folder, "mmmu") == 0
    after = read_record(path)
    assert [one.identity for one in after.results] == [before.results[0].identity]
    assert after.failures == ()


def test_figures_of_earlier_weights_do_not_outlive_a_run_that_is_cut_short(
    student: Path, environment_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert evaluate(student, environment_folder, "mmmu") == 0
    (student / "model.safetensors").write_bytes(b"other weights")

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "run_suite", interrupted)
    assert evaluate(student, environment_folder, "mmmu") == 130
    assert read_record(student.parents[1] / "suites.json").results == ()


def test_a_student_does_not_take_the_name_of_another(
    student: Path, environment_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir, other, output = student.parents[1], tmp_path / "elsewhere" / "small", tmp_path / "output"
    shutil.copytree(student, other)
    assert evaluate(other, environment_folder, "mmmu", "--output", str(run_dir)) == 2  # not scored yet, but there
    assert "rename its directory" in capsys.readouterr().err
    assert evaluate(student, environment_folder, "mmmu", "--output", str(output)) == 0
    assert evaluate(other, environment_folder, "mmmu", "--output", str(output)) == 2
    assert evaluate(other, environment_folder, "mmstar", "--output", str(tmp_path / "failures")) == 3
    assert evaluate(student, environment_folder, "mmmu", "--output", str(tmp_path / "failures")) == 2
    assert calls(student) == ["mmmu_val", "mmstar"]
    assert [one.source for one in read_record(output / "suites.json").results] == [str(student.resolve())]


def test_a_run_that_was_moved_keeps_its_figures(student: Path, environment_folder: Path, tmp_path: Path) -> None:
    assert evaluate(student, environment_folder, "mmmu") == 0
    moved = student.parents[1].rename(student.parents[2] / "moved")
    assert evaluate(moved / "students" / "small", environment_folder, "mmmu") == 0
    assert [one.source for one in read_record(moved / "suites.json").results] == ["students/small"]
    assert calls(student) == ["mmmu_val"]


def test_a_record_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "suites.json").write_text('{"results": [{"student": "a"}]}')
    with pytest.raises(DataError, match="no record of suites"):
        read_record(tmp_path / "suites.json")


@pytest.mark.parametrize("words", [["eval"], ["eval", "--suite", "mmmu"], ["eval", "--suites", "mmmu"]])
def test_eval_needs_a_run_file_or_a_suite_with_a_student(
    words: list[str], environment_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words, "--suite-env", str(environment_folder)]) == 2
    assert "student" in capsys.readouterr().err or words[1] == "--suites"


@pytest.fixture
def run_file(student: Path) -> Path:
    """A run of two students, of which `small` is trained."""
    path = student.parents[1] / "run.yaml"
    (student.parent / "given").mkdir()
    (student.parent / "given" / "config.json").write_text("{}")
    given = write_small_run(
        path.parent, teacher=path, student=student.parent / "given", data=path, cluster={"kind": "ray"}
    )
    values = yaml.safe_load(given.read_text())
    values |= {"output_dir": str(path.parent)}
    values["students"] += [values["students"][0] | {"name": "untrained"}]
    path.write_text(yaml.safe_dump({name: value for name, value in values.items() if name != "cluster"}))
    return path


def test_the_students_of_a_run_are_those_that_exist(
    run_file: Path, environment_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(run_file), "--suite", "mmmu", "--suite-env", str(environment_folder)]
    assert main(["eval", *words]) == 0
    record = read_record(run_file.parent / "suites.json")
    assert [one.student for one in record.results] == ["small-untouched", "small", "untrained-untouched"]
    told = run_file_path(run_file.parent / "suites.json").read_text().splitlines()[0]
    assert "`genrecal eval` of this file" in told
    assert "suites.json.provenance.json" in told
    assert main(["eval", *words, "--student", "untrained"]) == 2
    assert "student untrained is not trained yet" in capsys.readouterr().err
    assert main(["eval", *words, "--student", "smal"]) == 2
    assert "did you mean 'small'?" in capsys.readouterr().err
    other = shutil.copytree(run_file.parent / "students" / "given", environment_folder.parent / "untrained")
    assert main(["eval", *words, "--student", str(other)]) == 2
    assert "has the name of the run's student" in capsys.readouterr().err


def test_options_of_suites_go_with_a_suite(run_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(run_file), "--limit", "3"]) == 2
    assert "--limit goes with --suite" in capsys.readouterr().err
    assert main(["eval", str(run_file), "--suite", "", "--suite-env", str(tmp_path)]) == 2
    assert "no environment of lmms-eval" in capsys.readouterr().err
