"""How do thoughts, tool calls and tool results stand in a conversation's messages?"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from mllm.errors import DataError

_THOUGHTS = ("reasoning_content", "reasoning", "thinking")


def beside_content(entry: Mapping[str, Any], role: str, where: str) -> dict[str, Any]:
    """What a message says beside its content, as fields of `mllm.types.Turn`. Raises `DataError` for what cannot be read."""
    if entry.get("function_call"):
        raise DataError(
            f"{where}: function_call is OpenAI's old form; write tool_calls: [{{function: {{name, arguments}}}}]"
        )
    thoughts = next((entry[key] for key in _THOUGHTS if entry.get(key)), None)
    if thoughts is not None and not isinstance(thoughts, str):
        raise DataError(f"{where}: the assistant's thoughts are {type(thoughts).__name__}, expected a string")
    calls = _json(entry.get("tool_calls") or None, "tool_calls", where)
    if role != "assistant" and (thoughts or calls):
        raise DataError(
            f"{where}: a turn of role {role} has {'thoughts' if thoughts else 'tool_calls'}; only the assistant does"
        )
    found: dict[str, Any] = {}
    if thoughts:
        found["thoughts"] = thoughts.replace("\ufffc", "")
    if calls:
        found["calls"] = [_call(call, where) for call in calls]
    if role == "tool":
        found |= {"call_id": entry.get("tool_call_id"), "name": entry.get("name")}
    return found


def tools_of(row: Mapping[str, Any], where: str) -> list[Any] | None:
    """The tools that a row says the assistant may call (``tools``, a list or its JSON), or None."""
    return _json(row.get("tools") or None, "tools", where)


def _call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise DataError(
            f"{where}: a tool call is {call!r:.120}, expected {{type: function, function: {{name, arguments}}}}"
        )
    arguments = function.get("arguments") or {}
    if isinstance(
        arguments, str
    ):  # OpenAI writes JSON into a string; templates render an object, as vLLM gives it to them
        try:
            arguments = json.loads(arguments)
        except json.JSONDecodeError as error:
            raise DataError(f"{where}: the arguments of {function['name']} are no JSON ({error})") from None
    if not isinstance(arguments, Mapping):
        raise DataError(
            f"{where}: the arguments of {function['name']} are {type(arguments).__name__}, expected an object"
        )
    given = {
        k: v for k, v in arguments.items() if v is not None
    }  # tables fill the keys of other rows' calls with nulls
    return {**call, "type": "function", "function": {"name": function["name"], "arguments": given}}


def _json(value: Any, name: str, where: str) -> list[Any] | None:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise DataError(f"{where}: {name} is text and no JSON ({error})") from None
    if value is not None and not isinstance(value, (list, tuple)):
        raise DataError(f"{where}: {name} is {type(value).__name__}, expected a list")
    return list(value) if value else None
