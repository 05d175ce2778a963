"""The teacher in the place of its cache: computes what is read, each time it is read."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Protocol

from teacher_cache.build_plan import cache_identity, keeps_question_rows
from teacher_cache.chat import encode_conversation, load_processor
from teacher_cache.config import CacheConfig
from teacher_cache.manifest import fingerprint
from teacher_cache.schema import (
    TIERS,
    EncodedConversation,
    Sample,
    SkippedSample,
    TeacherHead,
    TeacherTargets,
    Tier,
)
from teacher_cache.teacher import Teacher, compute_targets, load_teacher_head
from teacher_cache.teacher_checkpoint import checkpoint_directory


class TargetSource(Protocol):
    """What training asks of a teacher: `TeacherCache` and `LiveTeacher` have it."""

    @property
    def sample_ids(self) -> tuple[str, ...]:
        """Samples that have targets, in order."""
        ...

    @property
    def skipped(self) -> tuple[SkippedSample, ...]:
        """Bad samples, which have none."""
        ...

    @property
    def hidden_size(self) -> int:
        """Columns of the hidden states."""
        ...

    @property
    def targets_fingerprint(self) -> str:
        """Equal wherever a sample would get the same targets."""
        ...

    def sample_digest(self, sample_id: str) -> str:
        """Return the digest of the sample that the teacher saw."""
        ...

    def num_tokens(self, sample_id: str) -> int:
        """Return the number of teacher tokens, images expanded."""
        ...

    def teacher_head(self) -> TeacherHead:
        """Return the teacher's output projection."""
        ...

    def read(self, sample_ids: Iterable[str], *, tiers: Collection[Tier] = TIERS) -> list[TeacherTargets]:
        """Return the targets of these samples, in this order."""
        ...

    def __len__(self) -> int: ...


class LiveTeacher:
    """A teacher engine behind the interface of its cache.

    For comparison: a training run takes it through ``train_student(targets=...)`` and pays for the teacher at every
    read, in the same process. The targets are those that a build with this engine stores.
    """

    def __init__(self, teacher: Teacher, *, config: CacheConfig, samples: Sequence[Sample]) -> None:
        """Take an engine and the samples that a cache of this configuration would hold; nothing is read or written."""
        self.teacher = teacher
        """The engine."""
        self._config = config
        self._samples = {sample.sample_id: sample for sample in samples}
        directory = checkpoint_directory(config.teacher)
        self._processor = load_processor(str(directory), trust_remote_code=config.teacher.trust_remote_code)
        self.skipped: tuple[SkippedSample, ...] = ()
        self._num_tokens: dict[str, int] = {}

    @property
    def sample_ids(self) -> tuple[str, ...]:
        """Ids of all samples, in order."""
        return tuple(self._samples)

    @property
    def hidden_size(self) -> int:
        """Columns of the hidden states."""
        return self.teacher.hidden_size

    @cached_property
    def targets_fingerprint(self) -> str:
        """SHA-256 (hex) of what decides the targets; never that of a cache."""
        return fingerprint({"live": cache_identity(self._config)})

    def sample_digest(self, sample_id: str) -> str:
        """Return the digest of a sample."""
        return self._samples[sample_id].digest

    def num_tokens(self, sample_id: str) -> int:
        """Return the number of teacher tokens, images expanded."""
        if sample_id not in self._num_tokens:
            self._num_tokens[sample_id] = len(self._encode(sample_id).token_ids)
        return self._num_tokens[sample_id]

    def teacher_head(self) -> TeacherHead:
        """Return the teacher's output projection."""
        return load_teacher_head(self._config.teacher)

    def read(self, sample_ids: Iterable[str], *, tiers: Collection[Tier] = TIERS) -> list[TeacherTargets]:
        """Run the teacher over these samples and return their targets, in this order.

        Raises:
            SampleError: A sample is too long for the teacher, or its targets are not finite.
            TeacherError: The engine failed.
        """
        asked = list(sample_ids)
        targets = compute_targets(
            self.teacher,
            [self._encode(sample_id) for sample_id in asked],
            topk=self._config.targets.topk,
            question_rows=["Q" in tiers and self._keeps_question_rows(sample_id) for sample_id in asked],
        )
        return targets if "L" in tiers else [_without_tier_l(one) for one in targets]

    def __len__(self) -> int:
        return len(self._samples)

    def _encode(self, sample_id: str) -> EncodedConversation:
        return encode_conversation(self._processor, self._samples[sample_id], max_length=self._config.data.max_length)

    def _keeps_question_rows(self, sample_id: str) -> bool:
        return keeps_question_rows(self._samples[sample_id], fraction=self._config.targets.question_fraction)


def _without_tier_l(targets: TeacherTargets) -> TeacherTargets:
    return replace(
        targets, topk_ids=None, topk_logprobs=None, logsumexp=None, target_logprobs=None, answer_byte_ends=None
    )
