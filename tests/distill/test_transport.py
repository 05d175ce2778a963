"""Records of tensors through one block of bytes."""

import pickle
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from distill.records import to_device
from distill.transport import pack, unpack


@dataclass(frozen=True)
class Record:
    tensors: dict[str, Tensor]
    inner: tuple[Tensor | None, ...]
    name: str


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.bool]
)
def test_records_come_back_as_they_were(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(0, 2, (5, 3, 7), generator=generator).to(dtype)
    record = Record(
        tensors={"whole": values, "turned": values.transpose(0, 2), "scalar": values[0, 0, 0], "odd": values[:1, :1]},
        inner=(values[:0], None),
        name="a",
    )
    block, skeleton = pack(record)
    back = unpack(block, skeleton)
    assert back.name == "a"
    assert back.inner[1] is None
    assert back.tensors.keys() == record.tensors.keys()
    pairs = [(back.tensors[name], record.tensors[name]) for name in record.tensors]
    for got, expected in [*pairs, (back.inner[0], record.inner[0])]:
        assert got.dtype == expected.dtype
        assert torch.equal(got, expected)
        assert got.shape == expected.shape
    views = [got for got, _ in pairs]
    assert len({view.untyped_storage().data_ptr() for view in views}) == 1


def test_a_tensor_that_is_held_twice_goes_once() -> None:
    rows = torch.randn(100, 8)
    record = Record(tensors={"one": rows, "other": rows.clone()}, inner=(rows, None), name="a")
    block, skeleton = pack(record)
    assert block.nbytes < 2.1 * rows.nbytes
    back = unpack(block, pickle.loads(pickle.dumps(skeleton)))
    assert torch.equal(back.tensors["other"], rows)
    assert back.inner[0] is back.tensors["one"]
    moved = to_device(back, torch.device("meta"))
    assert moved.inner[0] is moved.tensors["one"]
