"""8-bit rows against their definition, their cost against a dense float64 reference, chunks against Zarr's codec."""

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from hypothesis import given
from hypothesis import strategies as st
from zarr.codecs import BloscCodec

from teacher_cache import open_cache
from teacher_cache.errors import TeacherError
from teacher_cache.row_codec import (
    E4M3_MAX,
    blosc_configuration,
    compress_chunk,
    decompress_chunk,
    dequantize_rows,
    quantization_cost,
    quantize_rows,
)
from teacher_cache.schema import TeacherHead
from teacher_cache.verify import verify_cache
from tests.teacher_cache.store import assert_same, build, make_head, make_samples


def round_trip(rows: torch.Tensor) -> torch.Tensor:
    quantized = quantize_rows(rows)
    return dequantize_rows(quantized.codes, quantized.scales, dtype=torch.float32)


@given(
    rows=st.lists(
        st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=5, max_size=5), max_size=4
    )
)
def test_every_element_is_within_half_a_step(rows: list[list[float]]) -> None:
    """A step of e4m3 is 1/8 of the power of two below, and 2^-9 of the scale in the subnormal range."""
    exact = torch.tensor(rows, dtype=torch.float32).reshape(-1, 5)
    found, scales = round_trip(exact).double(), quantize_rows(exact).scales.double()
    bound = torch.maximum(exact.double().abs() / 16, scales[:, None] * 2.0**-10) * (1 + 1e-6)
    assert torch.isfinite(found).all()
    assert ((found - exact.double()).abs() <= bound).all()


def test_the_largest_value_and_zeros_are_exact() -> None:
    rows = torch.tensor([[0.0, 0.0, 0.0], [3.0, -3.0, 0.0], [1e-40, 0.0, 0.0]])
    found = round_trip(rows)
    assert torch.equal(found[:2], rows[:2])
    assert torch.isfinite(found).all()
    assert round_trip(torch.zeros(0, 4)).shape == (0, 4)


def test_codes_are_what_torch_rounds_to() -> None:
    rows = torch.randn(300, 64, generator=torch.Generator().manual_seed(0))
    quantized = quantize_rows(rows.bfloat16())
    scale = rows.bfloat16().float().abs().amax(dim=1) / E4M3_MAX
    assert torch.equal(quantized.scales, scale)
    expected = (rows.bfloat16().float() / scale[:, None]).to(torch.float8_e4m3fn)
    assert torch.equal(quantized.codes.view(torch.float8_e4m3fn).float(), expected.float())


def test_channels_beside_an_outlier_survive() -> None:
    rows = torch.randn(64, 32, generator=torch.Generator().manual_seed(1))
    rows[:, 3] *= 2000
    step = rows.abs().amax(dim=1, keepdim=True) / 127
    as_int8 = (rows / step).round() * step
    quiet = torch.arange(32) != 3
    fp8_error = (round_trip(rows) - rows)[:, quiet].norm() / rows[:, quiet].norm()
    int8_error = (as_int8 - rows)[:, quiet].norm() / rows[:, quiet].norm()
    assert fp8_error < 0.05 < 0.9 < int8_error


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_rows_without_an_8_bit_form_are_named(value: float) -> None:
    rows = torch.ones(400, 3)
    rows[301, 1] = value
    with pytest.raises(TeacherError, match="row 301"):
        quantize_rows(rows)


def heads() -> list[TeacherHead]:
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(9000, 16, generator=generator)
    bias = torch.randn(9000, generator=generator)
    return [
        TeacherHead(weight=weight),
        TeacherHead(weight=weight.bfloat16(), bias=bias, logit_scale=0.3, logit_softcap=20.0),
    ]


@pytest.mark.parametrize("head", heads(), ids=["plain", "all"])
def test_the_cost_is_the_kl_of_a_dense_reference(head: TeacherHead) -> None:
    rows = torch.randn(70, 16, generator=torch.Generator().manual_seed(3))
    cost = quantization_cost(rows, head=head, max_rows=70)

    def log_softmax(side: torch.Tensor) -> torch.Tensor:
        logits = side.double() @ head.weight.double().T
        logits = (logits if head.bias is None else logits + head.bias.double()) * head.logit_scale
        if head.logit_softcap is not None:
            logits = head.logit_softcap * torch.tanh(logits / head.logit_softcap)
        return logits.log_softmax(dim=1)

    p, q = log_softmax(rows), log_softmax(round_trip(rows))
    kl = (p.exp() * (p - q)).sum(dim=1)
    assert cost.rows == 70
    assert cost.kl_mean_nats == pytest.approx(float(kl.mean()), rel=1e-3)
    assert cost.kl_max_nats == pytest.approx(float(kl.max()), rel=1e-3)
    assert cost.kl_mean_nats > 0
    assert 0.01 < cost.relative_error < 0.05


