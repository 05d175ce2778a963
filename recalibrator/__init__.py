"""The Recalibrator of GenRecal (arXiv 2506.15681): trained beside the student, dropped at export."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from recalibrator.config import RecalibratorConfig
    from recalibrator.module import Recalibrator

__all__ = ["Recalibrator", "RecalibratorConfig"]


def __getattr__(name: str) -> Any:
    if name == "Recalibrator":
        from recalibrator.module import Recalibrator

        return Recalibrator
    if name == "RecalibratorConfig":
        from recalibrator.config import RecalibratorConfig

        return RecalibratorConfig
    raise AttributeError(f"module 'recalibrator' has no attribute {name!r}")
