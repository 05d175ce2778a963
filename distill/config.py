"""What decides a training run. Imports pydantic only, to keep the CLI quick."""

from typing import Any, Literal

from pydantic import Field, model_validator

from distill.loss_names import DivergenceKind, RegularizationForm
from teacher_cache.config import Dtype, StrictConfig

Stage = Literal["align", "distill", "finetune"]
Method = Literal["genrecal", "sft", "kd", "uld"]
LogitSource = Literal["topk", "rows"]
Backend = Literal["zero3", "torch"]

STAGES: tuple[Stage, ...] = ("align", "distill", "finetune")


class LoraConfig(StrictConfig):
    """Low-rank adapters that distill and finetune train in the place of the student's own weights."""

    rank: int = Field(default=16, gt=0)
    """Rows of each adapter's inner layer."""
    alpha: float = Field(default=32.0, gt=0)
    """An adapter's output is scaled by alpha / rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of an adapter's inputs that is dropped in training."""
    target_modules: tuple[str, ...] | None = None
    """Last parts of the names of the body's linear layers that get one, such as q_proj; by default all of them."""


class StudentConfig(StrictConfig):
    """One student and the method that trains it."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Folder name of the student's results."""
    model: str
    """Hugging Face directory, or repository id, of the untouched student."""
    revision: str | None = None
    """Commit of the repository; not used for a directory."""
    dtype: Dtype = "bfloat16"
    """Element type in which the student computes; masters and moments are float32."""
    max_length: int = Field(default=4096, gt=1)
    """Longest sample in student tokens, image tokens included; a longer one is a bad sample."""
    max_skipped_samples: int = Field(default=0, ge=0)
    """Bad samples on the student's side (too long) that are left out per stage, over all processes; one more stops."""
    method: Method = "genrecal"
    """genrecal; sft: the student's own cross-entropy alone; kd and uld add to it what `BaselineOptions` says: kd the
    divergence from a teacher with the same tokenizer, uld a distance over spans aligned across tokenizers."""
    lora: LoraConfig | None = None
    """Train adapters instead of the student's weights; by default the weights are trained."""
    trust_remote_code: bool = False
    """Run Python code that ships with the checkpoint."""


class StageConfig(StrictConfig):
    """One training stage."""

    max_steps: int | None = Field(default=None, gt=0)
    """Optimizer steps; by default one epoch over the samples, as in the paper."""
    global_batch_size: int = Field(default=128, gt=0)
    """Samples per optimizer step over all processes."""
    micro_batch_size: int = Field(default=4, gt=0)
    """Samples per process and forward pass, at most; gradients accumulate up to the global batch."""
    micro_batch_tokens: int | None = Field(default=None, gt=0)
    """Student tokens per process and forward pass, at most, padding included; a longer sample goes alone. By default
    samples alone are counted."""
    learning_rate: float = Field(default=1e-4, gt=0)
    """Learning rate at the first step after the warm-up (paper)."""
    final_learning_rate: float = Field(default=1e-5, ge=0)
    """Learning rate at the last step, reached linearly (paper)."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps of linear warm-up from zero (not stated in the paper)."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay (not stated in the paper)."""
    adam_betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's averaging coefficients (not stated in the paper)."""
    adam_epsilon: float = Field(default=1e-8, gt=0)
    """AdamW's denominator term (not stated in the paper)."""
    gradient_clipping: float = Field(default=1.0, ge=0)
    """Largest global gradient norm; 0 switches clipping off (not stated in the paper)."""
    max_samples: int | None = Field(default=None, gt=0)
    """Use only the first so many cached samples, in data order (A10); all by default."""


class AlignConfig(StageConfig):
    """Stage 1: the Recalibrator learns to speak for the frozen student."""

    regularization_weight: float = Field(default=1.0, ge=0)
    """Weight of the loss from the teacher's own question rows; needs tier Q in the cache when above 0."""
    regularization_form: RegularizationForm = "ce_kl"
    """What that loss compares: the head's predictions (ce, kl or both; the paper's choice is both), the rows before the
    head (feature_mse), or nothing (none, which needs no tier Q)."""
    ce_weight: float = Field(default=1.0, ge=0)
    """Weight of the recalibrated rows' cross-entropy, L_ar; 0 is the paper's ablation without it."""
    kl_weight: float = Field(default=1.0, ge=0)
    """Weight of the recalibrated rows' divergence from the teacher."""


