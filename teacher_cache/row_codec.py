"""Placeholder until the row codecs are written; raises on use."""

from typing import Any

from pydantic import BaseModel


class QuantizationCost(BaseModel):
    rows: int


def blosc_configuration(*, itemsize: int, chunk_bytes: int) -> dict[str, Any]:
    raise NotImplementedError


compress_chunk = decompress_chunk = quantize_rows = dequantize_rows = quantization_cost = blosc_configuration
