"""The client of an object store: how to reach it, and what its errors may say."""

import os
import re
from datetime import timedelta
from typing import Any

from obstore.exceptions import BaseError
from obstore.store import MemoryStore, from_url

from teacher_cache.errors import ConfigError
from teacher_cache.storage import uri_scheme

TIMEOUT_S = float(os.environ.get("GENRECAL_STORE_TIMEOUT_S", "60"))
"""Longest wait for one answer; requests are repeated for three times as long before an error."""

_SECRET = re.compile(r"\?\S+|(?i:(key|token|secret|signature|credential)\w*)\s*[=:]\s*\S+")
_MESSAGE_CHARACTERS = 300

_memory: dict[str, MemoryStore] = {}
_first_process: int | None = None


def is_forked() -> bool:
    """Tell whether a process that this one was forked from has used an object store: its threads are not in here."""
    global _first_process
    if _first_process is None:
        _first_process = os.getpid()
    return _first_process != os.getpid()


def connect(uri: str) -> Any:
    """Return a client of the store that a URI names.

    Raises:
        ConfigError: the URI or the settings in the environment cannot be used.
    """
    if uri_scheme(uri) == "memory":
        return _memory.setdefault(uri, MemoryStore())
    try:
        return from_url(
            uri,
            client_options={
                "timeout": timedelta(seconds=TIMEOUT_S),
                "connect_timeout": timedelta(seconds=10),
                # options given here replace those that the environment gives
                "allow_http": os.environ.get("AWS_ALLOW_HTTP", "").lower() in ("1", "true"),
            },
            retry_config={
                "max_retries": 10,
                "retry_timeout": timedelta(seconds=3 * TIMEOUT_S),
                "backoff": {"init_backoff": timedelta(seconds=0.1), "max_backoff": timedelta(seconds=10), "base": 2},
            },
        )
    except BaseError as error:
        raise ConfigError(f"cache uri {uri!r}: {plain_message(error)}") from None


def plain_message(error: BaseException) -> str:
    """Return the first line of an error, cut, without what may be a secret."""
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {_SECRET.sub('…', lines[0] if lines else '')[:_MESSAGE_CHARACTERS]}"
