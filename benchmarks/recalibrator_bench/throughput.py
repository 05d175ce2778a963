"""Forward and backward of the Recalibrator, against the student's blocks run plainly and against padded batches."""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from cache_bench.figures import Figure, ratio_figure
from torch import Tensor, nn
from transformers import Qwen2Config, Qwen2Model

from recalibrator import Recalibrator, RecalibratorConfig
from recalibrator.joint_sequence import Turn, plan_joint_sequence
from recalibrator_bench import exactness
from recalibrator_bench.settings import SECTION, Settings

BAR = 0.90

Step = Callable[[], Tensor]
Times = tuple[list[float], list[float]]
"""Seconds of the base's steps and of one's own, pair by pair."""


def measure(settings: Settings) -> Iterator[Figure]:
    """Yield the figures; of speed, from pairs of steps in alternating order, on one core and in its time."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = Qwen2Config(**settings.student, num_hidden_layers=2, vocab_size=8, bos_token_id=1, eos_token_id=2)
    module = Recalibrator(RecalibratorConfig(student_config=config, teacher_hidden=settings.teacher_hidden))
    student = StudentBlocks(config, module)
    yield from _against_student(module, student, settings)
    yield from _against_padding(module, student, settings)
    yield from exactness.measure(module, settings)


class StudentBlocks(nn.Module):
    """The student's text model with the Recalibrator's weights: the same blocks, as transformers runs them."""

    def __init__(self, config: Qwen2Config, module: Recalibrator) -> None:
        super().__init__()
        config._attn_implementation = "sdpa"
        self.body = Qwen2Model(config)
        self.body.layers.load_state_dict(module.blocks.state_dict())

    def forward(self, rows: Tensor) -> Tensor:
        positions = torch.arange(rows.shape[1])[None]
        embeddings = self.body.rotary_emb(rows, positions)
        for layer in self.body.layers:
            rows = layer(rows, attention_mask=None, position_embeddings=embeddings)
        return rows


def _against_student(module: Recalibrator, student: StudentBlocks, settings: Settings) -> Iterator[Figure]:
    width, tokens, answers = module.config.student_hidden, settings.joint_tokens, settings.answer_tokens
    rows = torch.randn(1, tokens, width, requires_grad=True)
    # all rows but the last predict an answer token, or those of an ordinary sample alone
    dense, ordinary = (plan_joint_sequence([[Turn(tokens - count, count)]]) for count in (tokens - 1, answers))

    def plain() -> Tensor:
        return student(rows)

    def blocks() -> Tensor:
        return module._blocks_forward(rows, dense)

    def blocks_of_sample() -> Tensor:
        return module._blocks_forward(rows, ordinary)[0, ordinary.predicting_slots]

    def step(count: int) -> Step:
        plan = ordinary if count == answers else dense
        teacher = torch.randn(count, settings.teacher_hidden)
        questions = torch.randn(tokens - count, width, requires_grad=True)
        return lambda: module(questions, teacher, plan, questions_from="student")

    for name, own, bar, note in (
        ("all rows read", blocks, BAR, f"{tokens} rows, width {width}, float32"),
        ("ordinary sample", blocks_of_sample, BAR, f"{tokens - answers} question and {answers} answer rows"),
    ):
        times = _pairs(plain, own, pairs=settings.pairs)
        yield _figure(f"two blocks, {name}, against the student's", times, tokens, bar, note=note)
    both = f"both projections, width {settings.teacher_hidden}, and the norm included"
    times = _pairs(plain, step(answers), pairs=settings.pairs)
    yield _figure("whole step, ordinary sample, against the student's blocks", times, tokens, BAR, note=both)
    times = _pairs(plain, step(tokens - 1), pairs=settings.pairs)
    yield _figure("whole step, nothing but an answer, against the student's blocks", times, tokens, note=both)
    per_row = sum(parameter.numel() for parameter in module.blocks.parameters())
    per_row += len(module.blocks) * tokens * width  # queries with keys, weights with values: half of all pairs each
    # three products per weight and row, forward and backward; the teacher's rows need no gradient
    work = 1 + (2 + 3) / 3 * settings.teacher_hidden * width * (tokens - 1) / (per_row * tokens)
    note = f"same pairs: {work:.2f} times the products of the blocks"
    yield _figure("whole step, nothing but an answer, products per second", times, tokens, BAR, work=work, note=note)


def _against_padding(module: Recalibrator, student: StudentBlocks, settings: Settings) -> Iterator[Figure]:
    width = module.config.student_hidden
    for name, lengths in settings.batches.items():
        plan = plan_joint_sequence([[Turn(1, length - 1)] for length in lengths])
        packed = torch.randn(1, sum(lengths), width, requires_grad=True)
        padded = torch.randn(len(lengths), max(lengths), width, requires_grad=True)
        times = _pairs(
            lambda padded=padded: student(padded),
            lambda packed=packed, plan=plan: module._blocks_forward(packed, plan),
            pairs=settings.pairs,
        )
        share = sum(lengths) / padded[..., 0].numel()
        note = f"{', '.join(map(str, lengths))} rows, {share:.0%} of the padded batch"
        yield _figure(f"packed against padded, {name}", times, sum(lengths), note=note)


def _figure(name: str, times: Times, tokens: int, bar: float | None = None, *, work: float = 1.0, note: str) -> Figure:
    """Return the ratio of speeds; ``work`` is how many times the base's products one's own step has to form."""
    base_s, own_s = times
    speeds = " and ".join(f"{tokens / statistics.median(seconds):.0f}" for seconds in times)
    weighted = [seconds * work for seconds in base_s]
    note = f"{note}; {speeds} rows/s of one core"
    return ratio_figure(SECTION, name, base_s=weighted, own_s=own_s, bar=bar, note=note)


def _pairs(base: Step, own: Step, *, pairs: int) -> Times:
    steps = (base, own)
    for step in steps:
        _seconds(step)
    times: Times = ([], [])
    for pair in range(pairs):
        for side in _order(pair):
            times[side].append(_seconds(steps[side]))
    return times


def _order(pair: int) -> Sequence[int]:
    return (0, 1) if pair % 2 == 0 else (1, 0)


def _seconds(step: Step) -> float:
    # of this thread: others on the machine count for less, and the backward pass of a CPU runs in it too
    start = time.thread_time()
    output = step()
    output.backward(torch.ones_like(output))
    return time.thread_time() - start
