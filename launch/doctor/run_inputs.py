"""Whether a run file can be run from here: its store, the space that it needs, its data and models."""

import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from distill.config import StudentConfig
from launch.console import format_bytes
from launch.doctor.findings import Finding, ok, problem, warning
from launch.run_config import RunConfig
from teacher_cache.config import DataConfig, TeacherConfig
from teacher_cache.errors import GenrecalError
from teacher_cache.local_store import STAGING, LocalStore
from teacher_cache.storage import Store, open_store, require_create

PROBED_ROWS = 64
"""Rows of the data that the size of the cache is estimated from; `cache plan` takes more."""


def check_run(config: RunConfig) -> Iterator[Finding]:
    """Yield a finding for everything that a run file names."""
    yield from check_folders(config)
    yield check_store(config.cache.uri)
    yield from check_data(config)
    yield from check_models(config)
    yield check_space(config)


def check_store(uri: str) -> Finding:
    """Return whether the cache's store refuses to create a name twice, which every commit rests on.

    Leaves nothing behind: what was written is removed, and no folder is made.
    """
    try:
        store = open_store(uri)
        if not isinstance(store, LocalStore):
            require_create(store)
        elif store.root.is_dir():
            _probe_cache(store)
        else:
            with tempfile.TemporaryDirectory(prefix=".genrecal-", dir=_nearest_folder(store.root)) as folder:
                require_create(LocalStore(Path(folder)))
    except (GenrecalError, OSError) as error:
        return problem(
            "cache store", f"{uri}: {error}", remedy="mend permissions or credentials, or choose another `cache.uri`"
        )
    return ok("cache store", f"{uri} can be written, and gives a name only once")


def check_folders(config: RunConfig) -> Iterator[Finding]:
    """Yield problems with folders that other users may write to."""
    places = [Path(config.output_dir)]
    if isinstance(store := open_store_or_none(config.cache.uri), LocalStore):
        places.append(store.root)
    for place in places:
        folder = _nearest_folder(place)
        mode = folder.stat().st_mode
        if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
            yield problem("folder", f"every user may change {folder}", remedy=f"run chmod o-w {folder}")
        elif not os.access(folder, os.W_OK):
            yield problem("folder", f"{folder} cannot be written", remedy="choose another `output_dir` or `cache.uri`")
        else:
            yield ok("folder", str(place))


def open_store_or_none(uri: str) -> Store | None:
    """Return the store at a URI, None where it cannot be used."""
    try:
        return open_store(uri)
    except (GenrecalError, OSError):
        return None


def check_data(config: RunConfig) -> Iterator[Finding]:
    """Yield whether the data files are there and have a usable first row."""
    from teacher_cache.samples import parse_rows, read_rows
    from teacher_cache.schema import SkippedSample

    files = {"cache.data.path": config.cache.data}
    if config.answers is not None:
        files = {"answers.source": config.cache.data.model_copy(update={"path": config.answers.source})}
    if config.evaluation is not None:
        files["evaluation.data"] = DataConfig(path=config.evaluation.data)
    for name, data in files.items():
        root = Path(data.image_root) if data.image_root else Path(data.path).parent
        try:
            _, first = next(parse_rows(read_rows(Path(data.path)), image_root=root))
        except StopIteration:
            yield problem("data", f"{data.path} has no row", remedy=f"correct `{name}`")
        except (GenrecalError, OSError) as error:
            yield problem("data", str(error), remedy=f"correct `{name}`")
        else:
            if isinstance(first, SkippedSample):
                yield warning(
                    "data",
                    f"{data.path}, first row {first.sample_id}: {first.message}",
                    remedy="see docs/data.md for the form of rows",
                )
            else:
                yield ok("data", f"{data.path} has usable rows")


def check_models(config: RunConfig) -> Iterator[Finding]:
    """Yield whether the models are on this machine, and whether any wants to run code of its own."""
    from teacher_cache.model_files import local_copy, refuse_own_code

    models: list[tuple[str, TeacherConfig | StudentConfig]] = [
        ("teacher", config.cache.teacher),
        *((student.name, student) for student in config.students),
    ]
    for name, model in models:
        directory = local_copy(model.model, revision=model.revision)
        if directory is None:
            yield warning(
                f"model {name}",
                f"{model.model} is not on this machine",
                remedy=f"fetch it first: hf download {model.model}",
            )
            continue
        try:
            refuse_own_code(directory, trusted=model.trust_remote_code)
        except GenrecalError as error:
            yield problem(f"model {name}", str(error), remedy="use a checkpoint in the form that transformers knows")
        else:
            yield ok(f"model {name}", str(directory))


def check_space(config: RunConfig) -> Finding:
    """Return whether a local cache's disk has room for what is not built yet."""
    store = open_store_or_none(config.cache.uri)
    if not isinstance(store, LocalStore):
        return ok("space", "an object store takes the cache")
    free = shutil.disk_usage(_nearest_folder(store.root)).free
    try:
        needed = _missing_bytes(config, store)
    except (GenrecalError, OSError) as error:
        return warning(
            "space",
            f"{format_bytes(free)} free, the size of the cache is not known: {error}",
            remedy="state it under `plan`",
        )
    text = f"{format_bytes(free)} free, about {format_bytes(needed)} needed"
    if needed > free:
        return problem("space", text, remedy="make room, or see `genrecal cache plan` for smaller forms of the cache")
    return ok("space", text)


def _missing_bytes(config: RunConfig, store: LocalStore) -> int:
    from launch.cache_plan import make_plan

    small = config.plan.model_copy(update={"sample_rows": min(config.plan.sample_rows, PROBED_ROWS)})
    planned = make_plan(config.model_copy(update={"plan": small})).storage.size.total_bytes
    stored = sum(entry.size_bytes for entry in store.list(""))
    return max(planned - stored, 0)


def _probe_cache(store: LocalStore) -> None:
    staging = store.root / STAGING
    is_there = staging.exists()
    require_create(store)
    if not is_there:
        with suppress(OSError):  # a builder that has just started uses it
            staging.rmdir()


def _nearest_folder(path: Path) -> Path:
    return next(folder for folder in [path.absolute(), *path.absolute().parents] if folder.is_dir())
