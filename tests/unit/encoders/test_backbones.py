"""Do the research backbones compute what their authors' modules compute, and refuse what those would get wrong?"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mllm.encoders import ENCODERS
from mllm.encoders.backbones import biformer, crossformer, vssd
from mllm.encoders.catalogue import build_encoder, encoder_config
from mllm.errors import CheckpointError, ConfigError
from mllm.testing.encoders import build_example, check_encoder, resolve_example, sample_pixels
from tests.golden.fill import check, fill_all, load

GOLDEN = Path(__file__).parents[2] / "golden"


def vector(name):
    """A case: its description, inputs as tensors, outputs as arrays, parameters under the authors' names."""
    meta, inputs, outputs = load(GOLDEN / f"{name}.json")
    state = {key: torch.from_numpy(value) for key, value in fill_all(meta).items()}
    return meta, {key: torch.from_numpy(value) for key, value in inputs.items()}, outputs, state


def encoder_with(state, spec, folder, **changes):
    """The encoder of a config, with an authors' state dict loaded from a file as a user would."""
    torch.save({"model": state}, folder / "weights.pth")
    weights = {"source": str(folder / "weights.pth")}
    encoder = build_encoder(encoder_config({**spec, **changes, "weights": weights}, where="encoder"))
    encoder.load_pretrained()
    return encoder.eval()


def compare(meta, outputs, have):
    """Every stored output must be among ``have``."""
    check(meta, outputs, {key: np.asarray(value.detach()) for key, value in have.items()})


def maps_of(maps):
    """The stages' maps ``(B, rows, cols, C)`` under the vectors' names and layout."""
    return {f"output.stage{i}": x.permute(0, 3, 1, 2) for i, x in enumerate(maps[:4])}


def refused(spec, *words, error=ConfigError):
    with pytest.raises(error) as caught:
        encoder_config(spec, where="encoder")
    assert all(word in str(caught.value) for word in words), str(caught.value)


def biformer_spec(meta):
    sizes = meta["ctor"]
    regions = sizes["n_wins"][:3] if "n_wins" in sizes else sizes["n_win"]
    kind = meta["case"].removeprefix("biformer_").replace("autopad", "biformer")
    return {
        "type": "biformer",
        "variant": kind,
        "widths": sizes["embed_dim"],
        "depths": sizes["depth"],
        "top_k": sizes["topks"][:3],
        "num_regions": regions,
        "head_width": sizes["head_dim"],
        "mlp_ratio": sizes["mlp_ratios"][0],
        "auto_pad": sizes.get("auto_pad", False),
    }


@torch.no_grad()
@pytest.mark.parametrize("name", ["biformer", "biformer_autopad", "biformer_stl", "biformer_stl_nchw"])
def test_biformer_is_the_authors(name, tmp_path, monkeypatch):
    meta, inputs, outputs, state = vector(name)
    image = inputs["input.image"]
    encoder = encoder_with(state, biformer_spec(meta), tmp_path, image_size=list(image.shape[2:]))
    chosen, choose = [], biformer.choose_regions
    monkeypatch.setattr(biformer, "choose_regions", lambda *a: chosen.append(choose(*a)) or chosen[-1])
    maps = encoder.model(image)
    have = maps_of(maps) | {"output.final": maps[4].permute(0, 3, 1, 2), "output.pooled": maps[4].mean((1, 2))}
    have |= {f"output.routing{i}": regions.sort(-1).values for i, regions in enumerate(chosen)}
    compare(meta, outputs, have)


def crossformer_spec(meta):
    sizes = meta["ctor"]
    return {
        "type": "crossformer",
        "width": sizes["embed_dim"],
        "depths": sizes["depths"],
        "num_heads": sizes["num_heads"],
        "group_size": sizes["group_size"],
        "interval": sizes["crs_interval"],
        "cooling": sizes["use_acl"],
    }


@torch.no_grad()
def test_crossformer_attends_alike_fused_and_in_plain_products():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 5, 3, 49, 16).unbind(0)
    for bias in (torch.randn(3, 49, 49), torch.randn(3, 49, 49) + torch.randn(5, 1, 1, 49)):  # the latter: padded keys
        fused, plain = crossformer.attend(q, k, v, bias), crossformer.multiply(q, k, v, bias)
        assert torch.allclose(fused, plain, atol=1e-5)


