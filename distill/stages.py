"""What each stage computes: one module per stage, whose forward does everything that needs weights.

Under ZeRO-3 a weight exists only while the module that owns it runs inside the engine's forward, so the losses are
computed here too. The teacher's body is never part of it; its head is a plain tensor, not a parameter.
"""

import dataclasses
from typing import Any, Literal, Self

import torch
import transformers
from jaxtyping import Float
from torch import Tensor, nn

from distill.baselines import kd_loss, uld_loss_of_rows
from distill.batch import Batch
from distill.linear_head import LinearHead
from distill.loss_inputs import BadRows
from distill.losses import WeightedTokenLosses, linear_ce, weighted_ce_kl
from distill.passes import RecalibratedPass
from distill.refusals import are_finite, nan_of, zero_bad
from distill.regularization import regularization_loss
from distill.stage_spec import StageSpec, TrainedPart
from distill.stage_sums import Counts, ShuffleSums, StageLosses, Totals
from distill.student import last_hidden_state, logit_options, name_parts
from recalibrator import Recalibrator
from teacher_cache.errors import ConfigError
from teacher_cache.schema import TeacherHead

Task = Literal["losses", "question_shuffle", "features", "answer_nats", "generate"]


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
        if (spec.with_recalibrator and recalibrator is None) or (spec.needs_teacher_head and teacher_head is None):
            raise ConfigError(f"stage {spec.stage} needs a Recalibrator and the teacher's head")
        self.spec = spec
        self.student = student
        self.recalibrator = recalibrator if spec.with_recalibrator else None
        self.teacher_head = teacher_head if spec.needs_teacher_head else None
        self.student_logits = logit_options(student)
        self.refusals: list[str] = []
        """Why losses refused their rows, since this was last cleared."""
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

    def forward(
        self,
        batch: Batch | None = None,
        *,
        task: Task = "losses",
        counts: Counts | None = None,
        prompts: dict[str, Any] | None = None,
    ) -> Any:
        """Run one micro-batch.

        Args:
            batch: The micro-batch.
            task: ``losses`` gives StageLosses; ``question_shuffle`` ShuffleSums; ``features`` mean-pooled features per
                sample; ``answer_nats`` the summed cross-entropy of the student's own answers; ``generate`` token ids.
            counts: Supervised tokens of the *global* batch (A11), for ``losses``.
            prompts: What the student's ``generate`` takes, for ``generate``, which needs no batch.
        """
        if task == "generate":
            assert prompts is not None
            return self.student.generate(**prompts)  # type: ignore[operator]
        assert batch is not None
        hidden_states = self._student_rows(batch)
        if task == "answer_nats":
            return self._answer_nats(batch, hidden_states)
        student_rows = hidden_states.index_select(0, _recalibrated_rows(batch))
        if task == "question_shuffle":
            return self._question_shuffle(batch, student_rows)
        if task == "features":
            return self._features(batch, student_rows)
        assert counts is not None
        main, totals = self._totals(batch, hidden_states, student_rows)
        weights = self.spec.weights
        loss = (
            main / max(counts.answer_tokens, 1)
            + weights.regularization * totals.regularization_loss / max(counts.regularization_tokens, 1)
            + weights.sft * totals.sft_loss / max(counts.student_tokens, 1)
            + weights.baseline * totals.baseline_loss / max(counts.baseline_terms, 1)
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
                packed=self.spec.packing,
            )
        return hidden_states.flatten(0, 1)

    def _totals(self, batch: Batch, hidden_states: Tensor, student_rows: Tensor) -> tuple[Tensor, Totals]:
        """Return the sum of the main pass's weighted terms, which has their gradient, and all sums."""
        zero = hidden_states.new_zeros((), dtype=torch.float32)
        main = ce = kl = boundary = regularization = sft = baseline = zero
        if batch.main is not None:
            losses = self._recalibrated_losses(batch.main, student_rows)
            weights = batch.main.weights
            main = (losses.loss * weights).sum()
            ce, kl = (losses.ce_loss * weights).sum(), (losses.kl_loss * weights).sum()
            boundary = (losses.ce_loss * weights * batch.main.plan.boundary_mask).sum()
        if batch.regularization is not None and self.spec.regularization_weight > 0:
            regularization = (self._regularization(batch.regularization) * batch.regularization.weights).sum()
        if self.spec.with_answers:
            sft, baseline = self._student_losses(batch, hidden_states)
        return main, Totals(ce, kl, boundary, regularization, sft, baseline)

    def _student_losses(self, batch: Batch, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        rows = hidden_states.index_select(0, batch.student.predicting_rows)
        head = self._student_head()
        try:
            return self._answer_losses(batch, rows, head)
        except BadRows as error:
            nan = self._refused(error, rows, head.weight, head.bias)
            return nan, nan

    def _student_head(self) -> LinearHead:
        module = self.student.get_output_embeddings()
        return LinearHead(weight=module.weight, bias=getattr(module, "bias", None), **self.student_logits)

    def _answer_nats(self, batch: Batch, hidden_states: Tensor) -> Float[Tensor, ""]:
        rows, head, inputs = (
            hidden_states.index_select(0, batch.student.predicting_rows),
            self._student_head(),
            batch.student,
        )
        try:
            ce = linear_ce(rows, weight=head.weight, bias=head.bias, labels=inputs.labels, **self.student_logits)
        except BadRows:
            return nan_of(rows).double()
        return (ce.double() * inputs.weights).sum()

    def _answer_losses(self, batch: Batch, rows: Tensor, head: LinearHead) -> tuple[Tensor, Tensor]:
        inputs, targets = batch.student, batch.logit_targets
        ce = linear_ce(rows, weight=head.weight, bias=head.bias, labels=inputs.labels, **self.student_logits)
        sft = (ce * inputs.weights).sum()
        if targets is None:
            return sft, torch.zeros_like(sft)
        teacher_head = None if self.teacher_head is None else _linear_head(self.teacher_head)
        options = self.spec.baseline_options
        if self.spec.baseline == "kd":
            kd = kd_loss(rows, head=head, targets=targets, teacher_head=teacher_head, options=options)
            return sft, (kd * inputs.weights).sum()
        uld = uld_loss_of_rows(
            rows, head=head, labels=inputs.labels, targets=targets, teacher_head=teacher_head, options=options
        )
        assert targets.span_weights is not None
        return sft, (uld * targets.span_weights).sum()

    def _recalibrated(self, passed: RecalibratedPass, student_rows: Tensor | None) -> Tensor:
        assert self.recalibrator is not None
        questions_from: Literal["student", "teacher"] = "student" if passed.question_rows is None else "teacher"
        questions = student_rows if passed.question_rows is None else passed.question_rows
        assert questions is not None
        answers = passed.answer_rows
        finite = are_finite(questions, answers)
        bad = [name for name, fine in zip(("question", "answer"), finite, strict=True) if not fine]
        options: dict[str, Any] = {"plan": passed.plan, "questions_from": questions_from, "are_finite": True}
        if not bad:
            return self.recalibrator(questions, answers, **options)
        self.refusals.append(f"{' and '.join(bad)} rows are not finite, questions from the {questions_from}")
        # its modules run all the same: other processes wait in their collectives
        rows = self.recalibrator(zero_bad(questions), zero_bad(answers), **options)
        return rows * float("nan")

    def _recalibrated_losses(self, passed: RecalibratedPass, student_rows: Tensor | None) -> WeightedTokenLosses:
        rows, weights = self._recalibrated(passed, student_rows), self.spec.weights
        try:
            return weighted_ce_kl(
                rows,
                teacher_rows=passed.teacher_rows.to(rows.dtype),
                head=self._teacher_head(),
                labels=passed.labels,
                ce_weight=weights.ce,
                kl_weight=weights.kl,
            )
        except BadRows as error:
            nan = self._refused(error, rows)
            return WeightedTokenLosses(nan, nan, nan)

    def _regularization(self, passed: RecalibratedPass) -> Float[Tensor, " answer_tokens"]:
        rows = self._recalibrated(passed, None)
        try:
            return regularization_loss(
                self.spec.regularization_form,
                rows,
                teacher_rows=passed.teacher_rows,
                head=self._teacher_head(),
                labels=passed.labels,
            )
        except BadRows as error:
            return self._refused(error, rows)

    def _teacher_head(self) -> LinearHead:
        assert self.teacher_head is not None
        return _linear_head(self.teacher_head)

    def _refused(self, error: BadRows, *tensors: Tensor | None) -> Tensor:
        self.refusals.append(str(error))
        return nan_of(*tensors)

    def _question_shuffle(self, batch: Batch, student_rows: Tensor) -> ShuffleSums:
        main, shuffled = batch.main, batch.shuffled
        assert main is not None
        assert shuffled is not None
        other = dataclasses.replace(main, plan=shuffled.plan)
        boundary = main.plan.boundary_mask
        sums = []
        for passed, rows in ((main, student_rows), (other, student_rows[shuffled.student_index])):
            ce = self._recalibrated_losses(passed, rows).ce_loss * main.weights
            sums += [ce.sum(), (ce * boundary).sum()]
        return ShuffleSums(*sums)

    def _features(self, batch: Batch, student_rows: Tensor) -> dict[str, Float[Tensor, "batch features"]]:
        assert batch.main is not None
        question_rows = student_rows[: len(batch.student.question_rows)]
        features = {
            "z_s": _mean_per_sample(question_rows, batch.sample_of_question_row),
            "r_s": _mean_per_sample(self._recalibrated(batch.main, student_rows), batch.sample_of_answer_token),
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


def _recalibrated_rows(batch: Batch) -> Tensor:
    """Return which of the student's rows go to the Recalibrator: question rows, then stand-ins for answer rows."""
    rows = batch.student.question_rows
    stand_ins = None if batch.main is None else batch.main.stand_ins
    return rows if stand_ins is None else torch.cat([rows, stand_ins])


def _linear_head(head: TeacherHead) -> LinearHead:
    return LinearHead(
        weight=head.weight, bias=head.bias, logit_scale=head.logit_scale, logit_softcap=head.logit_softcap
    )


def _mean_per_sample(rows: Float[Tensor, "rows width"], sample: Tensor | None) -> Float[Tensor, "batch width"]:
    assert sample is not None
    sums = rows.new_zeros(int(sample.max()) + 1, rows.shape[1], dtype=torch.float32).index_add(0, sample, rows.float())
    return sums / torch.bincount(sample)[:, None]
