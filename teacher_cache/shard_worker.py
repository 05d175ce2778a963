"""Builds one shard after the other with one teacher engine: encode, compute, check and write at the same time."""

import logging
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Final

from teacher_cache.build_plan import keeps_question_rows
from teacher_cache.chat import Processor, encode_conversation, load_processor
from teacher_cache.config import CacheConfig
from teacher_cache.errors import CacheError, GenrecalError, SampleError
from teacher_cache.head_check import HeadCheck
from teacher_cache.prefetch import Prefetch
from teacher_cache.progress import PieceProgress
from teacher_cache.samples import check_skip_budget
from teacher_cache.schema import EncodedConversation, Sample, SkippedSample, TeacherTargets
from teacher_cache.shard_attempt import ShardAttempt
from teacher_cache.spot_check import TOLERANCE, ReferenceRows, SpotCheck, compare_with_reference
from teacher_cache.teacher import Teacher, TeacherRequest, TransformersTeacher
from teacher_cache.teacher_checkpoint import checkpoint_directory
from teacher_cache.teacher_copy import require_same_copy
from teacher_cache.writer import CacheWriter

logger = logging.getLogger(__name__)

WINDOW_SAMPLES: Final = 32
"""Encoded samples among which the longest goes to the engine first."""
WRITES_AHEAD: Final = 8
"""Samples that wait to be written; more of them hold the engine up instead of filling the memory."""
SIGN_OF_LIFE_S: Final = 1.0


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
    spot_check: SpotCheck
    worker: dict[str, str]


class ShardWorker:
    """One engine and what it needs to build shards."""

    def __init__(
        self, config: CacheConfig, *, writer: CacheWriter, identity: dict[str, str], log_file: Path | None
    ) -> None:
        """Start the engine, once this node's copy of the teacher is found to be the one that the cache is of.

        Raises:
            ConfigError: It is another one.
            CacheError: The cache has no teacher head, or the store does not give it.
        """
        if writer.teacher is None or writer.head is None:
            raise CacheError(f"{config.uri} is opened without the teacher that it is built with; use `open_builder`")
        teacher = require_same_copy(config.teacher, expected=writer.teacher)
        self.config = config.model_copy(update={"teacher": teacher})
        self.writer = writer
        directory = str(checkpoint_directory(teacher))
        self.processor = load_processor(directory, trust_remote_code=teacher.trust_remote_code)
        self.head = writer.head
        self.teacher = start_teacher(self.config, log_file=log_file)
        self.identity = {**self.teacher.provenance, **identity}

    def build(
        self, shard_id: str, samples: Sequence[Sample], *, references: Sequence[ReferenceRows] = ()
    ) -> Iterator[PieceProgress | ShardReport]:
        """Compute and commit one shard, unless it stands already; yield signs of life, and the report at the end.

        Args:
            shard_id: A planned shard.
            samples: All its samples.
            references: What some of its samples are compared with.

        Raises:
            DataError: More of its samples are bad than ``max_skipped_samples``; nothing is committed.
            TeacherError: The engine failed or its targets fail their checks; nothing is committed.
            CacheError: The shard cannot be written, or was withdrawn meanwhile.
        """
        started = time.monotonic()
        checking = HeadCheck(self.head, num_samples=len(samples))
        with self.writer.start_shard(shard_id) as attempt, checking:
            digests = {sample.sample_id: sample.digest for sample in samples}
            attempt.require_planned(list(digests), skipped=(), digests=digests)
            build = _ShardBuild(
                self, attempt, samples, head_check=checking, references={one.sample_id: one for one in references}
            )
            if not attempt.is_done_elsewhere:
                yield from build.run()
            # a machine at fault skips all that it gets: what is committed stands for everyone
            data = self.config.data
            where = f"shard {shard_id} of {data.path}"
            check_skip_budget(build.skipped, allowed=data.max_skipped_samples, source=where)
            difference = checking.result()
            spot_check = SpotCheck.merged(build.spot_checks)
            provenance = {**self.identity, "head_difference_nats": difference, "spot_check": asdict(spot_check)}
            record = attempt.commit(skipped=build.skipped, provenance=provenance)
        if record.withdrawn is not None:
            raise CacheError(f"shard {shard_id}: withdrawn ({record.withdrawn}) while it was built; try it again")
        yield ShardReport(
            shard_id=shard_id,
            samples=len(record.sample_ids),
            tokens=build.tokens,
            seconds=time.monotonic() - started,
            skipped=record.skipped,
            head_difference_nats=difference,
            spot_check=spot_check,
            worker=self.identity,
        )

    def close(self) -> None:
        """Stop the engine."""
        self.teacher.close()


