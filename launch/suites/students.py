"""Which students go through suites, and the folder in which their figures lie."""

from collections.abc import Sequence
from pathlib import Path

from launch.results import evaluated_models
from launch.run_config import RunConfig
from launch.suggestions import suggestion
from launch.suites.harness import SuiteStudent
from launch.suites.results import RECORD, SuiteRecord
from teacher_cache.errors import ConfigError


def find_students(wanted: str | None, config: RunConfig | None) -> list[SuiteStudent]:
    """Return the students to run: a directory, or those of a run that exist.

    Raises:
        ConfigError: There is none.
    """
    models = [] if config is None else [model for model in evaluated_models(config) if model.name != "teacher"]
    names = [model.name for model in models]
    if wanted is not None and wanted not in names:
        if not (Path(wanted) / "config.json").is_file():
            what = f"is none of the run's ({', '.join(names)}), nor" if names else "is not"
            raise ConfigError(
                f"--student {wanted} {what} a directory with a config.json{suggestion(wanted, names)}: "
                "`genrecal export` writes one"
            )
        found = SuiteStudent(name=Path(wanted).resolve().name, model=wanted, path=Path(wanted))
        if other := next((one for one in models if one.name == found.name and not _same(one.model, wanted)), None):
            raise ConfigError(
                f"--student {wanted} has the name of the run's student at {other.model}, whose figures it would "
                f"replace: rename the directory, or leave out the run file and name a folder with --output"
            )
        return [found]
    if config is None:
        raise ConfigError("--suite needs a student: `--student DIR`, or a run file")
    from distill.student import resolve_model

    students = [
        SuiteStudent(
            name=model.name,
            model=model.model,
            path=resolve_model(model.model, revision=model.revision),
            trust_remote_code=model.trust_remote_code,
        )
        for model in models
        if wanted in (None, model.name) and (not model.trained or Path(model.model).exists())
    ]
    if not students:
        which = "no student of the run is" if wanted is None else f"student {wanted} is not"
        raise ConfigError(f"{which} trained yet: run `genrecal train` first")
    return students


def output_folder(wanted: Path | None, config: RunConfig | None, students: Sequence[SuiteStudent]) -> Path:
    """Return the folder of the record: as wanted, of the run, or of the run that has the student in `students`.

    Raises:
        ConfigError: None is wanted, and the student lies in no run.
    """
    if wanted is not None:
        return wanted
    if config is not None:
        return Path(config.output_dir)
    folder = students[0].path.resolve().parent
    if folder.name != "students":
        raise ConfigError(f"the student at {students[0].path} lies in no run: name a folder for {RECORD} with --output")
    return folder.parent


def source_of(student: SuiteStudent, *, output_dir: Path) -> str:
    """Return what a student is loaded from, as the record in a folder says it."""
    return _source(student.model, output_dir=output_dir)


def require_free_names(students: Sequence[SuiteStudent], *, record: SuiteRecord, output_dir: Path) -> None:
    """Refuse a student whose name another one holds, in the record or among the trained of the run.

    Raises:
        ConfigError: Its figures and answers would replace those of the other.
    """
    for student in students:
        holders = record.sources(student.name)
        trained = output_dir / "students" / student.name
        if (trained / "config.json").is_file():
            holders.add(_source(str(trained), output_dir=output_dir))
        if others := sorted(holders - {source_of(student, output_dir=output_dir)}):
            raise ConfigError(
                f"the student at {student.model} is called {student.name}, as the one at {', '.join(others)} of "
                f"{output_dir}, whose figures it would replace: rename its directory, or name another folder for "
                f"{RECORD} with --output"
            )


def _source(model: str, *, output_dir: Path) -> str:
    if not Path(model).is_dir():
        return model
    path, folder = Path(model).resolve(), output_dir.resolve()
    return str(path.relative_to(folder) if path.is_relative_to(folder) else path)


def _same(path: str, other: str) -> bool:
    return Path(path).resolve() == Path(other).resolve()
