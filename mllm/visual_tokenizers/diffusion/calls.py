"""How is each network of `diffusers` called at one step, with nothing that a decoder of codes does not have?"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mllm.visual_tokenizers.diffusion.config import DiffusionDecoderConfig


def called(
    network: Any, config: DiffusionDecoderConfig, seen: Tensor, times: Tensor, tokens: Tensor | None, **more: Any
) -> Any:
    """The output of a network, or of a copy of it. seen ``(B, C, H, W)``, times ``(B,)``; tokens ``(B, N, D)`` or None."""
    number, device = len(seen), seen.device
    if config.network == "unet":
        return network(seen, times, **more)
    if config.network == "dit":
        # Its class embedding drops labels at random in training; the label that stands for a dropped one stays what it is.
        labels = torch.ones(number, dtype=torch.long, device=device)
        return network(seen, timestep=times, class_labels=labels, **more)
    if config.network == "sd3":
        width, pooled = network.config.joint_attention_dim, network.config.pooled_projection_dim
        tokens = torch.zeros(number, 1, width, device=device) if tokens is None else tokens
        zeros = torch.zeros(number, pooled, device=device)
        return network(seen, encoder_hidden_states=tokens, pooled_projections=zeros, timestep=times, **more)
    # Without a sequence the attention sees one zero: ILLUME+'s 77 zeros of an absent text give the same.
    tokens = torch.zeros(number, 1, network.config.cross_attention_dim, device=device) if tokens is None else tokens
    if network.config.addition_embed_type == "text_time":  # SDXL: its pooled text and six time ids
        ids = time_ids(number, config.size_index or 0).to(device)
        pooled = network.config.projection_class_embeddings_input_dim - 6 * network.config.addition_time_embed_dim
        more["added_cond_kwargs"] = {"text_embeds": torch.zeros(number, pooled, device=device), "time_ids": ids}
    return network(seen, times, encoder_hidden_states=tokens, **more)


def time_ids(number: int, size_index: int) -> Tensor:
    """``(number, 6)``: SDXL's size and crop are gone; the last says which of its sizes ILLUME+ draws."""
    ids = torch.zeros(number, 6)
    ids[:, 5] = size_index
    return ids
