"""Keeps a vLLM engine fed: prompts are rendered by a thread ahead of its steps, and finished ones come out at once."""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final

from teacher_cache.errors import SampleError
from teacher_cache.prefetch import Prefetch
from teacher_cache.teacher import TeacherRequest

_RENDERED_AHEAD: Final = 8


@dataclass(frozen=True, kw_only=True)
class FinishedRequest:
    """A request with what the engine returned for it."""

    request: TeacherRequest
    output: Any
    """``vllm.PoolingRequestOutput``."""


@dataclass(frozen=True, kw_only=True)
class _Rendered:
    """A request in the form that the engine takes: image tensors made, placeholders expanded."""

    request: TeacherRequest
    engine_input: Any
    params: Any


def run_requests(
    engine: Any, requests: Iterable[TeacherRequest], *, topk: int, tokens_in_flight: int
) -> Iterator[FinishedRequest | SampleError]:
    """Yield requests as they finish, in any order; those that the engine refuses come out as errors.

    Args:
        engine: ``vllm.v1.engine.llm_engine.LLMEngine`` with the pooler of :mod:`teacher_cache.vllm_pooler`.
        requests: Pulled from a thread while less than ``tokens_in_flight`` tokens are unfinished.
        topk: Highest logits per answer token.
        tokens_in_flight: Prompt tokens that the engine holds: enough for its next steps, as bounds its memory.
    """
    from vllm.exceptions import VLLMValidationError

    in_flight: dict[str, TeacherRequest] = {}
    tokens = 0
    numbers = itertools.count()
    with Prefetch(_render(engine, requests, topk=topk), depth=_RENDERED_AHEAD) as rendered:
        try:
            while True:
                while tokens < tokens_in_flight and (rendered.is_ready or not in_flight):
                    ready = next(rendered, None)
                    if ready is None:
                        break
                    if isinstance(ready, SampleError):
                        yield ready
                        continue
                    request_id = str(next(numbers))
                    try:
                        engine.add_request(request_id, ready.engine_input, ready.params)
                    except VLLMValidationError as error:
                        yield _refused(ready.request, error)
                        continue
                    in_flight[request_id] = ready.request
                    tokens += len(ready.request.conversation.token_ids)
                if not in_flight:
                    return
                for output in engine.step():
                    request = in_flight.pop(output.request_id)
                    tokens -= len(request.conversation.token_ids)
                    yield FinishedRequest(request=request, output=output)
        finally:
            if in_flight:
                engine.abort_request(list(in_flight))


def _render(engine: Any, requests: Iterable[TeacherRequest], *, topk: int) -> Iterator[_Rendered | SampleError]:
    from vllm import PoolingParams
    from vllm.exceptions import VLLMValidationError
    from vllm.renderers.inputs.preprocess import parse_model_prompt

    from teacher_cache.vllm_pooler import TASK, TargetsRequest

    for request in requests:
        conversation = request.conversation
        images = {"multi_modal_data": {"image": list(conversation.images)}} if conversation.images else {}
        prompt = {"prompt_token_ids": list(conversation.prompt_token_ids)} | images
        wanted = TargetsRequest(spans=conversation.spans, topk=topk, question_rows=request.question_rows)
        try:
            (engine_input,) = engine.renderer.render_cmpl([parse_model_prompt(engine.model_config, prompt)])
        except (VLLMValidationError, ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
            # its image processor refuses an image in its own words: that costs this sample, not the job
            yield _refused(request, error)
            continue
        params = PoolingParams(task=TASK, skip_reading_prefix_cache=True, extra_kwargs=wanted.to_extra_kwargs())
        yield _Rendered(request=request, engine_input=engine_input, params=params)


def _refused(request: TeacherRequest, error: Exception) -> SampleError:
    sample_id = request.conversation.sample_id
    message = f"vLLM refuses sample {sample_id}: {type(error).__name__}: {error}"
    return SampleError(message, sample_id=sample_id, reason="engine-refused")
