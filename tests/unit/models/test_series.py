"""Does an encoder that reads another's features compute what the two do by hand, everywhere a model goes?"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mllm.encoders.catalogue import build_encoder, encoder_config
from mllm.encoders.series import encoder_configs, features_for, reading_order
from mllm.errors import ConfigError, UnavailableError
from mllm.models.modeling_mllm import MllmForConditionalGeneration
from mllm.processing.frames import VideoSpec
from mllm.processing.layout import LayoutRules
from mllm.train.features.cache import why_not
from mllm.types import ImageSpec, Video, ViewLayout, VisionFeatures
from tests.helpers import TINY_CLIP, picture, tiny_model

VGGT: dict[str, Any] = {
    "type": "vggt", "width": 32, "depth": 2, "num_heads": 2, "patch_size": 8, "num_registers": 1, "patch_embed": "conv", "image_size": 32,
    "reads": "semantic",
}  # fmt: skip
PARTS: dict[str, Any] = {
    "encoders": {"geometry": VGGT, "semantic": dict(TINY_CLIP)},  # what is read stands behind its reader, on purpose
    "connector": {"type": "channel_concat", "grid": [4, 4]},
    "video": {"frames": 4},
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("series"), **PARTS)


def clip(frames=4):
    return Video(np.random.default_rng(0).integers(0, 256, (frames, 32, 32, 3), dtype=np.uint8), fps=2.0)


@torch.no_grad()
def test_the_reader_is_given_what_the_other_made(made):
    model, processor = made
    tower = model.model.vision_tower
    assert list(tower.encoders) == ["geometry", "semantic"] and tower.reads == {"geometry": "semantic"}
    batch = processor(text="<video>\nwhat", videos=clip(), return_tensors="pt")
    pixels = model.model.pixel_keys.by_encoder(batch)
    layouts = model.model.visual_layouts(None, batch["video_times"])
    features = tower(pixels, layouts=layouts)[0]
    assert list(features) == ["geometry", "semantic"], "in the model's order, whichever ran first"
    semantic, geometry = tower.encoders["semantic"], tower.encoders["geometry"]
    read = semantic(pixels["semantic"])
    assert torch.equal(features["semantic"].tokens, read.tokens)
    scene = torch.zeros(4, dtype=torch.long)
    alone = geometry(pixels["geometry"], scene_ids=scene, given=read)
    torch.testing.assert_close(features["geometry"].tokens, alone.tokens)
    # the aggregator by hand, on the projected features
    patch = geometry.model.patch_embed
    by_hand = patch.proj(
        torch.nn.functional.layer_norm(read.tokens, read.tokens.shape[-1:], patch.norm.weight, patch.norm.bias)
    )
    torch.testing.assert_close(patch(read.tokens), by_hand)
    other = geometry(pixels["geometry"] * 0, scene_ids=scene, given=read)
    assert torch.equal(other.tokens, alone.tokens), "pixels of its own are not looked at"
    changed = VisionFeatures(read.tokens.flip(0), read.grid)
    assert not torch.allclose(geometry(pixels["geometry"], scene_ids=scene, given=changed).tokens, alone.tokens)


def test_the_loss_of_the_reader_teaches_the_other(made):
    model, processor = made
    model.zero_grad()
    batch = processor(text="<video>\nwhat", videos=clip(), return_tensors="pt")
    pixels = model.model.pixel_keys.by_encoder(batch)
    features = model.model.vision_tower(pixels, layouts=model.model.visual_layouts(None, batch["video_times"]))[0]
    features["geometry"].tokens.square().sum().backward()
    learned = [p.grad for p in model.model.vision_tower.encoders["semantic"].parameters() if p.grad is not None]
    assert learned and all(g.isfinite().all() for g in learned)
    model.zero_grad()


@torch.no_grad()
def test_saved_and_opened_it_is_the_same_model(made, tmp_path):
    model, processor = made
    batch = processor(text="<video>\nwhat <image>", videos=clip(), images=picture(), return_tensors="pt")
    want = model(**batch).logits
    model.save_pretrained(tmp_path)
    told = json.loads((tmp_path / "config.json").read_text())["encoders"]["geometry"]["reads"]
    assert told["encoder"] == "semantic" and told["width"] == model.config.encoder_infos()["semantic"].width
    again = MllmForConditionalGeneration.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(**batch).logits, want)


@pytest.mark.parametrize(("seen", "reader"), [(8, 8), (8, 4), (4, 8), (3, 5), (5, 3)])
def test_of_fewer_frames_those_before_stand(seen, reader):
    rules = LayoutRules(
        ViewLayout(num_tokens=1, grid=(1, 1)),
        {"first": ImageSpec(height=8, width=8), "a": ImageSpec(height=8, width=8), "b": ImageSpec(height=8, width=8)},
        video=VideoSpec(frames=8, fewer={n: k for n, k in (("a", seen), ("b", reader)) if k < 8}),
    )
    layouts = [rules.video_layout(8), rules.video_layout(6)]
    frames = [layout.frames_of("a") for layout in layouts]
    tokens = torch.cat([100.0 * n + torch.tensor(f, dtype=torch.float32) for n, f in enumerate(frames)])[:, None, None]
    given = features_for("b", "a", VisionFeatures(tokens, (1, 1)), layouts).tokens.flatten().tolist()
    wanted = [
        100.0 * n + max(f for f in frames[n] if f <= own)
        for n, layout in enumerate(layouts)
        for own in layout.frames_of("b")
    ]
    assert given == wanted


def test_what_cannot_be_in_series_is_told(made):
    model, _ = made
    reading = {"type": "hf", "reads": "semantic", **{k: v for k, v in TINY_CLIP.items() if k != "type"}}
    for encoders, message in (
        (
            {"a": {**VGGT, "reads": "semantics"}, "semantic": dict(TINY_CLIP)},
            "'semantics' is no encoder of this model",
        ),
        (
            {"a": {**VGGT, "reads": "b"}, "b": {**VGGT, "reads": "a"}},
            r"encoders\.a\.reads: a and b read each other in a circle",
        ),
        ({"a": {**VGGT, "reads": "a"}}, "in a circle"),
        ({"a": reading, "semantic": dict(TINY_CLIP)}, r"encoders\.a\.reads: type hf reads pixels only; .*: vggt"),
    ):
        with pytest.raises(ConfigError, match=message):
            encoder_configs(encoders, where="encoders")
    with pytest.raises(ConfigError, match="'semantic' is an encoder of a model, and this one stands alone"):
        encoder_config(VGGT, where="e")
    with pytest.raises(ConfigError, match="was given none"):
        model.model.vision_tower.encoders["geometry"](torch.zeros(1, 3, 32, 32))
    with pytest.raises(ConfigError, match="not there, or each other"):
        reading_order({"a": "b", "c": None})
    assert "see each other" in str(why_not(model, set())) or "reads the features" in str(why_not(model, set()))


def test_a_router_and_vllm_refuse_it(made):
    from mllm.models.pipeline import EncoderBank
    from mllm.serve.vllm.refusals import refuse_unserved

    model, _ = made
    with pytest.raises(ConfigError, match="'geometry' reads 'semantic', and both must then run on every picture"):
        EncoderBank(model.config.encoders, {"type": "gate", "experts": ["geometry"]}, text_width=16)
    with pytest.raises(UnavailableError, match="encoder geometry of this checkpoint reads the features of semantic"):
        refuse_unserved(model.config)


def test_published_weights_fill_all_but_what_takes_the_features(tmp_path):
    plain = build_encoder(encoder_config({k: v for k, v in VGGT.items() if k != "reads"}, where="e"))
    state = {k.replace("model.", "aggregator.", 1): v.clone() for k, v in plain.state_dict().items()}
    save_file(state, tmp_path / "model.safetensors")
    specs = {"geometry": {**VGGT, "weights": {"source": str(tmp_path)}}, "semantic": dict(TINY_CLIP)}
    reader = build_encoder(encoder_configs(specs, where="encoders")["geometry"])
    before = {k: v.clone() for k, v in reader.state_dict().items()}
    reader.load_pretrained()
    for name, value in reader.state_dict().items():
        kept = before[name] if ".patch_embed." in name else plain.state_dict()[name]
        assert torch.equal(value, kept), name
