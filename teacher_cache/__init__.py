"""The teacher cache: run the teacher once, keep its targets, read them by sample id.

``open_cache(uri)`` is the way in for readers. It is imported on first use, so that configuration and
command-line modules of this package stay free of torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from teacher_cache.reader import TeacherCache, open_cache

__all__ = ["TeacherCache", "open_cache"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from teacher_cache import reader

        return getattr(reader, name)
    raise AttributeError(f"module 'teacher_cache' has no attribute {name!r}")
