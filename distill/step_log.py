"""Where the metrics of each step go: metrics.jsonl, the monitors, one console line per interval, the progress bar."""

import json
import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from distill.metrics import keep_steps, logged_lines
from distill.monitors import Monitors, Place, open_monitors
from distill.processes import Processes
from teacher_cache.progress import Progress, clock_text, progress

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"


@dataclass(kw_only=True)
class StepLog:
    """Writes the records of one stage's steps; on other processes than the first, nothing."""

    label: str
    start: int
    max_steps: int
    interval_steps: int
    file: TextIO | None = None
    monitors: Monitors = field(default_factory=lambda: Monitors(None))
    bar: Progress | None = None
    measured: frozenset[int] = frozenset()
    """Steps whose validation was logged before this run of the stage."""
    _began: float = field(default_factory=time.monotonic)

    def write(self, record: Mapping[str, float]) -> None:
        """Log one step; what monitors show under its ``global_step`` is what metrics.jsonl has."""
        if self.file is None:
            return
        step = int(record["global_step"])
        record = {"global_step": step, "max_steps": self.max_steps, **record}
        if step > self.start:
            record["time/remaining_s"] = self._remaining_s(step)
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()
        self.monitors.write(record, step=step)
        if step > self.start and self.bar is not None:
            self.bar.update(1, **({"loss": f"{record['train/loss']:.4f}"} if "train/loss" in record else {}))
        if "time/step_s" in record and (step % self.interval_steps == 0 or step == self.max_steps):
            logger.info(console_line(self.label, record=record))

    def _remaining_s(self, step: int) -> float:
        elapsed = time.monotonic() - self._began
        return elapsed / (step - self.start) * (self.max_steps - step)


@contextmanager
def open_step_log(
    directory: Path,
    *,
    place: Place,
    label: str,
    start: int,
    max_steps: int,
    interval_steps: int,
    sections: Mapping[str, dict[str, Any]],
    processes: Processes,
) -> Iterator[StepLog]:
    """Open the log of a stage that goes on after step ``start``; ``sections`` are those of DeepSpeed's monitors."""
    log = StepLog(label=label, start=start, max_steps=max_steps, interval_steps=interval_steps)
    if processes.rank > 0:
        yield log
        return
    path = directory / METRICS_FILE
    keep_steps(path, until=start)
    log.measured = frozenset(validated_steps(path))
    with (
        path.open("a") as log.file,
        open_monitors(sections, place=place, start=start, processes=processes) as log.monitors,
        progress(total=max_steps, initial=start, unit="step", description=label) as log.bar,
    ):
        yield log


def validated_steps(path: Path) -> set[int]:
    """Return the steps after which the student was scored, as a metrics file has them."""
    return {step for step, line in logged_lines(path) if '"validation/' in line}


def console_line(label: str, *, record: Mapping[str, float]) -> str:
    """Return one line a human can follow."""
    short = {name.split("/")[1]: value for name, value in record.items() if name.startswith("train/")}
    losses = " | ".join(f"{name} {value:.4f}" for name, value in short.items())
    step, max_steps = int(record["global_step"]), int(record["max_steps"])
    speed = f"dt {1e3 * record['time/step_s']:.0f}ms | tok/s {record['throughput/tokens_per_s']:,.0f}"
    mfu = f" | mfu {100 * record['throughput/mfu']:.1f}" if "throughput/mfu" in record else ""
    return (
        f"{label} step {step:05d}/{max_steps:05d} ({100 * step / max_steps:.1f}%) | {losses or 'no loss'} | "
        f"norm {record.get('optim/grad_norm', float('nan')):.3f} | lr {record['optim/lr']:.2e} | {speed}{mfu} | "
        f"wait {100 * record['data/wait_fraction']:.0f}% | eta {clock_text(record['time/remaining_s'])}"
    )
