"""Reads of an object store for forked processes.

The client of object stores has threads, which a fork leaves behind. So a forked process, as a data loader's worker is
by default, starts this module as a process of its own and asks it over pipes: a line of JSON each way, then bytes.
"""

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, BinaryIO, Literal

from teacher_cache import errors
from teacher_cache.errors import CacheError, GenrecalError

Operation = Literal["read", "size", "get_range", "list", "folders"]


class ObjectService:
    """Reading processes of one forked process; each answers one request at a time. Thread-safe."""

    def __init__(self, uri: str) -> None:
        """Start nothing yet."""
        self._uri = uri
        self._owner = os.getpid()
        self._idle: list[subprocess.Popen[bytes]] = []
        self._lock = threading.Lock()
        self._started: list[subprocess.Popen[bytes]] = []
        weakref.finalize(self, _stop, self._started, self._owner)

    @property
    def is_ours(self) -> bool:
        """Whether this process made it, rather than one that forked this one."""
        return self._owner == os.getpid()

    def ask(self, operation: Operation, name: str, **options: int) -> Any:
        """Return what the store's method of this name returns: bytes, or plain JSON values.

        Raises:
            OSError: as the store raises it.
            CacheError: the reading process is gone.
        """
        with self._process() as process:
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                process.stdin.write(_line({"operation": operation, "name": name, "options": options}))
                process.stdin.flush()
                answer = json.loads(process.stdout.readline() or "{}")
                data = process.stdout.read(answer["bytes"]) if "bytes" in answer else None
            except (OSError, ValueError) as error:
                raise CacheError(f"{self._uri}: the process that reads for {os.getpid()} fails: {error}") from error
        if data is not None and len(data) == answer["bytes"]:
            return data
        if "value" in answer:
            return answer["value"]
        if "error" not in answer:
            raise CacheError(f"{self._uri}: the process that reads for {os.getpid()} has ended; read again")
        if (kind := getattr(errors, answer["error"], None)) is not None:
            raise kind(answer["message"])
        raise OSError(answer["errno"], answer["message"], answer["path"])

    @contextmanager
    def _process(self) -> Iterator["subprocess.Popen[bytes]"]:
        with self._lock:
            process = self._idle.pop() if self._idle else None
        if process is None:
            command = [sys.executable, "-m", __name__, self._uri]
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            self._started.append(process)
        yield process  # one that fails is not used again
        with self._lock:
            self._idle.append(process)


def serve(uri: str, requests: BinaryIO, answers: BinaryIO) -> None:
    """Answer requests until there are no more."""
    from teacher_cache.object_store import ObjectStore

    store = ObjectStore(uri)
    for line in requests:
        request = json.loads(line)
        data = b""
        try:
            value = getattr(store, request["operation"])(request["name"], **request["options"])
            if request["operation"] == "list":
                answer: dict[str, Any] = {"value": [asdict(entry) for entry in value]}
            elif request["operation"] in ("read", "get_range"):
                data = bytes(value)
                answer = {"bytes": len(data)}
            else:
                answer = {"value": value}
        except GenrecalError as error:
            answer = {"error": type(error).__name__, "message": str(error)}
        except OSError as error:
            answer = {
                "error": "OSError",
                "errno": error.errno or errno.EIO,
                "message": error.strerror or str(error),
                "path": error.filename,
            }
        answers.write(_line(answer) + data)
        answers.flush()


def _line(value: dict[str, Any]) -> bytes:
    return json.dumps(value).encode() + b"\n"


def _stop(processes: "list[subprocess.Popen[bytes]]", owner: int) -> None:
    if os.getpid() == owner:  # a fork of the owner holds the same pipes and must not wait for their end
        for process in processes:
            process.communicate()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group; this process ends with its requests
    serve(sys.argv[1], sys.stdin.buffer, sys.stdout.buffer)
