"""Builds one shard after the other with one teacher engine: encode, compute, check, commit."""

import itertools
import logging
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from teacher_cache.build_plan import keeps_question_rows
from teacher_cache.chat import Processor, encode_conversation, load_processor
from teacher_cache.config import CacheConfig
from teacher_cache.errors import GenrecalError, SampleError
from teacher_cache.reader import open_cache
from teacher_cache.schema import EncodedConversation, Sample, SkippedSample, TeacherTargets
from teacher_cache.teacher import Teacher, TransformersTeacher, check_head_agrees
from teacher_cache.teacher_checkpoint import checkpoint_directory
from teacher_cache.writer import CacheWriter

logger = logging.getLogger(__name__)

SAMPLES_AT_ONCE = 64
"""Samples whose images are decoded at the same time, while the engine computes as many others."""


@dataclass(frozen=True, kw_only=True)
class ShardReport:
    """What building one shard took."""

    shard_id: str
    samples: int
    tokens: int
    """Teacher tokens, image tokens included."""
    seconds: float
    skipped: tuple[SkippedSample, ...]
    head_difference_nats: float
    """Largest difference between the engine's log-probabilities and the stored rows through the stored head."""
    worker: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class _Encoded:
    sample: Sample
    conversation: EncodedConversation


class ShardWorker:
    """One engine and what it needs to build shards."""

    def __init__(
        self, config: CacheConfig, *, writer: CacheWriter, identity: dict[str, str], log_file: Path | None
    ) -> None:
        self.config = config
        self.writer = writer
        directory = str(checkpoint_directory(config.teacher))
        self.processor = load_processor(directory, trust_remote_code=config.teacher.trust_remote_code)
        self.head = open_cache(config.uri, allow_incomplete=True).teacher_head()
        self.teacher = start_teacher(config, log_file=log_file)
        self.identity = {**self.teacher.provenance, **identity}

    def build(self, shard_id: str, samples: Sequence[Sample]) -> ShardReport:
        """Compute and commit one shard.

        Raises:
            TeacherError: The engine failed or its targets fail their checks; nothing is committed.
            CacheError: The shard cannot be written.
        """
        started = time.monotonic()
        targets, skipped = self._compute(samples)
        difference = check_head_agrees(targets, head=self.head) if targets else 0.0
        self.writer.commit_shard(
            shard_id,
            targets,
            sample_digests={sample.sample_id: sample.digest for sample in samples},
            skipped=skipped,
            provenance={**self.identity, "head_difference_nats": difference},
        )
        return ShardReport(
            shard_id=shard_id,
            samples=len(targets),
            tokens=sum(len(target.token_ids) for target in targets),
            seconds=time.monotonic() - started,
            skipped=tuple(skipped),
            head_difference_nats=difference,
            worker=self.identity,
        )

    def close(self) -> None:
        """Stop the engine."""
        self.teacher.close()

    def _compute(self, samples: Sequence[Sample]) -> tuple[list[TeacherTargets], list[SkippedSample]]:
        targets: list[TeacherTargets] = []
        skipped: list[SkippedSample] = []
        batches = [samples[start : start + SAMPLES_AT_ONCE] for start in range(0, len(samples), SAMPLES_AT_ONCE)]
        with ThreadPoolExecutor(max_workers=1) as ahead:
            encoded = ahead.submit(self._encode, batches[0])
            for following in itertools.chain(batches[1:], [None]):
                ready, bad = encoded.result()
                if following is not None:
                    encoded = ahead.submit(self._encode, following)
                done, refused = self._run_teacher(ready)
                targets += done
                skipped += [*bad, *refused]
        return targets, skipped

    def _encode(self, samples: Sequence[Sample]) -> tuple[list[_Encoded], list[SkippedSample]]:
        encoded, skipped = [], []
        for sample in samples:
            conversation = encode_or_skip(self.processor, sample, max_length=self.config.data.max_length)
            if isinstance(conversation, SkippedSample):
                skipped.append(conversation)
            else:
                encoded.append(_Encoded(sample=sample, conversation=conversation))
        return encoded, skipped

    def _run_teacher(self, encoded: list[_Encoded]) -> tuple[list[TeacherTargets], list[SkippedSample]]:
        settings = self.config.targets
        skipped: list[SkippedSample] = []
        while encoded:
            try:
                done = self.teacher.compute(
                    [entry.conversation for entry in encoded],
                    topk=settings.topk,
                    question_rows=[
                        keeps_question_rows(entry.sample, fraction=settings.question_fraction) for entry in encoded
                    ],
                )
            except SampleError as error:
                skipped.append(_skipped(error))
                encoded = [entry for entry in encoded if entry.sample.sample_id != error.sample_id]
            else:
                return done, skipped
        return [], skipped


def encode_or_skip(processor: Processor, sample: Sample, *, max_length: int) -> EncodedConversation | SkippedSample:
    """Return a sample as the teacher takes it, or why it takes none.

    Raises:
        ConfigError: The chat template or the processor serves no sample.
    """
    try:
        return encode_conversation(processor, sample, max_length=max_length)
    except SampleError as error:
        return _skipped(error)
    except GenrecalError:
        raise
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        # a processor refuses an image or a text in its own words: that costs this sample, not the job
        logger.warning("sample %s cannot be encoded", sample.sample_id, exc_info=True)
        message = f"the teacher's processor refuses the sample: {type(error).__name__}: {error}"
        return SkippedSample(sample_id=sample.sample_id, reason="not-encodable", message=message)


def start_teacher(config: CacheConfig, *, log_file: Path | None) -> Teacher:
    """Start the engine that the config names."""
    if config.build.engine == "transformers":
        return TransformersTeacher(config.teacher)
    from teacher_cache.vllm_teacher import VllmTeacher

    return VllmTeacher(config.teacher, build=config.build, max_length=config.data.max_length, log_file=log_file)


def _skipped(error: SampleError) -> SkippedSample:
    return SkippedSample(sample_id=error.sample_id, reason=error.reason, message=str(error))
