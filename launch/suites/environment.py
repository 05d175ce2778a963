"""The environment of lmms-eval: where it is, what is in it, which tasks it knows."""

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from launch.processes import FATE_SHARED
from launch.suggestions import nearest
from launch.suites.known import KNOWN_SUITES, KnownSuite, known_suite, suite_of_task
from launch.suites.plugin import MODEL
from teacher_cache.errors import ConfigError

INSTALLER = Path(__file__).with_name("install.sh")
DEFAULT_FOLDER = Path(".venv-suites")
INDEX = "genrecal-suites.json"
"""In the environment: its tasks, listed when it was made."""
LISTING_TIMEOUT_S = 600.0
ANSWERS_IN_WORDS = {"generate_until"}
JUDGE_VARIABLES = {"openai": ("OPENAI_API_KEY",), "azure": ("AZURE_API_KEY", "AZURE_ENDPOINT")}
"""What has to be set for a judge, by the value of API_TYPE."""
JUDGE_ADDRESSES = {"openai": "OPENAI_API_URL", "azure": "AZURE_ENDPOINT"}
"""What says where the judge is, by the value of API_TYPE."""


@dataclass(frozen=True, kw_only=True)
class Suite:
    """One suite that can run."""

    task: str
    parts: tuple[str, ...]
    """The tasks it consists of."""
    judge: bool
    """Whether a judge model reads answers."""
    known: KnownSuite | None
    """The benchmark that it is, where it has a name of its own."""
    included: bool
    """Whether it came with `include`, so that its name says nothing."""


@dataclass(frozen=True, kw_only=True)
class SuiteEnvironment:
    """A virtual environment with lmms-eval."""

    folder: Path
    version: str
    """Of lmms-eval."""
    tasks: Mapping[str, Any]
    """By name: `parts`, `judge`, `output_types`, and `included` of those from `include`."""
    include: Path | None
    """Folder with further tasks."""

    @property
    def python(self) -> Path:
        """The interpreter."""
        return interpreter(self.folder)

    def suite(self, name: str) -> Suite:
        """Return the suite of a name: one that papers use, or a task or group of lmms-eval.

        Raises:
            ConfigError: There is none, or one that students cannot answer.
        """
        known = known_suite(name)
        task = known.task if known and not self._included(name) else name
        if task not in self.tasks:
            near = nearest(name, [*self.tasks, *(suite.name for suite in KNOWN_SUITES)])
            meant = f", did you mean {near!r}?" if near else ""
            raise ConfigError(
                f"no suite {name!r} in lmms-eval {self.version}{meant or ';'} "
                f"`{self.python} -m lmms_eval tasks list` lists all"
            )
        entry = self.tasks[task]
        if not entry["parts"]:
            raise ConfigError(f"suite {task} consists of tasks that lmms-eval {self.version} does not have")
        if others := sorted(set(entry["output_types"]) - ANSWERS_IN_WORDS):
            raise ConfigError(
                f"suite {task} asks for {', '.join(others)}; students answer one question in words (generate_until)"
            )
        benchmark = None if self._included(task) else suite_of_task(task)
        return Suite(
            task=task,
            parts=tuple(entry["parts"]),
            judge=benchmark.judge if benchmark else bool(entry["judge"]),
            known=benchmark,
            included=self._included(task),
        )

    def _included(self, task: str) -> bool:
        return bool(self.tasks.get(task, {}).get("included"))


def interpreter(folder: Path) -> Path:
    """Return the interpreter of a virtual environment."""
    return folder / "bin" / "python"


def open_environment(folder: Path, *, include: Path | None = None) -> SuiteEnvironment:
    """Return the environment that the installer made.

    Args:
        folder: The virtual environment.
        include: Folder with further tasks.

    Raises:
        ConfigError: There is none, it is not whole, or the tasks in ``include`` cannot be read.
    """
    command = shlex.join([str(INSTALLER), str(folder), sys.executable])
    remedy = f"run `{command}`, which makes it from pinned versions (some minutes, 0.5 GB)"
    if not interpreter(folder).exists():
        raise ConfigError(f"no environment of lmms-eval at {folder}: {remedy}; or name another with --suite-env")
    try:
        listed = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        version, models, tasks = str(listed["lmms_eval"]), listed["models"], dict(listed["tasks"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"the environment at {folder} is not whole ({folder / INDEX}: {error}): {remedy}") from error
    if MODEL not in models:
        raise ConfigError(f"lmms-eval in {folder} does not find genrecal's model: install genrecal anew, then {remedy}")
    if include is not None:
        included = _list_tasks(folder, include)
        tasks |= {name: {**entry, "included": True} for name, entry in included.items()}
    return SuiteEnvironment(folder=folder, version=version, tasks=tasks, include=include)


def require_judge(suites: Sequence[Suite], *, environment: Mapping[str, str] | None = None) -> str | None:
    """Return the judge model that suites will ask, None where none asks one.

    Raises:
        ConfigError: One asks a judge that cannot be reached with what the environment holds.
    """
    asking = [suite.task for suite in suites if suite.judge]
    if not asking:
        return None
    environment = os.environ if environment is None else environment
    kind = _judge_interface(environment)
    if kind not in JUDGE_VARIABLES:
        raise ConfigError(
            f"{', '.join(asking)}: a judge model scores the answers, but API_TYPE is {kind!r}; "
            f"known are {' and '.join(JUDGE_VARIABLES)}. Set one of them, or pass --without-judge"
        )
    if lacking := [name for name in JUDGE_VARIABLES[kind] if not environment.get(name)]:
        raise ConfigError(
            f"{', '.join(asking)}: a judge model scores the answers, but {' and '.join(lacking)} is not set "
            f"(API_TYPE {kind}). Without it lmms-eval would score such answers 0 or guess. Set it, and OPENAI_API_URL "
            "and MODEL_VERSION where the judge is not OpenAI's; or pass --without-judge to run them all the same"
        )
    return judge_model(environment)


def judge_model(environment: Mapping[str, str]) -> str:
    """Return the model that lmms-eval asks, and through which interface."""
    return f"{environment.get('MODEL_VERSION', 'gpt-4o-2024-11-20')} ({_judge_interface(environment)})"


def judge_address(environment: Mapping[str, str]) -> str | None:
    """Return where the judge is asked, without credentials and query; None where lmms-eval's own default is."""
    address = environment.get(JUDGE_ADDRESSES[_judge_interface(environment)])
    if not address:
        return None
    parts = urlsplit(address)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def _judge_interface(environment: Mapping[str, str]) -> str:
    return environment.get("API_TYPE", "openai")


def _list_tasks(folder: Path, include: Path) -> dict[str, Any]:
    if not include.is_dir():
        raise ConfigError(f"--include-path {include} is no folder; it must hold YAML files of lmms-eval tasks")
    # -P: a folder `launch` where the user stands is not the package
    command = [str(interpreter(folder)), "-P", "-m", "launch.suites.task_index", str(include.resolve())]
    variables = os.environ | {FATE_SHARED: str(os.getpid())}
    try:
        done = subprocess.run(
            command, env=variables, capture_output=True, text=True, check=False, timeout=LISTING_TIMEOUT_S
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(f"lmms-eval cannot read the tasks in {include}: {error}") from error
    if done.returncode != 0:
        raise ConfigError(f"lmms-eval cannot read the tasks in {include}:\n{done.stderr[-2000:]}")
    tasks: dict[str, Any] = json.loads(done.stdout)["tasks"]
    if not tasks:
        raise ConfigError(f"no task in {include}: lmms-eval reads the YAML files in it that have `task: NAME`")
    return tasks
