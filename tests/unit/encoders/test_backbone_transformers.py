"""Do ChannelViT, DuoFormer and CrossViT compute what their authors' modules compute, for any channels and sizes?"""

from __future__ import annotations

import pytest
import timm
import torch

from mllm.config import validate
from mllm.encoders import ENCODERS
from mllm.encoders.backbones import channelvit, crossvit, duoformer
from mllm.encoders.catalogue import DESCRIPTIONS, build_encoder, catalogue, encoder_config
from mllm.errors import ConfigError
from mllm.train.engine.groups import no_decay_names
from tests.unit.encoders.test_backbones import compare, encoder_with, refused, vector

TINY_CHANNELS = channelvit.ChannelVitEncoder.tiny()
TINY_DUO = duoformer.DuoFormerEncoder.tiny()
TINY_CROSS = crossvit.CrossVitEncoder.tiny()


def channelvit_spec(meta):
    sizes = meta["ctor"]
    return {
        "type": "channelvit",
        "width": sizes["embed_dim"],
        "depth": sizes["depth"],
        "num_heads": sizes["num_heads"],
        "patch_size": sizes["patch_size"],
        "num_channels": sizes["in_chans"],
        "trained_size": sizes["img_size"][0],
        "image_size": 32,
    }


@torch.no_grad()
@pytest.mark.parametrize("name", ["channelvit", "channelvit_hcs", "channelvit_one_channel"])
def test_channelvit_is_the_authors(name, tmp_path):
    meta, inputs, outputs, state = vector(name)
    encoder = encoder_with(state, channelvit_spec(meta), tmp_path, layers=[0, 1, -1], keep_prefix=True)
    image, channels = inputs["input.image"], inputs["input.channels"]
    steps = encoder.model(image, channels)
    first = steps[1] if len(steps) == 2 else encoder.model.norm(steps[1])
    have = {"output.tokens0": steps[0], "output.block0": first, "output.final": steps[-1]}
    compare(meta, outputs, have | {"output.cls": steps[-1][:, 0]})
    features = encoder(image, channels=channels)
    assert features.grid == (4 * image.shape[1], 4)  # channels under one another
    torch.testing.assert_close(features.tokens[..., 64:], steps[-1][:, 1:])


@torch.no_grad()
def test_channels_are_arranged_as_asked_and_told_apart():
    spec = {**TINY_CHANNELS, "image_size": 16, "layers": [-1], "sample_channels": False}
    state = build_encoder(encoder_config({**spec, "merge": "mean"}, where="e")).model.state_dict()
    grids = {}
    for merge in ("stack", "concat", "mean"):
        encoder = build_encoder(encoder_config({**spec, "merge": merge}, where="e")).eval()
        encoder.model.load_state_dict(state)
        grids[merge] = encoder(torch.ones(2, 3, 16, 16))
        assert tuple(grids[merge].tokens.shape[1:]) == (
            encoder.config.info.grid[0] * encoder.config.info.grid[1],
            encoder.config.info.width,
        )
    apart = grids["stack"].tokens.unflatten(1, (3, 16))
    torch.testing.assert_close(grids["mean"].tokens, apart.mean(1))
    torch.testing.assert_close(grids["concat"].tokens, apart.transpose(1, 2).flatten(2))
    assert not torch.allclose(apart[:, 0], apart[:, 1])  # the same pixels as other channels
    five = torch.randn(2, 5, 16, 16)
    ids = torch.tensor([[0, 1, 2, 3, 4], [4, 3, 2, 1, 0]])
    both = encoder(five, channels=ids).tokens
    torch.testing.assert_close(both[1], encoder(five[1:].flip(1), channels=torch.arange(5)).tokens[0])
    with pytest.raises(ConfigError, match="no channel 5; the table has 5"):
        encoder(five, channels=torch.tensor([0, 1, 2, 3, 5]))
    with pytest.raises(ConfigError, match=r"expected pixels \(B, 3, 16, 16\), got \(2, 5, 16, 16\)"):
        encoder(five)


