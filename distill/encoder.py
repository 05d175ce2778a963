"""Samples of a data file and their tokenisation by the student, in whichever process needs them."""

import weakref
from collections.abc import Sequence
from dataclasses import replace
from multiprocessing.synchronize import Event
from typing import Any

import torch
from torch import Tensor

from distill.config import StudentConfig
from teacher_cache.chat import encode_conversation
from teacher_cache.config import DataConfig
from teacher_cache.errors import SampleError
from teacher_cache.sample_file import SampleEntry, SampleFile
from teacher_cache.schema import EncodedConversation, Sample, SkippedSample

_HELD_BYTES = 256 * 2**20


class SampleReader:
    """Reads the samples of a data file by their entries; opened anew in each process that it is sent to."""

    def __init__(self, config: DataConfig) -> None:
        """Open nothing yet."""
        self._config = config
        self._file: SampleFile | None = None

    def read(self, entries: Sequence[SampleEntry]) -> list[Sample]:
        """Return the samples of these entries, in their order.

        Raises:
            DataError: The file or an image is gone, or holds other content than when it was scanned.
        """
        if self._file is None:
            self._file = SampleFile(self._config, held_bytes=_HELD_BYTES)
            weakref.finalize(self, self._file.close)
        in_file_order = self._file.read(sorted(entries, key=lambda entry: entry.place))
        found = {sample.sample_id: sample for sample in in_file_order}
        return [found[entry.sample_id] for entry in entries]

    def __reduce__(self) -> tuple[Any, ...]:
        return SampleReader, (self._config,)


class StudentEncoder:
    """The student's tokenisation of samples, images in its dtype, kept in memory up to a size."""

    def __init__(
        self, processor: Any, *, config: StudentConfig, memory_mib: float, ending: Event | None = None
    ) -> None:
        """Take a processor; once ``ending`` is set, nothing is encoded any more."""
        self._processor = processor
        self._config = config
        self._dtype: torch.dtype = getattr(torch, config.dtype)
        self._memory_mib = memory_mib
        self._memory_bytes = int(memory_mib * 2**20)
        self._ending = ending
        self._encoded: dict[str, EncodedConversation | SkippedSample] = {}

    def for_worker(self, ending: Event | None, *, num_workers: int) -> "StudentEncoder":
        """Return an empty one that is sent to one of some workers, which share its memory."""
        memory_mib = self._memory_mib / num_workers
        return StudentEncoder(self._processor, config=self._config, memory_mib=memory_mib, ending=ending)

    def __contains__(self, sample_id: str) -> bool:
        return sample_id in self._encoded

    def encode(self, sample: Sample | SampleEntry) -> EncodedConversation | SkippedSample:
        """Return a sample as the student sees it, or why it cannot be used; an entry is enough for one that is kept."""
        if sample.sample_id in self._encoded:
            return self._encoded[sample.sample_id]
        if self._ending is not None and self._ending.is_set():
            raise InterruptedError("the process that encodes is to end")
        assert isinstance(sample, Sample)
        try:
            encoded = encode_conversation(self._processor, sample, max_length=self._config.max_length)
        except SampleError as error:
            bad = SkippedSample(sample_id=sample.sample_id, reason=error.reason, message=str(error))
            self._encoded[sample.sample_id] = bad
            return bad
        pixels = {name: self.in_dtype(tensor) for name, tensor in encoded.model_inputs.items()}
        encoded = replace(encoded, images=(), prompt_token_ids=(), model_inputs=pixels)
        size = encoded.token_ids.nbytes + encoded.answer_byte_ends.nbytes
        size += sum(tensor.nbytes for tensor in encoded.model_inputs.values())
        if size <= self._memory_bytes:
            self._memory_bytes -= size
            self._encoded[sample.sample_id] = encoded
        return encoded

    def in_dtype(self, tensor: Tensor) -> Tensor:
        """Return what the vision encoder makes of its input first: made here, it is half the bytes of a micro-batch."""
        return tensor.to(self._dtype) if tensor.is_floating_point() else tensor
