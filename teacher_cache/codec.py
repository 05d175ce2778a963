"""Targets as arrays: bfloat16 bits, 8-bit rows, the checks before storing, the teacher head.

Stored arrays are little-endian. With the exact codec, hidden states are stored bit for bit: float32 and float16 as
they are, bfloat16 as its 16 bits.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Annotated, Literal, get_args

import numpy as np
import pydantic
import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from teacher_cache.config import Compression, Dtype, RowCodec
from teacher_cache.errors import CacheCorrupt, TeacherError
from teacher_cache.row_codec import dequantize_rows, quantize_rows
from teacher_cache.schema import Span, TeacherHead, TeacherTargets, Tier

Axis = Literal["tokens", "turns", "tier_a", "tier_q", "answer_tokens"]
AXES: tuple[Axis, ...] = get_args(Axis)
HIDDEN = ("hidden_states", "question_hidden_states")
SCALES = ("hidden_scales", "question_hidden_scales")
_FLOAT_BITS = {
    torch.bfloat16: (torch.uint16, 0x7F80),
    torch.float16: (torch.uint16, 0x7C00),
    torch.float32: (torch.uint32, 0x7F800000),
}
_BLOCK_ELEMENTS = 2**18
_MOST_COLUMNS = 2**20
DTYPES: dict[Dtype, torch.dtype] = {name: getattr(torch, name) for name in get_args(Dtype)}


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Sizes and types that all samples of a shard share."""

    dtype: Dtype
    """Element type of the hidden states as they are read."""
    codec: RowCodec
    compression: Compression
    hidden_size: Annotated[int, pydantic.Field(ge=1, le=_MOST_COLUMNS)]
    topk: Annotated[int, pydantic.Field(ge=1, le=_MOST_COLUMNS)]


@dataclass(frozen=True, kw_only=True)
class Field:
    """One stored array: its tier, ragged axis, stored element type, and the shape of one row."""

    tier: Tier
    axis: Axis
    dtype: np.dtype
    row_shape: tuple[int, ...]
    float_type: str | None = None
    """What the bits stand for where Zarr has no such type."""

    @cached_property
    def row_bytes(self) -> int:
        """Stored size of one row."""
        return self.dtype.itemsize * math.prod(self.row_shape)


@lru_cache(maxsize=64)
def stored_fields(layout: Layout) -> Mapping[str, Field]:
    """Return every ragged array of a shard, by name."""
    int32, float32 = np.dtype("<i4"), np.dtype("<f4")
    return {
        "token_ids": Field(tier="A", axis="tokens", dtype=int32, row_shape=()),
        "spans": Field(tier="A", axis="turns", dtype=int32, row_shape=(2,)),
        **_hidden_fields("hidden_states", tier="A", axis="tier_a", layout=layout),
        **_hidden_fields("question_hidden_states", tier="Q", axis="tier_q", layout=layout),
        "topk_ids": Field(tier="L", axis="answer_tokens", dtype=int32, row_shape=(layout.topk,)),
        "topk_logprobs": Field(tier="L", axis="answer_tokens", dtype=float32, row_shape=(layout.topk,)),
        "logsumexp": Field(tier="L", axis="answer_tokens", dtype=float32, row_shape=()),
        "target_logprobs": Field(tier="L", axis="answer_tokens", dtype=float32, row_shape=()),
        "answer_byte_ends": Field(tier="L", axis="answer_tokens", dtype=int32, row_shape=()),
    }


def _hidden_fields(name: str, *, tier: Tier, axis: Axis, layout: Layout) -> dict[str, Field]:
    shape = (layout.hidden_size,)
    if layout.codec == "fp8":
        codes = Field(tier=tier, axis=axis, dtype=np.dtype("u1"), row_shape=shape, float_type="float8_e4m3fn")
        return {name: codes, scales_name(name): Field(tier=tier, axis=axis, dtype=np.dtype("<f4"), row_shape=())}
    if layout.dtype == "bfloat16":
        return {name: Field(tier=tier, axis=axis, dtype=np.dtype("<u2"), row_shape=shape, float_type="bfloat16")}
    dtype = np.dtype({"float16": "<f2", "float32": "<f4"}[layout.dtype])
    return {name: Field(tier=tier, axis=axis, dtype=dtype, row_shape=shape)}


def scales_name(name: str) -> str:
    """Return the array that holds the scales of 8-bit hidden states."""
    return name.replace("hidden_states", "hidden_scales")


def layout_of(targets: TeacherTargets, *, codec: RowCodec, compression: Compression) -> Layout:
    """Return the sizes and types of one sample.

    Raises:
        TeacherError: the hidden states have a type or rank that is not stored, or tier L is absent.
    """
    dtype = str(targets.hidden_states.dtype).removeprefix("torch.")
    topk_ids = targets.topk_ids
    if dtype not in DTYPES or targets.hidden_states.ndim != 2 or topk_ids is None or topk_ids.ndim != 2:
        raise TeacherError(
            f"sample {targets.sample_id!r}: hidden_states is {dtype} of shape {tuple(targets.hidden_states.shape)} and "
            f"topk_ids of shape {None if topk_ids is None else tuple(topk_ids.shape)}; expected two axes each and one "
            f"of {', '.join(DTYPES)}"
        )
    return Layout(
        dtype=dtype,
        codec=codec,
        compression=compression,
        hidden_size=targets.hidden_states.shape[1],
        topk=topk_ids.shape[1],
    )


