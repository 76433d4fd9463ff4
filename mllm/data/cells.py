"""What does a cell of a row hold, whoever wrote the table: pandas, numpy, json?"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from mllm.errors import DataError


def given(value: Any) -> bool:
    """Whether a cell holds something: not None, not NaN, not an empty text or list."""
    if value is None or _is_nan(value):
        return False
    return len(value) > 0 if hasattr(value, "__len__") else True


def as_list(value: Any) -> list[Any]:
    """Nothing (see `given`) → [], a list or a numpy array of objects → its given entries, anything else → one entry."""
    value = plain_cell(value)
    if not given(value):
        return []
    if isinstance(value, (list, tuple)):
        return [item for item in value if given(item)]
    return [value]


def plain_cell(value: Any) -> Any:
    """A cell without numpy and NaN: lists for arrays of objects, texts or one dimension, Python numbers, None for NaN.

    Arrays of numbers with more dimensions are pictures and stay.
    """
    if isinstance(value, np.ndarray):
        if value.ndim > 1 and value.dtype.kind not in "OUS":
            return value
        return [plain_cell(item) for item in value]
    if isinstance(value, np.generic):
        return plain_cell(value.item())
    if isinstance(value, Mapping):
        return {key: plain_cell(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_cell(item) for item in value]
    return None if _is_nan(value) else value


def conversation_cell(value: Any, where: str) -> Any:
    """A conversation that a table keeps as JSON text, as the list it means; anything else as it is. Raises `DataError`."""
    if not isinstance(value, str) or not value.lstrip().startswith(("[", "{")):
        return value
    try:
        found = json.loads(value)
    except ValueError as error:
        raise DataError(f"{where}: the conversation is text that looks like JSON and is none ({error})") from None
    return [found] if isinstance(found, dict) else found


def _is_nan(value: Any) -> bool:
    """NaN of any library is the one value that differs from itself (pandas' NA refuses even that question)."""
    if isinstance(value, (str, bytes, Mapping, list, tuple, np.ndarray)):
        return False
    try:
        return bool(value != value)
    except (TypeError, ValueError):
        return True
