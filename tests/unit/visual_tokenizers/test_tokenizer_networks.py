"""Do the networks reproduce the published modules' outputs?"""

from __future__ import annotations

import re

import pytest
import torch

from mllm.errors import ConfigError
from mllm.visual_tokenizers.networks.convolution import (
    ConvolutionalDecoder,
    ConvolutionalEncoder,
    ConvolutionConfig,
    Norm,
    ResidualBlock,
    ShuffleDown,
    ShuffleUp,
    SpatialNorm,
)
from mllm.visual_tokenizers.networks.discriminator import (
    DiscriminatorConfig,
    adaptive_weight,
    build_discriminator,
    gate,
    generator_loss,
    hinge_discriminator_loss,
)
from mllm.visual_tokenizers.networks.transformer import AttentionProjection, CodeTransformer, RotaryTransformer

BLOCK = [
    (r"\bblock_([12])\b", r"block\1"), (r"attn_1\b", "attention"), (r"nin_shortcut", "shortcut"),
    (r"\.q\.", ".query."), (r"\.k\.", ".key."), (r"\.v\.", ".value."), (r"proj_out", "out"), (r"^mid\.", "middle."),
    (r"norm_layer", "norm"), (r"conv_y", "scale"), (r"conv_b\b", "shift"),
]  # fmt: skip
TOKENFLOW = [
    (r"conv_blocks\.(\d+)\.res\.", r"levels.\1.blocks."), (r"conv_blocks\.(\d+)\.attn\.", r"levels.\1.attention."),
    (r"conv_blocks\.(\d+)\.(down|up)sample\.", r"levels.\1.resample."), (r"^mid\.0", "mid.block_1"),
    (r"^mid\.1", "mid.attn_1"), (r"^mid\.2", "mid.block_2"), *BLOCK,
]  # fmt: skip


def by_level(num_levels):
    """Reference names ``up.<resolution index>`` to positions in our list, lowest resolution first."""
    return [
        (r"^up\.(\d+)\.", lambda m: f"levels.{num_levels - 1 - int(m[1])}."), (r"\.block\.", ".blocks."),
        (r"\.attn\.", ".attention."), (r"\.upsample\.", ".resample."), *BLOCK,
    ]  # fmt: skip


PROJECTION = [
    (r"^attn\.(q|v)_bias", r"\1_bias"), (r"^attn\.qkv", "qkv"), (r"^attn\.proj", "out"), (r"^mlp\.norm", "mlp_norm"),
    (r"^mlp\.w0", "gate"), (r"^mlp\.w1", "up"), (r"^mlp\.w2", "mlp_out"),
]  # fmt: skip


def renamed(weights, rules):
    out = {}
    for name, value in weights.items():
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        out[name] = value
    return out


def conv_config(case, **changes):
    ctor = case.meta["ctor"]
    return ConvolutionConfig(
        channels=ctor["ch"], multipliers=tuple(ctor["ch_mult"]), num_res_blocks=ctor["num_res_blocks"], **changes
    )


def test_pixel_encoder_is_tokenflows(golden):
    case = golden("tokenflow_pixel_encoder")
    encoder = ConvolutionalEncoder(conv_config(case), case.meta["ctor"]["z_channels"]).eval()
    encoder.load_state_dict(renamed(case.weights, TOKENFLOW))
    case.check(y=encoder(case.inputs["x"]))


def test_pixel_decoder_is_tokenflows(golden):
    case = golden("tokenflow_pixel_decoder")
    decoder = ConvolutionalDecoder(conv_config(case), case.meta["ctor"]["z_channels"]).eval()
    decoder.load_state_dict(renamed(case.weights, TOKENFLOW))
    case.check(y=decoder(case.inputs["z"]))


def test_pixel_decoder_is_dualtokens(golden):
    case = golden("dualtoken_pixel_decoder")
    decoder = ConvolutionalDecoder(conv_config(case), case.meta["ctor"]["decoder_in_channels"]).eval()
    decoder.load_state_dict(renamed(case.weights, by_level(2)))
    case.check(y=decoder(case.inputs["z"]))


