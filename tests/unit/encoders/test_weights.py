"""Do published weights arrive completely, at any image size, or not at all?"""

from __future__ import annotations

import json

import huggingface_hub.constants
import open_clip
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    CLIPConfig,
    CLIPModel,
    Pix2StructConfig,
    Pix2StructForConditionalGeneration,
    SiglipConfig,
    SiglipModel,
)

from mllm.encoders.catalogue import build_encoder, encoder_config
from mllm.encoders.weights import parameters_on_meta, resize_positions
from mllm.errors import CheckpointError, UnavailableError

TIMM = {"embed_dim": 32, "depth": 4, "num_heads": 2, "patch_size": 4}
VIT = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "image_size": 16, "patch_size": 4}
CLIP = {"model_type": "clip_vision_model", **VIT, "intermediate_size": 64}
OPEN_CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "layers": 4, "width": 32, "head_width": 16, "patch_size": 4},
    "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1},
}


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def stir(model, seed=0):
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model.eval()


def load(source, **config):
    encoder = build_encoder(encoder_config({**config, "weights": {"source": str(source)}}, where="encoder"))
    encoder.load_pretrained()
    return encoder.eval()


def save(model, path):
    state = {key: value.clone().contiguous() for key, value in model.state_dict().items()}
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    return path


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".bin"])
@torch.no_grad()
def test_a_timm_file_fills_the_blocks_that_are_kept(tmp_path, suffix):
    model = stir(timm.create_model("vit_small_patch14_reg4_dinov2", num_classes=10, img_size=16, **TIMM))
    source = save(model, tmp_path / f"weights{suffix}")
    common = {"type": "timm", "architecture": "vit_small_patch14_reg4_dinov2", "options": TIMM, "image_size": 16}
    pixels = torch.randn(2, 3, 16, 16)
    want = model.forward_intermediates(pixels, indices=[2], output_fmt="NLC", intermediates_only=True)[0]
    torch.testing.assert_close(load(source, **common, layers=[-2])(pixels).tokens, want, rtol=0, atol=1e-5)


@torch.no_grad()
def test_timm_weights_of_one_image_size_serve_another(tmp_path):
    model = stir(timm.create_model("vit_small_patch14_dinov2", num_classes=0, img_size=16, **TIMM))
    source = save(model, tmp_path / "weights.safetensors")
    encoder = load(source, type="timm", architecture="vit_small_patch14_dinov2", options=TIMM, image_size=[24, 32])
    assert encoder.config.info.grid == (6, 8)
    table = model.pos_embed
    want = resize_positions(table, (4, 4), (6, 8), num_prefix_tokens=table.shape[1] - 16)
    torch.testing.assert_close(encoder.model.pos_embed, want, rtol=0, atol=1e-5)
    model.set_input_size((24, 32))
    pixels = torch.randn(1, 3, 24, 32)
    want = model.forward_features(pixels)[:, 1:]
    torch.testing.assert_close(encoder(pixels).tokens, want, rtol=0, atol=1e-5)


@torch.no_grad()
def test_sam_weights_of_one_image_size_serve_another_and_the_authors_names_are_read(tmp_path):
    options = {**TIMM, "depth": 2, "window_size": 2, "neck_chans": 16, "global_attn_indexes": [1]}
    model = stir(timm.create_model("samvit_base_patch16", num_classes=0, img_size=16, **options))
    original = {f"image_encoder.{k.replace('mlp.fc', 'mlp.lin')}": v.clone() for k, v in model.state_dict().items()}
    original["prompt_encoder.no_mask_embed.weight"] = torch.zeros(1, 8)
    save_file(original, tmp_path / "sam.safetensors")
    common = {"type": "timm", "architecture": "samvit_base_patch16", "options": options}
    encoder = load(tmp_path / "sam.safetensors", **common, image_size=16)
    pixels = torch.randn(2, 3, 16, 16)
    want = model.forward_features(pixels).flatten(2).mT
    torch.testing.assert_close(encoder(pixels).tokens, want, rtol=0, atol=1e-5)
    larger = load(tmp_path / "sam.safetensors", **common, image_size=24)
    pixels = torch.randn(1, 3, 24, 24)
    want = model.forward_features(pixels).flatten(2).mT  # timm resizes both tables on use
    torch.testing.assert_close(larger(pixels).tokens, want, rtol=0, atol=1e-4)


