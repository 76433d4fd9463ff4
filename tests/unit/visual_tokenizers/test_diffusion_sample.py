"""Is a diffusion decoder that tells the clean picture taught and sampled as flow matching says?"""

from __future__ import annotations

import pytest
import torch

from mllm.errors import ConfigError
from mllm.train.stages.diffusion.stage import narrow_patches
from mllm.visual_tokenizers.diffusion.decoder import decoder_config
from mllm.visual_tokenizers.diffusion.objectives import build_objective
from tests.unit.visual_tokenizers.diffusion_configs import DIT, tiny_decoder
from tests.unit.visual_tokenizers.test_diffusion import some_codes


@pytest.mark.parametrize("steps", [1, 4])
def test_told_exactly_it_has_nothing_to_learn(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The samplers arrive at what is told, and the loss compares what flow matching's does."""
    decoder = tiny_decoder("unet", prediction="sample", drop=0.0)
    pixels = torch.rand(3, 3, 16, 16) * 2 - 1
    codes = some_codes(decoder.tokenizer)
    objective = decoder.objective
    times = torch.tensor([50.0, 400.0, 1000.0])
    noise = torch.randn_like(pixels)
    way = objective.from_sample(pixels, objective.noisy(pixels, noise, times), times)
    torch.testing.assert_close(way, objective.target(pixels, noise), atol=1e-4, rtol=0)
    assert (
        decoder.loss(pixels, decoder.tokenizer.embed(codes)).mean().item() > 0.1
    )  # a new network tells something else
    monkeypatch.setattr(decoder, "_told", lambda noisy, times, conditions: pixels)
    torch.testing.assert_close(decoder.decode(codes, steps=steps), pixels, atol=1e-4, rtol=0)


def test_near_the_picture_what_is_told_is_divided_by_no_less_than_a_twentieth() -> None:
    objective = build_objective(decoder_config({"prediction": "sample"}))
    noisy, told = torch.ones(2, 3, 4, 4), torch.zeros(2, 3, 4, 4)
    way = objective.from_sample(told, noisy, torch.tensor([0.0, 500.0]))
    assert way[0].unique().item() == pytest.approx(20) and way[1].unique().item() == pytest.approx(2)


def test_a_sample_is_told_in_flow_matching_alone() -> None:
    with pytest.raises(ConfigError, match="prediction sample is for flow_matching"):
        decoder_config({"prediction": "sample", "objective": "epsilon"})


def test_patches_wider_than_their_vector_lose_no_noise_that_is_not_told() -> None:
    wide = {**DIT, "patch_size": 4}
    assert narrow_patches(tiny_decoder("dit", "illume", settings=wide, objective="flow_matching"))
    assert not narrow_patches(
        tiny_decoder("dit", "illume", settings=wide, objective="flow_matching", prediction="sample")
    )
