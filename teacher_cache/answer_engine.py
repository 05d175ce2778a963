"""The teacher in vLLM as it writes answers: the generating runner, under the settings of the build."""

from pathlib import Path

import torch

from teacher_cache.answer_writing import AnswerRequest, GeneratedAnswer
from teacher_cache.answers_config import AnswersConfig
from teacher_cache.config import CacheConfig
from teacher_cache.errors import SampleError
from teacher_cache.teacher_checkpoint import checkpoint_directory
from teacher_cache.vllm_teacher import engine_arguments, prepare_process, shut_down, start_engine


class VllmAnswerEngine:
    """One vLLM engine that generates. Its log goes to ``log_file``; without one only its errors are printed."""

    def __init__(self, cache: CacheConfig, *, answers: AnswersConfig, log_file: Path | None = None) -> None:
        """Start the engine.

        Raises:
            TeacherError: It does not start.
        """
        directory = checkpoint_directory(cache.teacher)
        on_cuda = torch.cuda.is_available()
        prepare_process(cache.teacher.model, on_cuda=on_cuda, log_file=log_file)
        arguments = engine_arguments(
            cache.teacher, directory=directory, build=cache.build, max_length=cache.data.max_length, on_cuda=on_cuda
        )
        del arguments["hf_overrides"]  # the twin of the pooling runner
        arguments |= {"runner": "generate", "seed": answers.seed, "enable_prefix_caching": on_cuda}
        self._answers = answers
        self._in_flight: dict[str, str] = {}
        self._count = 0
        self._llm = start_engine(arguments, model=cache.teacher.model, on_cuda=on_cuda)

    @property
    def num_unfinished(self) -> int:
        """Requests whose answers are not there yet."""
        return len(self._in_flight)

    def submit(self, request: AnswerRequest) -> None:
        """Take a request.

        Raises:
            SampleError: vLLM refuses it: ``engine-refused``.
        """
        from vllm import SamplingParams
        from vllm.exceptions import VLLMValidationError
        from vllm.renderers.inputs.preprocess import parse_model_prompt

        engine = self._llm.llm_engine
        images = {"multi_modal_data": {"image": list(request.images)}} if request.images else {}
        prompt = {"prompt_token_ids": list(request.prompt_token_ids)} | images
        params = SamplingParams(
            temperature=self._answers.temperature, max_tokens=self._answers.max_new_tokens, seed=request.seed
        )
        self._count += 1
        request_id = str(self._count)
        try:
            (engine_input,) = engine.renderer.render_cmpl([parse_model_prompt(engine.model_config, prompt)])
        except (VLLMValidationError, ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
            # its image processor refuses an image in its own words: that costs this answer, not the job
            raise _refused(request, error) from error
        try:
            engine.add_request(request_id, engine_input, params)
        except VLLMValidationError as error:
            raise _refused(request, error) from error
        self._in_flight[request_id] = request.sample_id

    def step(self) -> list[GeneratedAnswer]:
        """Go on, and return the answers that are finished now."""
        finished = []
        for output in self._llm.llm_engine.step():
            if output.finished:
                (completion,) = output.outputs
                finished.append(
                    GeneratedAnswer(
                        sample_id=self._in_flight.pop(output.request_id),
                        text=completion.text,
                        num_tokens=len(completion.token_ids),
                        is_whole=completion.finish_reason == "stop",
                    )
                )
        return finished

    def close(self) -> None:
        """Shut the engine down and free its memory."""
        shut_down(vars(self).pop("_llm"))


def _refused(request: AnswerRequest, error: Exception) -> SampleError:
    message = f"vLLM refuses to answer sample {request.sample_id}: {type(error).__name__}: {error}"
    return SampleError(message, sample_id=request.sample_id, reason="engine-refused")
