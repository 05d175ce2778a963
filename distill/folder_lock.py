"""One training at a time in a student's folder: a lock that ends with the process that holds it."""

import errno
import fcntl
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from teacher_cache.errors import GenrecalError

logger = logging.getLogger(__name__)

LOCK = ".lock"
_TAKEN = (errno.EACCES, errno.EAGAIN)
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


class TrainingBusy(GenrecalError):
    """Another process trains in the folder: run again once it has ended."""

    code = "training-busy"
    exit_code = 3


@contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Hold a folder against every other process, on any node for which its file system keeps POSIX locks.

    The kernel gives the lock back when the process ends, however it does.

    Raises:
        TrainingBusy: Another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # a record lock, not flock: forked workers do not share it, and NFS passes it on
    with (folder / LOCK).open("a", encoding="utf-8") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _TAKEN:
                holder = (folder / LOCK).read_text(encoding="utf-8") or "another process"
                raise TrainingBusy(f"{folder} is in use by {holder}: wait for it or end it, then run again") from error
            if error.errno not in _UNSUPPORTED:
                raise
            logger.warning("the file system of %s has no locks: see to it that nothing else trains there", folder)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield
