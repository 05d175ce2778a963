"""What each stage trains and minimises: one module per stage, whose forward does everything that needs weights.

Under ZeRO-3 a weight exists only while the module that owns it runs inside the engine's forward, so the losses are
computed here too. The teacher's body is never part of it; its head is a plain tensor, not a parameter.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Self

import torch
import transformers
from jaxtyping import Float
from torch import Tensor, nn

from distill.baselines import head_topk_kl
from distill.batch import Batch, RecalibratedPass
from distill.config import DistillConfig, FinetuneConfig, Method, Stage, TrainConfig
from distill.losses import TokenLosses, linear_ce, linear_ce_kl
from distill.student import Part, last_hidden_state, logit_options, name_parts
from recalibrator import Recalibrator
from teacher_cache.errors import ConfigError
from teacher_cache.schema import TeacherHead, Tier

TrainedPart = Part | Literal["recalibrator"]
Task = Literal["losses", "question_shuffle", "features"]


@dataclass(frozen=True, kw_only=True)
class StageSpec:
    """One stage of one method."""

    stage: Stage
    trained: frozenset[TrainedPart]
    with_answers: bool
    """The student reads its answers and learns from them."""
    with_recalibrator: bool
    with_topk: bool
    regularization_weight: float
    include_boundary_row: bool

    @property
    def needs_teacher(self) -> bool:
        """Whether cached targets are read."""
        return self.with_recalibrator or self.with_topk

    @property
    def tiers(self) -> tuple[Tier, ...]:
        """The cached targets that are read; none where no teacher is needed."""
        if not self.needs_teacher:
            return ()
        with_questions: tuple[Tier, ...] = ("Q",) if self.regularization_weight > 0 else ()
        with_logits: tuple[Tier, ...] = ("L",) if self.with_topk else ()
        return ("A", *with_questions, *with_logits)


def stage_spec(stage: Stage, *, method: Method, train: TrainConfig, has_images: bool) -> StageSpec:
    """Return what a stage does.

    Raises:
        ConfigError: The method has no such stage.
    """
    if stage == "align" and method != "genrecal":
        raise ConfigError(f"method {method} has no align stage: leave it out of `train.stages` for this student")
    recalibrated = method == "genrecal" and stage != "finetune"
    config = train.stage(stage)
    trained: set[TrainedPart] = set()
    if stage == "distill":
        trained |= {"body"}
    if stage == "finetune":
        # a projector that never runs would still be decayed
        trained |= {"body", "head", "embeddings"}
        trained |= {"projector"} if has_images else set()
    if recalibrated and (not isinstance(config, DistillConfig) or config.train_recalibrator):
        trained |= {"recalibrator"}
    return StageSpec(
        stage=stage,
        trained=frozenset(trained),
        with_answers=stage != "align",
        with_recalibrator=recalibrated,
        with_topk=method == "kd" and stage == "distill",
        regularization_weight=0.0
        if isinstance(config, FinetuneConfig)
        else config.regularization_weight * recalibrated,
        include_boundary_row=train.recalibrator.include_boundary_row,
    )


class Totals(NamedTuple):
    """Sums over supervised tokens; the losses in nats. A tuple, so that ZeRO-3's hooks see the tensors inside."""

    ce_loss: Tensor
    kl_loss: Tensor
    boundary_ce: Tensor
    regularization_loss: Tensor
    sft_loss: Tensor
    topk_kl_loss: Tensor


class Counts(NamedTuple):
    """Supervised tokens, weighted."""

    answer_tokens: float
    boundary_tokens: float
    regularization_tokens: float
    student_tokens: float


class StageLosses(NamedTuple):
    """Share of one micro-batch of one process in the loss of the global batch, and its parts."""

    loss: Tensor
    totals: Totals


