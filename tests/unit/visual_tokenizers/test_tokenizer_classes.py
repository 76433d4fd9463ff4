"""Do the tokenizers compose their parts as the papers' code does?"""

from __future__ import annotations

import re

import pytest
import torch

from mllm.errors import CheckpointError, ConfigError
from mllm.visual_tokenizers.base import build_tokenizer, tokenizer_config
from mllm.visual_tokenizers.encoder import FeatureEncoder, encoder_settings, resize_tokens
from mllm.visual_tokenizers.teacher import EncoderTeacher
from tests.unit.visual_tokenizers.test_tokenizer_networks import BLOCK, PROJECTION, by_level, renamed
from tests.unit.visual_tokenizers.test_tokenizer_quantizers import EXAMPLES
from tests.unit.visual_tokenizers.tokenizer_configs import CONV, HEAD, SHARED, TINY, VIT


def dualtoken_state(weights):
    """Reference names → ours."""
    out = {}
    for name, value in weights.items():
        if name.startswith("siglip_model.vision_model."):
            name = name.removeprefix("siglip_model.vision_model.").replace("encoder.layers", "layers")
            out[name.replace("post_layernorm", "post_norm")] = value
        elif name.startswith("quantizer_"):
            book = {"sem": "semantic", "pix": "pixel"}[name[10:13]]
            for key, entry in (("weight", value[:-1]), ("sums", value[:-1]), ("counts", torch.ones(len(value) - 1))):
                out[f"{book}_quantizer.books.0.{key}"] = entry
        elif match := re.match(r"(prequant|postquant)_(sem|pix|shortcut)\.(.*)", name):
            book = {"sem": "semantic", "pix": "pixel", "shortcut": "shortcut"}[match[2]]
            way = {"prequant": "down", "postquant": "up"}[match[1]]
            (inner,) = renamed({match[3]: value}, PROJECTION)
            out[f"{book}_{way}.{inner}"] = value
        elif name.startswith("post_quant_conv."):
            (inner,) = renamed({name.removeprefix("post_quant_conv."): value}, BLOCK)
            out[f"from_codes.{inner}"] = value
        elif name.startswith("decoder."):
            (inner,) = renamed({name.removeprefix("decoder."): value}, by_level(2))
            out[f"decoder.{inner}"] = value
    return out


def test_two_level_encoding_is_dualtokens(golden):
    case = golden("dualtoken_two_level_encode")
    ctor = case.meta["ctor"]
    book = {"type": "residual", "size": ctor["n_embed"], "dim": ctor["vq_dim"], "depth": ctor["depth"]}
    vision = (
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "image_size",
        "patch_size",
    )
    decoder = ctor["decoder"]
    tokenizer = build_tokenizer(
        {
            "type": "dualtoken", "vision": {key: ctor[key] for key in vision},
            "layer_pixel": ctor["layer_recon"], "layer_shortcut": ctor["layer_shortcut"],
            "shortcut_weight": ctor["weight_shortcut"], "layer_semantic": ctor["layer_sem"],
            "pixel_quantizer": book, "semantic_quantizer": book, "decoder_grid": ctor["decoder_latent_shape"],
            "decoder": {
                "channels": decoder["ch"], "multipliers": decoder["ch_mult"],
                "num_res_blocks": decoder["num_res_blocks"],
            },
            "decoder_channels": decoder["decoder_in_channels"],
        }
    ).eval()  # fmt: skip
    state = dualtoken_state(case.weights)
    missing, unexpected = tokenizer.load_state_dict(state, strict=False)
    assert not unexpected and not missing
    with torch.no_grad():
        pixel, semantic = tokenizer._encode(case.inputs["image"])
        out = tokenizer(case.inputs["image"])
        hidden = tokenizer._run(tokenizer.embeddings(case.inputs["image"]), 0, ctor["layer_sem"])[ctor["layer_sem"]]
    case.check(
        zq_pix=tokenizer.embed(out.codes)["pixel"], loss_pix=pixel.losses["commitment"], code_pix=pixel.codes,
        zq_sem=out.features["tokens"], loss_sem=semantic.losses["commitment"], code_sem=semantic.codes,
        last_prequant=hidden, pooled=out.features["pooled"], image=out.reconstruction,
    )  # fmt: skip
    again = tokenizer.semantic_features(out.codes)
    assert torch.allclose(again["pooled"], out.features["pooled"], atol=1e-5)


def test_tokenflow_codes_carry_both_halves():
    tokenizer = build_tokenizer(TINY["tokenflow"]).eval()
    codes = tokenizer.encode(torch.rand(2, 3, 16, 16) * 2 - 1)
    halves = tokenizer.split(tokenizer.embed(codes)["shared"])
    assert {k: v.shape[-1] for k, v in halves.items()} == {"semantic": 8, "pixel": 4}
    assert tokenizer.semantic_tokens(codes).shape == (2, 16, 24)