def axis_lengths(spans: tuple[Span, ...], *, num_tokens: int) -> dict[Axis, int]:
    """Return the number of rows that one sample has on each ragged axis, tier Q included."""
    answer_tokens = sum(span.stop - span.start for span in spans)
    tier_a = answer_tokens + len(spans)
    return {
        "tokens": num_tokens,
        "turns": len(spans),
        "tier_a": tier_a,
        "tier_q": num_tokens - tier_a,
        "answer_tokens": answer_tokens,
    }


def encode_targets(targets: TeacherTargets, *, layout: Layout, vocab_size: int | None) -> dict[str, np.ndarray]:
    """Check one sample and return its stored arrays by field name.

    Raises:
        TeacherError: a value, type or row count is wrong; names the sample and the field.
    """
    where = f"sample {targets.sample_id!r}"
    _check_spans(targets.spans, num_tokens=len(targets.token_ids), where=where)
    lengths = axis_lengths(targets.spans, num_tokens=len(targets.token_ids))
    if targets.question_hidden_states is None:
        lengths["tier_q"] = 0
    fields = stored_fields(layout)
    arrays: dict[str, np.ndarray] = {}
    for name, field in fields.items():
        if name in SCALES:
            continue
        tensor = _tensor(targets, name, layout)
        expected = (lengths[field.axis], *field.row_shape)
        if tuple(tensor.shape) != expected:
            raise TeacherError(f"{where}: {name} has shape {tuple(tensor.shape)}, expected {expected}")
        _check_dtype(tensor, name=name, layout=layout, where=where)
        if tensor.is_floating_point() and not _is_finite(tensor):
            raise TeacherError(f"{where}: {name} holds NaN or infinity; the teacher's forward is broken for it")
        if name in HIDDEN and layout.codec == "fp8":
            quantized = quantize_rows(tensor)
            arrays[name] = quantized.codes.numpy()
            arrays[scales_name(name)] = quantized.scales.numpy()
        else:
            arrays[name] = _to_array(tensor, field)
    _check_values(targets, vocab_size=vocab_size, where=where)
    return {name: arrays[name] for name in fields}


def decode_targets(
    sample_id: str,
    arrays: Mapping[str, np.ndarray],
    *,
    spans: tuple[Span, ...],
    layout: Layout,
    tiers: Collection[Tier],
    has_question_rows: bool,
) -> TeacherTargets:
    """Return the targets that :func:`encode_targets` stored, of some tiers; ids come back as int64."""
    with_questions, with_logits = "Q" in tiers and has_question_rows, "L" in tiers
    return TeacherTargets(
        sample_id=sample_id,
        token_ids=torch.from_numpy(arrays["token_ids"]).long(),
        spans=spans,
        hidden_states=_from_arrays(arrays, "hidden_states", layout),
        question_hidden_states=_from_arrays(arrays, "question_hidden_states", layout) if with_questions else None,
        topk_ids=torch.from_numpy(arrays["topk_ids"]).long() if with_logits else None,
        topk_logprobs=torch.from_numpy(arrays["topk_logprobs"]) if with_logits else None,
        logsumexp=torch.from_numpy(arrays["logsumexp"]) if with_logits else None,
        target_logprobs=torch.from_numpy(arrays["target_logprobs"]) if with_logits else None,
        answer_byte_ends=torch.from_numpy(arrays["answer_byte_ends"]).long() if with_logits else None,
    )


def encode_teacher_head(head: TeacherHead) -> bytes:
    """Return the teacher head as safetensors, the same bytes for the same head; its scalars are tensors too."""
    # safetensors orders tensors, but not its metadata
    tensors = {"weight": head.weight.contiguous(), "logit_scale": torch.tensor(head.logit_scale, dtype=torch.float64)}
    if head.bias is not None:
        tensors["bias"] = head.bias.contiguous()
    if head.logit_softcap is not None:
        tensors["logit_softcap"] = torch.tensor(head.logit_softcap, dtype=torch.float64)
    return save(tensors)


def load_teacher_head(path: Path, *, vocab_size: int, hidden_size: int) -> TeacherHead:
    """Map what :func:`encode_teacher_head` made into memory.

    Raises:
        CacheCorrupt: the file is no teacher head, or one of other sizes.
    """
    try:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            head = TeacherHead(
                weight=file.get_tensor("weight"),
                bias=file.get_tensor("bias") if "bias" in names else None,
                logit_scale=file.get_tensor("logit_scale").item(),
                logit_softcap=file.get_tensor("logit_softcap").item() if "logit_softcap" in names else None,
            )
    except Exception as error:
        raise CacheCorrupt(f"{path}: not a teacher head: {error}") from error
    weight, bias = head.weight, head.bias
    has_sizes = weight.shape == (vocab_size, hidden_size) and (bias is None or bias.shape == (vocab_size,))
    if not has_sizes or weight.dtype not in _FLOAT_BITS:
        raise CacheCorrupt(
            f"{path}: its weight is {weight.dtype} {tuple(weight.shape)}, expected floats {(vocab_size, hidden_size)}"
        )
    return head


