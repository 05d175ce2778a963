"""What `genrecal cache plan` takes for granted. Imports pydantic only, to keep the CLI quick."""

from pydantic import Field

from teacher_cache.config import StrictConfig


class PlanConfig(StrictConfig):
    """Statistics and assumptions of `genrecal cache plan`; nothing else reads them."""

    sample_rows: int = Field(default=1024, gt=0)
    """Rows of the data that are tokenised, evenly spread over it; with no more rows than this, figures are exact."""
    samples: int | None = Field(default=None, gt=0)
    """Samples. Set this, `question_tokens` and `answer_tokens` where the data is not at hand: it is not read then."""
    question_tokens: float | None = Field(default=None, gt=0)
    """Mean teacher tokens per sample outside its answers, image tokens included."""
    answer_tokens: float | None = Field(default=None, gt=0)
    """Mean teacher tokens per sample in its answers, end-of-turn tokens included."""
    image_tokens: float = Field(default=0.0, ge=0)
    """How many of `question_tokens` stand for images."""
    turns: float = Field(default=1.0, ge=1)
    """Mean answers per sample."""
    hidden_size: int | None = Field(default=None, gt=0)
    """Columns of the teacher's hidden states; by default from its config.json."""
    vocab_size: int | None = Field(default=None, gt=0)
    """Rows of the teacher's output head; by default from its config.json."""
    parameters: int | None = Field(default=None, gt=0)
    """Parameters of the teacher, image tower included; by default counted from its config.json."""
    gpu_peak_tflop_per_s: float = Field(default=989.0, gt=0)
    """Peak of one GPU in the teacher's element type, in TFLOP/s; the default is a dense H100 SXM in bfloat16."""
    utilisation: float = Field(default=0.4, gt=0, le=1)
    """Fraction of the peak that a prefill reaches."""
    tokens_per_s_per_replica: float | None = Field(default=None, gt=0)
    """Measured teacher tokens per second of one replica; replaces the estimate from FLOPs."""
    read_gb_per_s_per_process: float = Field(default=1.0, gt=0)
    """Bandwidth at which each training process reads the cache, in GB/s; nothing is assumed to hide the reading."""
    step_time_s: float | None = Field(default=None, gt=0)
    """Seconds per optimizer step, for the bandwidth that training needs; by default it is given per 1,000 tokens/s."""
    storage_gpu_hours_per_tb: float = Field(default=0.0, ge=0)
    """What keeping a terabyte for as long as it is needed costs, in GPU-hours; 0 where the disks are there anyway."""
