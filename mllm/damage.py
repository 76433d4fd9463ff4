"""Why does a file not open? What it looks like, and what to do, where a library would give a traceback."""

from __future__ import annotations

import errno
import json
import os
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mllm.errors import CheckpointError, MllmError
from mllm.hub import hub_refusal

LEFT_OUT = "left_out.json"
"""In a checkpoint's trained parts: which published weights go with them."""
_LFS = b"version https://git-lfs.github.com/spec/"
_AGAIN = "download or copy it again"
_LARGEST_JSON = 256 << 20
_PICKLES = (".bin", ".pt", ".pth")
_CHECKED = (".json", ".safetensors", ".bin", ".pt", ".pth", ".model", ".gguf", ".yaml", ".jinja")
_READ_IN_SILENCE = ("generation_config.json", "chat_template.jinja")
"""Files that open without a word however much of them is missing: transformers takes defaults for the first, and reads the second at the
first prompt."""
_MISSED_IN_SILENCE = {
    "generation_config.json": ("*.safetensors", "and without it answers do not end where they were taught to"),
    "tokenizer_config.json": (
        "tokenizer.json",
        "and without it the tokenizer knows neither padding nor where answers end",
    ),
}
"""Files of a checkpoint of ours without which it opens all the same: (beside which they must stand, what happens without)."""
_OURS = "mllm"
"""``model_type`` of our checkpoints."""


def damage_of(path: str | Path) -> str | None:
    """One sentence on what is wrong with a file, starting with its path; None when nothing is to be seen.

    Looks for an absent or empty file, a Git LFS pointer, a web page, an archive, half a JSON, a safetensors file that is
    shorter than its header says, and a torch file without its end. Reads headers only, and JSON files whole.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            head = stream.read(512)
    except FileNotFoundError:
        if path.is_symlink():
            return f"{path}: a link to {path.readlink()}, which is not there (a git-annex or cache file that was not copied); {_AGAIN}"
        return f"{path}: no such file"
    except OSError as error:
        return f"{path}: cannot be read ({error.strerror})"
    problem = _look(path, size, head)
    return None if problem is None else f"{path}: {problem}"


def _look(path: Path, size: int, head: bytes) -> str | None:
    if size == 0:
        return f"is empty (0 bytes); {_AGAIN}"
    if head.startswith(_LFS):
        real = next(
            (line.split()[1] for line in head.decode("utf-8", "replace").splitlines() if line.startswith("size ")), "?"
        )
        return (
            f"is a Git LFS pointer ({size} bytes) in place of a file of {real} bytes: run `git lfs pull` in its folder, or fetch it "
            "with `hf download`"
        )
    start = head.lstrip().lower()
    if start.startswith((b"<!doctype html", b"<html")):
        return f"is a web page, the answer of a login or error page in place of the file; {_AGAIN}"
    if head.startswith(b"\x1f\x8b") or (
        head.startswith(b"PK\x03\x04") and path.suffix in (".safetensors", ".json", ".gguf")
    ):
        return "is an archive; unpack it first"
    if not head.strip(b"\0"):
        return f"begins with zeros, as an interrupted download leaves it; {_AGAIN}"
    if path.suffix == ".json":
        return _json_problem(path, size)
    if path.suffix == ".jinja":
        return _template_problem(path)
    if path.suffix == ".safetensors":
        return _tensor_problem(path, size, head)
    if path.suffix in _PICKLES and head.startswith(b"PK\x03\x04") and not zipfile.is_zipfile(path):
        return f"is cut short ({size} bytes; the directory at the end of a torch file is missing); {_AGAIN}"
    if path.suffix == ".gguf" and not head.startswith(b"GGUF"):
        return "is not a GGUF file (it does not begin with GGUF)"
    return None


def _json_problem(path: Path, size: int) -> str | None:
    if size > _LARGEST_JSON:
        return None
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        text = error.doc.rstrip()
        ends = error.pos >= len(text) or error.msg.startswith("Unterminated")
        found = "ends in the middle (cut short?)" if ends else error.msg
        return f"not valid JSON: {found}, line {error.lineno}, column {error.colno}; {_AGAIN}"
    except UnicodeDecodeError as error:
        return f"not valid JSON: no UTF-8 text (byte {error.start}); {_AGAIN}"
    return None


def _template_problem(path: Path) -> str | None:
    """Of a chat template: what transformers, with its own tag beside jinja's, could not render."""
    from jinja2 import Environment, TemplateSyntaxError, nodes
    from jinja2.ext import Extension
    from jinja2.parser import Parser

    class Generation(Extension):
        tags = {"generation"}

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    try:
        Environment(extensions=[Generation, "jinja2.ext.loopcontrols"]).parse(path.read_text(encoding="utf-8"))
    except TemplateSyntaxError as error:
        said = str(error.message).partition(".")[0]
        return f"no whole template (cut short?): {said}, line {error.lineno}; {_AGAIN}"
    except UnicodeDecodeError as error:
        return f"no template: no UTF-8 text (byte {error.start}); {_AGAIN}"
    return None


