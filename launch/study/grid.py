"""The runs of a study, in the order in which they are made."""

from dataclasses import dataclass
from pathlib import Path

from launch.study.config import Arm, StudyConfig
from teacher_cache.manifest import fingerprint

NO_TEACHER = "none"


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run: an arm on a pair with a seed."""

    arm: Arm
    student: str
    teacher: str | None
    """None where no teacher decides the result."""
    seed: int

    @property
    def name(self) -> str:
        """What people see of it."""
        return f"{self.arm.name} {self.student} from {self.teacher or NO_TEACHER} seed {self.seed}"


def plan_cells(config: StudyConfig) -> list[Cell]:
    """Return all runs, each once: in the order of the grid, those that wait for the FLOPs of others at the end."""
    cells: dict[str, Cell] = {}
    for part in config.grid:
        for seed in part.seeds:
            for pair in part.pairs:
                for name in part.arms:
                    cell = make_cell(config, name, student=pair.student, teacher=pair.teacher, seed=seed)
                    cells.setdefault(cell.name, cell)
    return sorted(cells.values(), key=lambda cell: cell.arm.equal_flops is not None)


def make_cell(config: StudyConfig, arm: str, *, student: str, teacher: str | None, seed: int) -> Cell:
    """Return the run of an arm; an untouched student has no seed, and without influence the teacher is left out."""
    chosen = config.arm(arm)
    return Cell(
        arm=chosen,
        student=student,
        teacher=teacher if chosen.depends_on_teacher else None,
        seed=0 if chosen.method == "untouched" else seed,
    )


def cell_digest(config: StudyConfig, cell: Cell) -> str:
    """Return the digest of everything in the study file that decides a run's result."""
    named = {model.name: model.model_dump(mode="json") for model in (*config.teachers, *config.students)}
    equal = cell.arm.equal_flops
    others = () if equal is None else (config.arm(equal.to), config.arm(equal.like))
    return fingerprint(
        {
            "data": config.data.model_dump(mode="json"),
            "student": named[cell.student],
            "teacher": None if cell.teacher is None else named[cell.teacher],
            "arm": cell.arm.model_dump(mode="json"),
            "train": config.train_config(cell.arm, seed=cell.seed).model_dump(mode="json"),
            "budget": [config.train_config(other, seed=cell.seed).model_dump(mode="json") for other in others],
            "cache": config.caches[cell.arm.cache].model_dump(mode="json"),
            "evaluation": config.evaluation.model_dump(mode="json"),
        }
    )


def cell_folder(config: StudyConfig, cell: Cell) -> Path:
    """Return the folder of a run; another configuration has another folder."""
    pair = f"{cell.student}-from-{cell.teacher or NO_TEACHER}"
    name = f"seed{cell.seed}-{cell_digest(config, cell)[:8]}"
    return Path(config.output_dir) / "runs" / cell.arm.name / pair / name
