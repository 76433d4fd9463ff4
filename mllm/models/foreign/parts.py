"""What do the readers of foreign checkpoints share? Encoders cut to what we use of them, and our names for a model's parts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mllm.connectors.build import connector_config
from mllm.encoders.base import EncoderConfig
from mllm.encoders.catalogue import build_encoder, encoder_config
from mllm.models.configuration_mllm import MllmConfig
from mllm.models.foreign.tensors import within
from mllm.processing.views.base import views_config


def model_config(
    encoders: Mapping[str, Mapping[str, Any]],
    connector: Mapping[str, Any],
    *,
    text: Any,
    image_token_id: int,
    head_bias: bool,
    dtype: torch.dtype,
    views: Mapping[str, Any] | None = None,
    modality_switch: bool = False,
) -> MllmConfig:
    """Our config of a foreign model."""
    return MllmConfig(
        text_config=text,
        encoders={name: encoder_config(value, where=f"encoders.{name}") for name, value in encoders.items()},
        connector=connector_config(dict(connector)),
        views=None if views is None else views_config(views),
        image_token_id=image_token_id,
        lm_head_bias=head_bias,
        modality_switch=modality_switch,
        dtype=dtype,
    )


def encoder_tensors(config: MllmConfig, name: str, state: Mapping[str, Tensor], where: Any) -> dict[str, Tensor]:
    """A whole published encoder's tensors as those of ours, which ends at the layer it hands out; under our names."""
    resolved = encoder_config(config.encoders[name], where=f"encoders.{name}")
    with torch.device("meta"):
        kept = build_encoder(resolved).get_submodule("model").state_dict()
        whole = whole_encoder(resolved).state_dict()
    pooled = [key for key in state if key.startswith(("head.", "attn_pool.", "fc_norm.", "pooler."))]
    tensors = within(state, kept, [*whole, *pooled], where=f"{where}: encoder {name}")
    return {f"model.vision_tower.encoders.{name}.model.{key}": value for key, value in tensors.items()}


def whole_encoder(config: EncoderConfig) -> nn.Module:
    """The library's model before anything is cut off. Call it under ``torch.device("meta")``."""
    from mllm.encoders.timm import TimmConfig, create

    if isinstance(config, TimmConfig):
        return create(config.architecture, config.resolved_info.image, config.options)
    from mllm.encoders.hf import HfConfig
    from mllm.encoders.hf_models import new_model, set_image_size, vision_config

    assert isinstance(config, HfConfig)
    full = vision_config(config.known_architecture)
    set_image_size(full, config.resolved_info.image)
    return new_model(full)


def decoder_tensors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A language model's decoder under our names."""
    return {f"model.language_model.{key}": value for key, value in state.items()}


def head_tensors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The output head under our names."""
    return {f"lm_head.{key}": value for key, value in state.items()}


def projector_tensors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The connector under our names."""
    return {f"model.multi_modal_projector.{key}": value for key, value in state.items()}
