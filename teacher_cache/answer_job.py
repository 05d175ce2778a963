"""The books of a run that writes answers: which samples form which part, and what decides the file."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from teacher_cache.answer_file import AnswerCounts, AnswerFile
from teacher_cache.answer_writing import WrittenSample
from teacher_cache.answers_config import AnswersConfig
from teacher_cache.build_plan import engine_version
from teacher_cache.config import CacheConfig, DataConfig
from teacher_cache.errors import ConfigError
from teacher_cache.sample_file import SampleEntry, SampleFile, scan_samples
from teacher_cache.samples import image_folder
from teacher_cache.schema import Sample
from teacher_cache.teacher_checkpoint import processing_identity, teacher_identity
from teacher_cache.teacher_copy import at_commit, describe_copy


class AnswerJob:
    """What is to be written, and what has been."""

    def __init__(self, cache: CacheConfig, *, answers: AnswersConfig) -> None:
        """Read the source once.

        Raises:
            DataError: It is missing, or more of its rows are bad than ``max_skipped_samples``.
            ConfigError: The paths do not go together.
        """
        self.source = source_data(cache.data, answers=answers)
        teacher = at_commit(cache.teacher)
        self.teacher = describe_copy(teacher)
        table = scan_samples(self.source)
        self.skipped = table.skipped
        size = answers.samples_per_part
        self.parts = [table.samples[start : start + size] for start in range(0, len(table.samples), size)]
        cache = cache.model_copy(update={"teacher": teacher})
        identity = answers_identity(cache, answers=answers, samples=table.samples)
        self.file = AnswerFile(Path(cache.data.path), identity=identity, num_parts=len(self.parts))

    def read(self, part: int) -> list[Sample]:
        """Return the samples of a part."""
        with SampleFile(self.source) as file:
            return file.read(self.parts[part])

    def commit(self, part: int, samples: Sequence[WrittenSample]) -> None:
        """Keep a part that was written."""
        with SampleFile(self.source) as file:
            rows = file.rows(self.parts[part])
        self.file.commit(part, samples, rows=rows)

    def finish(self) -> AnswerCounts:
        """Make the data file of all parts."""
        return self.file.finish(skipped=self.skipped, provenance={"engine_version": engine_version("vllm")})


def source_data(data: DataConfig, *, answers: AnswersConfig) -> DataConfig:
    """Return the configuration of the data with the original answers.

    Raises:
        ConfigError: The file cannot be made from it.
    """
    source = data.model_copy(update={"path": answers.source})
    if Path(data.path).suffix != ".parquet" or Path(data.path) == Path(answers.source):
        raise ConfigError(
            f"`cache.data.path` is {data.path}; with `answers` it names a new Parquet file, made from {answers.source}"
        )
    if image_folder(data).resolve() != image_folder(source).resolve():
        raise ConfigError(
            f"image paths in {answers.source} are relative to its own folder, but {data.path} lies in another one; "
            "set `cache.data.image_root`"
        )
    return source


def answers_identity(cache: CacheConfig, *, answers: AnswersConfig, samples: Sequence[SampleEntry]) -> dict[str, Any]:
    """Return all that decides which answers are written, beside chance: engine and replicas do not."""
    lines = "".join(f"{sample.sample_id} {sample.digest}\n" for sample in samples)
    return {
        "teacher": teacher_identity(cache.teacher),
        "processing": {**processing_identity(cache.teacher), "max_length": cache.data.max_length},
        "source": hashlib.sha256(lines.encode()).hexdigest(),
        "settings": answers.model_dump(mode="json", exclude={"source"}),
    }
