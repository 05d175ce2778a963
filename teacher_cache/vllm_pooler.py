"""The pooler inside the engine: hidden rows and answer scores of each finished request, as one byte tensor."""

from collections.abc import Callable, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.pooler.abstract import Pooler
from vllm.model_executor.layers.pooler.common import PoolingParamsUpdate
from vllm.model_executor.layers.pooler.tokwise.methods import AllPool

from teacher_cache.answer_scores import AnswerScores, join_scores, pack, score_logits, stored_rows
from teacher_cache.schema import Span, predicting_rows

if TYPE_CHECKING:
    from vllm.pooling_params import PoolingParams
    from vllm.v1.pool.metadata import PoolingMetadata

TASK: Final = "token_embed"
LOGITS_BYTES = 256 * 2**20
"""Logits computed at a time, in float32."""


@dataclass(frozen=True, kw_only=True)
class TargetsRequest:
    """What one request asks of the pooler; travels in ``PoolingParams.extra_kwargs``."""

    spans: tuple[Span, ...]
    topk: int
    question_rows: bool

    def to_extra_kwargs(self) -> dict[str, Any]:
        """Return the JSON-like form."""
        return {
            "spans": [list(span) for span in self.spans],
            "topk": self.topk,
            "question_rows": self.question_rows,
        }

    @classmethod
    def from_extra_kwargs(cls, values: dict[str, Any] | None, *, num_tokens: int) -> "TargetsRequest":
        """Return the request; without values (the engine's profiling run) one whose answer is the whole prompt."""
        if values is None:
            return cls(spans=(Span(1, num_tokens),), topk=1, question_rows=True)
        return cls(
            spans=tuple(Span(*span) for span in values["spans"]),
            topk=values["topk"],
            question_rows=values["question_rows"],
        )


class TargetsPooler(Pooler):
    """Collects every row of a prompt, over chunked prefill too, then scores the rows that predict its answers.

    ``compute_logits`` is the model's own, so scale and soft-cap apply. Under tensor parallelism it gathers
    over all ranks and may return None on all but the first, whose output alone is used.
    """

    def __init__(self, compute_logits: Callable[[Tensor], Tensor | None]) -> None:
        super().__init__()
        self.pooling = AllPool()
        self.compute_logits = compute_logits
        self.rows_at_once = max(1, LOGITS_BYTES // (4 * get_current_vllm_config().model_config.get_vocab_size()))

    def get_supported_tasks(self) -> Set[Any]:
        """Name the one task that vLLM may run."""
        return {TASK}

    def get_pooling_updates(self, task: Any) -> PoolingParamsUpdate:
        """Ask for the prompt's token ids: tier L needs the token that really follows."""
        return PoolingParamsUpdate(requires_token_ids=True)

    def forward(self, hidden_states: Tensor, pooling_metadata: "PoolingMetadata") -> list[Tensor | None]:
        """Return the packed targets of each request that is complete, None for the others."""
        prompts = [
            _Prompt.create(rows, token_ids=token_ids[: len(rows)], params=params)
            for rows, token_ids, params in zip(
                self.pooling(hidden_states, pooling_metadata),
                pooling_metadata.get_prompt_token_ids_cpu(),
                pooling_metadata.pooling_params,
                strict=True,
            )
            if rows is not None
        ]
        packed = iter(self._pack(prompts) if prompts else [])
        finished = pooling_metadata.get_pooling_cursor().get_finished_mask()
        return [next(packed) if done else None for done in finished]

    def _pack(self, prompts: "list[_Prompt]") -> list[Tensor]:
        predicting = [torch.from_numpy(predicting_rows(prompt.request.spans)) for prompt in prompts]
        rows = torch.cat([p.rows[r.to(p.rows.device)] for p, r in zip(prompts, predicting, strict=True)])
        following = torch.cat([p.token_ids[r + 1] for p, r in zip(prompts, predicting, strict=True)])
        scores = self._score(rows, following.to(rows.device), topk=prompts[0].request.topk)
        if scores is None:
            return [torch.empty(0, dtype=torch.uint8) for _ in prompts]
        shares = scores.split([len(r) for r in predicting])
        return [pack(prompt.stored_rows(), share) for prompt, share in zip(prompts, shares, strict=True)]

    def _score(self, rows: Tensor, following: Tensor, *, topk: int) -> AnswerScores | None:
        parts = []
        for chunk, targets in zip(rows.split(self.rows_at_once), following.split(self.rows_at_once), strict=True):
            logits = self.compute_logits(chunk)
            if logits is not None:
                parts.append(score_logits(logits, target_ids=targets, topk=topk))
        return join_scores(parts) if parts else None


@dataclass(frozen=True, kw_only=True)
class _Prompt:
    """One complete prompt: its rows, the ids of its tokens, and what is asked about it."""

    rows: Tensor
    token_ids: Tensor
    request: TargetsRequest

    @classmethod
    def create(cls, rows: Tensor, *, token_ids: Tensor, params: "PoolingParams") -> "_Prompt":
        request = TargetsRequest.from_extra_kwargs(params.extra_kwargs, num_tokens=len(token_ids))
        return cls(rows=rows, token_ids=token_ids, request=request)

    def stored_rows(self) -> Tensor:
        positions = stored_rows(self.request.spans, num_tokens=len(self.rows), with_question=self.request.question_rows)
        return self.rows[torch.from_numpy(positions).to(self.rows.device)]