def test_tokenflow_pixel_branch_may_work_at_another_size():
    config = {**TINY["tokenflow"], "image_size": 14, "pixel_image_size": 16, "student": {**VIT, "image_size": 16}}
    tokenizer = build_tokenizer(config).eval()
    assert tokenizer(torch.zeros(1, 3, 14, 14)).reconstruction.shape == (1, 3, 14, 14)


def test_dualtoken_semantic_codes_do_not_touch_pixels_and_the_reverse():
    tokenizer = build_tokenizer(TINY["dualtoken"]).eval()
    codes = tokenizer.encode(torch.rand(1, 3, 16, 16))
    with torch.no_grad():
        image, pooled = tokenizer.decode(codes), tokenizer.semantic_features(codes)["pooled"]
        codes.codes["semantic"] = (codes.codes["semantic"] + 1) % 16
        assert torch.equal(tokenizer.decode(codes), image)
        assert not torch.allclose(tokenizer.semantic_features(codes)["pooled"], pooled, atol=1e-4)


def test_illume_keeps_its_semantic_encoder_frozen_and_adds_noise_only_in_training():
    tokenizer = build_tokenizer(TINY["illume"]).train()
    assert not tokenizer.semantic_encoder.training
    assert not any(p.requires_grad for p in tokenizer.semantic_encoder.parameters())
    vectors = torch.randn(8, 16, 8)
    noisy = tokenizer._noisy(vectors)
    changed = (noisy != vectors).any(-1)
    assert changed.any() and not changed.all()
    assert torch.equal(noisy[changed], vectors.roll(1, 0)[changed])
    assert torch.equal(tokenizer.eval()._noisy(vectors), vectors)


def test_single_codebook_may_predict_a_teacher_too():
    tokenizer = build_tokenizer({**TINY["vq"], "semantic_head": HEAD})
    assert tokenizer(torch.zeros(2, 3, 16, 16)).features["tokens"].shape == (2, 16, 24)


@pytest.mark.parametrize("example", EXAMPLES)
def test_any_quantizer_fits_the_plain_tokenizer(example):
    config = EXAMPLES[example]
    tokenizer = build_tokenizer({**TINY["vq"], "quantizer": config}).eval()
    with torch.no_grad():
        codes = tokenizer.encode(torch.rand(2, 3, 16, 16) * 2 - 1)
        assert tokenizer.decode(codes).shape == (2, 3, 16, 16)
    assert codes.codes["pixel"].shape[1] == tokenizer.num_positions["pixel"]


def test_single_codebook_decoder_may_be_conditioned_on_the_codes():
    tokenizer = build_tokenizer({**TINY["vq"], "spatial_norm": True}).eval()
    pixels = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.allclose(tokenizer.decode(tokenizer.encode(pixels)), tokenizer(pixels).reconstruction, atol=1e-5)
    assert any("shift" in name for name, _ in tokenizer.decoder.named_parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"student": {**VIT, "patch_size": 8}}, "must agree"),
        ({"quantizer": {"type": "multi_scale", "scales": [1, 2], "inner": SHARED}}, "last scale is 2"),
        ({"quantizer": {"type": "vq", "size": 8, "parts": {"pixel": 4}}}, "semantic"),
        ({"encodr": CONV}, "did you mean 'encoder'"),
        ({"student": {**VIT, "wdith": 2}}, "did you mean 'width'"),
    ],
)
def test_misfits_are_refused_when_building(change, message):
    with pytest.raises(ConfigError, match=message):
        build_tokenizer({**TINY["tokenflow"], **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer_pixel": 3}, "layer_semantic"),
        ({"decoder_grid": [4, 4]}, "the image is 16×16"),
        ({"weights": {"source": "/nowhere/at/all"}}, "cannot be read"),
    ],
)
def test_dualtoken_says_what_does_not_fit(change, message):
    from mllm.errors import MllmError

    with pytest.raises(MllmError, match=message):
        build_tokenizer({**TINY["dualtoken"], **change}).load_pretrained()


def test_unknown_tokenizers_suggest_a_name():
    with pytest.raises(ConfigError, match="did you mean 'tokenflow'"):
        tokenizer_config({"type": "tokenflo"})


def test_teacher_features_are_resized_to_the_codes_grid():
    tokens = torch.arange(4.0).view(1, 4, 1)
    assert torch.equal(resize_tokens(tokens, (2, 2), (2, 2)), tokens)
    assert resize_tokens(tokens, (2, 2), (4, 4)).mean() == pytest.approx(1.5)


QWEN = {
    "type": "qwen2_vl_vision", "image_size": 56,
    "architecture": {"depth": 2, "embed_dim": 32, "hidden_size": 24, "num_heads": 2, "mlp_ratio": 2},
}  # fmt: skip