@pytest.mark.parametrize("name", ["crossformer", "crossformer_pp", "crossformer_pyramid"])
def test_crossformer_is_the_authors(name, tmp_path):
    meta, inputs, outputs, state = vector(name)
    image, dense = inputs["input.image"], name == "crossformer_pyramid"
    state["layers.0.blocks.0.attn.biases"] = torch.zeros(3, 2)  # as older checkpoints have
    size = {"image_size": list(image.shape[2:]), "final_norm": not dense}
    maps = encoder_with(state, crossformer_spec(meta), tmp_path, **size).model(image)
    have = maps_of(maps)
    if not dense:
        have |= {"output.final": maps[4].flatten(1, 2), "output.pooled": maps[4].mean((1, 2))}
    compare(meta, outputs, have)


@pytest.mark.parametrize(("size", "interval"), [(2, 1), (2, 3), (3, 2)])
def test_groups_are_rows_an_interval_apart(size, interval):
    rows, cols = 2 * size * interval, size * interval
    places = torch.arange(rows * cols).reshape(1, rows, cols, 1)
    groups = crossformer.to_groups(places, size, interval)
    assert torch.equal(crossformer.from_groups(groups, size, interval, (rows, cols)), places)
    first = groups[0, 0, :, 0].reshape(size, size)
    assert torch.equal(first, torch.arange(size)[:, None] * cols * interval + torch.arange(size) * interval)


@torch.no_grad()
def test_a_small_map_does_not_change_how_crossformer_groups_a_large_one():
    """The authors' dense class keeps the choice it made for a small map."""
    block = crossformer.Block(crossformer.CrossFormerConfig(type="crossformer"), 2, 1, 0.0).eval()
    large, small = torch.randn(1, 28, 28, 384), torch.randn(1, 7, 7, 384)
    before = block(large)
    block(small)
    assert torch.equal(block(large), before)


def vssd_spec(meta):
    sizes = meta["ctor"]
    return {
        "type": "vssd",
        "width": sizes["embed_dim"],
        "depths": sizes["depths"],
        "num_heads": sizes["num_heads"],
        "state": sizes["d_state"],
        "stage_norms": meta["case"] == "vssd_pyramid",
    }


@torch.no_grad()
@pytest.mark.parametrize("name", ["vssd", "vssd_pyramid"])
def test_vssd_is_the_authors(name, tmp_path):
    meta, inputs, outputs, state = vector(name)
    image = inputs["input.image"]
    encoder = encoder_with(state, vssd_spec(meta), tmp_path, image_size=list(image.shape[2:]), layers=[1, 2, 3, 4])
    maps = encoder.model(image)
    have = maps_of(maps)
    if name == "vssd":
        have["output.stem"] = encoder.model.patch_embed(image).permute(0, 3, 1, 2)
        have |= {"output.final": maps[4].flatten(1, 2), "output.pooled": maps[4].mean((1, 2))}
    compare(meta, outputs, have)


@torch.no_grad()
def test_vssd_takes_a_classifiers_weights_into_the_dense_form_and_back(tmp_path):
    *_, plain = vector("vssd")
    meta, _, _, dense = vector("vssd_pyramid")
    size = {"image_size": [50, 75]}
    encoder = encoder_with({f"module.{k}": v for k, v in plain.items()}, vssd_spec(vector("vssd")[0]), tmp_path, **size)
    norms = encoder_with(plain, vssd_spec(vector("vssd")[0]), tmp_path, **size, layers=[3], stage_norms=True)
    pixels = torch.randn(1, 3, 50, 75)
    assert encoder(pixels).grid == (2, 3) and norms(pixels).grid == (4, 5)
    assert torch.equal(norms.model.outnorm2.weight, torch.ones(128)) and not hasattr(norms.model, "outnorm3")
    back = encoder_with(dense, vssd_spec(meta), tmp_path, **size, stage_norms=False, layers=[3])
    assert back(pixels).grid == (4, 5)


TINY_BIFORMER = biformer.BiFormerEncoder.tiny()