def test_channel_sampling_happens_in_training_only_and_reaches_every_number_of_channels(monkeypatch):
    spec = {**TINY_CHANNELS, "merge": "mean", "sample_channels": True}
    encoder = build_encoder(encoder_config(spec, where="e"))
    seen = []
    forward = encoder.model.forward
    monkeypatch.setattr(encoder.model, "forward", lambda x, ids: seen.append((x.shape[1], ids)) or forward(x, ids))
    torch.manual_seed(0)
    pixels = torch.randn(2, 3, 16, 20)
    for _ in range(20):
        assert encoder.train()(pixels).tokens.shape == (2, 20, 64)
    assert {count for count, _ in seen} == {1, 2, 3}
    assert all(set(ids[0].tolist()) <= {4, 0, 2} and torch.equal(ids[0], ids[1]) for _, ids in seen)
    seen.clear()
    encoder.eval()(pixels)
    assert seen[0][0] == 3
    refused({**spec, "merge": "stack"}, "sample_channels", "set merge: mean")
    refused({**TINY_CHANNELS, "channels": [0, 7]}, "channels: no channel 7", "0 to 4")
    refused({**TINY_CHANNELS, "image_size": 18}, "18 x 18 is no multiple of 4 (patch_size)")


def duoformer_spec(meta, **changes):
    sizes = meta["ctor"]
    width = sizes.get("embed_dim", sizes.get("dim"))
    sizes = {"width": width, "depth": sizes.get("depth", 1), "num_heads": sizes["num_heads"]}
    return {"type": "duoformer", **sizes, "output": "patches", "image_size": 224, **changes}


@torch.no_grad()
def test_duoformer_is_the_authors(tmp_path):
    meta, inputs, outputs, state = vector("duoformer")
    encoder = encoder_with(state, duoformer_spec(meta), tmp_path, keep_prefix=True)
    image = inputs["input.image"]
    model = encoder.model
    maps = model.maps(image)
    tokens = model.tokens(maps)
    regions = model.vision_transformer.inside(tokens, recompute=False)[-1]
    patches = model.vision_transformer.across(regions, (7, 7), recompute=False)
    head = [state[f"vision_transformer.head.{kind}"] for kind in ("weight", "bias")]
    have = {f"output.cnn{i}_mean": x.mean((2, 3)) for i, x in enumerate(maps)}
    have |= {"output.region_tokens": tokens[:, ::7], "output.scale_out": regions, "output.patch_out": patches}
    compare(meta, outputs, have | {"output.logits": torch.nn.functional.linear(patches[:, 0], *head)})


@torch.no_grad()
def test_duoformers_attention_inside_and_across_regions_is_the_authors():
    meta, inputs, outputs, state = vector("duoformer_transformer")
    config = duoformer.DuoFormerConfig.model_validate(duoformer_spec(meta))
    former = duoformer.MultiscaleFormer(config, 2).eval()
    heads = ("fc_norm", "head")
    former.load_state_dict({k: v for k, v in state.items() if not k.startswith(heads)})
    regions = former.inside(inputs["input.tokens"], recompute=False)[-1]
    patches = former.across(regions, (7, 7), recompute=False)
    logits = torch.nn.functional.linear(patches[:, 0], state["head.weight"], state["head.bias"])
    compare(meta, outputs, {"output.scale_out": regions, "output.patch_out": patches, "output.logits": logits})
    for name in ("duoformer_patch_attention", "duoformer_patch_attention_qknorm"):
        meta, inputs, outputs, state = vector(name)
        spec = duoformer_spec(meta, patch_qk_norm=name.endswith("qknorm"))
        former = duoformer.MultiscaleFormer(duoformer.DuoFormerConfig.model_validate(spec), 1).eval()
        former.blocks[0].load_state_dict(state)
        former.cls_token.data, former.pos_embed.data = inputs["input.cls"], inputs["input.pos"]
        first = former.across(inputs["input.x"][:, :, 0], (7, 7), recompute=False)
        compare(meta, outputs, {"output.y0": first, "output.y1": former.blocks[0](4 * first)})


