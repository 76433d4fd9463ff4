"""What must a model's processor know of the poses and depth maps that its heads learn from?"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mllm.errors import ConfigError
from mllm.heads.build import head_configs
from mllm.processing.geometry_spec import GeometrySpec

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def geometry_spec(config: PreTrainedConfig) -> GeometrySpec | None:
    """What the processor of an `MllmConfig` makes poses and depth maps by; None for a model whose heads learn of neither. Raises
    `ConfigError` for two heads that learn of the same."""
    configs = head_configs(config.heads)
    named: dict[str, str] = {}
    for name, head in configs.items():
        if head.type in ("pose", "depth_map"):
            if head.type in named:
                raise ConfigError(f"model.heads: {named[head.type]} and {name} both learn of {head.type}; keep one")
            named[head.type] = name
    if not named:
        return None
    from mllm.heads.geometry.depth_map import DepthMapHead

    rules = config.layout_rules()
    size = DepthMapHead.size(configs[named["depth_map"]], rules.view) if "depth_map" in named else None
    return GeometrySpec(poses="pose" in named, depth=size, image=next(iter(rules.images.values())))
