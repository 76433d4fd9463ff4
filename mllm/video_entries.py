"""What does a row's entry say of a video: where it is read from, and what of it?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mllm.errors import DataError

_HOLD = ("frames", "bytes", "path", "url")
_BESIDE = {"fps": "fps", "seconds": "seconds", "start": "start", "end": "end", "numbers": "frames", "points": "points"}
"""Key of an entry → the field of `Video` that it is."""


def fields_of_entry(entry: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a video that an entry tells. Raises `DataError`."""
    told = {
        key: value for key, value in entry.items() if value is not None and not (isinstance(value, str) and not value)
    }
    if strange := [key for key in told if key not in _HOLD and key not in _BESIDE]:
        known = f"one of {', '.join(_HOLD)}, and {', '.join(_BESIDE)}"
        raise DataError(f"a video entry has {strange[0]!r}, which nothing reads; it may have {known}")
    held = [key for key in _HOLD if key in told and not (key == "path" and "bytes" in told)]  # hub rows have both
    if len(held) != 1:
        found = " and ".join(held) or f"none of {', '.join(_HOLD)}"
        raise DataError(f"a video entry has {found}, expected one; keys are {sorted(map(str, entry))}")
    fields = {"source": told[held[0]]} | {name: told[key] for key, name in _BESIDE.items() if key in told}
    for name, kind in (("seconds", float), ("frames", int)):
        if name in fields:
            try:
                fields[name] = tuple(map(kind, fields[name]))
            except (TypeError, ValueError):
                raise DataError(f"a video's {name} are {str(fields[name])[:80]}, expected a list of numbers") from None
    return fields