def _tensor_problem(path: Path, size: int, head: bytes) -> str | None:
    """The safetensors format: 8 bytes with the header's length, a JSON header with offsets, the tensors' bytes."""
    length = int.from_bytes(head[:8], "little")
    if size < 8 or length > size - 8:
        reason = (
            f"its header should have {length} bytes"
            if size >= 8 and length < 1 << 32
            else "its first bytes are no header"
        )
        return f"not a whole safetensors file ({size} bytes, {reason}): cut short or of another kind; {_AGAIN}"
    with path.open("rb") as stream:
        stream.seek(8)
        header = stream.read(length)
    try:
        entries = json.loads(header)
        needed = 8 + length + max((e["data_offsets"][1] for k, e in entries.items() if k != "__metadata__"), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        return f"not a safetensors file: its header is no JSON table of tensors; {_AGAIN}"
    if needed != size:
        return f"has {size} bytes and its header needs {needed}: {'cut short' if size < needed else 'something was added'}; {_AGAIN}"
    return None


def damage_in(folder: str | Path) -> str | None:
    """The first damaged file of a checkpoint folder (configs first), as `damage_of` says it, or a shard that is missing."""
    folder = Path(folder)
    if folder.is_file():
        return damage_of(folder)
    if not folder.is_dir():
        return None
    files = sorted((p for p in folder.iterdir() if p.suffix in _CHECKED), key=lambda p: (p.suffix != ".json", p.name))
    for path in files:
        if problem := damage_of(path):
            return problem
        if path.name.endswith(".index.json"):
            shards = sorted(set(json.loads(path.read_text(encoding="utf-8")).get("weight_map", {}).values()))
            if absent := [name for name in shards if not (folder / name).exists()]:
                return f"{folder}: shard {absent[0]} of {len(shards)} that {path.name} names is missing; copy the folder again"
    return None


@contextmanager
def naming_damage(*places: str | Path | None) -> Iterator[None]:
    """Turn what a library raises over a damaged file in ``places`` (folders, files or hub ids) into a `CheckpointError` that
    names the file; any other error passes unchanged."""
    try:
        yield
    except MllmError:
        raise
    except Exception as error:
        for place in places:
            if place is not None and (problem := damage_in(local_copy(place))):
                raise CheckpointError(problem) from error
        raise


@contextmanager
def opening(checkpoint: str | Path | None) -> Iterator[None]:
    """`naming_damage` for a checkpoint that may lie on the hub: why the hub did not give it becomes one `CheckpointError` too, and so
    does damage that a library would not tell of."""
    if checkpoint is not None and (problem := _silent_problem(local_copy(checkpoint))):
        raise CheckpointError(problem)
    try:
        with naming_damage(checkpoint):
            yield
    except MllmError:
        raise
    except Exception as error:
        if checkpoint is not None and (refusal := hub_refusal(error, checkpoint)):
            raise CheckpointError(refusal) from error
        raise


def _silent_problem(folder: Path) -> str | None:
    """What is wrong with a checkpoint that opens nonetheless and answers otherwise; None where nothing is to be seen."""
    for file in (folder / name for name in _READ_IN_SILENCE):
        if file.is_file() and (problem := damage_of(file)):
            return problem
    try:
        ours = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type") == _OURS
    except (OSError, ValueError, AttributeError):
        return None  # no folder of ours, or one that says itself what is wrong
    for name, (beside, without) in _MISSED_IN_SILENCE.items():
        if ours and not (folder / name).exists() and any(folder.glob(beside)):
            return f"{folder / name}: no such file, {without}; {_AGAIN}"
    return None


def disk_full(error: BaseException) -> str | None:
    """What the system says of a disk or quota that is full; None for another error, and for one of ours, which has told it. safetensors
    raises an error of its own, which has the number in its text alone."""
    if isinstance(error, MllmError):
        return None
    number = getattr(error, "errno", None) or re.search(r"\(os error (\d+)\)", str(error))
    number = int(number[1]) if isinstance(number, re.Match) else number
    return os.strerror(number) if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else None


def parts_alone(checkpoint: str | Path) -> str | None:
    """One sentence on what a folder or hub repository is and what to type, where published weights were left out of it."""
    folder = Path(checkpoint).expanduser()
    record = folder / LEFT_OUT if folder.is_dir() else hub_file(str(checkpoint), LEFT_OUT)
    if record is None or not record.is_file():
        return None
    source = read_json(record)["language_model"]["source"]
    return (
        f"{checkpoint}: the trained parts of a checkpoint, without its language model ({source}), and a whole one is needed here; write "
        f"it: mllm export {checkpoint} WHOLE"
    )


def hub_file(name: str, file: str, revision: str | None = None) -> Path | None:
    """A file of a hub repository, fetched or in the cache; None where it has none or cannot be asked."""
    from transformers.utils.hub import cached_file

    quiet = {
        "_raise_exceptions_for_missing_entries": False,
        "_raise_exceptions_for_connection_errors": False,
        "_raise_exceptions_for_gated_repo": False,
    }
    found = cached_file(name, file, revision=revision, **quiet)  # pyright: ignore[reportArgumentType]
    return None if found is None else Path(str(found))


def local_copy(place: str | Path) -> Path:
    """Where the files of a folder or hub id lie on this machine, as far as is known without asking the hub."""
    path = Path(place).expanduser()
    if path.exists() or str(place).count("/") != 1:
        return path
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(str(place), "config.json")
    return Path(found).parent if isinstance(found, str) else path


def read_json(path: str | Path) -> Any:
    """A JSON file's content. Raises `CheckpointError` that names the file and says what it looks like."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(damage_of(path) or f"{path}: cannot be read ({error})") from error


def read_safetensors(path: str | Path) -> dict[str, Any]:
    """A safetensors file's tensors. Raises `CheckpointError` that names the file and says what it looks like."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(str(path))
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(damage_of(path) or f"{path}: cannot be read ({error}); {_AGAIN}") from error