class DistillConfig(StageConfig):
    """Stage 2: the student's body learns through the Recalibrator."""

    regularization_weight: float = Field(default=0.0, ge=0)
    """As in align (A3); the paper's algorithm leaves it out here."""
    regularization_form: RegularizationForm = "ce_kl"
    """As in align."""
    ce_weight: float = Field(default=1.0, ge=0)
    """As in align."""
    kl_weight: float = Field(default=1.0, ge=0)
    """As in align."""
    sft_weight: float = Field(default=1.0, ge=0)
    """Weight of the student's own cross-entropy; 0 leaves nothing that teaches its answer rows, and warns."""
    train_recalibrator: bool = True
    """Train the Recalibrator too (A1); false is the reading of the paper's figure."""


class FinetuneConfig(StageConfig):
    """Stage 3: the student alone, everything but its vision encoder trained."""


class RecalibratorOptions(StrictConfig):
    """The Recalibrator's shape: readings where the paper is silent."""

    num_blocks: int = Field(default=2, gt=0)
    """Decoder blocks of the student's own configuration (paper: 2)."""
    output_norm: Literal["layernorm", "rmsnorm", "none"] = "layernorm"
    """Norm on the output features (A5)."""
    projection_bias: bool = False
    """Biases in both projections (A6)."""
    init_from_student: bool = False
    """Start the blocks from the student's last ones instead of fresh weights (A6)."""
    include_boundary_row: bool = True
    """Supervise the row that predicts the first answer token, the only one that needs the question (A7)."""
    positions: Literal["joint", "own"] = "joint"
    """joint: 0, 1, 2, ... over the joint sequence (A8, paper); own: the rows keep the positions that they had in their
    models' sequences, the paper's ablation without new position ids."""
    rope_theta: float | None = Field(default=None, gt=0)
    """Base of the Recalibrator's rotary embedding; the student's by default (A8)."""
    student_answer_fraction: float = Field(default=0.0, ge=0, le=1)
    """Share of each answer, counted from its end, whose rows come from the student instead of the teacher: closes the
    identity shortcut (docs/paper.md). 0 is the paper; above 0 needs tier L in the cache."""


class BaselineOptions(StrictConfig):
    """What kd and uld add to the student's own cross-entropy in distill; genrecal and sft do not read it."""

    source: LogitSource = "topk"
    """Teacher distributions: topk from tier L, everything below rank k as one entry; or exact, from the cached rows
    through the teacher's head."""
    weight: float = Field(default=1.0, ge=0)
    """Weight beside the student's own cross-entropy."""
    divergence: DivergenceKind = "forward_kl"
    """Divergence of kd."""
    jensen_shannon_beta: float = Field(default=0.5, gt=0, lt=1)
    """The teacher's share in the mixture of jensen_shannon."""
    temperature: float = Field(default=1.0, gt=0)
    """Divides the logits of both sides; uld needs source rows for another one than 1."""


class ZeroConfig(StrictConfig):
    """DeepSpeed ZeRO-3: speed and memory only, never the mathematics."""

    persistence_threshold: int = Field(default=10_000, ge=0)
    """Parameters with fewer elements stay gathered on every process."""
    leaf_module_parameters: int = Field(default=300_000_000, ge=0)
    """Frozen modules with at most so many parameters are gathered whole: one collective instead of many."""
    init_on_load: bool = False
    """Cut the student into shares while it is read, so that no process ever holds all of it; for students that do not
    fit into a node's memory once per process."""
    config_file: str | None = None
    """A DeepSpeed configuration (JSON) of your own, merged over ours. What follows from the stage's settings may be
    left out, "auto" or equal to them; anything else is refused."""
    overrides: dict[str, Any] = Field(default_factory=dict)
    """Further DeepSpeed configuration, merged over `config_file` and held to the same."""


