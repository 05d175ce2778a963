"""Examples of the report: images, questions and what each model answered."""

import base64
import io
from typing import Any

from distill.scoring import SampleRow
from launch.report.data import RunData
from launch.report.figures import KIND_LABELS
from teacher_cache.samples import decode_image
from teacher_cache.schema import Sample

MAX_EXAMPLES = 8
MAGIC = {b"\x89PNG": "image/png", b"\xff\xd8": "image/jpeg", b"RIFF": "image/webp", b"GIF8": "image/gif"}


def example_items(run: RunData) -> list[dict[str, Any]]:
    """Return the first sample of each family with every model's answer; the first ones where there are no families."""
    rows = {row.sample_id: row for row in run.rows}
    return [_example(run, sample, row=rows[sample.sample_id]) for sample in example_samples(run)]


def example_samples(run: RunData) -> list[Sample]:
    """Choose by order alone, never by outcome; at most MAX_EXAMPLES."""
    answered = set().union(*(result.answers for result in run.evaluations.values()))
    seen: set[str] = set()
    chosen = []
    for sample, row in zip(run.samples, run.rows, strict=True):
        family = str(row.columns.get("family", sample.sample_id))
        if sample.sample_id in answered and family not in seen:
            seen.add(family)
            chosen.append(sample)
    return chosen[:MAX_EXAMPLES]


def data_uri(image: bytes) -> str:
    """Return an encoded image as a data URI; what browsers do not show is converted to PNG."""
    kind = next((kind for magic, kind in MAGIC.items() if image.startswith(magic)), None)
    if kind is None:
        buffer = io.BytesIO()
        decode_image(image, sample_id="").save(buffer, format="PNG")
        kind, image = "image/png", buffer.getvalue()
    return f"data:{kind};base64,{base64.b64encode(image).decode()}"


def _example(run: RunData, sample: Sample, *, row: SampleRow) -> dict[str, Any]:
    students = {student: run.variants(student) for student in run.students}
    kinds = [kind for kind in KIND_LABELS if any(kind in variants for variants in students.values())]
    last = max(index for index, message in enumerate(sample.messages) if message.role == "assistant")
    return {
        "sample_id": sample.sample_id,
        "images": [data_uri(image) for image in sample.images],
        "family": row.columns.get("family", ""),
        "question": sample.messages[last - 1].text,
        "reference": row.reference,
        "teacher": _answer(run, "teacher", sample.sample_id),
        "students": list(students),
        "rows": [
            {
                "label": KIND_LABELS[kind],
                "answers": [_answer(run, names.get(kind), sample.sample_id) for names in students.values()],
            }
            for kind in kinds
        ],
    }


def _answer(run: RunData, name: str | None, sample_id: str) -> dict[str, Any] | None:
    result = run.evaluations.get(name or "")
    if result is None or sample_id not in result.answers:
        return None
    score = result.scores[sample_id]
    mark = "✓" if score >= 1 else "✗" if score <= 0 else f"{100 * score:.0f} %"
    return {"text": result.answers[sample_id], "score": score, "mark": mark}
