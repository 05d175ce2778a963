"""Names of the losses that a run file may choose. Imports nothing heavy, to keep the CLI quick."""

from typing import Literal

DivergenceKind = Literal["forward_kl", "reverse_kl", "jensen_shannon"]

RegularizationForm = Literal["none", "feature_mse", "kl", "ce", "ce_kl"]
"""The forms of the regularization loss in the paper's ablation; ``ce_kl`` is the paper's choice."""
