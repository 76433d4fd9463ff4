"""Which PEFT adapters may a server apply beside its model, and what must vLLM be told of them?"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mllm.errors import ConfigError
from mllm.serve.options import vllm_source_has

VISUAL = (".vision_tower.", ".multi_modal_projector.")
"""In the names of an adapter's weights on encoders, router and connector."""
ADAPTER = "visual_adapter"
"""Key of a picture's adapter in the model's inputs, and among a request's settings: its number, 0 for none."""
BESIDE_HEADS = "it changes encoders or the connector, and this model's heads look through them without an adapter; merge it: mllm export"
"""Why such an adapter is not served unmerged beside a model whose heads answer too."""
SETTING = "mllm_adapters"
"""Where vLLM's ``--additional-config`` names the adapters that change encoders or the connector, by number."""


@dataclass(frozen=True)
class Adapter:
    """An adapter that can be served unmerged. rank: its largest; visual: whether it changes encoders or the connector."""

    rank: int
    visual: bool


def read_adapter(folder: str) -> Adapter:
    """An adapter by its files. Raises `ConfigError` for one that would be applied in part only: answers would be those of a model
    that nobody trained."""
    from peft import PeftConfig
    from safetensors import SafetensorError, safe_open

    file = Path(folder) / "adapter_model.safetensors"
    try:
        with safe_open(str(file), "pt") as tensors:
            names = list(tensors.keys())
        config: Any = PeftConfig.from_pretrained(folder)
    except (OSError, ValueError, SafetensorError) as error:
        raise ConfigError(f"{folder}: no PEFT adapter that can be read ({str(error).splitlines()[0][:200]})") from None
    merged = f"merge it: mllm export {folder} MERGED"
    visual = [name for name in names if any(part in name for part in VISUAL)]
    outside = sorted(name for name in names if ".language_model." not in name and name not in visual)
    whole = [name for name in visual if not name.endswith((".lora_A.weight", ".lora_B.weight"))]
    if len(visual) == len(names):
        raise ConfigError(
            f"{folder}: it changes nothing of the language model, and vLLM loads no such adapter; {merged}"
        )
    if outside:
        raise ConfigError(
            f"{folder}: a server adapts the language model, encoders and the connector, and this adapter also changes "
            f"{outside[0]}; {merged}"
        )
    if whole:
        raise ConfigError(f"{folder}: it replaces {whole[0]} whole, which is not served unmerged; {merged}")
    if getattr(config, "use_dora", False):
        raise ConfigError(f"{folder}: vLLM does not serve DoRA unmerged; {merged}")
    rank = max([int(config.r), *map(int, (config.rank_pattern or {}).values())])
    return Adapter(rank, bool(visual))


def adapter_rank(folder: str) -> int:
    """The largest rank of an adapter for vLLM alone, without `mllm serve` before it: on the language model only. Raises
    `ConfigError`."""
    adapter = read_adapter(folder)
    if adapter.visual:
        raise ConfigError(
            f"{folder}: here vLLM adapts the language model only, and this adapter also changes encoders or the connector; serve "
            f"it with mllm serve --lora, or merge it: mllm export {folder} MERGED"
        )
    return adapter.rank


def named_adapters(adapters: list[str]) -> dict[str, str]:
    """``name=folder`` of adapters → folders by name. Raises `ConfigError` for a name that stands twice."""
    pairs = {name: folder for name, _, folder in (adapter.partition("=") for adapter in adapters)}
    if len(pairs) < len(adapters):
        raise ConfigError(f"--lora: two adapters have one name in {', '.join(adapters)}")
    return pairs


def visual_adapters(adapters: list[str]) -> dict[str, int]:
    """Those that change encoders or the connector, by name: the number by which the engine knows each, from 1."""
    return {
        name: number
        for number, (name, folder) in enumerate(named_adapters(adapters).items(), start=1)
        if read_adapter(folder).visual
    }


def adapter_arguments(adapters: list[str]) -> list[str]:
    """vLLM's arguments for ``name=folder`` of adapters; all of them are kept ready at once. Raises `ConfigError`."""
    if not adapters:
        return []
    pairs = named_adapters(adapters)
    rank = max(read_adapter(folder).rank for folder in pairs.values())
    ranks = [8, 16, 32, 64, 128, 256, 320, 512]
    fits = next((size for size in ranks if size >= rank), None)
    if fits is None:
        raise ConfigError(
            f"--lora: rank {rank}, and vLLM serves adapters up to rank {ranks[-1]}; merge it with mllm export"
        )
    given = ["--enable-lora", "--max-loras", str(max(2, len(pairs))), "--max-lora-rank", str(max(16, fits))]
    return [*given, "--lora-modules", *adapters]


def skips_visual_weights() -> bool:
    """Whether the installed vLLM can leave an adapter's visual weights to us (``lora_skip_prefixes``)."""
    return vllm_source_has("lora_skip_prefixes", "lora/*.py")