def test_biformer_refuses_what_its_regions_do_not_divide():
    refused({**TINY_BIFORMER, "image_size": 80}, "80 x 80 is no multiple of 32", "auto_pad: true", "nearest is")
    assert encoder_config({**TINY_BIFORMER, "image_size": [80, 44], "auto_pad": True}, where="e").info.grid == (5, 3)
    refused({**TINY_BIFORMER, "top_k": [1, 2, 5]}, "top_k: 5 of stage 2")
    refused({**TINY_BIFORMER, "widths": [8, 16, 16, 36]}, "36 of stage 3 is not divided by its 8 heads")
    nchw = {**TINY_BIFORMER, "variant": "stl_nchw"}
    assert encoder_config({**nchw, "image_size": 80}, where="e").info.grid == (5, 5)
    refused({**nchw, "image_size": [24, 64]}, "24 x 64 is too small")


@torch.no_grad()
def test_pyramids_give_a_stage_or_a_fusion_of_stages():
    one = build_encoder(encoder_config({**TINY_BIFORMER, "layers": [-1]}, where="e")).eval()
    early = build_encoder(encoder_config({**TINY_BIFORMER, "layers": [2]}, where="e")).eval()
    both = build_encoder(encoder_config({**TINY_BIFORMER, "layers": [2, -1]}, where="e")).eval()
    early.load_state_dict({k: v for k, v in one.state_dict().items() if k in early.state_dict()})
    both.load_state_dict(one.state_dict())
    pixels = torch.randn(1, 3, 64, 96)
    assert len(early.model.stages) == 2 and early.model.norm is None  # what is not read is not built
    assert early(pixels).grid == (8, 12) and one(pixels).grid == both(pixels).grid == (2, 3)
    torch.testing.assert_close(both(pixels).tokens[..., 16:], one(pixels).tokens)
    assert both(pixels).tokens.shape[2] == 16 + 32


def test_weights_with_a_prefix_or_a_head_load_and_half_of_them_do_not(tmp_path):
    torch.manual_seed(0)
    encoder = build_encoder(encoder_config(TINY_BIFORMER, where="e")).eval()
    state = encoder.model.state_dict()
    more = {f"module.visual.{k}": v.clone() for k, v in state.items()} | {"module.text.weight": torch.zeros(2)}
    pixels = torch.randn(1, 3, 64, 96)
    for name, content in (("prefix", more), ("head", {**state, "head.weight": torch.zeros(5, 32)})):
        save_file(content, tmp_path / f"{name}.safetensors")
        spec = {**TINY_BIFORMER, "weights": {"source": str(tmp_path / f"{name}.safetensors")}}
        other = build_encoder(encoder_config(spec, where="e")).eval()
        other.load_pretrained()
        with torch.no_grad():
            torch.testing.assert_close(other(pixels).tokens, encoder(pixels).tokens)
    half = dict(list(state.items())[: len(state) // 2])
    with pytest.raises(CheckpointError, match=r"missing: .*stages"):
        encoder_with(half, TINY_BIFORMER, tmp_path)
    with pytest.raises(CheckpointError, match="of another shape"):
        encoder_with(state, {**TINY_BIFORMER, "mlp_ratio": 2.0}, tmp_path)
    nowhere = build_encoder(encoder_config({**TINY_BIFORMER, "weights": {"source": "someone/backbone"}}, where="e"))
    with pytest.raises(CheckpointError, match="owner/name/file"):
        nowhere.load_pretrained()


def test_batch_norms_keep_published_statistics_and_learn_from_scratch():
    pixels = torch.randn(4, 3, 64, 96)

    def moved(**changes):
        encoder = build_encoder(encoder_config({**TINY_BIFORMER, **changes}, where="e")).train()
        before = encoder.model.norm.running_mean.clone()
        encoder(pixels)
        return not torch.equal(before, encoder.model.norm.running_mean)

    weights = {"weights": {"source": "./x.pth"}}
    assert moved() and moved(**weights, train_batch_norm=True)
    assert not moved(**weights) and not moved(train_batch_norm=False)


def test_one_channel_where_three_are_meant_is_named():
    encoder = build_encoder(encoder_config(TINY_BIFORMER, where="e"))
    with pytest.raises(ConfigError, match=r"expected pixels \(B, 3, 64, 96\), got \(1, 1, 64, 96\)"):
        encoder(torch.zeros(1, 1, 64, 96))


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({**crossformer.CrossFormerEncoder.tiny(), "image_size": 72}, ["72 x 72 is no multiple of 32", "64 x 64"]),
        ({**crossformer.CrossFormerEncoder.tiny(), "num_heads": [1, 2, 3, 2]}, ["num_heads: 3 of stage 2"]),
        ({**vssd.VssdEncoder.tiny(), "num_heads": [1, 2, 3, 4]}, ["num_heads: 3 of stage 2"]),
        ({**vssd.VssdEncoder.tiny(), "layers": [5]}, ["layers: 5 does not exist; the encoder has 4"]),
    ],
)
def test_settings_that_do_not_fit_are_refused(spec, words):
    refused(spec, *words)


