"""What tests of encoders of several views have in common."""

from __future__ import annotations

from typing import Any

import torch

from mllm.encoders.catalogue import build_encoder, encoder_config

SMALL_PI3 = {
    "width": 32,
    "num_heads": 2,
    "depth": 2,
    "dinov2_depth": 2,
    "dinov2_image_size": 56,
    "image_size": [42, 56],
}
"""Sizes of the π³ that the vectors pi3 and pi3_heads were made with."""


def build(config: dict[str, Any], **changes: Any) -> Any:
    """The encoder of a config with changes, as drawn."""
    return build_encoder(encoder_config({**config, **changes}, where="encoder")).eval()


def stirred(config: dict[str, Any], **changes: Any) -> Any:
    """One whose every weight counts."""
    torch.manual_seed(0)
    encoder = build(config, **changes)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return encoder


def check_gradients(encoder: Any) -> None:
    """Assert that every weight learns, and the same where blocks are computed again."""
    encoder.train()
    pixels, ids = torch.rand(4, 3, 16, 20), torch.tensor([0, 0, 0, 1])
    found = []
    for enabled in (False, True):
        encoder.zero_grad()
        encoder.set_gradient_checkpointing(enabled)
        features = encoder(pixels, scene_ids=ids)
        (features.tokens.square().mean() + features.prefix.square().mean()).backward()
        found.append({name: parameter.grad.clone() for name, parameter in encoder.named_parameters()})
    for name, gradient in found[0].items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(found[1][name], gradient, atol=1e-6, rtol=1e-5)
