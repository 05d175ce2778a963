"""The teacher in vLLM: one teacher-forced prefill per conversation, targets computed inside the engine."""

import gc
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from jaxtyping import Int

from teacher_cache.answer_scores import stored_rows, unpack
from teacher_cache.config import BuildConfig, TeacherConfig
from teacher_cache.errors import SampleError, TeacherError
from teacher_cache.schema import EncodedConversation, TeacherTargets, predicting_rows
from teacher_cache.teacher import TeacherRequest, check_topk, make_targets
from teacher_cache.teacher_checkpoint import checkpoint_directory, read_config, torch_dtype
from teacher_cache.vllm_plugin import PREFIX, register_class
from teacher_cache.vllm_stream import FinishedRequest, run_requests

STEPS_IN_FLIGHT = 4
"""Engine steps for which requests are waiting in the engine; one more for each further stage of a pipeline."""
MESSAGES_END_SECONDS = 10
"""Patience with the thread that reads an engine's messages, once the engine is shut down."""
CPU_KV_CACHE_GIB = 0.25
"""Key-value cache on a CPU unless the config says otherwise: vLLM would take a fraction of all memory."""


def engine_environment(*, model: str, on_cuda: bool, log_file: Path | None = None) -> dict[str, str]:
    """Return the environment variables that vLLM and its libraries read when they are imported.

    On a CPU the engine runs inside this process, without pinning threads to cores and without compiling.
    Variables that are already set win.
    """
    variables = {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR", "TOKENIZERS_PARALLELISM": "false"}
    if Path(model).is_dir():
        variables["HF_HUB_OFFLINE"] = "1"
    if log_file is not None:
        variables["VLLM_LOGGING_LEVEL"] = "INFO"
        variables["VLLM_LOGGING_CONFIG_PATH"] = str(_logging_config_path(log_file))
    if on_cuda:
        # asking torch for a GPU, as `is_available` does, already spoils CUDA for a forked child
        variables["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"
    else:
        variables |= {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "TORCHDYNAMO_DISABLE": "1",
        }
    return variables


class VllmTeacher:
    """One vLLM engine. Its log goes to ``log_file``; without one only its errors are printed."""

    uses_model_inputs = False

    def __init__(
        self, config: TeacherConfig, *, build: BuildConfig, max_length: int, log_file: Path | None = None
    ) -> None:
        directory = checkpoint_directory(config)
        on_cuda = torch.cuda.is_available()
        prepare_process(config.model, on_cuda=on_cuda, log_file=log_file)
        import vllm

        if not on_cuda:
            register_class(read_config(directory)["architectures"][0])
        self.dtype = torch_dtype(config)
        self.provenance = {"engine": "vllm", "engine_version": vllm.__version__}
        text_config = transformers.AutoConfig.from_pretrained(
            directory, trust_remote_code=config.trust_remote_code
        ).get_text_config()
        self.hidden_size: int = text_config.hidden_size
        self.vocab_size: int = text_config.vocab_size
        self._tokens_in_flight = (STEPS_IN_FLIGHT + build.pipeline_parallel_size - 1) * build.max_batched_tokens
        arguments = engine_arguments(config, directory=directory, build=build, max_length=max_length, on_cuda=on_cuda)
        self._llm = start_engine(arguments, model=config.model, on_cuda=on_cuda)

    def stream(self, requests: Iterable[TeacherRequest], *, topk: int) -> Iterator[TeacherTargets | SampleError]:
        """Yield the targets of each request when the engine has finished it."""
        check_topk(topk, vocab_size=self.vocab_size)
        for done in run_requests(self._llm.llm_engine, requests, topk=topk, tokens_in_flight=self._tokens_in_flight):
            if isinstance(done, SampleError):
                yield done
                continue
            try:
                yield self._targets(done, topk=topk)
            except SampleError as error:
                yield error

    def close(self) -> None:
        """Shut the engine down and free its memory."""
        shut_down(vars(self).pop("_llm"))

    def _targets(self, done: FinishedRequest, *, topk: int) -> TeacherTargets:
        conversation, with_question = done.request.conversation, done.request.question_rows
        check_token_ids(conversation, found=np.asarray(done.output.prompt_token_ids))
        num_tokens = len(conversation.token_ids)
        try:
            rows, scores = unpack(
                done.output.outputs.data,
                num_rows=len(stored_rows(conversation.spans, num_tokens=num_tokens, with_question=with_question)),
                hidden_size=self.hidden_size,
                dtype=self.dtype,
                num_answers=len(predicting_rows(conversation.spans)),
                topk=topk,
            )
        except ValueError as error:
            raise TeacherError(f"sample {conversation.sample_id}: {error}") from error
        return make_targets(conversation, rows=rows, scores=scores, with_question=with_question)


def engine_arguments(
    config: TeacherConfig, *, directory: Path, build: BuildConfig, max_length: int, on_cuda: bool
) -> dict[str, Any]:
    """Return the arguments of ``vllm.LLM``: the pooling runner on the twin of the teacher's own class."""
    kv_cache_gib = build.kv_cache_gib or (None if on_cuda else CPU_KV_CACHE_GIB)
    return {
        "model": str(directory),
        "runner": "pooling",
        "hf_overrides": {"architectures": [PREFIX + read_config(directory)["architectures"][0]]},
        "dtype": config.dtype,
        "trust_remote_code": config.trust_remote_code,
        "tensor_parallel_size": build.tensor_parallel_size,
        "pipeline_parallel_size": build.pipeline_parallel_size,
        "distributed_executor_backend": "mp" if build.tensor_parallel_size * build.pipeline_parallel_size > 1 else None,
        "max_model_len": max_length,
        "max_num_batched_tokens": build.max_batched_tokens,
        "enable_prefix_caching": False,
        "kv_cache_memory_bytes": None if kv_cache_gib is None else int(kv_cache_gib * 2**30),
        "mm_processor_cache_gb": 0,
        "limit_mm_per_prompt": {"video": 0, "audio": 0},
        "skip_mm_profiling": not on_cuda,
        "enforce_eager": not on_cuda,
        "use_tqdm_on_load": False,
    }


def start_engine(arguments: dict[str, Any], *, model: str, on_cuda: bool) -> Any:
    """Return ``vllm.LLM``.

    Raises:
        TeacherError: It does not start.
    """
    import vllm

    try:
        llm: Any = vllm.LLM(**arguments)
    except (ValueError, RuntimeError) as error:
        raise TeacherError(f"vLLM {vllm.__version__} cannot start the teacher {model}: {error}") from error
    if not on_cuda and arguments["pipeline_parallel_size"] > 1:
        # its CPU runner skips the first dummy step, in which a stage allocates what it takes from the one before
        llm.collective_rpc("execute_dummy_batch")
    return llm


def check_token_ids(conversation: EncodedConversation, *, found: Int[np.ndarray, " tokens"]) -> None:
    """Raise TeacherError when the engine saw other tokens than the conversation holds."""
    expected = conversation.token_ids
    if np.array_equal(expected, found):
        return
    shared = min(len(expected), len(found))
    differing = np.flatnonzero(expected[:shared] != found[:shared])
    first = int(differing[0]) if len(differing) else shared
    raise TeacherError(
        f"sample {conversation.sample_id}: vLLM expanded the prompt to other tokens than the teacher's processor: "
        f"expected {len(expected)} tokens, found {len(found)}; first difference at token {first}. Prompts go to "
        "vLLM with one placeholder per image; check that both use the same image processor settings"
    )


def shut_down(llm: Any) -> None:
    """Shut an engine down to which nobody else refers, and free its memory."""
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    core = llm.llm_engine.engine_core
    core.shutdown()
    end_messaging(core)
    del llm, core
    gc.collect()
    cleanup_dist_env_and_memory()


def end_messaging(core: Any) -> None:
    """End the ZeroMQ context of an engine in a process of its own: vllm 0.32 leaves it to the garbage collector."""
    context = getattr(core, "ctx", None)
    if context is None:
        return
    core.output_queue_thread.join(MESSAGES_END_SECONDS)
    if not core.output_queue_thread.is_alive():
        context.destroy(linger=0)


def prepare_process(model: str, *, on_cuda: bool, log_file: Path | None) -> None:
    """Set this process up before it imports vLLM."""
    if log_file is not None:
        log_file.parent.mkdir(parents=True, exist_ok=True)
        _logging_config_path(log_file).write_text(json.dumps(_logging_config(log_file)), encoding="utf-8")
    os.environ |= engine_environment(model=model, on_cuda=on_cuda, log_file=log_file) | os.environ


def _logging_config_path(log_file: Path) -> Path:
    return log_file.with_suffix(".logging.json")


def _logging_config(log_file: Path) -> dict[str, Any]:
    line = "%(asctime)s %(levelname)s %(process)d %(name)s: %(message)s"
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"line": {"format": line}},
        "handlers": {"file": {"class": "logging.FileHandler", "filename": str(log_file), "formatter": "line"}},
        "loggers": {"vllm": {"handlers": ["file"], "level": "INFO", "propagate": False}},
    }
