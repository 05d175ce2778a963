"""Errors of the whole project, grouped by what a caller can do about them.

Every error carries a stable ``code`` (append-only, safe to match on) and an ``exit_code`` that the
command line returns: 1 failed, 2 usage or config, 3 incomplete (retry), 4 identity or integrity
(a retry is useless). Messages read: what is wrong - where - expected and found - what to do.
"""


class GenrecalError(Exception):
    """Base of every error that this project raises on purpose."""

    code = "genrecal"
    exit_code = 1


class ConfigError(GenrecalError, ValueError):
    """A run file, override or launch environment that cannot be acted on."""

    code = "config"
    exit_code = 2


class DataError(GenrecalError, ValueError):
    """A data file whose shape is wrong, or more bad samples than the config allows."""

    code = "data"


class SampleError(DataError):
    """One sample that cannot be used; ``reason`` is a stable word, counted in skip lists."""

    code = "sample"

    def __init__(self, message: str, *, sample_id: str, reason: str) -> None:
        super().__init__(message)
        self.sample_id = sample_id
        self.reason = reason

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild_sample_error, (str(self), self.sample_id, self.reason)


def _rebuild_sample_error(message: str, sample_id: str, reason: str) -> SampleError:
    return SampleError(message, sample_id=sample_id, reason=reason)


class DataIncomplete(DataError):
    """A data file that is written in parts, of which some are missing: run the command again."""

    code = "data-incomplete"
    exit_code = 3


class DataMismatch(DataError):
    """A data file that was written from other content or with other settings than the run asks for."""

    code = "data-mismatch"
    exit_code = 4


class TeacherError(GenrecalError):
    """The teacher engine failed or returned targets that fail their checks."""

    code = "teacher"


class SpotCheckMismatch(TeacherError):
    """Targets differ from what plain transformers computes: no further attempt mends that."""

    code = "spot-check-mismatch"
    exit_code = 4


class CacheError(GenrecalError):
    """Base of the errors about a stored cache."""

    code = "cache"


class CacheNotFound(CacheError, FileNotFoundError):
    """No cache manifest at the URI."""

    code = "cache-not-found"


class CacheIncomplete(CacheError):
    """Planned shards are not committed yet: run the build again."""

    code = "cache-incomplete"
    exit_code = 3


class CacheMismatch(CacheError, ValueError):
    """The cache was built from other content than the run asks for."""

    code = "cache-mismatch"
    exit_code = 4


class CacheCorrupt(CacheError):
    """Stored bytes differ from what was committed; names shard, and sample where known."""

    code = "cache-corrupt"
    exit_code = 4


class FormatUnsupported(CacheError):
    """The cache was written in a format version that this release does not read."""

    code = "format-unsupported"
    exit_code = 4


class CheckpointError(GenrecalError):
    """A training checkpoint that is damaged or belongs to another run."""

    code = "checkpoint"
    exit_code = 4
