"""Measure a student over its samples in order, sorted and packed: ``python benchmarks/micro_batches.py``.

One rank's share of a step goes forward and backward through a Qwen2 of random weights, in micro-batches of as many
samples as they come, of neighbours in length, and of the same in one row each. On a GPU it runs there, in bfloat16.
"""

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cache_bench.command import make_parser, tell
from cache_bench.figures import Figure, ratio_figure
from transformers import Qwen2Config, Qwen2ForCausalLM

from distill.student import last_hidden_state


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is measured."""

    hidden_size: int
    layers: int
    samples: int
    micro_batch_size: int
    median_tokens: int
    pairs: int


FULL = Settings(hidden_size=128, layers=2, samples=16, micro_batch_size=4, median_tokens=64, pairs=5)
QUICK = Settings(hidden_size=64, layers=1, samples=4, micro_batch_size=2, median_tokens=20, pairs=2)
SPREAD = 0.6
"""Standard deviation of the logarithm of the lengths."""


def measure(settings: Settings) -> Iterator[Figure]:
    """Yield the figures."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=1000,
        hidden_size=settings.hidden_size,
        intermediate_size=4 * settings.hidden_size,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.hidden_size // 32,
        num_key_value_heads=settings.hidden_size // 64,
    )
    model = Qwen2ForCausalLM(config).to(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    lengths = np.random.default_rng(0).lognormal(np.log(settings.median_tokens), SPREAD, settings.samples)
    in_order = lengths.astype(int).clip(min=2)
    longest_first = -np.sort(-in_order)
    sides: dict[str, dict[str, Any]] = {
        "order": {"lengths": in_order, "packed": False},
        "sorted": {"lengths": longest_first, "packed": False},
        "packed": {"lengths": longest_first, "packed": True},
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for pair in range(settings.pairs + 1):
        for name, side in sides.items():
            took = step_s(model, size=settings.micro_batch_size, **side)
            if pair > 0:  # the first warms up
                seconds[name].append(took)
    for name, base, own in (("sorted over in order", "order", "sorted"), ("packed over sorted", "sorted", "packed")):
        yield ratio_figure(f"micro-batches on {device.type}", name, base_s=seconds[base], own_s=seconds[own])


def step_s(model: Qwen2ForCausalLM, *, lengths: np.ndarray, size: int, packed: bool) -> float:
    """Return the seconds of forward and backward over all samples."""
    _synchronize(model)
    began = time.perf_counter()
    for start in range(0, len(lengths), size):
        part = torch.from_numpy(lengths[start : start + size])
        mask = (torch.arange(int(part.max())) < part[:, None]).long().to(model.device)
        ids = torch.full_like(mask, 7)
        rows = last_hidden_state(model, ids, attention_mask=mask, model_inputs={}, packed=packed)
        rows[mask.bool()].float().square().mean().backward()
    model.zero_grad()
    _synchronize(model)
    return time.perf_counter() - began


def _synchronize(model: Qwen2ForCausalLM) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize()


def main(argv: Sequence[str]) -> int:
    """Measure, print, and return the exit code."""
    arguments = make_parser("micro_batches.py", description="Measure micro-batches.").parse_args(argv)
    tell(measure(QUICK if arguments.quick else FULL), arguments, folder=Path.cwd())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
