"""Do the connectors' modules reproduce the numbers of the published reference implementations?"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from mllm.connectors.attention_bias import BiasedCrossAttention
from mllm.connectors.build import build_connector
from mllm.connectors.gated_fusion import ConvNorm, FrameBottleneck, GatedFusion
from mllm.connectors.geometry_exchange import GeometryExchange
from mllm.connectors.layers import ProjectorConfig
from mllm.connectors.merv import AttentivePooler, EncoderMixture, PooledProjector
from mllm.connectors.mova import AdapterBlock, GatedMlp, MapAttention, rotary_table, rotate
from mllm.connectors.slow_fast import SlowTokenAttention, fast_frames, fast_tokens
from mllm.connectors.spatial_aggregator import SpatialAggregator
from mllm.connectors.spatial_mllm import GeometryMerger
from mllm.fusions import ChannelAttentionConv, GateFusion, SoftmaxFusion
from mllm.types import EncoderInfo, ImageSpec, Routing, VisionFeatures
from tests.golden.fill import check, fill_all, load

GOLDEN = Path(__file__).parents[2] / "golden"
IMAGE = ImageSpec(height=16, width=16)


def case(name: str) -> tuple[dict, dict[str, torch.Tensor], dict]:
    meta, inputs, outputs = load(GOLDEN / f"{name}.json")
    return meta, {key.removeprefix("input."): torch.from_numpy(value) for key, value in inputs.items()}, outputs


def fill_from(module: nn.Module, meta: dict, renames: list[tuple[str, str]]) -> nn.Module:
    """Load the case's parameters under the module's own names; every parameter must be filled, and every one used."""
    state = {}
    for name, value in fill_all(meta).items():
        for pattern, replacement in renames:
            name = re.sub(pattern, replacement, name)
        state[name] = torch.from_numpy(value)
    module.load_state_dict(state, strict=True)
    return module.eval()


def compare(meta: dict, expected: dict, **got: torch.Tensor) -> None:
    check(meta, expected, {f"output.{name}": np.asarray(value.detach()) for name, value in got.items()})


def test_the_fill_rule_gives_the_published_check_value():
    from tests.golden.fill import fill

    assert fill("w", (2, 2), 1, "matrix")[0, 0] == pytest.approx(-0.2707212)


SVA_NAMES = [
    (r"aggregate_(\d)\.attention_layer\.linear", r"readers.\1.linear"),
    (r"aggregate_(\d)\.attention_layer\.k_proj", r"readers.\1.keys.0"),
    (r"aggregate_(\d)\.attention_layer\.v_proj", r"readers.\1.values.0"),
    (r"aggregate_(\d)\.attention_layer\.", r"readers.\1."),
    (r"cross_attn\.k_proj_(\d)", r"attention.keys.\1"),
    (r"cross_attn\.v_proj_(\d)", r"attention.values.\1"),
    (r"cross_attn\.", "attention."),
    (r"q_proj", "query"),
    (r"o_proj", "out"),
    (r"pos_embed_", "positions."),
    (r"proj_context", "context"),
    (r"proj_in", "input"),
    (r"proj_out", "output"),
    (r"weight_mlp", "mixture"),
]


@pytest.mark.parametrize("sampler", ["joint", "sep"])
def test_spatial_aggregator_equals_cambrian(sampler):
    meta, x, expected = case(f"cambrian_sva_{sampler}")
    module = SpatialAggregator(32, 32, [32, 32], [1, 2], hidden=32, depth=2, num_heads=16, sampler=sampler)
    fill_from(module, meta, SVA_NAMES)
    biases = [torch.where(x[f"mask_{i}"] > 0, 0.0, float("-inf")) for i in (0, 1)]
    compare(meta, expected, y=module(x["q"], x["ctx"], [x["lat_0"], x["lat_1"]], biases))


def test_prismatic_fused_mlp_is_a_channel_concat_with_a_depth_3_projector():
    meta, x, expected = case("prismatic_fused_mlp")
    encoders = {
        "dino": EncoderInfo(image=IMAGE, grid=(3, 3), width=14),
        "siglip": EncoderInfo(image=IMAGE, grid=(3, 3), width=10),
    }
    spec = {"type": "channel_concat", "projector": {"depth": 3, "hidden": ["4x", "out"]}}
    module = fill_from(build_connector(spec, encoders, 16), meta, [])
    dino, siglip = x["x"].split([14, 10], dim=-1)
    features = {"dino": VisionFeatures(dino, (3, 3)), "siglip": VisionFeatures(siglip, (3, 3))}
    compare(meta, expected, y=module.view_tokens(features))


ATTENTION_NAMES = [
    (r"q_proj", "query"),
    (r"k_proj", "key"),
    (r"v_proj", "value"),
    (r"inner_attn_ln", "norm"),
    (r"proj\.", "out."),
]
BLOCK_NAMES = [
    (r"cross_attn\.", "readers."),
    (r"self_attn", "attention"),
    *ATTENTION_NAMES,
    (r"norm1\.", "query_norms."),
    (r"norm2\.", "expert_norms."),
    (r"norm3", "attention_norm"),
    (r"norm4", "mlp_norm"),
    (r"mlp\.w1", "mlp.gate"),
    (r"mlp\.w2", "mlp.value"),
    (r"mlp\.w3", "mlp.out"),
    (r"mlp\.ffn_ln", "mlp.norm"),
]
ADAPTER_NAMES = [
    (r"^pos_embed", "positions"),
    (r"^mlp\.", "projector."),
    (r"^downsample\.0\.b1", "stages.0"),
    (r"^downsample\.2\.b1", "stages.1"),
    (r"conv(\d)\.conv", r"conv_\1"),
    (r"conv(\d)\.bn", r"norm_\1.norm"),
    (r"se\.fc1", "squeeze"),
    (r"se\.fc2", "excite"),
]


def test_mova_rotary_table_and_rotation_equal_the_reference():
    meta, x, expected = case("mova_rope_table")
    cos, sin = rotary_table((4, 4))
    compare(meta, expected, cos=cos, sin=sin, y=rotate(x["q"], (cos, sin)))


def test_mova_attention_equals_the_reference():
    meta, x, expected = case("mova_attention")
    module = fill_from(MapAttention(128, 96), meta, ATTENTION_NAMES)
    compare(meta, expected, y=module(x["x"], x["value"], rotary_table((4, 4))))


def test_mova_gated_mlp_equals_the_reference():
    meta, x, expected = case("mova_swiglu")
    names = [(r"^w1", "gate"), (r"^w2", "value"), (r"^w3", "out"), (r"ffn_ln", "norm")]
    module = fill_from(GatedMlp(64, 170), meta, names)
    compare(meta, expected, y=module(x["x"]))


@pytest.mark.parametrize("learning", [False, True])
def test_mova_block_equals_the_reference_whether_or_not_gradients_are_recorded(learning):
    meta, x, expected = case("mova_adapter_block")
    module = fill_from(AdapterBlock(1024, [64, 48, 32], text_width=1024, top_k=2), meta, BLOCK_NAMES)
    experts = [x["expert_0"], x["expert_1"], x["expert_2"]]
    with torch.set_grad_enabled(learning):
        y = module(x["x"], experts, x["text"], x["routing"], rotary_table((3, 3)))
    compare(meta, expected, y=y)


@pytest.mark.parametrize("name", ["mova_adapter", "mova_adapter_at_init"])
def test_mova_connector_equals_the_reference(name):
    meta, x, expected = case(name)
    widths = {"base": 1024, "a": 64, "b": 48, "c": 32}
    encoders = {key: EncoderInfo(image=IMAGE, grid=(4, 4), width=width) for key, width in widths.items()}
    spec = {"type": "mova", "depth": 2, "top_k": 2, "text_width": 1024}
    module = build_connector(spec, encoders, 128)
    # the output MLP and the blocks' MLP share a prefix in the reference: rename the outer one first
    fill_from(module, meta, [*ADAPTER_NAMES, *BLOCK_NAMES])
    parts = x["x"].split(list(widths.values()), dim=-1)
    features = {key: VisionFeatures(part, (4, 4)) for key, part in zip(widths, parts)}
    routing = Routing(experts=("a", "b", "c"), weights=x["routing"])
    with torch.no_grad():
        y = module.view_tokens(features, routing, x["text"])
    compare(meta, expected, y=y)
    if name == "mova_adapter_at_init":
        pooled = nn.functional.adaptive_avg_pool2d(parts[0].transpose(1, 2).unflatten(-1, (4, 4)), 2)
        direct = module.projector(pooled.flatten(2).transpose(1, 2))
        torch.testing.assert_close(y, direct)


def test_merv_pooled_projector_equals_the_reference():
    meta, x, expected = case("merv_pool3d_projector")
    module = PooledProjector(ProjectorConfig(depth=1), 6, 10, grid=(5, 5), output=(2, 2), frames=4)
    fill_from(module, meta, [(r"projector\.projector", "projector.0")])
    compare(meta, expected, y=module(x["x"]))


def test_merv_attentive_pooler_equals_the_reference():
    meta, x, expected = case("merv_attentive_pooler")
    module = AttentivePooler(ProjectorConfig(depth=1), 16, 10, num_queries=4, num_heads=2)
    state = {name: torch.from_numpy(value) for name, value in fill_all(meta).items()}
    names = {
        "query_tokens": "queries",
        "cross_attn.norm1": "norm",
        "cross_attn.norm2": "mlp_norm",
        "cross_attn.xattn.q.": "query.",
        "cross_attn.xattn.kv": "key_value",
        "cross_attn.xattn.proj": "out",
        "cross_attn.mlp.fc1": "mlp.0",
        "cross_attn.mlp.fc2": "mlp.2",
        "projector.projector": "projector.0",
    }
    renamed = {}
    for name, value in state.items():
        old = next(prefix for prefix in names if name.startswith(prefix))
        renamed[names[old] + name.removeprefix(old)] = value.squeeze(0) if old == "query_tokens" else value
    module.load_state_dict(renamed)
    compare(meta, expected, y=module(x["x"]))


def test_merv_mixture_equals_the_reference_without_its_dead_parameters():
    meta, x, expected = case("merv_fusion")
    values = {name: torch.from_numpy(value) for name, value in fill_all(meta).items()}
    module = EncoderMixture(16, 12)
    module.load_state_dict(
        {
            "query": values["Q"],
            "query_projection.weight": values["attention.q_proj_weight"],
            "query_projection.bias": values["attention.in_proj_bias"][:12],
            "key_projection.weight": values["attention.k_proj_weight"],
        }
    )
    y, w = module(torch.stack([x[f"V_{i}"] for i in range(4)], dim=1))
    compare(meta, expected, y=y, w=w)


def test_biased_cross_attention_equals_fakereasoning():
    meta, x, expected = case("fakereasoning_cross_attention")
    module = BiasedCrossAttention(64, num_heads=16, map_heads=16, bias_hidden=32, mlp_hidden=128)
    names = [
        (r"attention_mlp\.mlp", "bias"),
        (r"mhatt\.0\.linear_q", "query"),
        (r"mhatt\.0\.linear_k", "key"),
        (r"mhatt\.0\.linear_v", "value"),
        (r"mhatt\.0\.linear_merge", "out"),
        (r"ffn\.0\.mlp\.fc\.linear", "mlp.0"),
        (r"ffn\.0\.mlp\.linear", "mlp.3"),
        (r"norm\.0\.", "attention_norm."),
        (r"norm\.1\.", "mlp_norm."),
        (r"a_2", "weight"),
        (r"b_2", "bias"),
    ]
    fill_from(module, meta, names)
    compare(meta, expected, y=module(x["q"], x["kv"], x["attn"]))


def test_the_fusion_blocks_norm_equals_fakereasoning():
    meta, x, expected = case("fakereasoning_layernorm")
    width = meta["ctor"]["size"]
    block = BiasedCrossAttention(width, num_heads=1, map_heads=1, bias_hidden=1, mlp_hidden=1)
    norm = fill_from(block.mlp_norm, meta, [(r"a_2", "weight"), (r"b_2", "bias")])
    compare(meta, expected, y=norm(x["x"]))


def test_the_attention_map_convention_is_fakereasonings():
    """A map is the softmax of scaled logits, rows sum to 1: what eager Hugging Face attention returns."""
    from transformers import Dinov2Config
    from transformers.models.dinov2.modeling_dinov2 import Dinov2Attention

    meta, x, expected = case("fakereasoning_dino_attention")
    config = Dinov2Config(hidden_size=32, num_attention_heads=4, qkv_bias=True, attn_implementation="eager")
    module = Dinov2Attention(config).eval()
    values = {name: torch.from_numpy(value) for name, value in fill_all(meta).items()}
    weights = [*values["qkv.weight"].chunk(3), values["proj.weight"]]
    biases = [*values["qkv.bias"].chunk(3), values["proj.bias"]]
    linears = [layer for layer in module.modules() if isinstance(layer, nn.Linear)]  # query, key, value, output
    for layer, weight, bias in zip(linears, weights, biases, strict=True):
        layer.load_state_dict({"weight": weight, "bias": bias})
    maps: list[torch.Tensor] = []

    def keep_maps(_module, _args, output):
        maps.extend(o for o in output if o is not None and o.dim() == 4) if isinstance(output, tuple) else None

    for layer in module.modules():
        layer.register_forward_hook(keep_maps)
    y = module(x["x"])
    compare(meta, expected, y=y[0] if isinstance(y, tuple) else y, attn=maps[0])


@torch.no_grad()
def test_a_transformers_and_convolutions_maps_are_fused_as_db_sam_does():
    meta, x, expected = case("dbsam_fusion")
    sizes, weights = meta["ctor"], fill_all(meta)
    multi = SoftmaxFusion(sizes["dim"], sizes["num_conv"], sizes["reduction"], sizes["expand_ratio"])
    gate = GateFusion(sizes["dim"], sizes["reduction"], sizes["expand_ratio"])
    names = {
        "conv_fc": "conv_scorers",
        "vit_fc": "vit_scorer",
        "ffn.": "",
        "fc_spatial": "spatial",
        "fc_channel": "channel",
    }
    for module, prefix in ((multi, "multi."), (gate, "dane.")):
        state = {}
        for name, value in weights.items():
            if name.startswith(prefix):
                name = name.removeprefix(prefix)
                for former, present in names.items():
                    name = name.replace(former, present)
                state[name] = torch.from_numpy(value)
        module.load_state_dict(state, strict=True)
    convs = [x[f"conv_{k}"] for k in range(sizes["num_conv"])]
    attended = ChannelAttentionConv(sizes["dim"])
    attended.load_state_dict(
        {k.removeprefix("mb."): torch.from_numpy(v) for k, v in weights.items() if k.startswith("mb.")}
    )
    mbconv = attended(x["vit"].permute(0, 3, 1, 2))
    compare(meta, expected, multi=multi(x["vit"], convs), dane=gate(x["vit"], convs[:1]), mbconv=mbconv)


def test_spatial_mllm_merges_geometry_as_both_published_versions_do():
    meta, x, expected = case("spatialmllm_connector_v11")
    module = fill_from(GeometryMerger("1.1", 16, 24), meta, [("ln_q", "norm")])
    geometry = x["spatial_0"][:, 5:]  # one camera and four register tokens before the patches
    grouped = module.group(geometry, (4, 6)).flatten(0, 1)
    compare(meta, expected, grouped=grouped, y=x["video"] + module(geometry, (4, 6)).flatten(0, 1))

    meta, x, expected = case("spatialmllm_connector_v10")
    names = [
        ("token_merge_ln_q", "norm"),
        ("token_merge_mlp", "mlp"),
        ("vgg_to_language_ln_q", "second_norm"),
        ("vgg_to_language_mlp", "second_mlp"),
    ]
    module = fill_from(GeometryMerger("1.0", 16, 24), meta, names)
    frames = x["spatial"][0, :, 5:]
    film, stills = (module(f, (4, 6)).view(1, -1, 2, 3, 24) for f in (frames, frames.repeat_interleave(2, dim=0)))
    compare(meta, expected, video=film, images=stills)


def test_slow_fast_splits_tokens_and_reads_the_slow_ones_as_published():
    meta, x, expected = case("slowfast_token_split")
    least = meta["ctor"]["min_fast_frames"]
    found = {
        s["out"]: fast_tokens(x["video"], stride=s["sampling"], pool=s["pool"], side=s["spatial"], least=least)
        for s in meta["ctor"]["settings"]
    }
    rows = [fast_frames(*pair) for pair in meta["ctor"]["pairs"]]
    index = torch.tensor([row + [-1] * (16 - len(row)) for row in rows])
    compare(meta, expected, idx=index, **found)

    meta, x, expected = case("slowfast_hybrid_cross_attention")
    module = SlowTokenAttention(32, 4, 2)
    fresh = module(x["state"], x["query"], x["slow"], asks=x["token_type"] <= 2, valid=x["key_mask"].bool())
    assert torch.equal(fresh, x["state"]), "the layer starts without effect"
    filled = {name: torch.from_numpy(value) for name, value in fill_all(meta).items()}
    names = {"cross_attn_kv_proj.": "key_value.", "cross_attn_gate_proj.0.": "token_gate."}
    state = {"layer_gate": filled["cross_attn_warm_up_gate"]}
    for theirs, ours in names.items():
        state |= {ours + part: filled[theirs + part] for part in ("weight", "bias")}
    module.load_state_dict(state)
    valid = x["key_mask"].bool() & x["has_visual"].bool()[:, None]
    compare(meta, expected, y=module(x["state"], x["query"], x["slow"], asks=x["token_type"] <= 2, valid=valid))


def part_from(module: nn.Module, meta: dict, prefix: str, renames: list[tuple[str, str]]) -> nn.Module:
    """`fill_from` with the parameters under one name."""
    state = {}
    for name, value in fill_all(meta).items():
        if name.startswith(prefix):
            name = name.removeprefix(prefix)
            for pattern, replacement in renames:
                name = re.sub(pattern, replacement, name)
            state[name] = torch.from_numpy(value)
    counted = {name: value for name, value in module.state_dict().items() if name.endswith("num_batches_tracked")}
    module.load_state_dict({**state, **counted}, strict=True)
    return module.eval()


GATE_NAMES = [
    (r"fuse_conv\.(0|conv)\.", "fuse.conv."),
    (r"fuse_conv\.(1|bn)\.", "fuse.norm."),
    (r"attention\.(0|3)\.", lambda found: f"gate.{0 if found[1] == '0' else 2}.conv."),
    (r"attention\.(1|4)\.", lambda found: f"gate.{0 if found[1] == '1' else 2}.norm."),
]


@torch.no_grad()
def test_a_second_sensor_passes_the_gate_as_in_doracamom():
    meta, x, expected = case("doracamom_bev_voxel_fusion")
    sizes, names = meta["ctor"], GATE_NAMES
    width = sizes["bev_channels"]
    enter = part_from(
        ConvNorm(sizes["voxel_channels"] * sizes["z"], width, 2, "batch_norm"),
        meta,
        "bev.img_bev_conv.",
        [(r"^0\.", "conv."), (r"^1\.", "norm.")],
    )
    flat = GatedFusion(width)
    state = {name: value for name, value in fill_all(meta).items() if not name.startswith("bev.img_bev_conv")}
    params = [entry for entry in meta["params"] if entry["name"] in state]
    part_from(flat, {**meta, "params": params}, "bev.", names)
    solid = part_from(GatedFusion(sizes["img_channels3d"], dims=3, bias=False), meta, "vox.", names)
    camera = enter(x["voxel"].flatten(1, 2)).relu()
    compare(
        meta,
        expected,
        bev=flat(camera, x["radar_bev"]),
        bev_add_radar=flat(camera, x["radar_bev"], add_second=True),
        voxel=solid(x["img_voxel"], x["pts_voxel"]),
    )


@torch.no_grad()
def test_frames_of_both_sensors_become_one_as_in_doracamom():
    meta, x, expected = case("doracamom_temporal_c3d")
    sizes = meta["ctor"]
    width, queue, (rows, cols, height) = sizes["embed_dims"], sizes["queue"], sizes["hwz"]
    names = [
        (r"conv1", "reduce"), (r"conv2", "mix"), (r"conv3", "expand"), (r"bn(\d)", r"norm\1"),
        (r"downsample\.0", "shortcut"), (r"downsample\.1", "shortcut_norm"),
    ]  # fmt: skip
    camera = part_from(FrameBottleneck(width, width, queue, dims=3), meta, "t.temporal_block.0.", names)
    radar = part_from(FrameBottleneck(sizes["radar_channels"], width, queue), meta, "t.radar_temporal_block.0.", names)
    now = x["voxel"].transpose(1, 2).unflatten(2, (rows, cols, height)).permute(0, 1, 4, 2, 3)
    before = x["prev_voxel"].permute(0, 1, 2, 5, 3, 4)

    def tokens(voxels: torch.Tensor) -> torch.Tensor:
        return voxels.permute(0, 3, 4, 2, 1).flatten(1, 3)

    compare(
        meta,
        expected,
        voxel=tokens(camera(torch.cat([before, now[:, None]], 1))),
        radar=radar(torch.cat([x["prev_radar"], x["radar"][:, None]], 1)),
        voxel_first=tokens(camera(now[:, None])),
        radar_first=radar(x["radar"][:, None]),
    )


def exchange_case() -> tuple[GeometryExchange, dict, dict[str, torch.Tensor], dict]:
    meta, x, expected = case("imagine360_warp_attention")
    names = [
        (r"attn1\.to_q", "query"), (r"attn1\.to_k", "key"), (r"attn1\.to_v", "value"), (r"attn1\.to_out", "out"),
        (r"ff\.net\.0\.proj", "ffn_in"), (r"ff\.net\.2", "ffn_out"), (r"norm1", "norm"), (r"norm2", "ffn_norm"),
    ]  # fmt: skip
    block = GeometryExchange(meta["ctor"]["dim"], code="published")
    return part_from(block, meta, "warp.transformer.", names), meta, x, expected


@torch.no_grad()
def test_a_panorama_and_its_views_exchange_as_in_imagine360():
    block, meta, x, expected = exchange_case()
    sizes = meta["ctor"]
    number, count, frames = sizes["B"], sizes["views"], sizes["frames"]
    whole = x["pano"].permute(0, 2, 3, 4, 1).flatten(2, 3).flatten(0, 1)
    views = x["pers"].unflatten(0, (number, count)).permute(0, 3, 1, 4, 5, 2).flatten(3, 4).flatten(0, 1)
    angles = (x["pano_coords"].flatten(0, 1), x["pers_coords"].flatten(1, 2))
    got = {}
    for kind in ("same", "opposite"):
        over_views = x[f"mask_pers_{kind}"].permute(1, 2, 0, 3, 4).flatten(2, 4).flatten(0, 1)
        over_whole = x[f"mask_pano_{kind}"].flatten(3, 4).flatten(0, 2)
        new_whole, new_views = block(whole, views, angles, (over_views, over_whole))
        got[f"pano_{kind}"] = (
            new_whole.unflatten(0, (number, frames)).unflatten(2, sizes["pano_hw"]).permute(0, 4, 1, 2, 3)
        )
        split = new_views.unflatten(0, (number, frames)).unflatten(3, sizes["pers_hw"])
        got[f"pers_{kind}"] = split.permute(0, 2, 5, 1, 3, 4).flatten(0, 1)
    compare(meta, expected, **got)
