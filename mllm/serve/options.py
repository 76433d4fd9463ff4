"""Is what was typed after ``mllm serve`` right? Asked before anything heavy is imported, which takes half a minute."""

from __future__ import annotations

import errno
import importlib.util
import os
import re
import socket
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path

from mllm.errors import ConfigError, UnavailableError, did_you_mean
from mllm.install import install_hint, missing_library
from mllm.models.engine_memory import engines_of, parse_memory, seats_of
from mllm.serve.http.keys import CLIENTS, LOOPBACK, read_clients

_HOST = re.compile(r"[\w-]+(\.[\w-]+)*\.?|[0-9a-fA-F:]*:[0-9a-fA-F:.]*")


def check_extra(extra: list[str]) -> None:
    """Raise `ConfigError` for an option that the installed vLLM does not have or a number that is none, before it takes half a minute to
    say so."""
    extra = written_out(extra)
    if any(option.split("=")[0] == "--api-key" for option in extra):
        raise ConfigError(f"--api-key would be readable in the list of processes; set {CLIENTS} in the environment")
    seats_of(extra)
    engines_of(extra)


def written_out(extra: list[str]) -> list[str]:
    """vLLM's own arguments with every option by its whole name, as it is looked for here: vLLM takes ``--max_num_seqs`` and
    ``--max-num-s`` as well. Raises `ConfigError` for one that it does not have, or that may mean several."""
    known = _vllm_options()
    made = []
    for option in extra:
        typed, mark, rest = option.partition("=")
        head, dot, keys = typed.partition(".")
        if not head.startswith("--") or head == "--":
            made.append(option)
            continue
        name = head.replace("_", "-")
        if len(known) > 100 and name not in known:
            meant = sorted(one for one in known if one.startswith(name))
            if not meant:
                raise ConfigError(f"{typed}: neither mllm serve nor vLLM has this option{did_you_mean(name, known)}")
            if len(meant) > 1:
                raise ConfigError(f"{typed}: write the option out; it may be {', '.join(meant[:6])}")
            name = meant[0]
        made.append(f"{name}{dot}{keys}{mark}{rest}")
    return made


@lru_cache(maxsize=1)
def _vllm_options() -> set[str]:
    """Options of ``vllm serve``, by its source (importing vLLM takes many seconds)."""
    found: set[str] = set()
    for text in _vllm_sources("engine/arg_utils.py", "entrypoints/**/cli_args.py", "entrypoints/cli/serve.py"):
        found |= {name.replace("_", "-") for name in re.findall(r'"(--[a-z][a-z0-9_-]+)"', text)}
        found |= {f"--{name.replace('_', '-')}" for name in re.findall(r"^    ([a-z][a-z0-9_]+): ", text, re.MULTILINE)}
    return found | {f"--no-{name[2:]}" for name in found} | ({"--help"} if found else set())


def check_folder(checkpoint: str, *files: str) -> None:
    """Raise `ConfigError` for a path to nothing or to no checkpoint; a name like owner/model may still be on the hub.

    files: one of which makes a folder a checkpoint; default: config.json.
    """
    folder = Path(checkpoint).expanduser()
    if folder.is_file():
        raise ConfigError(f"{checkpoint}: a file; give the checkpoint's folder")
    remote = checkpoint.count("/") == 1 and not checkpoint.startswith((".", "/", "~")) and not folder.parent.is_dir()
    if not folder.exists() and not remote:
        raise ConfigError(f"{checkpoint}: no such folder")
    files = files or ("config.json",)
    if folder.is_dir() and not any((folder / name).is_file() for name in files):
        raise ConfigError(f"{checkpoint}: no checkpoint (the folder has no {' or '.join(files)})")


def check_values(memory: str | None, keys: str | None, hosts: Sequence[str] = ()) -> None:
    """Raise `ConfigError` for a size that is none, a file of keys that cannot be used, or an address where a host's name is meant: a
    picture's host is compared with it, and would never be the same."""
    for host in hosts:
        if not _HOST.fullmatch(host):
            raise ConfigError(f"--media-domain {host}: expected the name of a host alone, such as images.example.org")
    if memory is not None:
        parse_memory(memory)
    if keys is not None:
        read_clients(keys)


def check_start(host: str, keys: str | None) -> None:
    """Raise `UnavailableError` without vLLM, and `ConfigError` where others than this machine would be answered without a key."""
    if importlib.util.find_spec("vllm") is None:
        raise UnavailableError(f"vLLM is not installed: {install_hint('serve')}, or with serve-cpu without a GPU")
    if lacking := missing_library():
        raise UnavailableError(lacking)
    if not (os.environ.get(CLIENTS) or os.environ.get("VLLM_API_KEY") or keys) and host not in LOOPBACK:
        raise ConfigError(
            f"--host {host} is reachable from outside: set a key in the environment variable {CLIENTS}, or --keys FILE"
        )


def check_port(host: str, port: int) -> None:
    """Raise `ConfigError` where this machine cannot listen there, which vLLM says after half a minute."""
    if not 0 < port < 2**16:
        raise ConfigError(f"--port {port}: expected 1 to {2**16 - 1}")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            taken.bind((host.strip("[]"), port))
        except OSError as error:
            cure = "take another --port" if error.errno in (errno.EADDRINUSE, errno.EACCES) else "take another --host"
            raise ConfigError(f"--host {host} --port {port}: {error.strerror or error}; {cure}") from None


def vllm_source_has(text: str, files: str) -> bool:
    """Whether the installed vLLM knows something, by its source (importing vLLM takes many seconds)."""
    return any(text in source for source in _vllm_sources(files))


def _vllm_sources(*patterns: str) -> Iterator[str]:
    """Source files of the installed vLLM; none where it is not installed."""
    specification = importlib.util.find_spec("vllm")
    if specification is None or not specification.submodule_search_locations:
        return
    root = Path(next(iter(specification.submodule_search_locations)))
    for pattern in patterns:
        for path in root.glob(pattern):
            yield path.read_text(encoding="utf-8", errors="replace")
