"""Which PEFT adapters may a server apply beside its model, and what must vLLM be told of them?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mllm.errors import ConfigError


def adapter_rank(folder: str) -> int:
    """The largest rank of an adapter that vLLM serves unmerged. Raises `ConfigError` for any other: vLLM would apply the language
    model's part of it alone, and answer as a model that nobody trained."""
    from peft import PeftConfig
    from safetensors import SafetensorError, safe_open

    file = Path(folder) / "adapter_model.safetensors"
    try:
        with safe_open(str(file), "pt") as tensors:
            names = list(tensors.keys())
        config: Any = PeftConfig.from_pretrained(folder)
    except (OSError, ValueError, SafetensorError) as error:
        raise ConfigError(f"{folder}: no PEFT adapter that can be read ({str(error).splitlines()[0][:200]})") from None
    outside = sorted(name for name in names if ".language_model." not in name)
    if outside:
        merged = f"merge it: mllm export {folder} MERGED"
        raise ConfigError(
            f"{folder}: vLLM adapts the language model only, and this adapter also changes {outside[0]}; {merged}"
        )
    if getattr(config, "use_dora", False):
        raise ConfigError(f"{folder}: vLLM does not serve DoRA unmerged; merge it: mllm export {folder} MERGED")
    return max([int(config.r), *map(int, (config.rank_pattern or {}).values())])


def adapter_arguments(adapters: list[str]) -> list[str]:
    """vLLM's arguments for ``name=folder`` of adapters; all of them are kept ready at once. Raises `ConfigError`."""
    if not adapters:
        return []
    pairs = {name: folder for name, _, folder in (adapter.partition("=") for adapter in adapters)}
    if len(pairs) < len(adapters):
        raise ConfigError(f"--lora: two adapters have one name in {', '.join(adapters)}")
    rank = max(adapter_rank(folder) for folder in pairs.values())
    ranks = [8, 16, 32, 64, 128, 256, 320, 512]
    fits = next((size for size in ranks if size >= rank), None)
    if fits is None:
        raise ConfigError(
            f"--lora: rank {rank}, and vLLM serves adapters up to rank {ranks[-1]}; merge it with mllm export"
        )
    given = ["--enable-lora", "--max-loras", str(max(2, len(pairs))), "--max-lora-rank", str(max(16, fits))]
    return [*given, "--lora-modules", *adapters]
