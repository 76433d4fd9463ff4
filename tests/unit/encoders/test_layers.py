"""Are the features those of the library's own model, at the layer that was asked for?"""

from __future__ import annotations

import open_clip
import pytest
import timm
import torch
from transformers import AutoConfig, AutoModel, Pix2StructImageProcessor, Pix2StructVisionConfig, Pix2StructVisionModel

from mllm.encoders.catalogue import build_encoder, encoder_config
from mllm.errors import ConfigError, UnavailableError

SIZES = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64}
CLIP = {"model_type": "clip_vision_model", **SIZES, "image_size": 16, "patch_size": 4}
SIGLIP = {**CLIP, "model_type": "siglip_vision_model", "vision_use_head": False}
DINOV2 = {"model_type": "dinov2", "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "image_size": 16}
RADIO = {**DINOV2, "model_type": "radio", "patch_size": 4, "max_img_size": 32}


def stir(model, seed=0):
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model.eval()


def make(seed=0, **config):
    return stir(build_encoder(encoder_config(config, where="encoder")), seed)


def transplant(encoder, reference):
    """The reference's weights, as far as the encoder has them."""
    encoder.model.load_state_dict({k: v for k, v in reference.state_dict().items() if k in encoder.model.state_dict()})
    return encoder.eval()


def reference_model(architecture):
    settings = dict(architecture)
    return stir(AutoModel.from_config(AutoConfig.for_model(settings.pop("model_type"), **settings)))


def prefix_and_tokens(features):
    return torch.cat([features.prefix, features.tokens], dim=1)


@pytest.mark.parametrize("layer", [0, 1, 3, -1, -2, -5])
@torch.no_grad()
def test_clip_layers_are_hugging_faces_hidden_states(layer):
    reference = reference_model(CLIP)
    encoder = transplant(
        make(type="hf", architecture=CLIP, layers=[layer], final_norm=False, keep_prefix=True), reference
    )
    pixels = torch.randn(2, 3, 16, 16)
    want = reference(pixels, output_hidden_states=True).hidden_states[layer]
    torch.testing.assert_close(prefix_and_tokens(encoder(pixels)), want, rtol=0, atol=1e-5)


@torch.no_grad()
def test_llavas_choice_needs_no_norm_and_no_last_block():
    encoder = make(type="hf", architecture=CLIP, layers=[-2])
    assert "final_norm" in type(encoder.config).model_fields and encoder.config.final_norm
    names = {name for name, _ in encoder.named_parameters()}
    assert not any("layers.3." in name or "post_layernorm" in name for name in names)
    assert any("layers.2." in name for name in names)


@torch.no_grad()
def test_the_last_norm_of_clip_reaches_every_token():
    reference = reference_model(CLIP)
    encoder = transplant(make(type="hf", architecture=CLIP, layers=[-1], keep_prefix=True), reference)
    pixels = torch.randn(2, 3, 16, 16)
    out = reference(pixels, output_hidden_states=True)
    have = prefix_and_tokens(encoder(pixels))
    torch.testing.assert_close(have[:, 0], out.pooler_output, rtol=0, atol=1e-5)
    torch.testing.assert_close(have, reference.post_layernorm(out.hidden_states[-1]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("architecture", [SIGLIP, {**DINOV2, "patch_size": 4}], ids=["siglip", "dinov2"])
@torch.no_grad()
def test_last_layer_with_norm_is_the_last_hidden_state(architecture):
    reference = reference_model(architecture)
    encoder = transplant(make(type="hf", architecture=architecture), reference)
    pixels = torch.randn(2, 3, 16, 16)
    want = reference(pixels).last_hidden_state[:, -16:]
    torch.testing.assert_close(encoder(pixels).tokens, want, rtol=0, atol=1e-5)


@torch.no_grad()
def test_radio_takes_unnormalised_pixels_and_gives_its_features():
    reference = reference_model(RADIO)
    encoder = transplant(make(type="hf", architecture=RADIO, keep_prefix=True), reference)
    pixels = torch.rand(2, 3, 16, 16)
    out = reference(pixels)
    features = encoder(pixels)
    assert encoder.config.info.image.mean == (0, 0, 0) and encoder.config.info.num_prefix_tokens == 10
    torch.testing.assert_close(features.tokens, out.features, rtol=0, atol=1e-5)
    torch.testing.assert_close(prefix_and_tokens(features), out.last_hidden_state, rtol=0, atol=1e-5)


@torch.no_grad()
def test_siglip2_is_given_patches_mask_and_shapes_of_its_image():
    architecture = {"model_type": "siglip2_vision_model", **SIZES, "num_patches": 16, "patch_size": 4}
    reference = reference_model({**architecture, "vision_use_head": False})
    encoder = transplant(make(type="hf", architecture=architecture, image_size=[8, 24]), reference)
    pixels = torch.randn(2, 3, 8, 24)
    # Siglip2ImageProcessor's layout: patches in raster order, each (row, column, channel)
    patches = pixels.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 4, 5, 1).reshape(2, 12, 48)
    want = reference(patches, torch.ones(2, 12, dtype=torch.long), torch.tensor([[2, 6], [2, 6]])).last_hidden_state
    torch.testing.assert_close(encoder(pixels).tokens, want, rtol=0, atol=1e-5)


@torch.no_grad()
def test_pix2struct_sees_what_its_image_processor_makes():
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "d_ff": 64, "d_kv": 16, "seq_len": 64}
    reference = stir(Pix2StructVisionModel(Pix2StructVisionConfig(**sizes)))
    encoder = transplant(
        make(type="hf", architecture={"model_type": "pix2struct_vision_model", **sizes}, image_size=64), reference
    )
    image = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8)
    inputs = Pix2StructImageProcessor(max_patches=16)(images=[image], return_tensors="pt")
    want = reference(**inputs).last_hidden_state
    torch.testing.assert_close(encoder(image[None] / 255).tokens, want, rtol=0, atol=2e-5)