def test_qwen_vision_takes_patches_as_its_own_image_processor_makes_them():
    from PIL import Image
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    torch.manual_seed(0)
    encoder = FeatureEncoder(encoder_settings(QWEN)).eval()
    assert encoder.grid == (2, 2) and encoder.width == 24
    image = torch.randint(0, 256, (3, 56, 56), dtype=torch.uint8)
    processor = Qwen2VLImageProcessorPil(size={"shortest_edge": 56 * 56, "longest_edge": 56 * 56})
    made = processor(Image.fromarray(image.permute(1, 2, 0).numpy()), return_tensors="pt")
    with torch.no_grad():
        expected = encoder.encoder.model(made["pixel_values"], grid_thw=made["image_grid_thw"])
        expected = expected if isinstance(expected, torch.Tensor) else expected.pooler_output
        got = encoder(image[None].float() / 127.5 - 1)
    assert torch.allclose(got[0], expected, atol=1e-4)
    with torch.no_grad():
        batch = encoder(torch.rand(3, 3, 56, 56) * 2 - 1)
    assert batch.shape == (3, 4, 24) and encoder(torch.zeros(0, 3, 56, 56)).shape == (0, 4, 24)


def test_qwen_vision_survives_a_meta_build_and_loads_its_weights(tmp_path):
    torch.manual_seed(0)
    source = FeatureEncoder(encoder_settings(QWEN)).eval()
    source.encoder.model.save_pretrained(tmp_path)
    with torch.device("meta"):
        again = FeatureEncoder(encoder_settings({**QWEN, "weights": {"source": str(tmp_path)}}))
    again.to_empty(device="cpu").eval()
    again.encoder.restore_buffers()
    again.load_pretrained()
    pixels = torch.rand(1, 3, 56, 56)
    torch.testing.assert_close(again(pixels), source(pixels), rtol=1e-5, atol=1e-6)
    gone = FeatureEncoder(encoder_settings({**QWEN, "weights": {"source": str(tmp_path / "none")}}))
    with pytest.raises(CheckpointError, match="cannot be read"):
        gone.load_pretrained()
    with pytest.raises(ConfigError, match="multiple of 28"):
        FeatureEncoder(encoder_settings({**QWEN, "image_size": 60}))


def test_small_vit_reads_the_weights_it_names(tmp_path):
    from safetensors.torch import save_file

    source = FeatureEncoder(encoder_settings(VIT))
    save_file(source.encoder.state_dict(), str(tmp_path / "vit.safetensors"))
    again = FeatureEncoder(encoder_settings({**VIT, "weights": str(tmp_path / "vit.safetensors")}))
    again.load_pretrained()
    ones = torch.ones(1, 3, 16, 16)
    torch.testing.assert_close(again(ones), source(ones), rtol=1e-5, atol=1e-6)
    with pytest.raises(CheckpointError, match="does not exist"):
        FeatureEncoder(encoder_settings({**VIT, "weights": str(tmp_path / "none")})).load_pretrained()


@pytest.mark.parametrize("normalise", [True, False])
def test_any_registered_encoder_is_a_student(normalise):
    hf = {
        "type": "hf", "resize": "squash",
        "architecture": {
            "model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 2, "image_size": 16, "patch_size": 4,
        },
    }  # fmt: skip
    torch.manual_seed(0)
    tokenizer = build_tokenizer({**TINY["tokenflow"], "student": hf, "student_normalise": normalise}).eval()
    pixels = torch.rand(2, 3, 16, 16) * 2 - 1
    info = tokenizer.student.encoder.config.info.image
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (info.mean, info.std))
    fed = (pixels / 2 + 0.5 - mean) / std if normalise else pixels
    with torch.no_grad():
        assert torch.allclose(tokenizer.student(pixels), tokenizer.student.encoder(fed).tokens, atol=1e-6)
        assert tokenizer.encode(pixels).codes["shared"].shape == (2, 21, 1)


def test_a_teachers_tokens_may_be_projected(tmp_path):
    from safetensors.torch import save_file

    weight = torch.randn(7, 24)
    save_file({"visual_projection.weight": weight}, str(tmp_path / "p.safetensors"))
    teacher = EncoderTeacher(VIT, str(tmp_path / "p.safetensors"))
    pixels = torch.rand(2, 3, 16, 16)
    assert teacher.width == 7
    assert torch.allclose(teacher(pixels)["tokens"], teacher.encoder(pixels) @ weight.T, atol=1e-5)
    save_file({"visual_projection.weight": torch.randn(7, 9)}, str(tmp_path / "p.safetensors"))
    with pytest.raises(CheckpointError, match="one matrix"):
        EncoderTeacher(VIT, str(tmp_path / "p.safetensors"))
