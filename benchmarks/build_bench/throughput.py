"""Building shards, against the same engine's prefill of the same samples and against plain transformers."""

import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from cache_bench.figures import Figure, ratio_figure
from random_inputs import create_models, write_data

from launch.demo.models import ModelSpec
from teacher_cache.build_plan import open_builder
from teacher_cache.chat import encode_conversation
from teacher_cache.config import BuildConfig, CacheConfig, DataConfig, TargetsConfig, TeacherConfig
from teacher_cache.sample_file import SampleFile, scan_samples
from teacher_cache.schema import EncodedConversation, Sample, Span
from teacher_cache.shard_worker import ShardReport, ShardWorker
from teacher_cache.teacher import Teacher, TeacherRequest, TransformersTeacher

SECTION = "build"
BAR, AHEAD = 0.90, 1.0


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Sizes of one run."""

    teacher: ModelSpec
    samples_per_shard: int
    words: tuple[int, int]
    """Of a question and of an answer."""
    pairs: int
    max_batched_tokens: int
    dtype: str = "float32"


_TEACHER = ModelSpec(family="qwen2-vl", tokenizer="byte-bpe", vocab_size=1024, initializer_range=0.02)
FULL = Settings(
    teacher=replace(_TEACHER, hidden_size=512, intermediate_size=2048, num_layers=18, num_heads=8, num_kv_heads=8),
    samples_per_shard=24,
    words=(120, 80),
    pairs=7,
    max_batched_tokens=512,  # their activations fit the processor's cache
)
# 1.3 thousand million parameters in few layers, so that vLLM compiles them soon
GPU = Settings(
    teacher=replace(
        _TEACHER,
        vocab_size=32_768,
        hidden_size=2560,
        intermediate_size=10_240,
        num_layers=12,
        num_heads=20,
        num_kv_heads=4,
        vision_hidden=256,
    ),
    samples_per_shard=128,
    words=(400, 200),
    pairs=3,
    max_batched_tokens=16_384,
    dtype="bfloat16",
)
QUICK = Settings(teacher=_TEACHER, samples_per_shard=4, words=(20, 10), pairs=2, max_batched_tokens=512)


def measure(folder: Path, settings: Settings) -> Iterator[Figure]:
    """Yield the speed of the build against the engine alone and against transformers."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    create_models(folder, {"teacher": settings.teacher})
    # one shard more than there are pairs
    num_samples = settings.samples_per_shard * (settings.pairs + 1)
    data = write_data(folder, num_samples=num_samples, words=settings.words)
    config = CacheConfig(
        uri=str(folder / "cache"),
        teacher=TeacherConfig(model=str(folder / "teacher"), dtype=settings.dtype),
        data=DataConfig(path=str(data), max_length=2048),
        targets=TargetsConfig(topk=64, question_fraction=1.0),
        samples_per_shard=settings.samples_per_shard,
        build=BuildConfig(max_batched_tokens=settings.max_batched_tokens),
    )
    writer = open_builder(config, scan_samples(config.data))
    worker = ShardWorker(config, writer=writer, identity={}, log_file=folder / "engine.log")
    reference = TransformersTeacher(config.teacher)
    shards = writer.missing_shards()
    samples = _samples(config)
    tokens = 0

    def build(pair: int) -> None:
        nonlocal tokens
        shard = shards[pair]
        *_, report = worker.build(shard.shard_id, [samples[sample_id] for sample_id in shard.sample_ids])
        assert isinstance(report, ShardReport)
        tokens = report.tokens

    def engine_alone(pair: int) -> None:
        _prefill(worker.teacher, encoded[pair])

    def transformers_alone(pair: int) -> None:
        _prefill(reference, encoded[pair])

    encoded = [
        [encode_conversation(worker.processor, samples[id_], max_length=2048) for id_ in shard.sample_ids]
        for shard in shards
    ]
    seconds = _interleaved([build, engine_alone, transformers_alone], pairs=settings.pairs)
    own, engine, plain = ([one[side] for one in seconds] for side in range(3))
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} threads"
    parameters = sum(weight.numel() for weight in reference.model.parameters())
    note = (
        f"{parameters / 1e6:.0f} M parameters on {where}, {tokens} tokens a shard: build "
        f"{tokens / statistics.median(own):.0f}, engine {tokens / statistics.median(engine):.0f}, transformers "
        f"{tokens / statistics.median(plain):.0f} tokens/s"
    )
    yield ratio_figure(
        SECTION, "a shard, against the engine's prefill alone", base_s=engine, own_s=own, bar=BAR, note=note
    )
    yield ratio_figure(
        SECTION, "a shard, against the transformers teacher", base_s=plain, own_s=own, bar=AHEAD, note="nothing stored"
    )
    worker.close()


def _samples(config: CacheConfig) -> dict[str, Sample]:
    with SampleFile(config.data) as file:
        return {sample.sample_id: sample for sample in file.read(scan_samples(config.data).samples)}


def _prefill(teacher: Teacher, conversations: Sequence[EncodedConversation]) -> None:
    """Run the teacher over every token, and let it return next to nothing."""
    requests = [
        TeacherRequest(
            conversation=replace(
                conversation,
                spans=(Span(len(conversation.token_ids) - 1, len(conversation.token_ids)),),
                answer_byte_ends=conversation.answer_byte_ends[-1:],
            ),
            question_rows=False,
        )
        for conversation in conversations
    ]
    assert len(list(teacher.stream(requests, topk=1))) == len(requests)


def _interleaved(sides: Sequence[Callable[[int], None]], *, pairs: int) -> list[list[float]]:
    """Run all sides in turn, in another order each time, after one run that does not count."""
    rng = np.random.default_rng(1)
    seconds = []
    for pair in range(pairs + 1):
        times = [0.0] * len(sides)
        for side in rng.permutation(len(sides)).tolist():
            start = time.perf_counter()
            sides[side](pair)
            times[side] = time.perf_counter() - start
        if pair:
            seconds.append(times)
    return seconds
