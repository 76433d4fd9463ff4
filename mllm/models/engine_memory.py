"""How much memory may a served model take, for its weights and for the keys and values of running requests?"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mllm.errors import ConfigError

if TYPE_CHECKING:
    from mllm.models.configuration_mllm import MllmConfig

ENGINES = ("--data-parallel-size", "-dp")
"""vLLM's option for engines behind one address."""
SEATS = 128
"""Requests at once where ``--max-num-seqs`` says nothing (vLLM's own number of a server)."""
PROCESSES = 3 * 2**30
"""What the server's three processes hold beside weights and cache on a CPU: 2.9 GiB were measured."""
BLOCK = 128
"""Tokens of a block on a CPU, vLLM's largest default; a sequence fills whole blocks."""
_DEFAULT_SHARE, _GPU_SHARE, _GPU_MARGIN = 0.5, 0.92, 0.02
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class Need:
    """What a checkpoint asks for. weights: bytes on disk; per_token: bytes of keys and values; length: tokens of the
    longest request; seats: requests at once."""

    weights: int
    per_token: int
    length: int
    seats: int

    @property
    def one(self) -> int:
        """Bytes of the cache below which not even one request of full length fits."""
        return (-(-self.length // BLOCK) + 1) * BLOCK * self.per_token

    @property
    def all(self) -> int:
        """Bytes with which every seat has a request of full length."""
        return self.seats * self.one


def need_of(checkpoint: str, config: MllmConfig, *, dtype: str, length: int | None, seats: int) -> Need:
    """What a checkpoint needs. config: ours; dtype: as in ``--dtype``; length: ``--max-model-len``, None: the model's."""
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    wanted = str(config.dtype or "float32").removeprefix("torch.") if dtype == "auto" else dtype
    size = 4 if wanted == "float32" else 2
    folder = Path(checkpoint)
    weights = sum(file.stat().st_size for file in folder.glob("*.safetensors")) if folder.is_dir() else 0
    longest = length or int(getattr(text, "max_position_embeddings", 4096))
    return Need(weights, 2 * text.num_hidden_layers * heads * width * size, longest, seats)


def parse_memory(text: str) -> float | int:
    """``--memory``: a share of all memory (0.5, 50%) as a float, or a size (8GB, 8GiB) in bytes. Raises `ConfigError`."""
    shown = text.strip().upper().replace(" ", "")
    number = shown.rstrip("KMGIB%")
    unit = shown[len(number) :]
    try:
        value = float(number)
    except ValueError:
        value = -1.0
    if unit == "%" and 0 < value <= 100:
        return value / 100
    if unit == "" and 0 < value <= 1:
        return value
    if unit in _UNITS and unit and value > 0:
        return int(value * _UNITS[unit])
    raise ConfigError(f"--memory {text}: expected a share such as 0.5 or 50%, or a size such as 8GB")


def cpu_cache(need: Need, memory: float | int | None, *, free: int, total: int) -> int:
    """Bytes for keys and values on a CPU: for all seats where that fits, at least for one request.

    memory: of `parse_memory`, for weights, processes and cache together; None: the cache takes at most half of what is
    free. Raises `ConfigError` with what would fit.
    """
    there, cure = free, "free memory, or take a smaller model"
    room = free - need.weights - PROCESSES
    if memory is not None:
        wanted = int(memory * total) if isinstance(memory, float) else memory
        if wanted > free:
            raise ConfigError(
                f"--memory asks for {size_text(wanted)} and {size_text(free)} of {size_text(total)} are free"
            )
        room = wanted - need.weights - PROCESSES
        least = need.weights + PROCESSES + need.one
        there, cure = wanted, f"give --memory {least / 2**30 + 0.1:.1f}GiB or more"
    else:
        room = min(room, int(_DEFAULT_SHARE * free)) if room >= need.one else room
    cache = min(need.all, room)
    if cache >= need.one:
        return cache
    fits = max(0, room // need.per_token // BLOCK - 1) * BLOCK
    cure = f"with --max-model-len {fits} it would" if fits else cure
    raise ConfigError(
        f"the model needs {size_text(need.weights)} for weights, {size_text(PROCESSES)} for its processes and {size_text(need.one)} for "
        f"one request of {need.length} tokens; {size_text(there)} are {'there' if memory is None else 'asked for'}: {cure}"
    )


def gpu_share(memory: float | int | None, *, free: int, total: int) -> float:
    """vLLM's share of a GPU: what was asked for, or 0.92, or less where others hold memory. Raises `ConfigError`."""
    if memory is not None:
        share = memory if isinstance(memory, float) else memory / total
        if share * total > free:
            raise ConfigError(
                f"--memory asks for {size_text(int(share * total))} and {size_text(free)} of {size_text(total)} are free"
            )
        return round(share, 4)
    return round(min(_GPU_SHARE, free / total - _GPU_MARGIN), 4)


def memory_arguments(need: Need, memory: str | None, extra: list[str]) -> tuple[list[str], str]:
    """vLLM's arguments for the memory of this machine, and what they mean in words; empty where ``extra`` or vLLM's own
    environment variable says it. Several engines on a CPU share its memory: each gets its part. Raises `ConfigError` before
    anything heavy has started."""
    import torch

    wanted = parse_memory(memory) if memory is not None else None
    given = any(o.split("=")[0] in ("--gpu-memory-utilization", "--kv-cache-memory-bytes") for o in extra)
    if given or (wanted is None and os.environ.get("VLLM_CPU_KVCACHE_SPACE")):
        return [], "memory as given to vLLM"
    if torch.cuda.is_available():
        states = [torch.cuda.mem_get_info(index) for index in range(torch.cuda.device_count())]
        share = min(gpu_share(wanted, free=free, total=total) for free, total in states)
        return ["--gpu-memory-utilization", str(share)], f"{share:.0%} of each GPU"
    engines = engines_of(extra)
    free, total = (size // engines for size in free_memory())
    part = wanted // engines if isinstance(wanted, int) else wanted
    cache = cpu_cache(need, part, free=free, total=total)
    full = min(need.seats, cache // need.one)
    return ["--kv-cache-memory-bytes", str(cache)], f"cache {size_text(cache)}: {full} requests of {need.length} tokens"


def engine_memory(need: Need, memory: str | None, extra: list[str]) -> dict[str, Any]:
    """`memory_arguments` as keywords of vLLM's ``LLM``."""
    arguments = memory_arguments(need, memory, extra)[0]
    names = [name.removeprefix("--").replace("-", "_") for name in arguments[::2]]
    return {name: float(value) if "." in value else int(value) for name, value in zip(names, arguments[1::2])}


def free_memory(root: Path = Path("/sys/fs/cgroup")) -> tuple[int, int]:
    """Bytes of memory that are free and that there are: the machine's, or the container's where that is less."""
    machine = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    free, total = (int(machine[name].split()[0]) * 1024 for name in ("MemAvailable", "MemTotal"))
    try:
        limit = int((root / "memory.max").read_text())
        used = int((root / "memory.current").read_text())
        given_back = dict(line.split() for line in (root / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no container, or no limit ("max")
        return free, total
    used -= int(given_back.get("inactive_file", 0))
    return min(free, max(0, limit - used)), min(total, limit)


def seats_of(extra: list[str]) -> int:
    """``--max-num-seqs`` among vLLM's own arguments."""
    return _number(extra, ("--max-num-seqs",), SEATS)


def engines_of(extra: list[str]) -> int:
    """``--data-parallel-size`` among vLLM's own arguments."""
    return _number(extra, ENGINES, 1)


def _number(extra: list[str], names: tuple[str, ...], default: int) -> int:
    """The value of an option, of which the last one counts; the default where it is not there. Raises `ConfigError`."""
    found = default
    for place, option in enumerate(extra):
        name, _, value = option.partition("=")
        if name in names:
            value = value or (extra[place + 1] if place + 1 < len(extra) else "")
            if not value.isdecimal() or int(value) < 1:
                raise ConfigError(f"{name} {value}: expected a whole number from 1 on")
            found = int(value)
    return found


def size_text(value: int) -> str:
    """Bytes for people: GiB, or MiB below one."""
    return f"{value / 2**30:.1f} GiB" if value >= 2**30 else f"{value / 2**20:.0f} MiB"