@torch.no_grad()
def test_unit_is_the_authors_at_three_sizes_of_one_table(tmp_path):
    meta, inputs, outputs, state = vector("unit_encoder")
    sizes = meta["ctor"]
    state = {f"unit_model.{key}": value for key, value in state.items()}
    state["unit_model.input_conditioner.norm_mean"] = torch.zeros(3, 1, 1)
    spec = {
        "type": "unit",
        "width": sizes["embed_dim"],
        "keep_prefix": True,
        **{key: sizes[key] for key in ("depth", "num_heads", "patch_size", "cpe_max_size", "num_cls_tokens")},
        "register_multiple": sizes["register_multiple"],
    }
    have = {}
    for name in ("a", "b", "full"):
        image = inputs[f"input.image_{name}"]
        encoder = encoder_with(state, spec, tmp_path, image_size=list(image.shape[2:]))
        mean, std = (
            torch.tensor(v).view(3, 1, 1) for v in (encoder.config.info.image.mean, encoder.config.info.image.std)
        )
        features = encoder((image - mean) / std)
        have |= {f"output.cls_{name}": features.prefix[:, 0], f"output.spatial_{name}": features.tokens}
    compare(meta, outputs, have)
    smaller = encoder_with(state, {**spec, "cpe_max_size": 20}, tmp_path, image_size=16)
    assert smaller.model.patch_generator.pos_embed.shape[1] == 25, "a table of another size is resized"


def test_units_positions_are_random_windows_in_its_pretraining_only():
    torch.manual_seed(0)
    spec = {
        "type": "unit",
        "width": 8,
        "depth": 1,
        "num_heads": 1,
        "patch_size": 4,
        "cpe_max_size": 32,
        "image_size": 16,
    }
    plain, jittered = (
        build_encoder(encoder_config({**spec, "position_jitter": jitter}, where="encoder")).train()
        for jitter in (False, True)
    )
    jittered.load_state_dict(plain.state_dict())
    pixels = torch.randn(1, 3, 16, 16).expand(40, -1, -1, -1)
    with torch.no_grad():
        assert torch.allclose(plain(pixels).tokens[0], plain(pixels).tokens[1], atol=1e-5)
        seen = jittered.model.patch_generator.random_windows((4, 4), 400)
        assert 10 < int((seen.abs().sum((1, 2)) == 0).sum()) < 90, "about a tenth is shown no position"
        assert not torch.allclose(jittered(pixels).tokens[0], jittered(pixels).tokens[1], atol=1e-4)
        assert torch.allclose(jittered.eval()(pixels).tokens, plain.eval()(pixels).tokens, atol=1e-5)