def test_movq_decoder_is_illumes(golden):
    case = golden("illume_movq_decoder")
    decoder = ConvolutionalDecoder(conv_config(case, attention_levels=(1,)), 8, condition_channels=8).eval()
    decoder.load_state_dict(renamed(case.weights, by_level(2)))
    case.check(y=decoder(case.inputs["z"], case.inputs["zq"]))


def test_spatial_norm_is_illumes(golden):
    case = golden("illume_spatial_norm")
    norm = SpatialNorm(32, 32, 8)
    norm.load_state_dict(renamed(case.weights, BLOCK))
    case.check(y=norm(case.inputs["x"], case.inputs["zq"]))


@pytest.mark.parametrize(("name", "block"), [("illume_dc_down", ShuffleDown), ("illume_dc_up", ShuffleUp)])
def test_shuffle_blocks_are_illumes(golden, name, block):
    case = golden(name)
    module = block(case.meta["ctor"]["in_channels"], case.meta["ctor"]["out_channels"])
    module.load_state_dict(case.weights)
    case.check(y=module(case.inputs["x"]))


def test_post_quantisation_block_is_dualtokens(golden):
    case = golden("dualtoken_post_quant_block")
    block = ResidualBlock(64, 96, first_kernel=1)
    block.load_state_dict(renamed(case.weights, BLOCK))
    case.check(y=block(case.inputs["x"]))


@pytest.mark.parametrize(("way", "in_dim", "out_dim"), [("down", 72, 8), ("up", 8, 72)])
def test_attention_projection_is_dualtokens(golden, way, in_dim, out_dim):
    case = golden(f"dualtoken_attn_projection_{way}")
    module = AttentionProjection(in_dim, out_dim, 9, causal=way == "up")
    module.load_state_dict(renamed(case.weights, PROJECTION))
    case.check(y=module(case.inputs["x"]))


def test_semantic_decoder_is_tokenflows(golden):
    case = golden("tokenflow_semantic_decoder")
    module = CodeTransformer(8, 48, 3, 12, (4, 4)).eval()
    rules = [
        (r"cls_token", "class_token"), (r"pos_embed", "positions"), (r"patch_embed\.proj", "embed"),
        (r"\.attn\.", ".attention."), (r"\.mlp\.", "."), (r"fc_norm", "norm"),
    ]  # fmt: skip
    weights = renamed(case.weights, rules)
    weights["embed.weight"] = weights["embed.weight"][:, :, 0, 0]
    module.load_state_dict(weights)
    case.check(
        y=module(case.inputs["x"].flatten(2).transpose(1, 2)),
        y_big=module(case.inputs["x_big"].flatten(2).transpose(1, 2), (6, 6)),
    )


def test_patch_discriminator_is_tokenflows(golden):
    case = golden("tokenflow_patchgan")
    judge = build_discriminator(DiscriminatorConfig(channels=8, num_layers=3)).eval()
    judge.load_state_dict(renamed(case.weights, [("^main", "layers")]), strict=False)
    case.check(y=judge(case.inputs["x"]))


def test_residual_discriminator_is_dualtokens(golden):
    case = golden("dualtoken_discriminator")
    judge = build_discriminator(DiscriminatorConfig(type="residual", channels=64, num_layers=2)).eval()
    rules = [("^main", "layers"), ("norm1", "norm"), ("conv1", "conv"), ("nin_shortcut", "shortcut")]
    judge.load_state_dict(renamed(case.weights, rules))
    case.check(y=judge(case.inputs["x"]))


def test_gan_losses_are_tokenflows(golden):
    case = golden("tokenflow_gan_losses")
    start, weight = case.meta["ctor"]["start"], case.meta["ctor"]["weight"]
    case.check(
        d_loss=hinge_discriminator_loss(case.inputs["real"], case.inputs["fake"]),
        g_loss=generator_loss(case.inputs["fake"]),
        gate=torch.tensor([gate(weight, step, start) for step in (0, start - 1, start, start + 1)]),
    )


def test_leaky_hinge_is_dualtokens(golden):
    case = golden("dualtoken_hinge_loss")
    loss = hinge_discriminator_loss(case.inputs["real"], case.inputs["fake"], leak=0.01)
    case.check(loss=loss)


