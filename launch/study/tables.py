"""The tables of the study's page, as Markdown."""

import math
from collections.abc import Iterable, Sequence

from launch.study.config import StudyConfig
from launch.study.results import Row
from launch.study.statistics import Answer, Estimate, answer, estimate, mean_of, paired_difference

UNTOUCHED, SFT, TEACHER = "untouched", "sft", "teacher"
NOTHING = "-"


def claim_table(config: StudyConfig, rows: Sequence[Row]) -> str:
    """Return one line per claim: the paper's figures, ours, and what they say."""
    answers = [answer(claim, rows) for claim in config.claims]
    papers = [one for one in answers if one.claim.paper]
    own = [one for one in answers if not one.claim.paper]
    head = ["claim", "paper", "arms", "difference in accuracy", "in bits per byte", "in calibration error", "pairs",
            "seeds", "result"]  # fmt: skip
    parts = [table(head, [_claim_line(one) for one in papers])]
    if own:
        parts += ["Questions that the paper does not ask:", table(head, [_claim_line(one) for one in own])]
    return "\n\n".join(parts)


def _claim_line(one: Answer) -> list[str]:
    claim, difference = one.claim, one.difference
    sides = [
        f"{arm}{f' of {teacher}' if teacher else ''}"
        for arm, teacher in ((claim.better, claim.better_teacher), (claim.worse, claim.worse_teacher))
    ]
    relation = f" = (± {100 * claim.equal_within:g}) " if claim.equal_within is not None else " > "
    return [
        claim.text,
        claim.paper or NOTHING,
        relation.join(sides),
        _points(difference, signed=True),
        _difference(one.bits_difference),
        _difference(one.calibration_difference),
        str(one.num_pairs),
        NOTHING if difference is None else str(difference.num_seeds),
        one.verdict,
    ]


def teacher_table(rows: Sequence[Row]) -> str:
    """Return one line per teacher."""
    head = ["teacher", "accuracy", "bits per byte", "calibration error"]
    lines = [
        [row.teacher or "", _percent(row.accuracy), f"{row.bits_per_byte:.3f}", f"{row.calibration_error:.3f}"]
        for row in rows
        if row.arm == TEACHER
    ]
    return table(head, lines)


def pair_tables(rows: Sequence[Row]) -> str:
    """Return one table per pair of student and teacher, the arms that know no teacher in each of the student's."""
    pairs = dict.fromkeys((row.student, row.teacher) for row in rows if row.student is not None and row.teacher)
    parts = []
    for student, teacher in pairs:
        own = [row for row in rows if row.student == student and row.teacher in (teacher, None)]
        parts += [f"### {student} from {teacher}", _arm_table(own), _measure_table(own)]
    return "\n\n".join(parts)


def _arm_table(rows: Sequence[Row]) -> str:
    head = ["arm", "accuracy", "seeds", "against sft", "against untouched", "TFLOPs of the student", "total TFLOPs",
            "cache MB", "seconds"]  # fmt: skip
    lines = []
    for arm, own in by_arm(rows).items():
        against = [paired_difference(own, by_arm(rows).get(other, []))[0] for other in (SFT, UNTOUCHED)]
        accuracy = estimate([row.accuracy for row in own])
        lines.append(
            [
                arm,
                _points(accuracy),
                str(len(own)),
                *(
                    NOTHING if arm == other else _points(one, signed=True)
                    for one, other in zip(against, (SFT, UNTOUCHED), strict=True)
                ),
                _number(mean_of(own, lambda row: row.student_flops / 1e12), digits=2),
                _number(mean_of(own, lambda row: row.total_flops / 1e12), digits=2),
                _number(mean_of(own, lambda row: row.cache_bytes / 1e6), digits=1),
                _number(mean_of(own, lambda row: row.seconds), digits=0),
            ]
        )
    return table(head, lines)


def _measure_table(rows: Sequence[Row]) -> str:
    head = ["arm", "bits per byte", "agreement", "divergence, nats", "calibration error", "confidence when wrong",
            "gap after align", "gap after distill", "of it at boundary rows", "at the rest"]  # fmt: skip
    lines = []
    for arm, own in by_arm(rows).items():
        figures = (
            mean_of(own, lambda row: row.bits_per_byte),
            mean_of(own, lambda row: row.teacher_agreement),
            mean_of(own, lambda row: row.teacher_divergence),
            mean_of(own, lambda row: row.calibration_error),
            mean_of(own, lambda row: row.confidence_when_wrong),
            mean_of(own, lambda row: row.align_question_gap),
            mean_of(own, lambda row: row.distill_question_gap),
            mean_of(own, lambda row: row.distill_boundary_gap),
            mean_of(own, lambda row: row.distill_rest_gap),
        )
        lines.append([arm, *(_number(figure, digits=3) for figure in figures)])
    return table(head, lines)


def by_arm(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Return the rows of each arm, in the order of the rows."""
    arms: dict[str, list[Row]] = {}
    for row in rows:
        arms.setdefault(row.arm, []).append(row)
    return arms


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)


def _points(value: Estimate | None, *, signed: bool = False) -> str:
    if value is None:
        return NOTHING
    mean = f"{100 * value.mean:+.1f}" if signed else f"{100 * value.mean:.1f}"
    return mean if math.isnan(value.margin) else f"{mean} ± {100 * value.margin:.1f}"


def _difference(value: Estimate | None) -> str:
    if value is None:
        return NOTHING
    return f"{value.mean:+.3f}" if math.isnan(value.margin) else f"{value.mean:+.3f} ± {value.margin:.3f}"


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def _number(value: float | None, *, digits: int) -> str:
    return NOTHING if value is None else f"{value:.{digits}f}"
