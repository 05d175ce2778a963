"""What a run has left behind for good: whether its cache, its students and its evaluation are complete.

Exit codes get lost on the way through schedulers, so these marks alone say what is done. They are read without torch,
except for the records of a cache that exists.
"""

import json
from pathlib import Path
from typing import Any

from launch.run_config import RunConfig
from teacher_cache.documents import decode_document
from teacher_cache.durable_files import replace_file, sync_names_above
from teacher_cache.errors import CacheError, GenrecalError
from teacher_cache.manifest import Manifest, fingerprint, read_manifest
from teacher_cache.storage import open_store

STAGE_DONE = "DONE.json"
"""The trainer's last file of a stage."""


def cache_content(config: RunConfig) -> dict[str, Any]:
    """Return all that a run file says of what its cache holds."""
    return config.cache.model_dump(mode="json", exclude={"build"})


def mark_cache(config: RunConfig) -> None:
    """Leave for good that a build has found everything in the cache that the run file asks of it."""
    _write(_cache_mark(config), read_manifest(open_store(config.cache.uri)).fingerprint)


def cache_complete(config: RunConfig) -> bool:
    """Tell whether the cache is complete and was created for, or a build found it to hold, what the run file names.

    Contents are not compared here: a build does that, and the trainer where it joins the cache with the data.
    """
    try:
        manifest = read_manifest(open_store(config.cache.uri))
        if not _marked(config, manifest) and not _created_for(config, manifest):
            return False
        targets = config.cache.targets.model_dump(mode="json", exclude={"codec"})
        if manifest.codec != config.cache.targets.codec or manifest.identity.get("targets") != targets:
            return False
        from teacher_cache.inspect import cache_status

        return cache_status(config.cache.uri).published
    except CacheError:
        return False


def student_complete(config: RunConfig, name: str) -> bool:
    """Tell whether a student is published and all its stages are done with the settings of the run file."""
    output_dir = Path(config.output_dir)
    student = config.student(name)
    train = student.settings(config.train)
    stages = [stage for stage in train.stages if stage != "align" or student.method == "genrecal"]
    if not (output_dir / "students" / name / "config.json").is_file():
        return False
    for stage in stages:
        asked: dict[str, Any] = {
            **train.model_dump(mode="json"),
            "student": student.alone().model_dump(mode="json"),
            "settings": train.stage(stage).model_dump(mode="json"),
        }
        found = _stage_identity(output_dir / "training" / name / stage / STAGE_DONE)
        if found is None or not _agrees(found, asked):
            return False
    return True


def mark_report(config: RunConfig) -> None:
    """Leave for good with which settings the models were scored; the last report alone counts."""
    _write(_marks(config) / "report", _evaluation_digest(config))


def report_complete(config: RunConfig) -> bool:
    """Tell whether the report is there, of the run file's evaluation, and newer than every student it is about."""
    if _read(_marks(config) / "report") != _evaluation_digest(config):
        return False
    output_dir = Path(config.output_dir)
    report = output_dir / "report.html"
    students = [output_dir / "students" / student.name / "config.json" for student in config.students]
    if not report.is_file() or not (output_dir / "results.json").is_file():
        return False
    return all(path.is_file() and path.stat().st_mtime <= report.stat().st_mtime for path in students)


def _marks(config: RunConfig) -> Path:
    return Path(config.output_dir) / "submit" / "marks"


def _cache_mark(config: RunConfig) -> Path:
    return _marks(config) / f"cache-{fingerprint(cache_content(config))}"


def _evaluation_digest(config: RunConfig) -> str:
    return fingerprint({"evaluation": config.evaluation and config.evaluation.model_dump(mode="json")})


def _write(mark: Path, text: str) -> None:
    mark.parent.mkdir(parents=True, exist_ok=True)
    replace_file(mark, text.encode())
    sync_names_above(mark)


def _read(mark: Path) -> str | None:
    try:
        return mark.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None


def _marked(config: RunConfig, manifest: Manifest) -> bool:
    return _read(_cache_mark(config)) == manifest.fingerprint


def _created_for(config: RunConfig, manifest: Manifest) -> bool:
    """Tell whether the cache was created with this teacher and data; that record does not follow extensions."""
    content = cache_content(config)
    return all(manifest.provenance.get(part) == content[part] for part in ("teacher", "data"))


def _agrees(stored: dict[str, Any], asked: dict[str, Any]) -> bool:
    """Tell whether the run file says the same of everything in a stored identity that it says anything of."""
    for name, value in stored.items():
        if name in ("student", "settings") and isinstance(value, dict):
            if any(asked[name].get(field) != setting for field, setting in value.items()):
                return False
        elif name in asked and asked[name] != value:
            return False
    return True


def _stage_identity(path: Path) -> dict[str, Any] | None:
    try:
        identity = json.loads(decode_document(path.read_bytes(), where=str(path)))["identity"]
    except (OSError, KeyError, GenrecalError):
        return None
    return identity if isinstance(identity, dict) else None
