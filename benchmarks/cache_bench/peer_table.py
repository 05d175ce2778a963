"""The cache beside its peers: the same rows, written durably, read at random, and damaged."""

import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cache_bench.figures import Figure, ratio_figure
from cache_bench.page_cache import FileSet, sync_under
from cache_bench.peers import PEERS, Arrays, Peer, Read
from cache_bench.reading import SampleReader
from cache_bench.rows import build_cache, make_samples
from cache_bench.settings import Settings
from cache_bench.writing import stored_arrays, write_raw
from teacher_cache.reader import open_cache
from teacher_cache.schema import TeacherTargets

SECTION = "peers"
OWN = "genrecal"

_FLIPS = 24
_SNIPPET_BYTES, _SEARCHES = 64, 20


@dataclass(frozen=True, kw_only=True)
class _Contender:
    """A format that is open for reading."""

    name: str
    files: FileSet
    read: Callable[[int], object]


def measure(settings: Settings) -> Iterator[Figure]:
    """Yield, per format, reads cold and warm and durable writes against the raw bytes, and what notices damage."""
    samples = make_samples(settings.peer_samples, shape=settings.shape, seed=9)
    arrays = stored_arrays(samples)
    folder = settings.folder / SECTION
    peers = [peer for peer in PEERS if peer.is_installed]
    for name in sorted({peer.module for peer in PEERS if not peer.is_installed}):
        print(f"peers: {name} is not installed; see benchmarks/requirements-peers.txt", file=sys.stderr)
    yield from _writes(settings, folder, samples=samples, arrays=arrays, peers=peers)
    yield from _reads(settings, folder, arrays=arrays, peers=peers)
    shutil.rmtree(folder)
    yield from _damage(folder, samples=samples[:2], arrays=arrays[:2], peers=peers)


def _writes(
    settings: Settings,
    folder: Path,
    *,
    samples: Sequence[TeacherTargets],
    arrays: Sequence[Arrays],
    peers: Sequence[Peer],
) -> Iterator[Figure]:
    seconds: dict[str, list[float]] = {name: [] for name in (OWN, *(peer.name for peer in peers))}
    raw_s: list[float] = []
    for _ in range(settings.peer_writes):
        shutil.rmtree(folder, ignore_errors=True)
        os.sync()
        raw_s.append(write_raw(folder / "raw", arrays))
        os.sync()
        start = time.perf_counter()
        build_cache(str(folder / OWN), samples, per_shard=len(samples))
        seconds[OWN].append(time.perf_counter() - start)
        for peer in peers:
            os.sync()
            seconds[peer.name].append(_write(peer, folder / peer.name, arrays))
    for name, own_s in seconds.items():
        yield ratio_figure(
            SECTION, f"{name}: durable write", base_s=raw_s, own_s=own_s, note=_amplification(folder, name)
        )


def _write(peer: Peer, folder: Path, arrays: Sequence[Arrays]) -> float:
    folder.mkdir(parents=True)
    start = time.perf_counter()
    peer.write(folder, arrays)
    sync_under(folder)
    return time.perf_counter() - start


def _amplification(folder: Path, name: str) -> str:
    stored, raw = (sum(p.stat().st_size for p in (folder / part).rglob("*") if p.is_file()) for part in (name, "raw"))
    return f"{stored / raw:.3f} times the bytes"


