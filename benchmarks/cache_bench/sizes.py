"""Stored bytes per answer token, and how near lossless compression comes to what is possible."""

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Integer

from cache_bench.figures import Figure
from cache_bench.rows import Shape, build_cache, make_samples
from cache_bench.settings import Settings
from teacher_cache.codec import layout_of, stored_fields
from teacher_cache.config import DataConfig, RowCodec, TeacherConfig
from teacher_cache.schema import TeacherTargets

SECTION = "size"
BYTES_BARS: dict[RowCodec, float] = {"exact": 16_900, "fp8": 8_500}
ALIGNMENT_BAR, ENTROPY_BAR = 0.03, 0.95
ANSWER_TOKENS = 200

_SHAPE = Shape(hidden=8192, topk=64, mean_tokens=1450, answer_tokens=ANSWER_TOKENS, questions=False)
_TITLES: dict[RowCodec, str] = {"exact": "bf16", "fp8": "8-bit"}
_DEMO_CONVERSATIONS = 400


def measure(settings: Settings) -> Iterator[Figure]:
    """Yield bytes per answer token for both codecs, and the share of the entropy bound."""
    folder = settings.folder / SECTION
    samples = make_samples(settings.answer_samples, shape=_SHAPE, seed=7)
    for codec in BYTES_BARS:
        yield from _bytes_per_token(folder, samples, codec=codec)
    shape = replace(settings.shape, mean_tokens=settings.entropy_rows)
    yield _share_of_bound(folder, make_samples(1, shape=shape, seed=8), what="simulated heavy-tailed rows")
    if settings.real_states:
        yield _share_of_bound(folder, _demo_states(settings.folder / "demo"), what="states of the demo's teacher")


def _bytes_per_token(folder: Path, samples: Sequence[TeacherTargets], *, codec: RowCodec) -> Iterator[Figure]:
    build_cache(str(folder), samples, per_shard=len(samples), codec=codec)
    fields = stored_fields(layout_of(samples[0], codec=codec, compression="none"))
    others = {name for name, field in fields.items() if field.tier != "A"}
    files = [path for path in folder.rglob("*") if path.is_file() and path.parent.name not in others]
    total = sum(path.stat().st_size for path in files)
    rows_file = _rows_file(folder).stat().st_size
    shutil.rmtree(folder)
    tokens = len(samples) * ANSWER_TOKENS
    payload = len(samples) * (ANSWER_TOKENS + 1) * fields["hidden_states"].row_bytes
    title = f"{_TITLES[codec]}, d = {_SHAPE.hidden}, {ANSWER_TOKENS}-token answers"
    yield Figure(
        section=SECTION,
        name=f"{title}: bytes per answer token",
        value=total / tokens,
        unit="bytes",
        bar=BYTES_BARS[codec],
        at_most=True,
        note=f"{payload / tokens:,.0f} are rows, boundary rows included; {len(samples)} samples in one shard",
    )
    yield Figure(
        section=SECTION,
        name=f"{title}: padding, checksums and index beside the rows",
        value=rows_file / payload - 1,
        unit="of the rows",
        bar=ALIGNMENT_BAR,
        at_most=True,
    )


def _share_of_bound(folder: Path, samples: Sequence[TeacherTargets], *, what: str) -> Figure:
    build_cache(str(folder), samples, per_shard=len(samples), compression="zstd")
    name = "hidden_states" if samples[0].question_hidden_states is None else "question_hidden_states"
    rows = torch.cat([rows for sample in samples if (rows := getattr(sample, name)) is not None])
    stored = _rows_file(folder, name).stat().st_size
    shutil.rmtree(folder)
    words = rows.view(torch.uint16).numpy().reshape(-1)
    bits = _entropy(words >> 7 & 0xFF) + _entropy(words >> 8 & 0x80 | words & 0x7F)
    ratio, bound = words.nbytes / stored, 16 / bits
    return Figure(
        section=SECTION,
        name=f"lossless, {what}: share of the order-0 entropy bound",
        value=ratio / bound,
        unit="of the bound",
        bar=ENTROPY_BAR,
        note=f"{rows.shape[0]} rows, d = {rows.shape[1]}: {ratio:.3f} times smaller of {bound:.3f} possible; exponents "
        f"and the rest of an element have {bits:.2f} bits, elements as a whole {_entropy(words):.2f}",
    )


def _rows_file(folder: Path, name: str = "hidden_states") -> Path:
    return next(path for path in folder.glob(f"shards/*/{name}/*") if path.name != "zarr.json")


def _entropy(symbols: Integer[np.ndarray, " symbols"]) -> float:
    """Return the order-0 entropy in bits."""
    counts = np.bincount(symbols)
    shares = counts[counts > 0] / len(symbols)
    return float(-(shares * np.log2(shares)).sum())


def _demo_states(folder: Path) -> list[TeacherTargets]:
    """Run the demo's trained teacher over some of the demo's conversations."""
    from launch.demo.digits import generate_digit_vqa
    from launch.demo.make_models import copy_trained_teacher
    from teacher_cache.chat import encode_conversation, load_processor
    from teacher_cache.samples import read_samples
    from teacher_cache.teacher import TransformersTeacher, compute_targets

    folder.mkdir()
    copy_trained_teacher(folder / "teacher")
    generate_digit_vqa(folder, num_train=_DEMO_CONVERSATIONS, num_test=7, seed=1)
    processor = load_processor(str(folder / "teacher"))
    samples = read_samples(DataConfig(path=str(folder / "train.parquet"))).samples
    conversations = [encode_conversation(processor, sample, max_length=4096) for sample in samples]
    teacher = TransformersTeacher(TeacherConfig(model=str(folder / "teacher")))
    targets = compute_targets(teacher, conversations, topk=8, question_rows=[True] * len(conversations))
    shutil.rmtree(folder)
    return targets
