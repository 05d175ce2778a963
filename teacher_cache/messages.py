"""The messages of a row in the forms that users bring them: text or parts, thinking, tool calls."""

import json
from collections.abc import Mapping
from typing import Any

from teacher_cache.errors import SampleError
from teacher_cache.schema import Message, ToolCall

IMAGE_MARK = "<image>"
ROLES = ("system", "user", "assistant", "tool")


def parse_message(message: Mapping[str, Any]) -> Message:
    """Turn one entry of `messages` into a turn.

    Raises:
        SampleError: ``bad-row``: the role, a part of the content or a tool call is of no known kind.
    """
    role, reasoning = message["role"], message.get("reasoning_content") or ""
    if role not in ROLES:
        raise bad_row(f"role {role!r} is none of {', '.join(ROLES)}")
    calls = tuple(_tool_call(call) for call in _decoded(message.get("tool_calls")) or ())
    if (reasoning or calls) and role != "assistant":
        raise bad_row(f"a message of role {role!r} has `reasoning_content` or `tool_calls`; only assistants do")
    if not isinstance(reasoning, str):
        raise bad_row(f"`reasoning_content` is {type(reasoning).__name__}; expected text")
    content = (message.get("content") or "") if calls else message["content"]
    return Message(role=role, content=_content(content), reasoning=reasoning, tool_calls=calls)


def parse_tools(tools: Any) -> str:
    """Return the schemas of tools as one JSON text, empty where there are none.

    Raises:
        SampleError: ``bad-row``: it is no list of records.
    """
    tools = _decoded(tools) or []
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise bad_row("`tools` is no list of records")
    return json.dumps(tools, ensure_ascii=False) if tools else ""


def bad_row(message: str, sample_id: str = "") -> SampleError:
    """Return the error of a row that is not in the form that is expected."""
    return SampleError(message, sample_id=sample_id, reason="bad-row")


def _content(content: Any) -> tuple[str | None, ...]:
    if isinstance(content, str):
        texts = content.split(IMAGE_MARK)
        marked = [part for text in texts for part in (None, text)][1:]
        return tuple(part for part in marked if part != "")
    parts: list[str | None] = []
    for part in content:
        if part["type"] == "text":
            if not isinstance(part["text"], str):
                raise bad_row(f"the text of a content part is {type(part['text']).__name__}; expected text")
            parts.append(part["text"])
        elif part["type"] == "image":
            parts.append(None)
        else:
            raise bad_row(f"content part of type {part['type']!r}; expected text or image")
    return tuple(parts)


def _tool_call(call: Mapping[str, Any]) -> ToolCall:
    """Read a call in either form: ``{"function": {"name", "arguments"}}``, or the inner record alone."""
    function = call.get("function") or call
    name, arguments = function["name"], _decoded(function["arguments"])
    if not isinstance(name, str) or not name.strip() or not isinstance(arguments, Mapping):
        raise bad_row(f"a tool call of {name!r} with {type(arguments).__name__}; expected a name and a JSON object")
    return ToolCall(name=name, arguments=json.dumps(arguments, ensure_ascii=False))


def _decoded(value: Any) -> Any:
    if not isinstance(value, str) or not value:
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise bad_row(f"{value[:80]!r} is no JSON: {error}") from error