class FaultConfig(StrictConfig):
    """What is not learned from: losses and gradients that are not finite, or spikes above those before."""

    spike_factor: float = Field(default=20.0, ge=0)
    """A loss or gradient norm so many spreads above the median of the last updates is a spike, and its update is
    skipped; 0 skips only what is not finite. The spread is the median absolute deviation, at least a quarter of the
    median."""
    spike_window: int = Field(default=128, gt=0)
    """Updates that the median is taken over."""
    spike_min_steps: int = Field(default=32, gt=0)
    """Updates without which nothing counts as a spike."""
    max_consecutive_skips: int = Field(default=5, ge=0)
    """Updates in a row that may be skipped; one more stops the run, with a checkpoint from before the first."""


class ValidationConfig(StrictConfig):
    """Held-out conversations that the student is scored on while it trains; align leaves it as it is."""

    data: str
    """Parquet or JSON-lines file of held-out conversations."""
    interval_steps: int = Field(default=100, gt=0)
    """Optimizer steps between validations; there is one before the first step and one after the last too."""
    max_samples: int | None = Field(default=256, gt=0)
    """Use only the first so many; null for all."""
    batch_size: int = Field(default=8, gt=0)
    """Samples per process and forward pass."""
    generate: bool = False
    """Answer them too, greedily, for the accuracy: exact match with the last answer of each. Under ZeRO-3 every new
    token gathers every layer."""
    max_new_tokens: int = Field(default=64, gt=0)
    """Longest answer in tokens."""


class TrainConfig(StrictConfig):
    """All stages of one student's training."""

    stages: tuple[Stage, ...] = STAGES
    """Stages to run, in this order; sft, kd and uld have no align stage and leave it out."""
    align: AlignConfig = AlignConfig()
    distill: DistillConfig = DistillConfig()
    finetune: FinetuneConfig = FinetuneConfig()
    recalibrator: RecalibratorOptions = RecalibratorOptions()
    baselines: BaselineOptions = BaselineOptions()
    num_processes: int = Field(default=1, gt=0)
    """Processes that train together, over all nodes."""
    backend: Backend = "zero3"
    """zero3 (DeepSpeed), or torch: one process without DeepSpeed, in float32, for comparison."""
    zero: ZeroConfig = ZeroConfig()
    gradient_checkpointing: bool = False
    """Recompute the student's activations in the backward pass: less memory, more time."""
    seed: int = 0
    """Decides initialisation, dropout and the order of samples."""
    save_interval_steps: int = Field(default=500, gt=0)
    """Optimizer steps between checkpoints."""
    keep_checkpoints: int = Field(default=2, ge=2)
    """Newest checkpoints to keep; at least two, so that a damaged one has a predecessor."""
    faults: FaultConfig = FaultConfig()
    hang_timeout_s: float = Field(default=1800.0, gt=0)
    """A step that takes longer ends the process with exit code 3, so that a cluster starts it again."""
    slow_timeout_s: float = Field(default=7200.0, gt=0)
    """The same for what may take longer: the start of a stage, its first step, a checkpoint, its end."""
    log_interval_steps: int = Field(default=10, gt=0)
    """Optimizer steps between log lines."""
    shuffle_gap_interval_steps: int = Field(default=100, gt=0)
    """Optimizer steps between measurements of the question-shuffle gap."""
    validation: ValidationConfig | None = None
    """Scoring on held-out data during training; none by default."""
    encoding_cache_mib: int = Field(default=512, ge=0)
    """Tokenised samples that each process keeps in memory for the next epoch, in MiB; its data workers share them out,
    and one finds there what it has made itself."""
    packing: bool = False
    """Run the student over all samples of a micro-batch in one row instead of padding them to the longest, where its
    family allows it (`distill/packing.py` names those). Worth it with an attention that skips what is masked."""
    data_workers: int | None = Field(default=None, ge=0)
    """Processes per training process that load data ahead, each one step; 0 loads in a thread. By default 4 with a
    GPU, 0 without."""

    @model_validator(mode="after")
    def _stages_in_order(self) -> "TrainConfig":
        if not self.stages or list(self.stages) != [stage for stage in STAGES if stage in self.stages]:
            raise ValueError(f"stages must be a non-empty selection of {', '.join(STAGES)} in this order")
        return self

    def stage(self, stage: Stage) -> AlignConfig | DistillConfig | FinetuneConfig:
        """Return the configuration of one stage."""
        return getattr(self, stage)
