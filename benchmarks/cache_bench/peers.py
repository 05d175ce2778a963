"""The same rows in other formats, each used as its documentation shows, with its checks on where it has any."""

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from teacher_cache.zarr_format import ArrayGeometry

Arrays = dict[str, np.ndarray]
"""One sample: rows by the name of the array."""
Read = Callable[[int], Arrays]


@dataclass(frozen=True, kw_only=True)
class Peer:
    """A format and its library."""

    name: str
    module: str
    """What must be installed."""
    write: Callable[[Path, Sequence[Arrays]], None]
    open: Callable[[Path], Read]

    @property
    def is_installed(self) -> bool:
        return importlib.util.find_spec(self.module) is not None


def _write_safetensors(folder: Path, samples: Sequence[Arrays]) -> None:
    from safetensors.numpy import save_file

    for number, sample in enumerate(samples):
        save_file(sample, folder / f"{number}.safetensors")


def _open_safetensors(folder: Path) -> Read:
    from safetensors.numpy import load_file

    return lambda number: load_file(folder / f"{number}.safetensors")


def _write_mds(folder: Path, samples: Sequence[Arrays]) -> None:
    from streaming import MDSWriter

    columns = {name: f"ndarray:{rows.dtype.name}" for name, rows in samples[0].items()}
    with MDSWriter(out=str(folder), columns=columns, size_limit="256mb", hashes=["xxh3_64"]) as writer:
        for sample in samples:
            writer.write(sample)


def _open_mds(folder: Path) -> Read:
    from streaming import LocalDataset

    dataset = LocalDataset(local=str(folder))
    return lambda number: dict(dataset[number])


def _hdf5(*, checksums: bool) -> Peer:
    def write(folder: Path, samples: Sequence[Arrays]) -> None:
        import h5py

        starts = _starts(samples)
        with h5py.File(folder / "rows.h5", "w") as file:
            for name, first in samples[0].items():
                shape = (int(starts[name][-1]), *first.shape[1:])
                chunks = (min(_chunk_rows(first), shape[0]), *first.shape[1:]) if checksums else None
                data = file.create_dataset(name, shape, first.dtype, chunks=chunks, fletcher32=checksums)
                for sample, start in zip(samples, starts[name][:-1], strict=True):
                    data[start : start + len(sample[name])] = sample[name]
        _save(folder / "starts.npz", starts)

    def read_from(folder: Path) -> Read:
        import h5py

        file, starts = h5py.File(folder / "rows.h5", "r"), _load(folder / "starts.npz")
        data = {name: file[name] for name in starts}
        return lambda number: {name: rows[slice(*starts[name][number : number + 2])] for name, rows in data.items()}

    name = "HDF5, chunks with Fletcher-32" if checksums else "HDF5, contiguous"
    return Peer(name=name, module="h5py", write=write, open=read_from)


def _parquet(*, checksums: bool) -> Peer:
    def write(folder: Path, samples: Sequence[Arrays]) -> None:
        import pyarrow.parquet

        options = {"compression": "none", "use_dictionary": False, "write_statistics": False}
        with pyarrow.parquet.ParquetWriter(
            folder / "rows.parquet", _binary_schema(samples[0]), write_page_checksum=checksums, **options
        ) as writer:
            for sample in samples:
                writer.write_table(_binary_table(sample))
        _save_like(folder, samples[0])

    def read_from(folder: Path) -> Read:
        import pyarrow.parquet

        file = pyarrow.parquet.ParquetFile(folder / "rows.parquet", page_checksum_verification=checksums)
        like = _load(folder / "like.npz")
        return lambda number: _from_binary(file.read_row_group(number, use_threads=False), like)

    name = f"Parquet, one sample per row group{', page checksums' if checksums else ''}"
    return Peer(name=name, module="pyarrow", write=write, open=read_from)


def _write_lance(folder: Path, samples: Sequence[Arrays]) -> None:
    import lance

    batches = (batch for sample in samples for batch in _binary_table(sample).to_batches())
    lance.write_dataset(batches, str(folder / "rows.lance"), schema=_binary_schema(samples[0]))
    _save_like(folder, samples[0])


def _open_lance(folder: Path) -> Read:
    import lance

    dataset, like = lance.dataset(str(folder / "rows.lance")), _load(folder / "like.npz")
    return lambda number: _from_binary(dataset.take([number]), like)