@torch.no_grad()
def test_lookupvit_is_the_public_module(tmp_path):
    meta, inputs, outputs, state = vector("lookupvit_lucidrains")
    sizes = meta["ctor"]
    spec = {
        "type": "lookupvit",
        "width": sizes["dim"],
        "depth": sizes["depth"],
        "num_heads": sizes["heads"],
        "head_width": sizes["dim_head"],
        "lookup_heads": sizes["cross_attn_heads"],
        "lookup_head_width": sizes["cross_attn_dim_head"],
        "mlp_ratio": sizes["mlp_factor"],
        "lookup_mlp_ratio": sizes["highres_mlp_factor"],
        "patch_size": sizes["highres_patch_size"],
        "patch_kernel": sizes["patch_conv_kernel_size"],
        "compressed_grid": [sizes["image_size"] // sizes["patch_size"]] * 2,
        "image_size": sizes["image_size"],
        "infusion": "logits",
        "lookup_norm": True,
    }
    encoder = encoder_with(state, {**spec, "output": "both"}, tmp_path)
    compressed, lookup = encoder.model(inputs["input.image"])[-1]
    pooled = encoder.model.norm(compressed).mean(1) + encoder.model.highres_norm(lookup).mean(1)
    have = {"output.compressed_tokens": compressed, "output.lookup_tokens": lookup}
    compare(meta, outputs, have | {"output.logits": pooled @ state["to_logits.weight"].T})
    few = encoder_with(state, spec, tmp_path)(inputs["input.image"])
    torch.testing.assert_close(few.tokens, encoder.model.norm(compressed))
    assert few.grid == (3, 3)
    other = encoder_with(state, {**spec, "compressed_grid": [2, 5]}, tmp_path)
    assert other(inputs["input.image"]).grid == (2, 5), "the number of tokens is chosen when the model is opened"
    paper = encoder_with(state, {**spec, "output": "lookup", "infusion": "probabilities"}, tmp_path)
    assert not torch.allclose(paper.model(inputs["input.image"])[-1][1], lookup, atol=1e-2)


@torch.no_grad()
def test_ddrnet_is_the_authors(tmp_path):
    meta, inputs, outputs, state = vector("ddrnet_dual")
    sizes, image = meta["ctor"], inputs["input.image"]
    spec = {
        "type": "ddrnet",
        "planes": sizes["planes"],
        "depths": sizes["layers"],
        "pooled_planes": sizes["spp_planes"],
        "image_size": sizes["size"],
    }
    encoder = encoder_with(state, spec, tmp_path, layers=[2, 4])
    seen = {}
    for name in ("layer4", "layer5_", "layer5", "spp"):
        getattr(encoder.model, name).register_forward_hook(lambda _, __, out, name=name: seen.update({name: out}))
    found = encoder(image)
    maps = found.tokens.transpose(1, 2).unflatten(2, found.grid).split([8, 16], 1)

    def classes(x, head):  # the published head, which is no part of the encoder
        for k in (1, 2):
            norm = {name: state[f"{head}.bn{k}.{name}"] for name in ("running_mean", "running_var", "weight", "bias")}
            x = torch.relu(torch.nn.functional.batch_norm(x, **norm))
            x = torch.conv2d(x, state[f"{head}.conv{k}.weight"], state.get(f"{head}.conv{k}.bias"), padding=2 - k)
        return x

    check(
        meta,
        outputs,
        {
            "output.logits": classes(maps[1], "final_layer"),
            "output.aux": classes(maps[0], "seghead_extra"),
            "output.low_stage4": seen["layer4"],
            "output.high_stage5": seen["layer5_"].mean((2, 3)),
            "output.low_stage5": seen["layer5"],
            "output.dappm": seen["spp"],
        },
    )
    with pytest.raises(ConfigError, match="no multiple of 64"):
        build_encoder(encoder_config({**spec, "image_size": 72}, where="encoder"))


def test_ddrnet_39_exchanges_three_times_and_stages_of_one_block_end_in_their_relu():
    spec = {**ENCODERS.get("ddrnet").tiny(), "depths": [1, 2, 4, 1], "exchanges": 3, "image_size": [64, 128]}
    assert len(check_encoder({**spec, "layers": [2, 4, -1]})) > 5
    refused({**spec, "depths": [1, 2, 3, 1]}, "cut in two with exchanges: 3, and its 3 blocks are odd")
    encoder = build_example(resolve_example(spec))
    names = {name.split(".")[0] for name, _ in encoder.model.named_parameters()}
    assert {"layer3_1", "layer3_2_", "compression3_2", "down3_1", "layer4"} <= names and "layer3" not in names
    assert len(encoder.model.layer4_) == 1 and len(encoder.model.layer3_2_) == 2
    with torch.no_grad():
        assert bool((encoder.model.layer4(torch.randn(1, 16, 8, 8)) >= 0).all())
        assert bool((encoder.model.layer3_1(torch.randn(1, 8, 8, 8)) < 0).any())


# SAM with something beside it ------------------------------------------------------------------------------------------


def sam_file(encoder, folder, *, without=(), **more):
    """SAM's checkpoint in the authors' names, of an encoder's trunk."""
    names = (
        ("patch_embed.projection.", "patch_embed.proj."), ("layers.", "blocks."), ("layer_norm", "norm"),
        ("neck.conv1.", "neck.0."), ("neck.norm1.", "neck.1."), ("neck.conv2.", "neck.2."), ("neck.norm2.", "neck.3."),
    )  # fmt: skip
    state = {
        "prompt_encoder.no_mask_embed.weight": torch.zeros(1, 8),
        "mask_decoder.iou_token.weight": torch.zeros(1, 8),
    }
    for name, value in encoder.model.vit.state_dict().items():
        for present, former in names:
            name = name.replace(present, former)
        state[f"image_encoder.{name}"] = value
    state = {name: value for name, value in (state | more).items() if name not in without}
    torch.save(state, folder / "sam.pth")
    return {"source": str(folder / "sam.pth")}


@pytest.mark.parametrize("kind", ["samunet", "dbsam"])
def test_sams_weights_open_in_encoders_that_set_something_beside_it(kind, tmp_path):
    donor = build_example(resolve_example(kind), seed=1)
    spec = ENCODERS.get(kind).tiny()

    def opened(**changes):
        weights = sam_file(donor, tmp_path, **changes)
        torch.manual_seed(0)
        encoder = build_encoder(encoder_config({**spec, "weights": weights}, where="e"))
        encoder.load_pretrained()
        return encoder

    encoder = opened()
    for name, value in donor.model.vit.state_dict().items():
        assert torch.equal(encoder.model.vit.state_dict()[name], value), name
    with pytest.raises(CheckpointError, match=r"1 missing: vit\.layers\.1\.attn\.qkv\.weight"):
        opened(without=("image_encoder.blocks.1.attn.qkv.weight",))
    with pytest.raises(CheckpointError, match=r"1 not part of this architecture: vit\.layers\.9\.attn"):
        opened(**{"image_encoder.blocks.9.attn": torch.zeros(1)})
    own = {f"model.{name}": value for name, value in donor.model.state_dict().items()}
    save_file({name: value.contiguous() for name, value in own.items()}, tmp_path / "own.safetensors")
    encoder = build_encoder(
        encoder_config({**spec, "weights": {"source": str(tmp_path / "own.safetensors")}}, where="e")
    )
    encoder.load_pretrained()
    pixels = sample_pixels(donor.config, 1)
    with torch.no_grad():
        torch.testing.assert_close(encoder.eval()(pixels).tokens, donor(pixels).tokens)


def test_what_cannot_stand_beside_sam_is_refused():
    refused({**ENCODERS.get("samunet").tiny(), "global_blocks": [1, 3]}, "global_blocks: name four")
    refused({**ENCODERS.get("samunet").tiny(), "image_size": 40}, "40 x 40 is no multiple of 32")
    refused({**ENCODERS.get("dbsam").tiny(), "fusion": "gate"}, "gate joins two branches; set branches: 1")
    refused({**ENCODERS.get("dbsam").tiny(), "branches": 4}, "branches: 4 with patch_size 8", "at most 3 branches")
    refused({**ENCODERS.get("dbsam").tiny(), "layers": [1]}, "layers is [-1]")


@torch.no_grad()
def test_sams_trunk_with_nothing_beside_it_is_transformers_sam():
    """Adapters that say nothing leave SAM as it is."""
    encoder = build_example(resolve_example({**ENCODERS.get("samunet").tiny(), "image_size": 64, "layers": [-1]}))
    for adapter in encoder.model.adapters:
        adapter.reshaper[-1].weight.zero_()
        adapter.reshaper[-1].bias.zero_()
    pixels = sample_pixels(encoder.config, 2)
    wanted = encoder.model.vit(pixels).last_hidden_state.flatten(2).transpose(1, 2)
    torch.testing.assert_close(encoder(pixels).tokens, wanted, rtol=1e-5, atol=1e-5)
