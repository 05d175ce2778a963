"""JSON documents that carry their own digest, in one canonical form.

A document is a JSON object whose key ``sha256`` is the SHA-256 of the canonical form of all its other
keys: keys sorted, no spaces, ASCII only. Whitespace in a file is free, everything else is covered.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

from teacher_cache.errors import CacheCorrupt, ConfigError


def canonical_json(value: object) -> str:
    """Return the one JSON text of ``value``, whatever the order of its mappings.

    Raises:
        ConfigError: a value has no stable JSON form (NaN, a set, an object, a key that is no string).
    """
    _require_stable(value, path="")
    return _dump(value)


def encode_document(body: Mapping[str, Any], *, indent: int | None = None) -> bytes:
    """Return the bytes of a document that holds ``body`` and its digest."""
    digest = hashlib.sha256(canonical_json(body).encode()).hexdigest()
    return (json.dumps({**body, "sha256": digest}, indent=indent) + "\n").encode()


def parse_document(data: bytes, *, where: str) -> dict[str, Any]:
    """Parse a document without looking at its digest.

    Raises:
        CacheCorrupt: the bytes are no JSON object.
    """
    try:
        document = json.loads(data, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise CacheCorrupt(f"{where}: not a JSON document ({len(data)} bytes): {error}") from error
    if not isinstance(document, dict):
        raise CacheCorrupt(f"{where}: expected a JSON object, found {type(document).__name__}")
    return document


def decode_document(data: bytes, *, where: str) -> str:
    """Return the canonical JSON of a document's body after checking its digest.

    Raises:
        CacheCorrupt: the bytes are no document or differ from what was written.
    """
    document = parse_document(data, where=where)
    stored = document.pop("sha256", None)
    try:
        body = _dump(document)
    except (ValueError, RecursionError) as error:
        raise CacheCorrupt(f"{where}: {error}") from error
    found = hashlib.sha256(body.encode()).hexdigest()
    if stored != found:
        raise CacheCorrupt(f"{where}: content differs from what was written: digest {stored!r}, content has {found}")
    return body


def _dump(value: object) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _require_stable(value: object, *, path: str) -> None:
    if isinstance(value, dict):
        for key, item in value.items():
            if type(key) is not str:
                raise ConfigError(f"no stable JSON form: key {key!r} under {path or 'the top'!r} is no string")
            _require_stable(key, path=f"a key of {path}")
            _require_stable(item, path=f"{path}.{key}" if path else key)
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            _require_stable(item, path=f"{path}[{index}]")
    elif type(value) is str and not _is_unicode(value):
        raise ConfigError(f"no stable JSON form: {path or 'the value'} is no valid Unicode: {value!r}")
    elif type(value) is float and not math.isfinite(value):
        raise ConfigError(f"no stable JSON form: {path or 'the value'} is {value}")
    elif type(value) not in (str, int, float, bool, type(None)):
        raise ConfigError(f"no stable JSON form: {path or 'the value'} is a {type(value).__name__}")


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")
