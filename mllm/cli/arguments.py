"""Are a command's arguments good, before torch is imported for them?"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable
from pathlib import Path

from mllm.damage import parts_alone
from mllm.errors import CheckpointError, ConfigError, DataError, UnknownName, did_you_mean
from mllm.modes import unreadable

DTYPES = ("float32", "bfloat16", "float16")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(?:/[\w.-]+)?")
_DEVICE = re.compile(r"auto|cpu|mps|(?:cuda|xpu)(?::\d+)?")
_SIZE = re.compile(r"\d+(?:\.\d+)?\s*(?:[KMGT]i?)?B", re.IGNORECASE)
_CONFIGS = ("config.json", "adapter_config.json")


def checkpoint(name: str | Path, what: str = "checkpoint", *, whole: bool = False) -> str:
    """A checkpoint's folder (of ours, of transformers, or a PEFT adapter) or a hub id, as given.

    whole: one that was saved without its language model is refused, as vLLM reads files. Raises `CheckpointError` for that, for a folder
    that is not there or holds no config, and for a hub id that is not in the cache when the hub must not be asked (``HF_HUB_OFFLINE``).
    """
    text, path = str(name), Path(name).expanduser()
    if path.is_file():
        raise CheckpointError(f"{text} is a file; a {what} is a folder with config.json, or a hub id (owner/name)")
    if path.is_dir():
        if not any((path / config).is_file() for config in _CONFIGS):
            inside = sorted(child.name for child in path.iterdir() if (child / "config.json").is_file())
            hint = f"; did you mean {path / ('final' if 'final' in inside else inside[-1])}?" if inside else ""
            raise CheckpointError(f"{text} holds no config.json, so it is no {what}{hint}")
        if closed := unreadable(path):
            raise CheckpointError(closed)
        if whole and (parts := parts_alone(path)):
            raise CheckpointError(parts)
        return text
    if _HUB_ID.fullmatch(text) is None or ("/" in text and path.parent.is_dir()):
        beside = [str(child) for child in path.parent.iterdir()] if path.parent.is_dir() else []
        close = difflib.get_close_matches(text, beside, n=1, cutoff=0.8)
        hint = f", did you mean {close[0]}?" if close else ""
        raise CheckpointError(f"{text}: no such folder{hint}; expected a {what} or a hub id (owner/name)")
    if any(
        os.environ.get(name, "").upper() in ("1", "TRUE", "YES", "ON")
        for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    ):
        from huggingface_hub import try_to_load_from_cache

        if not any(isinstance(try_to_load_from_cache(text, config), str) for config in _CONFIGS):
            raise CheckpointError(
                f"{text}: no such folder, and as a hub id it is not in the cache while HF_HUB_OFFLINE forbids a download"
            )
    if whole and (parts := parts_alone(text)):
        raise CheckpointError(parts)
    return text


def folder_of(path: Path, what: str, marker: str | None = None) -> Path:
    """An existing folder (that holds ``marker``). Raises `ConfigError`."""
    if not path.is_dir():
        raise ConfigError(f"{path}: no such folder; expected {what}")
    if marker is not None and not (path / marker).is_file():
        raise ConfigError(f"{path} holds no {marker}, so it is not {what}")
    return path


def pictures(paths: Iterable[str | Path] | None, option: str = "--image") -> None:
    """Every picture is an address or a file that is there. Raises `DataError`."""
    for path in paths or ():
        if (
            not str(path).startswith(("http://", "https://", "data:", "file:"))
            and not Path(path).expanduser().is_file()
        ):
            raise DataError(f"{option} {path}: no such file")


def videos(paths: Iterable[str | Path]) -> None:
    """Every video is a file or a folder of frames that is there. Raises `DataError`."""
    for path in paths:
        if not Path(path).expanduser().exists():
            raise DataError(f"{path}: no such video (a file or a folder of frames)")


def one_of(value: str, known: Iterable[str], option: str) -> str:
    """A value that the option knows. Raises `ConfigError`."""
    if value not in (names := tuple(known)):
        raise ConfigError(f"{option} {value}: expected one of {', '.join(names)}{did_you_mean(value, names)}")
    return value


def dtype(value: str, *, auto: bool = True) -> str:
    """A floating-point type's name. Raises `ConfigError`."""
    return one_of(value, (*(("auto",) if auto else ()), *DTYPES), "--dtype")


def device(value: str | None) -> str | None:
    """A device as torch writes it, None for the default. Raises `ConfigError`."""
    if value is not None and _DEVICE.fullmatch(value) is None:
        raise ConfigError(f"--device {value}: expected cpu, cuda, cuda:1 … or mps")
    return value


def server(address: str | None) -> str | None:
    """A running server's address as clients take it: without the ``/v1`` that OpenAI's clients have behind theirs. Raises `ConfigError`
    for what is no address."""
    if address is None:
        return None
    if re.fullmatch(r"https?://[^/\s]+\S*", address) is None:
        host = address.partition("://")[2] or address
        raise ConfigError(f"--server {address}: expected http://HOST:PORT; try http://{host or '127.0.0.1:8000'}")
    return address.rstrip("/").removesuffix("/v1")


def at_least(value: float | None, low: float, option: str) -> None:
    """A number that is not below ``low``; None passes. Raises `ConfigError`."""
    if value is not None and not value >= low:
        raise ConfigError(f"{option} {value}: must be at least {low:g}")


def shard_size(value: str) -> None:
    """A file size such as ``5GB``. Raises `ConfigError`."""
    if _SIZE.fullmatch(value) is None:
        raise ConfigError(f"--shard-size {value}: expected a size such as 5GB or 500MB")


def training_data(name: str) -> None:
    """The name of a dataset or mixture, a YAML, a file, a folder, a pattern or a hub id. Raises `UnknownName` or `DataError`;
    what is in it is looked at later."""
    from mllm import assets

    known = [*assets.available("data/datasets"), *assets.available("data/mixtures")]
    if name in known or Path(name).expanduser().exists() or any(mark in name for mark in "*?["):
        return
    if name.startswith(("/", "./", "../", "~")) or Path(name).suffix:
        if not any((root / name).is_file() for root in assets.roots()):
            raise DataError(f"{name}: no such file or folder{did_you_mean(name, known)}")
    elif "/" not in name:
        raise UnknownName("dataset", name, known)


def tasks(names: Iterable[str]) -> None:
    """Tasks and suites that exist. Raises `UnknownName`."""
    from mllm.eval.task import load_tasks

    load_tasks(tuple(names))


def new_folder(path: Path) -> None:
    """A folder that holds no checkpoint yet. Raises `ConfigError`."""
    if path.is_file():
        raise ConfigError(f"{path} is a file; expected a folder to write")
    if any((path / name).is_file() for name in _CONFIGS):
        raise ConfigError(f"{path} holds a checkpoint already; choose another folder")
