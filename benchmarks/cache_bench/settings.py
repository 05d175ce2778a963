"""How much each part measures: the full sizes, or tiny ones that only show that everything works."""

from dataclasses import dataclass
from pathlib import Path

from cache_bench.rows import Shape


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Sizes of one run."""

    folder: Path
    """Scratch space; what is written there is removed."""
    shape: Shape
    write_samples: int
    write_pairs: int
    read_samples: int
    read_passes: int
    batch: int
    """Samples per call where samples are read in batches."""
    peer_samples: int
    peer_writes: int
    open_samples: int
    open_per_shard: tuple[int, ...]
    verify_pairs: int
    answer_samples: int
    """Samples of the cache whose bytes are counted."""
    entropy_rows: int
    real_states: bool
    """Compress states of the demo's teacher too."""


def full(folder: Path) -> Settings:
    """Return the sizes of a run that counts."""
    return Settings(
        folder=folder,
        shape=Shape(hidden=4096, topk=64, mean_tokens=960),
        write_samples=32,
        write_pairs=15,
        read_samples=64,
        read_passes=2,
        batch=8,
        peer_samples=24,
        peer_writes=3,
        open_samples=1_000_000,
        open_per_shard=(1024, 32),
        verify_pairs=7,
        answer_samples=64,
        entropy_rows=8192,
        real_states=True,
    )


def quick(folder: Path) -> Settings:
    """Return sizes that only show that everything works."""
    return Settings(
        folder=folder,
        shape=Shape(hidden=256, topk=8, mean_tokens=120),
        write_samples=4,
        write_pairs=2,
        read_samples=8,
        read_passes=1,
        batch=4,
        peer_samples=3,
        peer_writes=1,
        open_samples=2_000,
        open_per_shard=(100,),
        verify_pairs=2,
        answer_samples=20,
        entropy_rows=512,
        real_states=False,
    )