@pytest.mark.parametrize("family", ["clip", "siglip", "dinov2", "radio"])
@torch.no_grad()
def test_attention_is_that_of_the_deepest_block_that_runs(family):
    architecture = {"clip": CLIP, "siglip": SIGLIP, "dinov2": {**DINOV2, "patch_size": 4}, "radio": RADIO}[family]
    reference = reference_model(architecture)
    encoder = transplant(make(type="hf", architecture=architecture, layers=[-2]), reference)
    pixels = torch.randn(2, 3, 16, 16)
    plain = encoder(pixels)
    features = encoder(pixels, return_attention=True)
    reference.set_attn_implementation("eager")
    want = reference(pixels, output_attentions=True).attentions[-2]
    torch.testing.assert_close(features.attention, want, rtol=0, atol=1e-5)
    torch.testing.assert_close(features.tokens, plain.tokens, rtol=0, atol=1e-5)
    assert encoder.model.config._attn_implementation == "sdpa" and plain.attention is None
    assert encoder(pixels[:0], return_attention=True).attention.shape == (0, *want.shape[1:])


def test_libraries_without_attention_weights_say_so():
    encoder = make(type="timm", architecture="vit_tiny_patch16_224", options={"depth": 1}, image_size=32)
    with pytest.raises(UnavailableError, match="type: hf"):
        encoder(torch.randn(1, 3, 32, 32), return_attention=True)


TIMM = {"embed_dim": 32, "depth": 4, "num_heads": 2, "patch_size": 4}


@torch.no_grad()
def test_timm_layer_minus_two_is_prismatics_penultimate_block():
    options = {**TIMM, "img_size": 16}
    reference = stir(timm.create_model("vit_large_patch14_reg4_dinov2", num_classes=0, **options))
    encoder = transplant(
        make(type="timm", architecture="vit_large_patch14_reg4_dinov2", options=TIMM, image_size=16, layers=[-2]),
        reference,
    )
    pixels = torch.randn(2, 3, 16, 16)
    (want,) = reference.get_intermediate_layers(pixels, n={len(reference.blocks) - 2})
    torch.testing.assert_close(encoder(pixels).tokens, want, rtol=0, atol=1e-5)
    assert len(encoder.model.blocks) == 3 and isinstance(encoder.model.norm, torch.nn.Identity)


@torch.no_grad()
def test_timm_last_layer_with_norm_is_forward_features_and_layers_are_concatenated_in_order():
    reference = stir(timm.create_model("vit_large_patch14_reg4_dinov2", num_classes=0, img_size=16, **TIMM))
    common = {"type": "timm", "architecture": "vit_large_patch14_reg4_dinov2", "options": TIMM, "image_size": 16}
    pixels = torch.randn(2, 3, 16, 16)
    last = transplant(make(**common, keep_prefix=True), reference)(pixels)
    torch.testing.assert_close(prefix_and_tokens(last), reference.forward_features(pixels), rtol=0, atol=1e-5)
    both = transplant(make(**common, layers=[-1, 2]), reference)(pixels).tokens
    second = transplant(make(**common, layers=[2]), reference)(pixels).tokens
    torch.testing.assert_close(both, torch.cat([last.tokens, second], dim=-1), rtol=0, atol=1e-5)