@torch.no_grad()
def test_vary_reads_the_authors_names(tmp_path):
    options = {**TIMM, "depth": 2, "window_size": 2, "neck_chans": 16, "global_attn_indexes": [1]}
    config = {"type": "vary", "options": options, "image_size": 16, "convs": [24]}
    donor = stir(build_encoder(encoder_config(config, where="encoder")))
    state = {}
    for key, value in donor.model.state_dict().items():
        name = key.removeprefix("sam.").replace("mlp.fc", "mlp.lin").replace("convs.0", "net_2")
        state[f"model.vision_tower_high.{name}"] = value.clone()
    state["model.vision_tower_high.net_3.weight"] = torch.zeros(48, 24, 3, 3)
    state["model.layers.0.mlp.weight"] = torch.zeros(2)
    save_file(state, tmp_path / "vary.safetensors")
    pixels = torch.randn(2, 3, 16, 16)
    have = load(tmp_path / "vary.safetensors", **config)(pixels).tokens
    torch.testing.assert_close(have, donor(pixels).tokens, rtol=0, atol=1e-5)
    with pytest.raises(CheckpointError, match="no local file"):
        load("some/repository", **config)


@torch.no_grad()
def test_open_clip_reads_its_image_side_out_of_a_whole_model_at_another_size(tmp_path):
    model = stir(open_clip.CLIP(**{k: OPEN_CLIP[k] for k in ("embed_dim", "vision_cfg", "text_cfg")}))
    source = save(model, tmp_path / "open_clip.pt")
    pixels = torch.randn(2, 3, 16, 16)
    encoder = load(source, type="open_clip", architecture=OPEN_CLIP, keep_prefix=True)
    _, tokens = model.visual._pool(model.visual.transformer(model.visual._embeds(pixels)))
    torch.testing.assert_close(encoder(pixels).tokens, tokens, rtol=0, atol=1e-5)
    larger = load(source, type="open_clip", architecture=OPEN_CLIP, image_size=24)
    resized = {"visual.positional_embedding": model.visual.positional_embedding.data.clone()}

    class Target:
        visual = larger.model

    open_clip.model.resize_pos_embed(resized, Target)
    torch.testing.assert_close(larger.model.positional_embedding, resized["visual.positional_embedding"])