def _write_zarr(folder: Path, samples: Sequence[Arrays]) -> None:
    import zarr
    from zarr.codecs import Crc32cCodec

    starts = _starts(samples)
    group = zarr.create_group(folder / "rows.zarr", zarr_format=3)
    for name, first in samples[0].items():
        chunk = _chunk_rows(first)
        rows = int(starts[name][-1])
        data = group.create_array(
            name,
            shape=(rows, *first.shape[1:]),
            dtype=first.dtype,
            chunks=(chunk, *first.shape[1:]),
            shards=(-(-rows // chunk) * chunk, *first.shape[1:]),
            compressors=[Crc32cCodec()],
        )
        data[:] = np.concatenate([sample[name] for sample in samples])
    _save(folder / "starts.npz", starts)


def _open_zarr(folder: Path) -> Read:
    import zarr

    group, starts = zarr.open_group(folder / "rows.zarr", mode="r"), _load(folder / "starts.npz")
    data: dict[str, Any] = {name: group[name] for name in starts}
    return lambda number: {name: rows[slice(*starts[name][number : number + 2])] for name, rows in data.items()}


def _write_tensorstore(folder: Path, samples: Sequence[Arrays]) -> None:
    import tensorstore

    starts = _starts(samples)
    for name, first in samples[0].items():
        chunk, rows = _chunk_rows(first), int(starts[name][-1])
        sharding = {
            "chunk_shape": [chunk, *first.shape[1:]],
            "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
        }
        data = tensorstore.open(
            {
                "driver": "zarr3",
                "kvstore": {"driver": "file", "path": str(folder / name)},
                "metadata": {
                    "shape": [rows, *first.shape[1:]],
                    "data_type": first.dtype.name,
                    "chunk_grid": {
                        "name": "regular",
                        "configuration": {"chunk_shape": [-(-rows // chunk) * chunk, *first.shape[1:]]},
                    },
                    "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
                },
            },
            create=True,
        ).result()
        data.write(np.concatenate([sample[name] for sample in samples])).result()
    _save(folder / "starts.npz", starts)


def _open_tensorstore(folder: Path) -> Read:
    import tensorstore

    starts = _load(folder / "starts.npz")
    data = {
        name: tensorstore.open(
            {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(folder / name)}}, open=True, read=True
        ).result()
        for name in starts
    }

    def read(number: int) -> Arrays:
        coming = {name: rows[slice(*starts[name][number : number + 2].tolist())].read() for name, rows in data.items()}
        return {name: future.result() for name, future in coming.items()}

    return read


PEERS = (
    Peer(
        name="safetensors, one file per sample", module="safetensors", write=_write_safetensors, open=_open_safetensors
    ),
    Peer(name="MDS", module="streaming", write=_write_mds, open=_open_mds),
    _hdf5(checksums=False),
    _hdf5(checksums=True),
    _parquet(checksums=False),
    _parquet(checksums=True),
    Peer(name="Lance", module="lance", write=_write_lance, open=_open_lance),
    Peer(name="zarr-python, shards with CRC-32C", module="zarr", write=_write_zarr, open=_open_zarr),
    Peer(
        name="tensorstore, shards with CRC-32C", module="tensorstore", write=_write_tensorstore, open=_open_tensorstore
    ),
)


def _starts(samples: Sequence[Arrays]) -> dict[str, np.ndarray]:
    """Return per array the first row of each sample, and the total."""
    return {name: np.cumsum([0, *(len(sample[name]) for sample in samples)]) for name in samples[0]}


def _chunk_rows(rows: np.ndarray) -> int:
    """Return as many rows per chunk as the cache itself takes."""
    from teacher_cache.codec import Field

    field = Field(tier="A", axis="tokens", dtype=rows.dtype, row_shape=rows.shape[1:])
    return ArrayGeometry(field=field, num_rows=len(rows), compression="none").chunk_rows


def _binary_schema(sample: Arrays) -> Any:
    import pyarrow

    return pyarrow.schema([(name, pyarrow.large_binary()) for name in sample])


def _binary_table(sample: Arrays) -> Any:
    """Return one row of binary columns, without a copy."""
    import pyarrow

    columns = []
    for rows in sample.values():
        buffers = [None, pyarrow.py_buffer(np.array([0, rows.nbytes])), pyarrow.py_buffer(rows)]
        columns.append(pyarrow.Array.from_buffers(pyarrow.large_binary(), 1, buffers))
    return pyarrow.Table.from_arrays(columns, schema=_binary_schema(sample))


def _from_binary(table: Any, like: Arrays) -> Arrays:
    return {
        name: np.frombuffer(table[name][0].as_buffer(), dtype=rows.dtype).reshape(-1, *rows.shape[1:])
        for name, rows in like.items()
    }


def _save_like(folder: Path, sample: Arrays) -> None:
    """Keep dtypes and row shapes."""
    _save(folder / "like.npz", {name: rows[:0] for name, rows in sample.items()})


def _save(path: Path, arrays: Arrays) -> None:
    np.savez(path, allow_pickle=False, **arrays)


def _load(path: Path) -> Arrays:
    with np.load(path) as file:
        return dict(file)
