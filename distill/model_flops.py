"""Model FLOPs of a stage from parameter counts: what the mathematics needs, whatever is recomputed or padded.

A linear map with P parameters costs 2 P operations per row forward, 2 P for the gradient of its input and 2 P for that
of its weights where it is trained. Attention scores, rows of padding and the teacher's head of KD and ULD are left out.
"""

from dataclasses import dataclass
from math import prod
from typing import Any, Self

from torch import Tensor, nn

from distill.batch import Batch
from distill.passes import RecalibratedPass
from distill.stage_spec import StageSpec
from distill.stages import StageModel
from distill.student import name_parts
from recalibrator import Recalibrator

EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


@dataclass(frozen=True, kw_only=True)
class PartSizes:
    """Parameters by what each row passes through."""

    vision_encoder: int = 0
    projector: int = 0
    body: int = 0
    adapters: int = 0
    student_head: int = 0
    pre_projection: int = 0
    blocks: int = 0
    """Of the Recalibrator, without the last one's feed-forward part."""
    last_feed_forward: int = 0
    """That part, which runs where an answer token is predicted."""
    post_projection: int = 0
    teacher_head: int = 0


@dataclass(frozen=True, kw_only=True)
class ModelFlops:
    """Counts the floating-point operations of a stage's micro-batches."""

    spec: StageSpec
    sizes: PartSizes
    image_token_id: int | None
    patch_size: int | None
    """Width of an image patch in pixels, where the student is given pixels and not patches."""

    @classmethod
    def of_model(cls, model: StageModel) -> Self | None:
        """Return the counter of a stage's model; None for a student with experts, of which not all run."""
        config: Any = model.student.config
        if any(getattr(config.get_text_config(), name, None) for name in EXPERTS):
            return None
        patch = getattr(getattr(config, "vision_config", None), "patch_size", None)
        return cls(
            spec=model.spec,
            sizes=part_sizes(model),
            image_token_id=getattr(config, "image_token_id", None),
            patch_size=patch[0] if isinstance(patch, list | tuple) else patch,
        )

    def of_batch(self, batch: Batch) -> float:
        """Return the operations of the forward and backward pass of one micro-batch, fillers left out."""
        own = len(batch.sample_ids)
        mask = batch.student.attention_mask[:own]
        tokens = int(mask.sum())
        images = 0
        if self.image_token_id is not None:
            images = int((batch.student.input_ids[:own][mask.bool()] == self.image_token_id).sum())
        trained, sizes = self.spec.trained, self.sizes
        passes = bool({"body", "adapters"} & trained)
        total = 2.0 * sizes.vision_encoder * self._patches(batch)
        total += _cost(sizes.projector, images, trained="projector" in trained)
        total += _cost(sizes.body, tokens, trained="body" in trained, passes_gradient=passes)
        total += _cost(sizes.adapters, tokens, trained="adapters" in trained, passes_gradient=passes)
        if self.spec.with_answers:
            rows = float((batch.student.weights > 0).sum())
            total += _cost(sizes.student_head, rows, trained="head" in trained, passes_gradient=True)
        for passed in (batch.main, batch.regularization):
            if passed is not None:
                total += self._recalibrated(passed, with_head=self._reads_head(passed, batch))
        return total

    def _reads_head(self, passed: RecalibratedPass, batch: Batch) -> bool:
        return passed is batch.main or self.spec.regularization_form != "feature_mse"

    def _recalibrated(self, passed: RecalibratedPass, *, with_head: bool) -> float:
        trained, sizes = "recalibrator" in self.spec.trained, self.sizes
        rows = len(passed.labels)
        teacher_rows = len(passed.answer_index) + (0 if passed.question_rows is None else len(passed.question_rows))
        total = _cost(sizes.pre_projection, teacher_rows, trained=trained)
        total += _cost(sizes.blocks, sum(passed.plan.lengths), trained=trained, passes_gradient=True)
        total += _cost(sizes.last_feed_forward + sizes.post_projection, rows, trained=trained, passes_gradient=True)
        if with_head:
            # recalibrated rows forward and back, the teacher's own rows forward
            total += 6.0 * sizes.teacher_head * rows
        return total

    def _patches(self, batch: Batch) -> int:
        pixels = batch.student.model_inputs.get("pixel_values")
        if not isinstance(pixels, Tensor):
            return 0
        if pixels.dim() >= 4:
            if self.patch_size is None:
                return 0
            height, width = pixels.shape[-2:]
            return prod(pixels.shape[:-3]) * (height // self.patch_size) * (width // self.patch_size)
        return prod(pixels.shape[:-1])


def part_sizes(model: StageModel) -> PartSizes:
    """Count the parameters of a stage's model; ZeRO-3's partitioned ones count whole."""
    parts = name_parts(model.student)
    counts = dict.fromkeys(parts.values(), 0)
    for name, parameter in model.student.named_parameters():
        counts[parts[name]] += _numel(parameter)
    head: Any = model.student.get_output_embeddings()
    recalibrator, teacher_head = model.recalibrator, model.teacher_head
    return PartSizes(
        vision_encoder=counts.get("vision_encoder", 0),
        projector=counts.get("projector", 0),
        body=counts.get("body", 0),
        adapters=counts.get("adapters", 0),
        student_head=_numel(head.weight),
        teacher_head=0 if teacher_head is None else teacher_head.weight.numel(),
        **({} if recalibrator is None else _recalibrator_sizes(recalibrator)),
    )


def _recalibrator_sizes(recalibrator: Recalibrator) -> dict[str, int]:
    last = _size(getattr(recalibrator.blocks[-1], "mlp", nn.Module()))
    return {
        "pre_projection": _size(recalibrator.pre_projection),
        "blocks": _size(recalibrator.blocks) - last,
        "last_feed_forward": last,
        "post_projection": _size(recalibrator.post_projection),
    }


def _cost(parameters: int, rows: float, *, trained: bool, passes_gradient: bool = False) -> float:
    return 2.0 * parameters * rows * (1 + trained + passes_gradient)


def _size(module: nn.Module) -> int:
    return sum(map(_numel, module.parameters()))


def _numel(parameter: Any) -> int:
    return int(getattr(parameter, "ds_numel", parameter.numel()))