def _reads(settings: Settings, folder: Path, *, arrays: Sequence[Arrays], peers: Sequence[Peer]) -> Iterator[Figure]:
    reader = SampleReader(folder / OWN)
    cache, ids = open_cache(str(folder / OWN)), reader.sample_ids
    own_files = FileSet.under(folder / OWN / "shards")
    contenders = [
        _Contender(
            name="pread",
            files=own_files,
            read=lambda number: reader.run("pread", [ids[number]], threads=1, start_at=0),
        ),
        _Contender(name=OWN, files=own_files, read=lambda number: cache.read([ids[number]])),
    ]
    for peer in peers:
        read = peer.open(folder / peer.name)
        _require_same(read, arrays, name=peer.name)
        contenders.append(_Contender(name=peer.name, files=FileSet.under(folder / peer.name), read=read))
    rng = np.random.default_rng(10)
    for state in ("cold", "warm"):
        seconds: dict[str, list[float]] = {contender.name: [] for contender in contenders}
        for contender in contenders:
            contender.files.warm()
        for number in np.tile(rng.permutation(len(arrays)), settings.read_passes).tolist():
            for place in rng.permutation(len(contenders)).tolist():
                contender = contenders[place]
                if state == "cold":
                    contender.files.drop()
                start = time.perf_counter()
                kept = contender.read(number)
                seconds[contender.name].append(time.perf_counter() - start)
                del kept
        for contender in contenders[1:]:
            middle = np.median(seconds[contender.name]) * 1e3
            yield ratio_figure(
                SECTION,
                f"{contender.name}: random reads, {state}",
                base_s=seconds["pread"],
                own_s=seconds[contender.name],
                note=f"{middle:.1f} ms per sample",
            )


def _require_same(read: Read, arrays: Sequence[Arrays], *, name: str) -> None:
    for number in (0, len(arrays) - 1):
        found = read(number)
        for key, rows in arrays[number].items():
            if not np.array_equal(found[key], rows):
                raise RuntimeError(f"{name}: sample {number} comes back with other {key}")


def _damage(
    folder: Path, *, samples: Sequence[TeacherTargets], arrays: Sequence[Arrays], peers: Sequence[Peer]
) -> Iterator[Figure]:
    """Flip one bit of the stored rows at a time, and read everything."""

    def read_own(path: Path) -> None:
        cache = open_cache(str(path))
        cache.read(cache.sample_ids)

    def read_peer(peer: Peer) -> Callable[[Path], None]:
        def read_all(path: Path) -> None:
            read = peer.open(path)
            for number in range(len(arrays)):
                read(number)

        return read_all

    build_cache(str(folder / OWN), samples, per_shard=len(samples))
    readers: dict[str, Callable[[Path], None]] = {OWN: read_own}
    for peer in peers:
        (folder / peer.name).mkdir(parents=True)
        peer.write(folder / peer.name, arrays)
        readers[peer.name] = read_peer(peer)
    for name, read_all in readers.items():
        noticed = _noticed(folder / name, read_all, arrays=arrays)
        yield Figure(section=SECTION, name=f"{name}: flipped bits noticed", value=noticed, unit=f"of {_FLIPS}")
    shutil.rmtree(folder)


def _noticed(folder: Path, read_all: Callable[[Path], None], *, arrays: Sequence[Arrays]) -> float:
    rng = np.random.default_rng(11)
    count = 0
    for _ in range(_FLIPS):
        path, place = _find_rows(folder, arrays, rng=rng)
        _flip(path, place)
        try:
            read_all(folder)
        except Exception:
            count += 1
        _flip(path, place)
    read_all(folder)
    return count


def _find_rows(folder: Path, arrays: Sequence[Arrays], *, rng: np.random.Generator) -> tuple[Path, int]:
    """Return where some bytes of the hidden states are stored: their own bytes, not padding or an index.

    In a format that stores them in another form, somewhere in the middle of the largest file.
    """
    stored = {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
    for _ in range(_SEARCHES):
        rows = arrays[int(rng.integers(len(arrays)))]["question_hidden_states"].tobytes()
        start = int(rng.integers(len(rows) - _SNIPPET_BYTES))
        for path, data in stored.items():
            if (place := data.find(rows[start : start + _SNIPPET_BYTES])) >= 0:
                return path, place
    path, data = max(stored.items(), key=lambda item: len(item[1]))
    return path, int(rng.integers(len(data) // 4, len(data) * 3 // 4))


def _flip(path: Path, place: int) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 16]))