@torch.no_grad()
def test_sams_last_norm_is_its_neck():
    options = {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 4, "window_size": 2, "neck_chans": 16}
    options["global_attn_indexes"] = [1]
    reference = stir(timm.create_model("samvit_base_patch16", num_classes=0, img_size=16, **options))
    common = {"type": "timm", "architecture": "samvit_base_patch16", "options": options, "image_size": 16}
    pixels = torch.randn(2, 3, 16, 16)
    have = transplant(make(**common), reference)(pixels)
    torch.testing.assert_close(
        have.tokens.mT.unflatten(2, (4, 4)), reference.forward_features(pixels), rtol=0, atol=1e-5
    )
    assert make(**common, final_norm=False).config.info.width == 32


@torch.no_grad()
def test_stages_of_a_hierarchical_model_meet_on_the_grid_of_the_last_one_named():
    options = {"dims": [8, 16, 24, 32], "depths": [1, 1, 2, 1]}
    common = {"type": "timm", "architecture": "convnext_atto", "options": options, "image_size": 64}
    reference = stir(timm.create_model("convnext_atto", num_classes=0, **options))
    encoder = transplant(make(**common, layers=[-1, -2]), reference)
    assert encoder.config.info.grid == (4, 4) and encoder.config.info.width == 32 + 24
    pixels = torch.randn(2, 3, 64, 64)
    final, maps = reference.forward_intermediates(pixels)
    up = torch.nn.functional.interpolate(final, size=(4, 4), mode="bilinear", align_corners=False)
    want = torch.cat([up, maps[-2]], dim=1).flatten(2).mT
    torch.testing.assert_close(encoder(pixels).tokens, want, rtol=0, atol=1e-5)
    assert len(make(**common, layers=[2]).model.stages) == 2


@torch.no_grad()
def test_open_clip_layers_are_residual_block_outputs_and_the_norm_is_ln_post():
    vision = {"image_size": 16, "layers": 4, "width": 32, "head_width": 16, "patch_size": 4}
    reference = stir(open_clip.model._build_vision_tower(16, open_clip.model.CLIPVisionCfg(**vision), quick_gelu=True))
    outputs = []
    for block in reference.transformer.resblocks:
        block.register_forward_hook(lambda module, args, output: outputs.append(output))
    common = {"type": "open_clip", "architecture": {"embed_dim": 16, "vision_cfg": vision, "quick_gelu": True}}
    pixels = torch.randn(2, 3, 16, 16)
    reference(pixels)
    encoder = transplant(make(**common, layers=[-2, -1], keep_prefix=True), reference)
    want = torch.cat([outputs[2], reference.ln_post(outputs[3])], dim=-1)
    torch.testing.assert_close(prefix_and_tokens(encoder(pixels)), want, rtol=0, atol=1e-5)


def test_open_clip_uses_openais_activation_where_the_weights_need_it():
    tagged = encoder_config(
        {"type": "open_clip", "architecture": "ViT-B-32", "weights": {"source": "openai"}}, where="encoder"
    )
    plain = encoder_config("clip-vit-b-32", where="encoder")
    assert tagged.quick_gelu and not plain.quick_gelu


def test_a_layer_that_does_not_exist_is_named():
    with pytest.raises(ConfigError, match=r"encoder\.layers: -6 does not exist; the encoder has 4 blocks"):
        make(type="hf", architecture=CLIP, layers=[-6])
    with pytest.raises(ConfigError, match=r"layers: 0 is the embeddings before the first block"):
        make(type="timm", architecture="vit_tiny_patch16_224", layers=[0])


def test_architectures_with_several_ends_ask_for_no_final_norm():
    with pytest.raises(ConfigError, match="final_norm: false"):
        make(type="timm", architecture="crossvit_tiny_240")
    assert encoder_config(
        {"type": "timm", "architecture": "crossvit_tiny_240", "final_norm": False}, where="encoder"
    ).info.grid == (14, 14)


def test_unknown_architectures_are_met_with_a_suggestion():
    with pytest.raises(ConfigError, match="did you mean 'vit_tiny_patch16_224'"):
        make(type="timm", architecture="vit_tiny_patch16_22")
    with pytest.raises(ConfigError, match="did you mean 'ViT-L-14-336'"):
        make(type="open_clip", architecture="ViT-L-14-33")
    with pytest.raises(ConfigError, match="did you mean 'siglip_vision_model'"):
        make(type="hf", architecture={"model_type": "siglip_vision"})
    with pytest.raises(ConfigError, match=r"architecture\.hidden_sise.*did you mean 'hidden_size'"):
        make(type="hf", architecture={**CLIP, "hidden_sise": 3})
    with pytest.raises(ConfigError, match=r"no weights tagged 'lvd142'.*did you mean 'lvd142m'"):
        make(type="timm", architecture="vit_large_patch14_reg4_dinov2.lvd142")