@torch.no_grad()
def test_duoformers_scale_token_from_channels_is_the_authors():
    meta, inputs, outputs, state = vector("duoformer_channel_token")
    with torch.device("meta"):
        token = duoformer.ScaleToken([256, 512, 1024, 2048], 768)
    counters = {k: torch.tensor(0) for k in token.state_dict() if k.endswith("num_batches_tracked")}
    token.load_state_dict(state | counters, assign=True)
    maps = [inputs[f"input.c{i}"] for i in range(4)]
    tokens = duoformer.to_regions(token.eval()(maps), 1)[:, :, 0]
    have = {"output.fused_mean": token.gather(maps).mean((2, 3)), "output.tokens": tokens[:, ::6]}
    compare(meta, outputs, have | {"output.tokens_mean": tokens.mean(1)})


@torch.no_grad()
def test_duoformer_runs_at_other_sizes_with_either_token_and_output(tmp_path):
    whole = {**TINY_DUO, "scale_token": "channels", "output": "patches", "scales": 4, "patch_residual": True}
    pixels = torch.randn(1, 3, 64, 96)
    one = build_encoder(encoder_config({**whole, "keep_prefix": True}, where="e")).eval()
    features = one(pixels)
    assert features.grid == (2, 3) and features.prefix.shape == (1, 1, 16)
    # As the authors name it, below a prefix, into a model that stops after the regions.
    state = {f"module.{k.replace('scale_token.', '')}": v for k, v in one.model.state_dict().items()}
    regions = encoder_with(state, {**whole, "output": "regions"}, tmp_path)
    inside = one.model.vision_transformer.inside(one.model.tokens(one.model.maps(pixels)), recompute=False)[-1]
    torch.testing.assert_close(regions(pixels).tokens, inside)
    refused({**TINY_DUO, "image_size": 72}, "72 x 72 is no multiple of 32")
    refused({**TINY_DUO, "keep_prefix": True}, "keep_prefix: regions have no class token")


def crossvit_spec(meta):
    sizes = meta["ctor"]
    return {
        "type": "crossvit",
        "branch_sizes": sizes["img_size"],
        "patch_sizes": sizes["patch_size"],
        "widths": sizes["embed_dim"],
        "num_heads": sizes["num_heads"],
        "mlp_ratios": sizes["mlp_ratio"][:2],
        "stages": sizes["depth"],
        "conv_stem": sizes["multi_conv"],
        "image_size": sizes["image"],
    }


@torch.no_grad()
def test_crossvit_is_the_authors(tmp_path):
    meta, inputs, outputs, state = vector("crossvit")
    spec, image = {**crossvit_spec(meta), "keep_prefix": True}, inputs["input.image"]
    normed = encoder_with(state, spec, tmp_path)
    plain = encoder_with(state, spec, tmp_path, final_norm=False).model(image)[-1]
    streams = normed.model(image)[-1]
    logits = [torch.nn.functional.linear(x[:, 0], *(state[f"head.{b}.{k}"] for k in ("weight", "bias")))
              for b, x in enumerate(streams)]  # fmt: skip
    have = {"output.tokens_small": plain[0], "output.tokens_large": plain[1]}
    compare(meta, outputs, have | {"output.logits": (logits[0] + logits[1]) / 2})


@torch.no_grad()
def test_crossvit_is_timms_and_takes_its_names(tmp_path):
    torch.manual_seed(0)
    sizes = {"img_size": 96, "img_scale": (1.0, 2 / 3), "patch_size": [12, 16], "embed_dim": [16, 24]}
    depth = {"depth": [[1, 2, 0], [1, 1, 2]], "num_heads": [2, 3], "mlp_ratio": [3, 2, 1]}
    theirs = timm.create_model("crossvit_9_240", pretrained=False, num_classes=3, **sizes, **depth).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    spec = {**TINY_CROSS, "branch_sizes": [96, 64], "mlp_ratios": [3, 2], "stages": depth["depth"]}
    spec |= {"image_size": 96, "conv_stem": False}
    ours = encoder_with(theirs.state_dict(), spec, tmp_path)
    pixels = torch.randn(2, 3, 96, 96)
    want = theirs.forward_features(pixels)
    for have, x in zip(ours.model(pixels)[-1], want):
        torch.testing.assert_close(have, x, atol=2e-5, rtol=1e-4)
    features = ours(pixels)
    assert features.grid == (8, 8)
    torch.testing.assert_close(features.tokens[..., 24:], want[0][:, 1:], atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(
        features.prefix[:, 0], torch.cat([want[1][:, 0], want[0][:, 0]], -1), atol=2e-5, rtol=1e-4
    )
    coarse = build_encoder(encoder_config({**spec, "grid": "coarse", "keep_prefix": False}, where="e"))
    assert coarse.config.info.grid == (4, 4) and coarse.model.blocks[-1].fusion is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"image_size": [36, 48]}, ["image_size: crossvit takes squares, not 36 x 48"]),
        ({"branch_sizes": [40, 32]}, ["branch_sizes: 40 is no multiple of the patch size 12 (fine)"]),
        ({"patch_sizes": [12, 8]}, ["conv_stem", "not 8"]),
        ({"widths": [15, 24]}, ["num_heads: 2 do not divide width 15"]),
    ],
)
def test_crossvits_sizes_that_do_not_fit_are_refused(changes, words):
    refused({**TINY_CROSS, **changes}, *words)


