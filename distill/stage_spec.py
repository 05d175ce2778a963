"""What each stage of each method trains and minimises, and which cached targets it reads."""

from dataclasses import dataclass, replace
from typing import Literal, Self

from distill.config import BaselineOptions, DistillConfig, FinetuneConfig, Method, Stage, TrainConfig
from distill.logit_targets import LogitNeeds
from distill.loss_names import RegularizationForm
from distill.student import Part
from teacher_cache.errors import ConfigError
from teacher_cache.schema import Tier

TrainedPart = Part | Literal["recalibrator"]


@dataclass(frozen=True, kw_only=True)
class TermWeights:
    """Weight of each term of a stage's loss; all are 1 in the paper."""

    ce: float = 1.0
    """Recalibrated rows against the teacher's answer tokens."""
    kl: float = 1.0
    """Recalibrated rows against the teacher's predictions."""
    regularization: float = 0.0
    sft: float = 1.0
    """The student's own answers."""
    baseline: float = 1.0
    """kd or uld."""


@dataclass(frozen=True, kw_only=True)
class StageSpec:
    """One stage of one method."""

    stage: Stage
    trained: frozenset[TrainedPart]
    with_answers: bool
    """The student reads its answers and learns from them."""
    with_recalibrator: bool
    baseline: Literal["kd", "uld"] | None
    baseline_options: BaselineOptions
    weights: TermWeights
    regularization_form: RegularizationForm
    include_boundary_row: bool
    student_answer_fraction: float
    packing: bool = False
    """The student's samples share a row."""

    @property
    def regularization_weight(self) -> float:
        """Weight of the regularization pass; 0 where there is none."""
        return self.weights.regularization

    def with_regularization(self, weight: float) -> Self:
        """Return the same stage with another weight of the regularization pass."""
        return replace(self, weights=replace(self.weights, regularization=weight))

    @property
    def needs_teacher(self) -> bool:
        """Whether cached targets are read."""
        return self.with_recalibrator or self.baseline is not None

    @property
    def needs_teacher_head(self) -> bool:
        """Whether rows of the teacher's width are turned into its predictions."""
        return self.with_recalibrator or (self.baseline is not None and self.baseline_options.source == "rows")

    @property
    def reads_answers(self) -> bool:
        """Whether the student's forward pass covers its answers."""
        return self.with_answers or self.student_answer_fraction > 0

    @property
    def same_tokens(self) -> bool:
        """Whether student and teacher must have the same answer tokens."""
        return self.baseline == "kd"

    @property
    def logit_needs(self) -> LogitNeeds | None:
        """What is read of the teacher's predictions for the student's own rows."""
        if self.baseline is None:
            return None
        return LogitNeeds(source=self.baseline_options.source, with_spans=self.baseline == "uld")

    @property
    def tiers(self) -> tuple[Tier, ...]:
        """The cached targets that are read; none where no teacher is needed."""
        if not self.needs_teacher:
            return ()
        with_topk = self.baseline is not None and self.baseline_options.source == "topk"
        with_byte_ends = self.baseline == "uld" or self.student_answer_fraction > 0
        with_questions: tuple[Tier, ...] = ("Q",) if self.regularization_weight > 0 else ()
        return ("A", *with_questions, "L") if with_topk or with_byte_ends else ("A", *with_questions)


def stage_spec(
    stage: Stage, *, method: Method, train: TrainConfig, has_images: bool, with_adapters: bool = False
) -> StageSpec:
    """Return what a stage does; with adapters they train in the place of everything of the student.

    Raises:
        ConfigError: The method has no such stage, or no such option.
    """
    if stage == "align" and method != "genrecal":
        raise ConfigError(f"method {method} has no align stage: leave it out of `train.stages` for this student")
    recalibrated = method == "genrecal" and stage != "finetune"
    config = train.stage(stage)
    baseline = method if stage == "distill" and (method == "kd" or method == "uld") else None
    _check_baseline(baseline, train.baselines)
    form: RegularizationForm = "none" if isinstance(config, FinetuneConfig) else config.regularization_form
    return StageSpec(
        stage=stage,
        trained=_trained_parts(
            stage, train=train, recalibrated=recalibrated, has_images=has_images, with_adapters=with_adapters
        ),
        with_answers=stage != "align",
        with_recalibrator=recalibrated,
        baseline=baseline,
        baseline_options=train.baselines,
        weights=_term_weights(stage, train=train, recalibrated=recalibrated),
        regularization_form=form,
        include_boundary_row=train.recalibrator.include_boundary_row,
        student_answer_fraction=train.recalibrator.student_answer_fraction * recalibrated,
    )


def _check_baseline(baseline: str | None, options: BaselineOptions) -> None:
    if baseline == "uld" and options.source == "topk" and options.temperature != 1:
        raise ConfigError(
            f"method uld at temperature {options.temperature} needs the teacher's full distributions, which the top-k "
            "of tier L does not give: set train.baselines.source to rows, or the temperature to 1"
        )


def _trained_parts(
    stage: Stage, *, train: TrainConfig, recalibrated: bool, has_images: bool, with_adapters: bool
) -> frozenset[TrainedPart]:
    trained: set[TrainedPart] = set()
    if stage == "distill":
        trained |= {"body"}
    if stage == "finetune":
        # a projector that never runs would still be decayed
        trained |= {"body", "head", "embeddings"}
        trained |= {"projector"} if has_images else set()
    if with_adapters and trained:
        trained = {"adapters"}
    if recalibrated and (stage != "distill" or train.distill.train_recalibrator):
        trained |= {"recalibrator"}
    return frozenset(trained)


def _term_weights(stage: Stage, *, train: TrainConfig, recalibrated: bool) -> TermWeights:
    config = train.stage(stage)
    if isinstance(config, FinetuneConfig):
        return TermWeights()
    return TermWeights(
        ce=config.ce_weight,
        kl=config.kl_weight,
        regularization=config.regularization_weight * (recalibrated and config.regularization_form != "none"),
        sft=config.sft_weight if isinstance(config, DistillConfig) else 1.0,
        baseline=train.baselines.weight,
    )