def test_rows_that_lose_nothing_cost_nothing() -> None:
    head = heads()[0]
    cost = quantization_cost(torch.tensor([[1.0] * 8 + [-0.5] * 8]), head=head)
    assert cost.kl_mean_nats == pytest.approx(0, abs=1e-9)
    assert cost.relative_error == 0


@pytest.mark.parametrize("itemsize", [1, 2, 4, 8])
def test_chunks_come_back_and_are_those_of_zarr(itemsize: int, tmp_path: Path) -> None:
    values = np.random.default_rng(itemsize).normal(size=8192).astype("<f4").view(f"<u{itemsize}")
    chunk = values.data.cast("B")
    packed = compress_chunk(chunk, itemsize=itemsize)
    out = bytearray(len(chunk))
    decompress_chunk(memoryview(packed), out=memoryview(out))
    assert bytes(out) == bytes(chunk)
    codec = BloscCodec(**blosc_configuration(itemsize=itemsize, chunk_bytes=len(chunk)))
    array = zarr.create_array(
        tmp_path / "array", shape=values.shape, dtype=values.dtype, chunks=values.shape, compressors=[codec]
    )
    array[...] = values
    theirs = (tmp_path / "array" / "c" / "0").read_bytes()
    decompress_chunk(memoryview(theirs), out=memoryview(out))
    assert bytes(out) == bytes(chunk)
    (tmp_path / "array" / "c" / "0").write_bytes(packed)
    assert np.array_equal(array[...], values)


@pytest.mark.parametrize("damage", ["bomb", "short", "empty", "longer", "bits"])
def test_a_chunk_that_claims_other_lengths_is_never_inflated(damage: str) -> None:
    chunk = memoryview(bytes(range(256)) * 64)
    packed = bytearray(compress_chunk(chunk, itemsize=2))
    match damage:
        case "bomb":
            packed[4:8] = struct.pack("<I", 2**30)
        case "short":
            packed = packed[:-1]
        case "empty":
            packed = bytearray()
        case "longer":
            packed += b"\0"
        case "bits":
            packed[16:] = bytes(len(packed) - 16)
    with pytest.raises(ValueError, match="compressed chunk"):
        decompress_chunk(memoryview(bytes(packed)), out=memoryview(bytearray(len(chunk))))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "options", [{"compression": "zstd"}, {"codec": "fp8"}, {"codec": "fp8", "compression": "zstd"}]
)
def test_a_cache_of_each_codec(tmp_path: Path, dtype: torch.dtype, options: dict[str, Any]) -> None:
    samples = make_samples(5, dtype=dtype)
    build(tmp_path / "cache", samples, **options)
    cache = open_cache(str(tmp_path / "cache"))
    for found, sample in zip(cache.read(cache.sample_ids), samples, strict=True):
        if "codec" not in options:
            assert_same(found, sample)
            continue
        expected = quantize_rows(sample.hidden_states)
        assert torch.equal(found.hidden_states, dequantize_rows(expected.codes, expected.scales, dtype=dtype))
        assert (found.question_hidden_states is None) == (sample.question_hidden_states is None)
    assert verify_cache(str(tmp_path / "cache")).ok
    assert verify_cache(str(tmp_path / "cache"), level="rows").ok
    costs = [shard.get("codec_cost") for shard in cache.provenance["shards"]]
    assert all(cost["kl_mean_nats"] < 0.05 for cost in costs) if "codec" in options else costs == [None] * 3


def test_the_stored_cost_is_that_of_the_stored_head(tmp_path: Path) -> None:
    samples = make_samples(1)
    build(tmp_path / "cache", samples, codec="fp8")
    (shard,) = open_cache(str(tmp_path / "cache")).provenance["shards"]
    expected = quantization_cost(samples[0].hidden_states, head=make_head())
    assert shard["codec_cost"]["kl_mean_nats"] == expected.kl_mean_nats