def test_adaptive_weight_is_the_ratio_of_gradients_and_is_clamped():
    last = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    x = torch.tensor([3.0, 4.0])
    ratio = adaptive_weight((last * x).sum() * 2, (last * x).sum(), last)
    assert torch.allclose(ratio, torch.tensor(2.0), atol=1e-3)
    assert adaptive_weight((last * x).sum() * 1e3, (last * x).sum(), last, high=10.0) == 10.0


def test_shuffle_sampling_builds_a_whole_encoder_and_decoder():
    config = ConvolutionConfig(channels=16, multipliers=(1, 2, 2), num_res_blocks=1, sampling="shuffle", groups=8)
    x = torch.randn(2, 3, 16, 24)
    z = ConvolutionalEncoder(config, 5)(x)
    assert z.shape == (2, 5, 4, 6)
    assert ConvolutionalDecoder(config, 5)(z).shape == x.shape


def test_rotary_positions_are_relative_in_rows_and_columns():
    torch.manual_seed(0)
    from mllm.visual_tokenizers.networks.transformer import rotary_table, rotate

    q, k = torch.randn(1, 16), torch.randn(1, 16)
    table = rotary_table((5, 5), 16, torch.device("cpu"))
    at = lambda v, r, c: rotate(v, (table[0][r * 5 + c], table[1][r * 5 + c]))  # noqa: E731
    score = lambda a, b: float((at(q, *a) * at(k, *b)).sum())  # noqa: E731
    assert score((0, 0), (1, 2)) == pytest.approx(score((2, 1), (3, 3)), abs=1e-5)
    assert score((0, 0), (1, 2)) != pytest.approx(score((0, 0), (2, 1)), abs=1e-3)
    assert RotaryTransformer(8, 16, 4, 1, 2)(torch.randn(2, 6, 8), (2, 3)).shape == (2, 6, 4)


def test_odd_images_and_widths_are_refused_with_the_cure():
    config = ConvolutionConfig(channels=8, multipliers=(1, 1), num_res_blocks=1, groups=4)
    with pytest.raises(ConfigError, match="multiple of 2"):
        ConvolutionalEncoder(config, 4)(torch.zeros(1, 3, 9, 8))
    with pytest.raises(ConfigError, match="groups"):
        ConvolutionalEncoder(ConvolutionConfig(channels=10, multipliers=(1,), groups=32), 4)
    with pytest.raises(ConfigError, match="heads"):
        AttentionProjection(72, 8, 8)


def test_norm_after_a_frozen_layer_has_a_gradient():
    # A channels-last input without gradient: torch's own group norm crashes here on the CPU.
    norm = Norm(16, 8)
    norm(torch.randn(2, 16, 4, 4).to(memory_format=torch.channels_last)).sum().backward()
    assert norm.weight.grad is not None and norm.weight.grad.isfinite().all()


def test_local_codes_tell_their_own_cell_alone() -> None:
    torch.manual_seed(0)
    sizes = {"channels": 8, "multipliers": [1, 2, 2], "num_res_blocks": 1, "groups": 8, "sampling": "shuffle"}
    still = {"attention_levels": [], "middle_attention": False}
    pictures = torch.rand(1, 3, 16, 16) * 2 - 1
    changed = pictures.clone()
    changed[..., 4:8, 8:12] *= -1  # the cell in row 1, column 2
    for local in (True, False):
        config = ConvolutionConfig.model_validate({**sizes, **still, "local": local})
        encoder, decoder = ConvolutionalEncoder(config, 6), ConvolutionalDecoder(config, 6, condition_channels=6)
        with torch.no_grad():
            first, second = encoder(pictures), encoder(changed)
            painted = [decoder(features, features) for features in (first, second)]
        moved = (first - second).abs().amax((0, 1)) > 1e-5
        repainted = (painted[0] - painted[1]).abs().amax((0, 1)) > 1e-5
        assert moved[1, 2] and repainted[4:8, 8:12].any()
        assert (int(moved.sum()) == 1) == local  # without, the norms over the picture move every code
        assert bool(repainted[:4].any()) != local
    for wrong in ({"middle_attention": True}, {"sampling": "convolution"}, {"attention_levels": [0]}):
        with pytest.raises(ValueError, match="tells its own cell"):
            ConvolutionConfig.model_validate({**sizes, **still, "local": True, **wrong})