def _tensor(targets: TeacherTargets, name: str, layout: Layout) -> Tensor:
    if name == "spans":
        return torch.tensor(targets.spans, dtype=torch.int64).reshape(-1, 2)
    if name == "question_hidden_states" and targets.question_hidden_states is None:
        return torch.empty(0, layout.hidden_size, dtype=DTYPES[layout.dtype])
    tensor: Tensor | None = getattr(targets, name)
    if tensor is None:
        raise TeacherError(f"sample {targets.sample_id!r}: {name} is absent; a cache stores it for every sample")
    return tensor


def _to_array(tensor: Tensor, field: Field) -> np.ndarray:
    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.bfloat16:
        tensor = tensor.view(torch.uint16)
    return tensor.numpy().astype(field.dtype, copy=False)


def _from_arrays(arrays: Mapping[str, np.ndarray], name: str, layout: Layout) -> Tensor:
    stored = torch.from_numpy(arrays[name])
    if layout.codec == "fp8":
        return dequantize_rows(stored, torch.from_numpy(arrays[scales_name(name)]), dtype=DTYPES[layout.dtype])
    return stored.view(torch.bfloat16) if layout.dtype == "bfloat16" else stored


def _is_finite(tensor: Tensor) -> bool:
    """Tell whether no element is NaN or infinite: a maximum over the bits, 10 times as fast as torch.isfinite.

    With the sign bit as the highest, the bits of infinities and NaNs are the largest of either sign.
    """
    if not tensor.numel():
        return True
    unsigned, infinity = _FLOAT_BITS[tensor.dtype]
    bits = tensor.detach().contiguous().view(unsigned).numpy().reshape(-1)
    signed = bits.view(bits.dtype.str.replace("u", "i"))
    negative_infinity = infinity | 1 << (8 * bits.itemsize - 1)
    # in blocks, so that the second look finds them in the processor's cache
    blocks = (slice(start, start + _BLOCK_ELEMENTS) for start in range(0, len(bits), _BLOCK_ELEMENTS))
    return all(bits[block].max() < negative_infinity and signed[block].max() < infinity for block in blocks)


def _check_spans(spans: tuple[Span, ...], *, num_tokens: int, where: str) -> None:
    stop = 1
    for span in spans:
        if not stop <= span.start < span.stop <= num_tokens:
            raise TeacherError(
                f"{where}: answer span {tuple(span)} of {num_tokens} tokens; expected ordered spans of at least one "
                f"token that start at 1 or later (this one at {stop} or later)"
            )
        stop = span.stop
    if not spans:
        raise TeacherError(f"{where}: it has no answer span; skip a sample without an answer")


def _check_dtype(tensor: Tensor, *, name: str, layout: Layout, where: str) -> None:
    expected: str
    if name in HIDDEN:
        expected, good = layout.dtype, tensor.dtype == DTYPES[layout.dtype]
    elif name in ("token_ids", "spans", "topk_ids", "answer_byte_ends"):
        expected, good = "int32 or int64", tensor.dtype in (torch.int32, torch.int64)
    else:
        expected, good = "float32", tensor.dtype == torch.float32
    if not good or tensor.device.type != "cpu":
        raise TeacherError(f"{where}: {name} is {tensor.dtype} on {tensor.device}, expected {expected} on the CPU")


def _check_values(targets: TeacherTargets, *, vocab_size: int | None, where: str) -> None:
    for name in ("token_ids", "topk_ids"):
        ids = getattr(targets, name)
        limit = vocab_size if name == "topk_ids" and vocab_size is not None else 2**31
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < limit:
            raise TeacherError(
                f"{where}: {name} ranges over {int(ids.min())}..{int(ids.max())}, expected 0..{limit - 1}"
            )
    _check_byte_ends(targets, where=where)
    logprobs, followed = targets.topk_logprobs, targets.target_logprobs
    assert logprobs is not None
    assert followed is not None
    if bool((logprobs[:, 1:] > logprobs[:, :-1]).any()):
        raise TeacherError(f"{where}: topk_logprobs is not sorted, highest first")
    highest = max(float(logprobs.max()), float(followed.max()))
    if highest > 1e-3:
        raise TeacherError(f"{where}: a log-probability is {highest}; expected none above 0")


def _check_byte_ends(targets: TeacherTargets, *, where: str) -> None:
    ends = targets.answer_byte_ends
    assert ends is not None
    for turn, of_turn in enumerate(ends.split([span.stop - span.start for span in targets.spans])):
        if int(of_turn[0]) < 0 or int(of_turn[-1]) >= 2**31 or bool((of_turn[1:] < of_turn[:-1]).any()):
            raise TeacherError(f"{where}: answer_byte_ends of turn {turn} decreases or leaves 0..{2**31 - 1}")