@torch.no_grad()
def test_open_clip_config_files_are_kept_inside_the_config(tmp_path):
    trunk = {"timm_model_name": "vit_tiny_patch16_224", "timm_pool": "", "timm_proj": "linear", "image_size": 32}
    settings = {
        "model_cfg": {"embed_dim": 16, "vision_cfg": trunk},
        "preprocess_cfg": {"mean": [0.1] * 3, "std": [0.2] * 3},
    }
    (tmp_path / "open_clip_config.json").write_text(json.dumps(settings))
    model = stir(timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=32))
    state = {f"visual.trunk.{k}": v.clone() for k, v in model.state_dict().items()}
    state |= {"visual.head.proj.weight": torch.zeros(16, 192), "text.transformer.pooler": torch.zeros(1)}
    save_file(state, tmp_path / "weights.safetensors")
    config = {"type": "open_clip", "architecture": str(tmp_path / "open_clip_config.json")}
    encoder = load(tmp_path / "weights.safetensors", **config)
    (tmp_path / "open_clip_config.json").unlink()
    assert build_encoder(encoder.config).config.info.image.mean == (0.1, 0.1, 0.1)
    pixels = torch.randn(1, 3, 32, 32)
    want = model.forward_features(pixels)[:, 1:]
    torch.testing.assert_close(encoder(pixels).tokens, want, rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_folder_of_a_whole_clip_gives_architecture_preprocessing_and_weights(tmp_path):
    text = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "vocab_size": 32,
    }
    vision = {k: v for k, v in CLIP.items() if k != "model_type"}
    model = stir(CLIPModel(CLIPConfig(text_config=text, vision_config=vision)))
    model.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.1] * 3, "image_std": [0.3] * 3}))
    encoder = load(tmp_path, type="hf", layers=[-2])
    assert encoder.config.architecture["model_type"] == "clip_vision_model"
    assert encoder.config.info.image.mean == (0.1, 0.1, 0.1) and encoder.config.info.image.height == 16
    pixels = torch.randn(2, 3, 16, 16)
    want = model.vision_model(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    torch.testing.assert_close(encoder(pixels).tokens, want, rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_folder_of_a_whole_siglip_gives_the_image_side(tmp_path):
    text = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "vocab_size": 32,
    }
    vision = {k: v for k, v in CLIP.items() if k != "model_type"}
    model = stir(SiglipModel(SiglipConfig(text_config=text, vision_config=vision)))
    model.save_pretrained(tmp_path)
    encoder = load(tmp_path, type="hf")
    pixels = torch.randn(2, 3, 16, 16)
    want = model.vision_model(pixels).last_hidden_state
    torch.testing.assert_close(encoder(pixels).tokens, want, rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_folder_of_a_whole_pix2struct_gives_its_encoder(tmp_path):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "d_ff": 64, "d_kv": 16, "seq_len": 64}
    text = {"hidden_size": 32, "num_layers": 1, "num_heads": 2, "d_ff": 32, "d_kv": 16, "vocab_size": 32}
    whole = Pix2StructConfig(text_config=text, vision_config={**sizes, "patch_embed_hidden_size": 48})
    model = stir(Pix2StructForConditionalGeneration(whole))
    model.save_pretrained(tmp_path)
    encoder = load(tmp_path, type="hf", image_size=16)
    for key, value in encoder.model.state_dict().items():
        assert torch.equal(value, model.encoder.state_dict()[key]), key


FAMILIES = {
    "clip": CLIP,
    "siglip": {**CLIP, "model_type": "siglip_vision_model"},
    "vit": {**CLIP, "model_type": "vit"},
    "dinov2": {"model_type": "dinov2", **VIT},
    "dinov2-registers": {"model_type": "dinov2_with_registers", **VIT},
    "dinov3": {**CLIP, "model_type": "dinov3_vit", "num_register_tokens": 4},
    "tipsv2": {"model_type": "tipsv2_vision_model", **VIT},
    "radio": {"model_type": "radio", **VIT, "max_img_size": 32},
}


@pytest.mark.parametrize("kind", ["folder", "file"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_hugging_face_weights_serve_another_size_like_its_own_interpolation(tmp_path, family, kind):
    settings = dict(FAMILIES[family])
    model = stir(AutoModel.from_config(AutoConfig.for_model(settings.pop("model_type"), **settings)))
    if kind == "folder":
        model.save_pretrained(tmp_path)
        source = tmp_path
    else:
        source = save(model, tmp_path / "weights.safetensors")
    encoder = load(source, type="hf", architecture=FAMILIES[family], image_size=24)
    assert encoder.config.info.grid == (6, 6)
    pixels = torch.randn(2, 3, 24, 24)
    own = {"interpolate_pos_encoding": True} if family in ("clip", "siglip", "vit") else {}
    out = model(pixels, **own).last_hidden_state[:, -36:]
    want = model.post_layernorm(out) if family == "clip" else out
    torch.testing.assert_close(encoder(pixels).tokens, want, rtol=0, atol=1e-5)


def test_missing_keys_are_listed(tmp_path):
    model = timm.create_model("vit_small_patch14_dinov2", num_classes=0, img_size=16, **TIMM)
    state = {k: v for k, v in model.state_dict().items() if not k.startswith("blocks.2.attn")}
    save_file(state, tmp_path / "weights.safetensors")
    common = {"type": "timm", "architecture": "vit_small_patch14_dinov2", "options": TIMM, "image_size": 16}
    with pytest.raises(CheckpointError, match=r"4 missing: blocks\.2\.attn"):
        load(tmp_path / "weights.safetensors", **common)
    hf = AutoModel.from_config(AutoConfig.for_model("dinov2", **VIT))
    state = {k: v for k, v in hf.state_dict().items() if "layer.1." not in k}
    save_file(state, tmp_path / "hf.safetensors")
    with pytest.raises(CheckpointError, match=r"keys missing: encoder\.layer\.1\."):
        load(tmp_path / "hf.safetensors", type="hf", architecture={"model_type": "dinov2", **VIT})


def test_a_folder_with_missing_keys_is_refused(tmp_path):
    hf = AutoModel.from_config(AutoConfig.for_model("dinov2", **VIT))
    hf.save_pretrained(tmp_path)
    state = {k: v.clone() for k, v in hf.state_dict().items() if "layer.1." not in k}
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"keys missing: encoder\.layer\.1\."):
        load(tmp_path, type="hf")


@pytest.mark.parametrize("kind", ["timm", "hf-file", "hf-folder"])
def test_weights_of_a_deeper_model_are_refused(tmp_path, kind):
    if kind == "timm":
        model = timm.create_model("vit_small_patch14_dinov2", num_classes=0, img_size=16, **TIMM)
        config = {
            "type": "timm",
            "architecture": "vit_small_patch14_dinov2",
            "options": {**TIMM, "depth": 3},
            "image_size": 16,
        }
    else:
        model = AutoModel.from_config(AutoConfig.for_model("dinov2", **VIT))
        config = {"type": "hf", "architecture": {"model_type": "dinov2", **VIT, "num_hidden_layers": 3}}
    source = tmp_path
    if kind == "hf-folder":
        model.save_pretrained(tmp_path)
    else:
        source = save(model, tmp_path / "weights.safetensors")
    with pytest.raises(CheckpointError, match=r"blocks\.3\.|layer\.3\."):
        load(source, **config)


@pytest.mark.parametrize("kind", ["vit", "vivit"])
@pytest.mark.parametrize("where", ["file", "folder"])
def test_weights_under_names_of_before_are_refused_where_they_are_more(tmp_path, kind, where):
    """transformers writes the names of before and reads them under new ones; a file is read without it."""
    architecture = {"model_type": kind, **VIT, "intermediate_size": 64}
    if kind == "vivit":
        del architecture["patch_size"]
        architecture |= {"num_frames": 4, "tubelet_size": [2, 4, 4]}
    config = {"type": kind if kind == "vivit" else "hf", "architecture": architecture}
    settings = {k: v for k, v in architecture.items() if k != "model_type"}
    AutoModel.from_config(AutoConfig.for_model(kind, **settings)).save_pretrained(tmp_path)
    source = tmp_path / "model.safetensors" if where == "file" else tmp_path
    load(source, **config)
    with pytest.raises(CheckpointError, match=r"16 keys of blocks that this architecture lacks: layers\.3\."):
        load(source, **{**config, "architecture": {**architecture, "num_hidden_layers": 3}})
    state = load_file(tmp_path / "model.safetensors")
    told = {"format": "pt"}
    save_file({**state, "embeddings.mask_token": torch.zeros(3)}, tmp_path / "model.safetensors", metadata=told)
    load(source, **config)
    key = "encoder.layer.1.attention.attention.key.bias"
    save_file({**state, f"{key}_2": torch.zeros(3)}, tmp_path / "model.safetensors", metadata=told)
    with pytest.raises(CheckpointError, match="1 keys of blocks that this architecture lacks: "):
        load(source, **config)


@pytest.mark.parametrize("where", ["file", "folder"])
def test_weights_with_registers_are_refused_by_an_architecture_without(tmp_path, where):
    AutoModel.from_config(AutoConfig.for_model("dinov2_with_registers", **VIT)).save_pretrained(tmp_path)
    source = tmp_path / "model.safetensors" if where == "file" else tmp_path
    with pytest.raises(CheckpointError, match=r"1 keys .* embeddings\.register_tokens\. It is of another variant"):
        load(source, type="hf", architecture={"model_type": "dinov2", **VIT})


def test_weights_of_another_width_are_refused(tmp_path):
    model = timm.create_model("vit_small_patch14_dinov2", num_classes=0, img_size=16, **TIMM)
    source = save(model, tmp_path / "weights.safetensors")
    options = {**TIMM, "embed_dim": 64}
    with pytest.raises(CheckpointError, match=r"of another shape|is no checkpoint"):
        load(source, type="timm", architecture="vit_small_patch14_dinov2", options=options, image_size=16)
    hf = AutoModel.from_config(AutoConfig.for_model("dinov2", **VIT))
    hf.save_pretrained(tmp_path / "hf")
    with pytest.raises(CheckpointError):
        load(tmp_path / "hf", type="hf", architecture={"model_type": "dinov2", **VIT, "hidden_size": 64})


class Payload:
    def __reduce__(self):
        return (print, ("this must not run",))


def test_files_that_hold_code_are_refused_unopened(tmp_path, capsys):
    torch.save({"weight": Payload()}, tmp_path / "weights.pt")
    with pytest.raises(CheckpointError, match=r"holds code, which is not run here; convert it to \.safetensors"):
        load(tmp_path / "weights.pt", type="timm", architecture="vit_tiny_patch16_224")
    assert "must not run" not in capsys.readouterr().out


def test_what_is_not_there_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"no such file or directory: \./nowhere\.safetensors"):
        load("./nowhere.safetensors", type="timm", architecture="vit_tiny_patch16_224")
    (tmp_path / "broken.safetensors").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        load(tmp_path / "broken.safetensors", type="timm", architecture="vit_tiny_patch16_224")
    with pytest.raises(CheckpointError, match=r"no open_clip tag.*did you mean 'laion2b_s34b_b79k'"):
        load("laion2b_s34b_b79", type="open_clip", architecture="ViT-B-32")
    unnamed = build_encoder(encoder_config({"type": "timm", "architecture": "vit_tiny_patch16_224"}, where="e"))
    with pytest.raises(CheckpointError, match="no weights named"):
        unnamed.load_pretrained()


@pytest.mark.parametrize(
    ("source", "config"),
    [
        ("timm", {"type": "timm", "architecture": "vit_tiny_patch16_224"}),
        ("laion2b_s34b_b79k", {"type": "open_clip", "architecture": "ViT-B-32"}),
        ("hf-hub:nobody/nothing", {"type": "open_clip", "architecture": OPEN_CLIP}),
        ("nobody/nothing", {"type": "hf", "architecture": CLIP}),
        ("nobody/nothing", {"type": "vggt", "width": 32, "depth": 1, "num_heads": 2, "patch_embed": "conv"}),
    ],
    ids=["timm", "tag", "hub", "hf", "vggt"],
)
def test_without_network_the_source_and_the_way_out_are_named(source, config):
    with pytest.raises(UnavailableError, match=rf"{source}.*set weights.source to the local path"):
        load(source, **config)


def test_a_config_that_must_be_fetched_says_so():
    with pytest.raises(UnavailableError, match=r"nobody/nothing.*local path"):
        encoder_config({"type": "hf", "weights": {"source": "nobody/nothing"}}, where="encoder")


def test_position_tables_keep_prefix_and_a_linear_ramp():
    ramp = torch.arange(8.0).repeat(8, 1)  # column number
    table = torch.cat([torch.full((1, 1), 9.0), ramp.reshape(64, 1)])
    resized = resize_positions(table, (8, 8), (4, 4), num_prefix_tokens=1)
    assert resized[0] == 9
    torch.testing.assert_close(
        resized[1:].reshape(4, 4)[:, 1:3], torch.tensor([[2.5, 4.5]]).repeat(4, 1), rtol=0, atol=0.05
    )


def test_parameters_on_meta_leaves_torch_as_it_was():
    before = torch.nn.Module.register_parameter
    with parameters_on_meta():
        layer = torch.nn.BatchNorm2d(4)
    assert layer.weight.is_meta and not layer.running_mean.is_meta
    assert torch.nn.Module.register_parameter is before and not torch.nn.Linear(2, 2).weight.is_meta
