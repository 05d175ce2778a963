"""How very short answers are replaced by reasoned ones. Imports pydantic only, to keep the CLI quick."""

from typing import Literal

from pydantic import Field

from teacher_cache.config import StrictConfig

Acceptance = Literal["final", "ending", "anywhere"]


class AnswersConfig(StrictConfig):
    """Very short answers that the teacher replaces by reasoned ones before the cache is built."""

    source: str
    """Parquet or JSON-lines file with the original answers; the Parquet file at `cache.data.path` is made from it."""
    max_characters: int = Field(default=16, gt=0)
    """Longest answer that counts as very short, in characters."""
    instruction: str = "Reason step by step. Then give the final answer on a last line of the form 'Answer: ...'."
    """Follows the question while the teacher writes; the data keeps the question as it was."""
    accept: Acceptance = "final"
    """Where a written answer must hold the original one, whatever the case, punctuation and form of a number: as its
    final answer (behind the last `Answer:`, in the last `\\boxed{}`, or else its last line), at the end of that, or
    anywhere. The last two also take answers that say more, or the opposite."""
    attempts: int = Field(default=4, gt=0)
    """Times that the teacher writes an answer before the original one is kept."""
    temperature: float = Field(default=0.7, ge=0)
    """Temperature of sampling; with 0 every attempt is the same, so set `attempts` to 1."""
    max_new_tokens: int = Field(default=512, gt=0)
    """Longest written answer in tokens; a longer one is not accepted."""
    seed: int = 0
    """Decides, with the sample, the turn and the attempt, what is sampled."""
    samples_per_part: int = Field(default=1024, gt=0)
    """Samples per part, the unit of work and of commit."""
