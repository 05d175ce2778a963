"""JSON documents that carry their own digest.

A document is a JSON object with one key per line. Its last line holds the key ``sha256``: the SHA-256
(hex) of every byte before that line. So each byte is covered, and any JSON reader can read the file.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

from teacher_cache.errors import CacheCorrupt, ConfigError

_DIGEST_KEY = b'"sha256": "'


def canonical_json(value: object) -> str:
    """Return the one JSON text of ``value``, whatever the order of its mappings: keys sorted, ASCII, no spaces.

    Raises:
        ConfigError: a value has no stable JSON form (NaN, a set, an object, a key that is no string).
    """
    _require_stable(value, path="")
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def plain_json(value: Any) -> Any:
    """Return ``value`` as it will read after storing: tuples become lists.

    Raises:
        ConfigError: a value has no stable JSON form.
    """
    return json.loads(canonical_json(value))


def encode_document(body: Mapping[str, Any]) -> bytes:
    """Return the bytes of a document that holds ``body`` and its digest."""
    lines = [f"{json.dumps(key)}: {json.dumps(value, allow_nan=False)},\n" for key, value in body.items()]
    covered = ("{\n" + "".join(lines)).encode()
    return covered + _digest_line(covered)


def parse_document(data: bytes, *, where: str) -> dict[str, Any]:
    """Parse a document without looking at its digest.

    Raises:
        CacheCorrupt: the bytes are no JSON object.
    """
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CacheCorrupt(f"{where}: not a JSON document ({len(data)} bytes): {error}") from error
    if not isinstance(document, dict):
        raise CacheCorrupt(f"{where}: expected a JSON object, found {type(document).__name__}")
    return document


def decode_document(data: bytes, *, where: str) -> bytes:
    """Return the JSON of a document's body after checking its digest.

    Raises:
        CacheCorrupt: the bytes are no document or differ from what was written.
    """
    covered, _, _ = data.rpartition(_DIGEST_KEY)
    if data != covered + _digest_line(covered):
        raise CacheCorrupt(f"{where}: its {len(data)} bytes differ from what was written, or were cut short")
    return covered.removesuffix(b",\n") + b"}"


def _digest_line(covered: bytes) -> bytes:
    return _DIGEST_KEY + hashlib.sha256(covered).hexdigest().encode() + b'"\n}\n'


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