class _ShardBuild:
    """One shard on its way: a thread encodes ahead, the engine computes, two more write and check in planned order."""

    def __init__(
        self,
        worker: ShardWorker,
        attempt: ShardAttempt,
        samples: Sequence[Sample],
        *,
        head_check: HeadCheck,
        references: Mapping[str, ReferenceRows],
    ) -> None:
        self._worker = worker
        self._attempt = attempt
        self._samples = samples
        self._head_check = head_check
        self._references = references
        self._tolerance = worker.config.build.spot_check_tolerance or TOLERANCE[worker.config.teacher.dtype]
        self._skipped: dict[str, SkippedSample] = {}
        self._computed: dict[str, TeacherTargets] = {}
        self._next = 0
        self._writes: deque[Future[None]] = deque()
        self.spot_checks: list[SpotCheck] = []
        self.tokens = 0

    @property
    def skipped(self) -> list[SkippedSample]:
        """Bad samples, in planned order."""
        return [self._skipped[sample.sample_id] for sample in self._samples if sample.sample_id in self._skipped]

    def run(self) -> Iterator[PieceProgress]:
        """Compute and write all samples."""
        told = time.monotonic()
        topk = self._worker.config.targets.topk
        with Prefetch(self._requests(), depth=WINDOW_SAMPLES) as requests, ThreadPoolExecutor(1) as writing:
            try:
                for done in self._worker.teacher.stream(requests, topk=topk):
                    if isinstance(done, SampleError):
                        self._skipped[done.sample_id] = skipped_sample(done)
                    else:
                        self._computed[done.sample_id] = done
                        self.tokens += len(done.token_ids)
                    self._write_ready(writing)
                    if time.monotonic() - told >= SIGN_OF_LIFE_S:
                        told = time.monotonic()
                        yield self._progress()
                self._write_ready(writing)
                for write in self._writes:
                    write.result()
            except BaseException:
                writing.shutdown(cancel_futures=True)
                raise
        yield self._progress()

    def _progress(self) -> PieceProgress:
        return PieceProgress(samples=self._next, tokens=self.tokens)

    def _requests(self) -> Iterator[TeacherRequest]:
        """Encode the samples; within each window, the longest come first so that no short rest waits for a long one."""
        window: list[TeacherRequest] = []
        for sample in self._samples:
            request = self._encode(sample)
            window += [] if request is None else [request]
            if len(window) == WINDOW_SAMPLES:
                yield from sorted(window, key=_length, reverse=True)
                window = []
        yield from sorted(window, key=_length, reverse=True)

    def _encode(self, sample: Sample) -> TeacherRequest | None:
        config = self._worker.config
        conversation = encode_or_skip(self._worker.processor, sample, max_length=config.data.max_length)
        if isinstance(conversation, SkippedSample):
            self._skipped[sample.sample_id] = conversation
            return None
        if not self._worker.teacher.uses_model_inputs:
            conversation = replace(conversation, model_inputs={})
        wanted = keeps_question_rows(sample, fraction=config.targets.question_fraction)
        return TeacherRequest(conversation=conversation, question_rows=wanted)

    def _write_ready(self, writing: ThreadPoolExecutor) -> None:
        """Hand over what comes next in planned order; wait while too much is waiting."""
        while self._next < len(self._samples):
            sample_id = self._samples[self._next].sample_id
            if (targets := self._computed.pop(sample_id, None)) is not None:
                self._writes.append(writing.submit(self._write, targets, self._next))
            elif sample_id not in self._skipped:
                break
            self._next += 1
        while self._writes and (self._writes[0].done() or len(self._writes) > WRITES_AHEAD):
            self._writes.popleft().result()

    def _write(self, targets: TeacherTargets, place: int) -> None:
        self._head_check.add(targets, place=place)
        if (reference := self._references.get(targets.sample_id)) is not None:
            self.spot_checks.append(compare_with_reference(targets, reference, tolerance=self._tolerance))
        self._attempt.append(targets)


def encode_or_skip(processor: Processor, sample: Sample, *, max_length: int) -> EncodedConversation | SkippedSample:
    """Return a sample as the teacher takes it, or why it takes none.

    Raises:
        ConfigError: The chat template or the processor serves no sample.
    """
    try:
        return encode_conversation(processor, sample, max_length=max_length)
    except SampleError as error:
        return skipped_sample(error)
    except GenrecalError:
        raise
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        # a processor refuses an image or a text in its own words: that costs this sample, not the job
        logger.warning("sample %s cannot be encoded", sample.sample_id, exc_info=True)
        message = f"the teacher's processor refuses the sample: {type(error).__name__}: {error}"
        return SkippedSample(sample_id=sample.sample_id, reason="not-encodable", message=message)


def skipped_sample(error: SampleError) -> SkippedSample:
    """Return what is listed of a sample that was left out."""
    return SkippedSample(sample_id=error.sample_id, reason=error.reason, message=str(error))


def start_teacher(config: CacheConfig, *, log_file: Path | None) -> Teacher:
    """Start the engine that the config names."""
    if config.build.engine == "transformers":
        return TransformersTeacher(config.teacher)
    from teacher_cache.vllm_teacher import VllmTeacher

    return VllmTeacher(config.teacher, build=config.build, max_length=config.data.max_length, log_file=log_file)


def _length(request: TeacherRequest) -> int:
    return len(request.conversation.token_ids)