def test_pretrained_preprocessing_is_used_unless_overridden():
    image = encoder_config({"type": "timm", "architecture": "vit_so400m_patch14_siglip_384"}, where="e").info.image
    assert (image.height, image.mean, image.std) == (384, (0.5,) * 3, (0.5,) * 3)
    changes = {"mean": [0.1, 0.2, 0.3], "resize": "letterbox", "interpolation": "bilinear", "image_size": [224, 448]}
    info = encoder_config({"type": "timm", "architecture": "vit_tiny_patch16_224", **changes}, where="e").info
    assert (info.image.height, info.image.width, info.grid) == (224, 448, (14, 28))
    assert (info.image.mean, info.image.resize, info.image.interpolation) == ((0.1, 0.2, 0.3), "letterbox", "bilinear")


def test_a_family_of_unknown_preprocessing_asks_for_it():
    architecture = {"model_type": "pixio", "image_size": 16, "patch_size": 4, "hidden_size": 32, "num_hidden_layers": 1}
    config = {"type": "hf", "architecture": {**architecture, "num_attention_heads": 2}}
    with pytest.raises(ConfigError, match=r"encoder\.mean: the preprocessing of pixio is not known; give mean and std"):
        make(**config)
    assert make(**config, mean=[0.5] * 3, std=[0.5] * 3).config.info.grid == (4, 4)


@torch.no_grad()
def test_dropped_patches_and_random_positions_stay_out_of_training():
    vision = {"image_size": 16, "layers": 2, "width": 32, "head_width": 16, "patch_size": 4, "patch_dropout": 0.5}
    dinov3 = {**CLIP, "model_type": "dinov3_vit", "pos_embed_rescale": 2.0}
    for config in (
        {"type": "open_clip", "architecture": {"embed_dim": 16, "vision_cfg": vision}},
        {"type": "hf", "architecture": dinov3},
    ):
        encoder = make(**config)
        pixels = torch.randn(2, 3, 16, 16)
        want = encoder(pixels).tokens
        torch.testing.assert_close(encoder.train()(pixels).tokens, want, rtol=0, atol=1e-5)


def test_what_a_library_says_about_its_settings_is_passed_on():
    with pytest.raises(ConfigError, match=r"encoder\.architecture: this encoder does not build \(.*div"):
        make(type="timm", architecture="vit_tiny_patch16_224", options={"embed_dim": 30, "num_heads": 4})
    with pytest.raises(ConfigError, match=r"encoder\.options: timm's vit_tiny_patch16_224 does not build.*dept"):
        make(type="timm", architecture="vit_tiny_patch16_224", options={"dept": 3})
    with pytest.raises(ConfigError, match=r"options: img_size and num_classes are set by the toolkit"):
        make(type="timm", architecture="vit_tiny_patch16_224", options={"img_size": 3})
    architecture = {**CLIP, "model_type": "aimv2_vision_model"}
    with pytest.raises(ConfigError, match=r"encoder\.image_size: this encoder does not run on 16 x 24 pixels"):
        make(type="hf", architecture=architecture, image_size=[16, 24])


def test_prefix_tokens_that_an_encoder_lacks_cannot_be_asked_for():
    with pytest.raises(ConfigError, match=r"encoder\.keep_prefix: this encoder has no class or register tokens"):
        make(type="hf", architecture=SIGLIP, keep_prefix=True)


def test_positions_are_exact_in_a_model_built_in_bfloat16():
    config = {
        "type": "timm",
        "architecture": "eva02_tiny_patch14_224",
        "options": {**TIMM, "depth": 1},
        "image_size": 64,
    }
    exact = make(**config).model.rope.pos_embed
    torch.set_default_dtype(torch.bfloat16)
    try:
        rounded = build_encoder(encoder_config(config, where="encoder")).model.rope.pos_embed
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(rounded.float(), exact.to(rounded.dtype).float())


@pytest.mark.parametrize(
    "config",
    [
        {
            "type": "timm",
            "architecture": "tf_efficientnet_lite0",
            "image_size": 64,
            "layers": [-1, -2],
            "final_norm": False,
            "train_batch_norm": False,
        },
        {"type": "ppocr", "image_size": 64},
    ],
    ids=lambda config: config["type"],
)
def test_convolutions_see_and_learn_the_same_with_channels_last(config):
    torch.manual_seed(0)
    model = build_encoder(encoder_config(config, where="e")).double().train()  # no rounding across a kink
    pixels, seen = torch.randn(2, 3, 64, 64, dtype=torch.float64), []
    for layout in (torch.contiguous_format, torch.channels_last):
        tokens = model(pixels.contiguous(memory_format=layout)).tokens
        tokens.square().sum().backward()
        seen.append([tokens.detach(), *(p.grad.clone() for p in model.parameters())])
        model.zero_grad()
    for plain, last in zip(*seen, strict=True):
        torch.testing.assert_close(last, plain, rtol=1e-6, atol=1e-9 * float(plain.abs().max()))
        assert last.is_contiguous()