class StageModel(nn.Module):
    """The student, the Recalibrator where the stage has one, and the losses."""

    def __init__(
        self,
        spec: StageSpec,
        *,
        student: transformers.PreTrainedModel,
        recalibrator: Recalibrator | None,
        teacher_head: TeacherHead | None,
    ) -> None:
        super().__init__()
        if spec.with_recalibrator and (recalibrator is None or teacher_head is None):
            raise ConfigError(f"stage {spec.stage} needs a Recalibrator and the teacher's head")
        self.spec = spec
        self.student = student
        self.recalibrator = recalibrator if spec.with_recalibrator else None
        self.teacher_head = teacher_head if spec.with_recalibrator else None
        self.student_logits = logit_options(student)
        self._freeze()

    @property
    def student_trains(self) -> bool:
        """Whether any part of the student is trained."""
        return bool(self.spec.trained - {"recalibrator"})

    def to_device(self, device: torch.device) -> Self:
        """Move everything, the teacher's head included."""
        if self.teacher_head is not None:
            head = self.teacher_head
            bias = None if head.bias is None else head.bias.to(device)
            self.teacher_head = dataclasses.replace(head, weight=head.weight.to(device), bias=bias)
        return self.to(device)

    def train(self, mode: bool = True) -> Self:
        """Set the mode; what is frozen stays deterministic."""
        super().train(mode)
        self.student.train(mode and self.student_trains)
        encoder = self.student.get_encoder(modality="image")
        if encoder not in (self.student, self.student.base_model):
            encoder.eval()
        if self.recalibrator is not None and "recalibrator" not in self.spec.trained:
            self.recalibrator.eval()
        return self

    def forward(self, batch: Batch, *, task: Task = "losses", counts: Counts | None = None) -> Any:
        """Run one micro-batch.

        Args:
            batch: The micro-batch.
            task: ``losses`` gives StageLosses; ``question_shuffle`` two sums of cross-entropy, with the samples' own
                questions and with their neighbours'; ``features`` mean-pooled features per sample.
            counts: Supervised tokens of the *global* batch (A11), for ``losses``.
        """
        hidden_states = self._student_rows(batch)
        question_rows = hidden_states.index_select(0, batch.student.question_rows)
        if task == "question_shuffle":
            return self._question_shuffle(batch, question_rows)
        if task == "features":
            return self._features(batch, question_rows)
        assert counts is not None
        totals = self._totals(batch, hidden_states, question_rows)
        loss = (
            (totals.ce_loss + totals.kl_loss) / max(counts.answer_tokens, 1)
            + self.spec.regularization_weight * totals.regularization_loss / max(counts.regularization_tokens, 1)
            + (totals.sft_loss + totals.topk_kl_loss) / max(counts.student_tokens, 1)
        )
        return StageLosses(loss, Totals(*(total.detach() for total in totals)))

    def _student_rows(self, batch: Batch) -> Float[Tensor, "rows student_hidden"]:
        inputs = batch.student
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.student_trains):
            hidden_states = last_hidden_state(
                self.student,
                inputs.input_ids,
                attention_mask=inputs.attention_mask,
                model_inputs=inputs.model_inputs,
            )
        return hidden_states.flatten(0, 1)

    def _totals(self, batch: Batch, hidden_states: Tensor, question_rows: Tensor) -> Totals:
        zero = hidden_states.new_zeros((), dtype=torch.float32)
        ce = kl = boundary = regularization = sft = topk_kl = zero
        if batch.main is not None:
            losses = self._recalibrated_losses(batch.main, question_rows)
            weights = batch.main.weights
            ce, kl = (losses.ce_loss * weights).sum(), (losses.kl_loss * weights).sum()
            boundary = (losses.ce_loss * weights * batch.main.plan.boundary_mask).sum()
        if batch.regularization is not None and self.spec.regularization_weight > 0:
            losses = self._recalibrated_losses(batch.regularization, None)
            regularization = ((losses.ce_loss + losses.kl_loss) * batch.regularization.weights).sum()
        if self.spec.with_answers:
            sft, topk_kl = self._student_losses(batch, hidden_states)
        return Totals(ce, kl, boundary, regularization, sft, topk_kl)

    def _student_losses(self, batch: Batch, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        inputs = batch.student
        rows = hidden_states.index_select(0, inputs.predicting_rows)
        head = self.student.get_output_embeddings()
        weight, bias = head.weight, getattr(head, "bias", None)
        ce = linear_ce(rows, weight=weight, bias=bias, labels=inputs.labels, **self.student_logits)
        sft = (ce * inputs.weights).sum()
        if batch.topk is None:
            return sft, torch.zeros_like(sft)
        kl = head_topk_kl(rows, weight=weight, bias=bias, topk=batch.topk, **self.student_logits)
        return sft, (kl * inputs.weights).sum()

    def _recalibrated(self, passed: RecalibratedPass, question_rows: Tensor | None) -> Tensor:
        assert self.recalibrator is not None
        if passed.question_rows is None:
            return self.recalibrator(question_rows, passed.answer_rows, plan=passed.plan, questions_from="student")
        return self.recalibrator(passed.question_rows, passed.answer_rows, plan=passed.plan, questions_from="teacher")

    def _recalibrated_losses(self, passed: RecalibratedPass, question_rows: Tensor | None) -> TokenLosses:
        head = self.teacher_head
        assert head is not None
        rows = self._recalibrated(passed, question_rows)
        return linear_ce_kl(
            rows,
            teacher_rows=passed.teacher_rows.to(rows.dtype),
            weight=head.weight,
            bias=head.bias,
            labels=passed.labels,
            logit_scale=head.logit_scale,
            logit_softcap=head.logit_softcap,
        )

    def _question_shuffle(self, batch: Batch, question_rows: Tensor) -> Float[Tensor, "2"]:
        assert batch.main is not None
        assert batch.shuffled is not None
        other = dataclasses.replace(batch.main, plan=batch.shuffled.plan)
        own_ce = self._recalibrated_losses(batch.main, question_rows).ce_loss
        other_ce = self._recalibrated_losses(other, question_rows[batch.shuffled.question_index]).ce_loss
        return torch.stack([(own_ce * batch.main.weights).sum(), (other_ce * batch.main.weights).sum()])

    def _features(self, batch: Batch, question_rows: Tensor) -> dict[str, Float[Tensor, "batch features"]]:
        assert batch.main is not None
        features = {
            "z_s": _mean_per_sample(question_rows, batch.sample_of_question_row),
            "r_s": _mean_per_sample(self._recalibrated(batch.main, question_rows), batch.sample_of_answer_token),
        }
        passed = batch.regularization
        if passed is not None and len(passed.labels) == len(batch.main.labels):
            assert passed.question_rows is not None
            samples = passed.plan.samples_of(passed.plan.question_slots)
            features["z_l"] = _mean_per_sample(passed.question_rows, samples)
            features["r_l"] = _mean_per_sample(self._recalibrated(passed, None), batch.sample_of_answer_token)
        return features

    def _freeze(self) -> None:
        parts: dict[str, TrainedPart] = dict(name_parts(self.student))
        for name, parameter in self.student.named_parameters():
            parameter.requires_grad_(parts[name] in self.spec.trained)
        if self.recalibrator is not None:
            self.recalibrator.requires_grad_("recalibrator" in self.spec.trained)


def batch_counts(batch: Batch) -> Counts:
    """Return the supervised tokens of one micro-batch."""
    main, regularization = batch.main, batch.regularization
    return Counts(
        answer_tokens=0.0 if main is None else float(main.weights.sum()),
        boundary_tokens=0.0 if main is None else float((main.weights * main.plan.boundary_mask).sum()),
        regularization_tokens=0.0 if regularization is None else float(regularization.weights.sum()),
        student_tokens=float(batch.student.weights.sum()),
    )


def _mean_per_sample(rows: Float[Tensor, "rows width"], sample: Tensor | None) -> Float[Tensor, "batch width"]:
    assert sample is not None
    sums = rows.new_zeros(int(sample.max()) + 1, rows.shape[1], dtype=torch.float32).index_add(0, sample, rows.float())
    return sums / torch.bincount(sample)[:, None]