PUBLISHED = {  # millions of parameters, with the authors' classifier of so many classes
    "biformer-t": (13.14, 1000), "biformer-b": (56.80, 1000), "biformer-stl": (28.37, 1000),
    "crossformer-t": (27.78, 1000), "crossformer-l": (91.97, 1000),
    "crossformer-pp-s": (23.33, 1000), "crossformer-pp-h": (95.96, 1000),
    "vssd-micro": (13.51, 1000), "vssd-base": (88.82, 1000),
    "channelvit-s-imagenet": (21.47, 0), "channelvit-s-so2sat": (21.63, 0),
    "duoformer-r50": (139.7, 2), "duoformer-r18": (125.4, 2),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_entries_of_the_catalogue_have_the_published_number_of_parameters(name):
    data = {key: value for key, value in catalogue()[name].items() if key not in DESCRIPTIONS}
    cls = ENCODERS.get(data["type"])
    config = validate(cls.Config, data | ({"output": "patches"} if data["type"] == "duoformer" else {}), where=name)
    with torch.device("meta"):
        model = cls.build(config)
    millions, classes = PUBLISHED[name]
    width = {"biformer": 512 if name == "biformer-t" else 768, "duoformer": 768}.get(data["type"])
    count = sum(p.numel() for p in model.parameters()) + classes * ((width or 8 * config.width) + 1)
    assert count / 1e6 == pytest.approx(millions, abs=0.006 if millions < 100 else 0.06)


@torch.no_grad()
@pytest.mark.parametrize("name", ["biformer", "channelvit", "crossformer", "crossvit", "duoformer", "vssd"])
def test_blocks_compile_without_graph_breaks(name):
    encoder = build_encoder(encoder_config(ENCODERS.get(name).tiny(), where="e")).eval()
    image, calls = encoder.config.info.image, {}
    for module in encoder.modules():
        if type(module).__name__ in ("Block", "Stage"):
            module.register_forward_pre_hook(lambda block, inputs: calls.update({block: inputs}))
    encoder(torch.randn(2, 3, image.height, image.width))
    block, inputs = list(calls.items())[-2 if name == "biformer" else -1]  # BiFormer's last block does not route
    block._forward_pre_hooks.clear()
    torch._dynamo.reset()
    report = torch._dynamo.explain(block)(*inputs)
    torch._dynamo.reset()
    assert report.graph_count == 1 and report.graph_break_count == 0, report.break_reasons


@pytest.mark.parametrize(
    ("name", "exempt"),
    [
        ("vssd", ["layers.0.blocks.0.attn.A_log", "layers.0.blocks.0.attn.D", "layers.0.blocks.0.attn.dt_bias"]),
        ("crossvit", ["pos_embed.0", "cls_token.1"]),
        ("duoformer", ["channel_token", "vision_transformer.pos_embed_for_scale"]),
        ("biformer", ["norm.weight", "downsample_layers.0.1.weight"]),
    ],
)
def test_tokens_positions_norms_and_state_spaces_do_not_decay(name, exempt):
    with torch.device("meta"):
        names = no_decay_names(build_encoder(encoder_config(ENCODERS.get(name).tiny(), where="e")))
    assert {f"model.{key}" for key in exempt} <= names
    assert not any(key.endswith(("qkv.weight", "fc1.weight", "proj.weight")) for key in names)
