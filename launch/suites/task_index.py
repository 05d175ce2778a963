"""Lists the tasks of lmms-eval as JSON; runs in its environment: ``python -m launch.suites.task_index [FOLDER]``.

Without a folder it lists what lmms-eval brings, which takes a minute and is therefore kept when the environment is
made; with one it lists the tasks of that folder alone.
"""

import functools
import json
import re
import sys
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

JUDGE_MODULE = re.compile(r"llm_judge|OPENAI_API_KEY|AZURE_API_KEY")
"""What a task's Python names where it can ask a judge model."""
JUDGE_METRIC = re.compile(r"judge|gpt", re.IGNORECASE)
"""How metrics are named that a judge model gives."""


def index(folder: str | None) -> dict[str, Any]:
    """Return the version of lmms-eval, the models it can run, and its tasks with what has to be known of each."""
    from lmms_eval.models import list_available_models
    from lmms_eval.tasks import TaskManager

    manager = TaskManager("ERROR", include_path=folder, include_defaults=folder is None)
    return {
        "lmms_eval": metadata.version("lmms-eval"),
        "models": list_available_models(),
        "tasks": {name: _task(name, entries=manager.task_index) for name in manager.all_tasks},
    }


def _task(name: str, *, entries: Mapping[str, Any]) -> dict[str, Any]:
    parts = sorted(set(_parts(name, entries=entries, above=())))
    configs = [_config(entries[part]["yaml_path"]) for part in parts]
    return {
        "parts": parts,
        "judge": any(_asks_judge(config, beside=entries[part]) for part, config in zip(parts, configs, strict=True)),
        "output_types": sorted({str(config.get("output_type", "generate_until")) for config in configs}),
    }


def _parts(name: str, *, entries: Mapping[str, Any], above: tuple[str, ...]) -> Iterator[str]:
    """Yield the tasks that a name stands for: itself, or those of a group or tag."""
    entry = entries.get(name)
    if entry is None or name in above:
        return
    if "task" not in entry["type"]:
        members = entry["task"] if entry["task"] != -1 else _config(entry["yaml_path"]).get("task", [])
        for member in _names(members):
            yield from _parts(member, entries=entries, above=(*above, name))
    elif isinstance(entry["yaml_path"], str):
        yield name


def _names(members: Any) -> Iterator[str]:
    """Yield the names in a group: plain, of a task with changed settings, or in a group that is written inside it."""
    if isinstance(members, str):
        yield members
    elif isinstance(members, Mapping):
        yield from _names(members.get("task"))
    elif isinstance(members, list):
        for member in members:
            yield from _names(member)


@functools.cache
def _config(yaml_path: Any) -> dict[str, Any]:
    from lmms_eval.utils import load_yaml_config

    if not isinstance(yaml_path, str):
        return {}
    try:
        return load_yaml_config(yaml_path, mode="simple")
    except Exception as error:  # one task of two thousand that does not load is no reason to list none
        print(f"{yaml_path} cannot be read: {type(error).__name__}", file=sys.stderr)
        return {}


def _asks_judge(config: Mapping[str, Any], *, beside: Mapping[str, Any]) -> bool:
    metrics = config.get("metric_list") or []
    if any(JUDGE_METRIC.search(str(metric["metric"])) for metric in metrics if metric):
        return True
    folder = str(Path(beside["yaml_path"]).parent)
    return any(_names_judge(folder, module) for module in _modules(config))


def _modules(value: Any) -> set[str]:
    """Return the modules whose functions a task's YAML names."""
    if isinstance(value, Mapping):
        return set().union(*(_modules(item) for item in value.values()))
    if isinstance(value, list):
        return set().union(*(_modules(item) for item in value))
    tag, function = getattr(value, "tag", None), getattr(value, "value", None)
    return {str(function).rpartition(".")[0]} if tag == "!function" else set()


@functools.cache
def _names_judge(folder: str, module: str) -> bool:
    """Return whether a module, or one that it imports from its own folder, can ask a judge."""
    path = Path(folder, f"{module.replace('.', '/')}.py")
    if not path.is_file():
        return False
    text = path.read_text(encoding="utf-8", errors="replace")
    imported = set(re.findall(rf"(?:\.|tasks\.{re.escape(Path(folder).name)}\.)(\w+) import", text))
    besides = [beside for name in imported if (beside := Path(folder, f"{name}.py")).is_file()]
    sources = [text, *(beside.read_text(encoding="utf-8", errors="replace") for beside in besides)]
    return any(JUDGE_MODULE.search(source) for source in sources)


if __name__ == "__main__":
    # what lmms-eval prints while it reads its tasks goes to standard output too
    target = sys.stdout
    sys.stdout = sys.stderr
    found = index(sys.argv[1] if len(sys.argv) > 1 else None)
    print(json.dumps(found), file=target)
