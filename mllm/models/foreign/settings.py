"""Which keys of a foreign config were read, which are harmless, and which would change the model unsaid?"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from mllm import damage
from mllm.errors import CheckpointError, ConfigError

ABOUT_THE_FILE = (
    "architectures",
    "transformers_version",
    "(torch_)?dtype",
    "_name_or_path",
    "_commit_hash",
    "auto_map",
    "ignore_index",
    "(pad|bos|eos|unk)_token_id",
    "vocab_size",
    "hidden_size",
    "use_cache",
    "id2label",
    "label2id",
    "problem_type",
    "return_dict",
    "output_(hidden_states|attentions)",
    "chunk_size_feed_forward",
    "is_encoder_decoder",
)
"""Keys that say nothing about what is computed from inputs."""


class Settings:
    """A foreign config file whose every key must be accounted for: taken, allowed in one value, or named harmless.

    Args:
        data: The keys and values.
        where: File or folder, for errors.
    """

    def __init__(self, data: Mapping[str, Any], where: str | Path):
        self._data = dict(data)
        self._where = where
        self._seen: set[str] = set()

    def __contains__(self, key: str) -> bool:
        return key in self._data

    def take(self, key: str, default: Any = None) -> Any:
        """The value of a key that the caller makes use of."""
        self._seen.add(key)
        return self._data.get(key, default)

    def expect(self, key: str, allowed: Collection[Any], why: str) -> Any:
        """The value of a key that may only have these values (absent counts as None). Raises `ConfigError` with ``why``."""
        value = self.take(key)
        if not any(value == other and type(value) is type(other) for other in allowed):
            raise ConfigError(f"{self._where}: {key}: {value!r} is not supported: {why}")
        return value

    def harmless(self, *patterns: str) -> None:
        """Keys (regular expressions, whole key) that do not change what the model computes."""
        self._seen |= {key for key in self._data if any(re.fullmatch(pattern, key) for pattern in patterns)}

    def finish(self) -> None:
        """Raise `ConfigError` for keys that nothing asked about, unless they say nothing (null, false, empty)."""
        unread = {k: v for k, v in self._data.items() if k not in self._seen and v not in (None, False, "", [], {})}
        if unread:
            shown = ", ".join(f"{key}: {str(value)[:60]}" for key, value in sorted(unread.items())[:5])
            raise ConfigError(
                f"{self._where}: {len(unread)} settings that this converter does not know ({shown}); they may change what the model "
                "computes, so nothing was converted. Remove them from a copy of the file where you know that they do not"
            )


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object. Raises `CheckpointError` for a damaged file."""
    data = damage.read_json(file)
    if not isinstance(data, dict):
        raise CheckpointError(f"{file}: holds a {type(data).__name__}, expected an object")
    return data


def text_config(settings: Settings, model_type: str) -> Any:
    """The language model's config, where a foreign config holds its keys among its own. model_type: transformers' name of it."""
    from transformers import AutoConfig

    blank = AutoConfig.for_model(model_type)
    known = {*blank.to_dict(), "rope_theta", "rope_scaling", "head_dim"} - {"model_type", "architectures"}
    return AutoConfig.for_model(model_type, **{key: settings.take(key) for key in sorted(known) if key in settings})
