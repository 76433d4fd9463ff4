"""Do the connectors put the right value at the right place, run what is routed and nothing else, and compile?"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from mllm.connectors import CONNECTORS
from mllm.connectors.build import build_connector
from mllm.connectors.geometry_exchange import angle_bias, box_angles
from mllm.connectors.layers import (
    ProjectorConfig,
    attend,
    build_projector,
    expert_weight,
    log_weight,
    position_sincos,
    resample,
    unblind,
)
from mllm.connectors.partitions import join_crops
from mllm.connectors.pixel_shuffle import space_to_depth
from mllm.connectors.spatial_aggregator import window_partition
from mllm.errors import AlignmentError, ConfigError
from mllm.testing.connectors import sample_features, sample_routing
from mllm.types import Block, EncoderInfo, ImageSpec, Routing, VisionFeatures, VisualLayout


def info(rows: int, cols: int, width: int) -> EncoderInfo:
    return EncoderInfo(image=ImageSpec(height=8, width=8), grid=(rows, cols), width=width)


def tiny(name: str, **changes):
    config, encoders, width = CONNECTORS.get(name).tiny()
    torch.manual_seed(0)
    return build_connector({**config, **changes}, encoders, width).eval()


def features_of(connector, batch: int, **options):
    return sample_features(type(connector), connector.config, connector.encoders, batch, **options)


# projectors and resampling


def test_llavas_projector_is_linear_gelu_linear_with_its_parameter_names():
    projector = build_projector(ProjectorConfig(depth=2), 6, 8)
    assert {name: tuple(p.shape) for name, p in projector.named_parameters()} == {
        "0.weight": (8, 6),
        "0.bias": (8,),
        "2.weight": (8, 8),
        "2.bias": (8,),
    }
    x = torch.randn(3, 6)
    by_hand = projector[2](F.gelu(projector[0](x)))
    torch.testing.assert_close(projector(x), by_hand)


def test_hidden_widths_count_from_the_input_and_missing_ones_are_the_output_width():
    assert ProjectorConfig(depth=4, hidden=["4x", 5]).widths(6, 8) == [6, 24, 5, 8, 8]
    assert ProjectorConfig(depth=3, hidden="0.5x").widths(6, 8) == [6, 3, 3, 8]
    assert ProjectorConfig(depth=1).widths(6, 8) == [6, 8]


@pytest.mark.parametrize("align", [False, True])
def test_bilinear_resampling_runs_in_fp32_and_comes_back_in_the_inputs_dtype(align):
    tokens = torch.randn(2, 12, 5)
    method = "bilinear_corners" if align else "bilinear"
    image = tokens.transpose(1, 2).reshape(2, 5, 3, 4)
    want = F.interpolate(image, size=(5, 6), mode="bilinear", align_corners=align).flatten(2).transpose(1, 2)
    torch.testing.assert_close(resample(tokens, (3, 4), (5, 6), method), want)
    half = resample(tokens.bfloat16(), (3, 4), (5, 6), method)
    exact = resample(tokens.bfloat16().float(), (3, 4), (5, 6), method)
    assert half.dtype == torch.bfloat16 and torch.equal(half, exact.bfloat16())


@pytest.mark.parametrize("method", ["bilinear", "bilinear_corners", "nearest", "area"])
def test_no_resampling_kernel_sees_bfloat16(method, monkeypatch):
    seen = []
    for name in ("interpolate", "adaptive_avg_pool2d"):
        real = getattr(F, name)
        monkeypatch.setattr(F, name, lambda x, *a, real=real, **k: seen.append(x.dtype) or real(x, *a, **k))
    resample(torch.randn(1, 12, 5).bfloat16(), (3, 4), (2, 2), method)
    assert seen == [torch.float32]


def test_pixel_unshuffle_is_torchs_and_area_is_the_mean_of_the_cells():
    tokens = torch.randn(2, 4 * 6, 3)
    image = tokens.transpose(1, 2).reshape(2, 3, 4, 6)
    want = F.pixel_unshuffle(image, 2).flatten(2).transpose(1, 2)
    assert torch.equal(resample(tokens, (4, 6), (2, 3), "pixel_unshuffle"), want)
    mean = image.unflatten(2, (2, 2)).unflatten(4, (3, 2)).mean(dim=(3, 5)).flatten(2).transpose(1, 2)
    torch.testing.assert_close(resample(tokens, (4, 6), (2, 3), "area"), mean)


def test_sincos_positions_are_centred_alike_on_grids_of_one_image():
    fine = position_sincos((4, 4), 8)
    assert fine.shape == (16, 8)
    torch.testing.assert_close(fine[0], torch.tensor([0.0, 0.0, 1.0, 1.0] * 2))
    torch.testing.assert_close(fine[4 * 2 + 1, [0, 4]], torch.tensor([2.0, 1.0]).sin())
    coarse = position_sincos((2, 2), 8, extent=(4, 4))  # a cell's centre lies between its four fine cells
    torch.testing.assert_close(coarse[3, [0, 4]], torch.tensor([2.5, 2.5]).sin())
    with pytest.raises(ConfigError, match="multiple of 4, got 6"):
        position_sincos((2, 2), 6)


def test_attention_on_an_empty_batch_is_empty_and_differentiable():
    q, k, v = (torch.zeros(0, 2, n, 4, requires_grad=True) for n in (3, 5, 5))
    out = attend(q, k, v)
    assert out.shape == (0, 2, 3, 4)
    out.sum().backward()
    assert all(x.grad is not None for x in (q, k, v))


# order of tokens and channels


def test_space_to_depth_lists_a_merged_tokens_cells_row_by_row_as_internvl():
    tokens = torch.arange(4 * 6 * 3.0).reshape(1, 24, 3)
    merged = space_to_depth(tokens, (4, 6), 2)
    assert merged.shape == (1, 6, 12)
    cells = [0, 1, 6, 7]  # token 0 merges grid cells (0, 0), (0, 1), (1, 0), (1, 1)
    assert torch.equal(merged[0, 0], tokens[0, cells].flatten())
    x = tokens.reshape(1, 4, 6, 3)  # the published chain of views, factor 0.5
    x = x.view(1, 4, 3, 6).permute(0, 2, 1, 3).contiguous().view(1, 3, 2, 12).permute(0, 2, 1, 3)
    assert torch.equal(merged, x.reshape(1, 6, 12))


def test_window_partition_gives_each_cell_the_block_under_it():
    tokens = torch.arange(4 * 6.0).reshape(1, 24, 1)
    windows = window_partition(tokens, (2, 3), 2)
    assert windows.shape == (6, 4, 1)
    assert windows[0].flatten().tolist() == [0, 1, 6, 7]
    assert windows[5].flatten().tolist() == [16, 17, 22, 23]


def test_channel_concat_joins_in_the_models_order():
    encoders = {"b": info(2, 2, 3), "a": info(2, 2, 2)}
    connector = build_connector({"type": "channel_concat", "projector": {"depth": 1}}, encoders, 4)
    features = features_of(connector, 2)
    want = connector.projector(torch.cat([features["b"].tokens, features["a"].tokens], dim=-1))
    torch.testing.assert_close(connector.view_tokens(features), want)


def test_sequence_concat_keeps_encoders_apart_and_interleave_takes_turns():
    encoders = {"a": info(2, 2, 3), "b": info(2, 2, 3)}
    for name, order in (("sequence_concat", [0, 1, 2, 3, 4, 5, 6, 7]), ("interleave", [0, 4, 1, 5, 2, 6, 3, 7])):
        connector = build_connector({"type": name, "projector": {"depth": 1}}, encoders, 4)
        features = features_of(connector, 2)
        parts = [connector.projectors[key](features[key].tokens) for key in encoders]
        torch.testing.assert_close(connector.view_tokens(features), torch.cat(parts, dim=1)[:, order])


def test_sequence_concat_of_other_grids_is_one_row_and_of_equal_columns_is_stacked():
    layout = CONNECTORS.get("sequence_concat").layout
    config = tiny("sequence_concat").config
    assert layout(config, {"a": info(2, 3, 4), "b": info(4, 3, 4)}).grid == (6, 3)
    assert layout(config, {"a": info(2, 3, 4), "b": info(2, 2, 4)}).grid == (1, 10)


def test_spatial_aggregator_closes_every_row_with_the_separator():
    connector = tiny("spatial_aggregator")
    layout = type(connector).layout(connector.config, connector.encoders)
    assert layout.row_separators and layout.num_tokens == 2 * (3 + 1) and layout.grid == (2, 3)
    tokens = connector.view_tokens(features_of(connector, 2)).unflatten(1, (2, 4))
    assert torch.equal(tokens[:, :, -1], connector.row_separator.expand(2, 2, -1))
    assert not torch.equal(tokens[:, :, 0], tokens[:, :, 1])


def test_spatial_aggregator_cells_read_their_own_windows_only():
    encoders = {"semantic": info(2, 2, 6), "spatial": info(4, 4, 4)}
    spec = {"type": "spatial_aggregator", "grid": [2, 2], "hidden": 8, "num_heads": 2, "row_separators": False}
    connector = build_connector(spec, encoders, 8).eval()
    features = features_of(connector, 1)
    before = connector.view_tokens(features)
    # fine cell → the coarse cell it lies under, on 4×4 under 2×2
    for fine, coarse in ((0, 0), (5, 0), (2, 1), (8, 2), (9, 2), (15, 3)):
        moved = features["spatial"].tokens.clone()
        moved[0, fine] += 1.0
        after = connector.view_tokens({**features, "spatial": VisionFeatures(moved, (4, 4))})
        assert (after != before).any(-1)[0].nonzero().flatten().tolist() == [coarse]


# routing


def test_absent_experts_channels_are_zeros():
    connector = tiny("channel_concat")
    features = features_of(connector, 2)
    routing = Routing(("spatial", "text"), torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    zeroed = {
        "semantic": features["semantic"],
        "spatial": VisionFeatures(features["spatial"].tokens * torch.tensor([1.0, 0.0])[:, None, None], (8, 8)),
        "text": VisionFeatures(features["text"].tokens * torch.tensor([0.0, 1.0])[:, None, None], (3, 5)),
    }
    torch.testing.assert_close(connector.view_tokens(features, routing), connector.view_tokens(zeroed))


def test_an_absent_experts_tokens_are_zero_vectors_in_sequence():
    connector = tiny("sequence_concat")
    tokens = connector.view_tokens(features_of(connector, 2), Routing(("spatial",), torch.tensor([[0.0], [0.25]])))
    assert not tokens[0, 4:].any() and tokens[1, 4:].any() and tokens[0, :4].any()


def test_select_keeps_features_whole_and_passes_the_weights_gradient():
    weights = torch.tensor([[0.25, 0.0]], requires_grad=True)
    routing = Routing(("a", "b"), weights)
    value = expert_weight(routing, "a", select=True)
    assert value is not None and value.item() == 1.0 and expert_weight(routing, "b", select=True).item() == 0.0
    value.sum().backward()
    assert weights.grad.tolist() == [[1.0, 0.0]]
    assert expert_weight(routing, "a").item() == 0.25 and expert_weight(routing, "always_on") is None


def test_log_weights_scale_an_experts_share_of_attention():
    bias = log_weight(torch.tensor([1.0, 0.5, 0.0]))
    shares = (torch.zeros(3) + bias).softmax(-1)
    torch.testing.assert_close(shares, torch.tensor([2 / 3, 1 / 3, 0.0]))
    assert unblind(torch.full((2, 3), float("-inf"))).eq(0).all()


def test_missing_features_are_an_error_unless_routing_switched_the_encoder_off():
    connector = tiny("channel_concat")
    features = features_of(connector, 2)
    missing = {key: value for key, value in features.items() if key != "text"}
    with pytest.raises(AlignmentError, match="'text' are absent from the batch and no routing"):
        connector.view_tokens(missing)
    with pytest.raises(AlignmentError, match="'text' are absent from the batch, but 1 images are routed to it"):
        connector.view_tokens(missing, Routing(("text",), torch.tensor([[1.0], [0.0]])))
    with pytest.raises(AlignmentError, match="no features of any encoder"):
        connector.view_tokens({})


def test_features_of_another_shape_batch_or_grid_are_an_error_with_both_shapes():
    connector = tiny("mlp")
    with pytest.raises(AlignmentError, match=r"'vision' have shape \(1, 6, 9\).*expected \(1, 6, 10\)"):
        connector.view_tokens({"vision": VisionFeatures(torch.zeros(1, 6, 9), (2, 3))})
    with pytest.raises(AlignmentError, match=r"on grid 3×2, expected .* on grid 2×3"):
        connector.view_tokens({"vision": VisionFeatures(torch.zeros(1, 6, 10), (3, 2))})
    several = tiny("channel_concat")
    features = {**features_of(several, 2), "text": features_of(several, 3)["text"]}
    with pytest.raises(AlignmentError, match=r"'text' have shape \(3, 15, 5\).*expected \(2, 15, 5\)"):
        several(features)
    with pytest.raises(AlignmentError, match="routing of 3 images for features of 2"):
        several(features_of(several, 2), Routing(("text",), torch.ones(3, 1)))


def stirred_mova(top_k: int | None = None):
    """A MoVA connector whose zero-initialised parameters have values, so that experts matter."""
    encoders = {"base": info(4, 4, 64), "x": info(3, 3, 12), "y": info(4, 4, 10), "z": info(5, 2, 6)}
    torch.manual_seed(0)
    connector = build_connector({"type": "mova", "depth": 2, "top_k": top_k}, encoders, 8).eval()
    for parameter in connector.parameters():
        if not parameter.detach().any():
            torch.nn.init.normal_(parameter, std=0.1)
    return connector


def test_mova_at_initialisation_is_the_mlp_of_the_pooled_base_for_any_routing_and_text():
    encoders = {"base": info(4, 6, 64), "x": info(3, 3, 12), "y": info(4, 4, 10)}
    connector = build_connector({"type": "mova"}, encoders, 8).eval()
    features = features_of(connector, 3)
    pooled = F.adaptive_avg_pool2d(features["base"].tokens.transpose(1, 2).unflatten(-1, (4, 6)), (2, 3))
    want = connector.projector(pooled.flatten(2).transpose(1, 2))
    for routing in (None, sample_routing(("x", "y"), 3), Routing(("x", "y"), torch.zeros(3, 2))):
        for text in (None, torch.randn(3, 8)):
            torch.testing.assert_close(connector.view_tokens(features, routing, text), want)


def test_mova_skips_unrouted_experts_per_image_and_gives_what_running_all_of_them_gives():
    connector = stirred_mova(top_k=2)
    features = features_of(connector, 4)
    text = torch.randn(4, 8)
    weights = torch.tensor([[1.0, 0, 0], [0.5, 0, 0.5], [0, 0, 0], [1 / 3, 1 / 3, 1 / 3]])
    rows: list[int] = []
    for block in connector.blocks:
        for reader in block.readers:
            reader.register_forward_pre_hook(lambda _module, args: rows.append(len(args[0])))
    with torch.no_grad():
        got = connector.view_tokens(features, Routing(("x", "y", "z"), weights), text)
    # per block: 1 + 2 + 0 + 2 (top_k) of the 12 image-expert pairs
    assert sum(rows) == 2 * (1 + 2 + 0 + 2)
    for image in range(4):
        part = slice(image, image + 1)
        alone = {key: VisionFeatures(f.tokens[part], f.grid) for key, f in features.items()}
        want = connector.view_tokens(alone, Routing(("x", "y", "z"), weights[part]), text[part])
        torch.testing.assert_close(got[part], want, atol=1e-6, rtol=1e-5)


def test_mova_with_nothing_routed_equals_the_path_without_experts_and_depends_on_no_expert():
    connector = stirred_mova()
    features = features_of(connector, 2)
    none = Routing(("x", "y", "z"), torch.zeros(2, 3))
    want = connector.view_tokens(features, none)
    torch.testing.assert_close(connector.view_tokens({"base": features["base"]}, none), want)
    assert not torch.equal(connector.view_tokens(features, Routing(("x", "y", "z"), torch.ones(2, 3) / 3)), want)


def test_mova_reads_the_question():
    connector = stirred_mova(top_k=2)
    features = features_of(connector, 2)
    outputs = [
        connector.view_tokens(features, None, torch.randn(2, 8, generator=torch.Generator().manual_seed(s)))
        for s in (1, 2)
    ]
    assert not torch.equal(*outputs)
    with pytest.raises(AlignmentError, match=r"text has shape \(1, 8\), expected \(2, 8\)"):
        connector.view_tokens(features, None, torch.zeros(1, 8))


def test_merv_weighs_encoders_and_leaves_absent_ones_out():
    connector = tiny("merv")
    features = features_of(connector, 2)
    tokens, weights = connector.mix(features)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2))
    parts = [connector.poolers[key](f.tokens.unsqueeze(1)) for key, f in features.items()]
    torch.testing.assert_close(tokens, sum(w[:, None, None] * part for w, part in zip(weights.T, parts)))
    _, weights = connector.mix(features, Routing(("spatial",), torch.tensor([[0.0], [1.0]])))
    assert weights[0].tolist() == [1.0, 0.0] and 0 < weights[1, 1] < 1


def test_attention_bias_needs_the_map_and_names_the_encoder():
    connector = tiny("attention_bias")
    assert type(connector).attention_from(connector.config, connector.encoders) == {"spatial": 2}
    features = features_of(connector, 2)
    without = {**features, "spatial": VisionFeatures(features["spatial"].tokens, (2, 3))}
    with pytest.raises(AlignmentError, match=r"'spatial' carry no attention map.*return_attention"):
        connector.view_tokens(without)
    features["spatial"].attention = torch.ones(2, 3, 7, 7)
    with pytest.raises(AlignmentError, match=r"\(2, 3, 7, 7\), expected \(2, 2, P \+ 6, P \+ 6\)"):
        connector.view_tokens(features)


def test_attention_bias_ignores_prefix_tokens_of_the_map():
    connector = tiny("attention_bias")
    features = features_of(connector, 2)
    attention = features["spatial"].attention
    changed = attention.clone()
    changed[:, :, 0], changed[:, :, :, 0] = 0.5, 0.5
    features["spatial"].attention = changed
    first = connector.view_tokens(features)
    features["spatial"].attention = attention
    assert torch.equal(first, connector.view_tokens(features))
    features["spatial"].attention = attention.flip(-1)
    assert not torch.equal(first, connector.view_tokens(features))


# compilation


@pytest.mark.parametrize("name", [name for name in CONNECTORS if name != "mova"])
def test_connectors_trace_into_one_graph(name):
    """No graph break without routing (MoVA skips experts per image, so it breaks by design)."""
    connector = tiny(name)
    features = features_of(connector, 2)
    torch.compiler.reset()  # all kinds share one `forward`, whose recompilations are counted together
    compiled = torch.compile(connector, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(features, None, None), connector(features, None, None))


def test_merv_weighs_encoders_once_for_a_whole_video():
    """As published: the keys are means over all tokens of a video, so that its frames share the weights; pictures have their own."""
    spec, encoders, width = CONNECTORS.get("merv").tiny()
    connector = build_connector(spec, encoders, width).eval()
    features = sample_features(type(connector), connector.config, encoders, 4)
    block = Block(4, (1, 2, 2))
    film = VisualLayout(tuple(replace(block, view=k) for k in range(3)), num_views=3, frames=3)
    with torch.no_grad():
        tokens = connector(features, None, None, [film, VisualLayout((block,))])
        pooled = torch.stack(
            [connector.poolers[name](f.tokens.unsqueeze(1)) for name, f in features.items()], dim=1
        )  # V, E, M, L
        whole, weights = connector.mixture(pooled[:3].transpose(0, 1).flatten(1, 2)[None])
    assert weights.shape == (1, 2)
    torch.testing.assert_close(tokens[:12], whole[0], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(tokens[12:], connector.mixture(pooled[3:])[0][0], atol=1e-6, rtol=1e-5)
    assert not torch.allclose(tokens[:4], connector.mixture(pooled[:1])[0][0], atol=1e-6)


def scales_layout(count: int) -> VisualLayout:
    return VisualLayout((Block(6, (1, 2, 3)),), count, thumbnail=0, scales=(1, 2))


@torch.no_grad()
def test_a_panorama_and_its_crops_exchange_before_they_become_one_map():
    torch.manual_seed(0)
    config, encoders, width = CONNECTORS.get("geometry_exchange").tiny()
    connector = build_connector(config, encoders, width).eval()
    plain = build_connector({"type": "multi_scale"}, encoders, width).eval()
    plain.projector.load_state_dict(connector.projector.state_dict())
    tokens = torch.randn(10, 6, 32)
    features = {"vision": VisionFeatures(tokens, (2, 3))}
    layouts = [scales_layout(5), scales_layout(5)]
    before = plain(features, layouts=layouts)
    assert torch.allclose(connector(features, layouts=layouts), before, atol=1e-6), (
        "an untrained exchange changes the map"
    )
    for layer in (connector.exchange.out, connector.exchange.ffn_out):
        torch.nn.init.normal_(layer.weight, std=0.2)
    after = connector(features, layouts=layouts)
    assert after.shape == before.shape and not torch.allclose(after, before, atol=1e-3)
    alone = connector({"vision": VisionFeatures(tokens[5:], (2, 3))}, layouts=layouts[:1])
    assert torch.allclose(after[6:], alone, atol=1e-6), "a picture's map depends on the others of its batch"
    moved = tokens[[0, 2, 1, 3, 4, *range(5, 10)]]
    other = connector({"vision": VisionFeatures(moved, (2, 3))}, layouts=layouts)
    assert not torch.allclose(other[:6], after[:6], atol=1e-3), "where a crop lies does not matter"


def test_angles_of_crops_are_those_of_the_whole_and_bias_leads_to_what_lies_there():
    field, boxes = (360.0, 180.0), [(0, 0, 0.5, 0.5), (0.5, 0, 1, 0.5), (0, 0.5, 0.5, 1), (0.5, 0.5, 1, 1)]
    crops = torch.stack([box_angles((2, 3), box, field) for box in boxes])
    large = join_crops(crops.transpose(1, 2).unflatten(2, (2, 3))[None], 2)[0].flatten(1).T
    assert torch.allclose(large, box_angles((4, 6), (0, 0, 1, 1), field), atol=1e-6)
    assert large[0].tolist() == pytest.approx([-math.pi * 5 / 6, math.pi * 3 / 8])
    whole = box_angles((4, 6), (0, 0, 1, 1), field)
    bias = angle_bias(whole, whole, 0.3)
    assert torch.equal(bias.argmax(1), torch.arange(24)) and bias.max() == 1 and bias.min() >= -1
    behind = angle_bias(whole, whole, 0.3, opposite=True).argmax(1)
    assert behind[0] == 3 * 6 + 3, "straight behind up left is down right, half a turn on"


@torch.no_grad()
def test_frames_of_a_video_are_fused_in_groups_and_the_gate_decides_what_a_second_sensor_adds():
    torch.manual_seed(0)
    config, encoders, width = CONNECTORS.get("gated_fusion").tiny()
    connector = build_connector({**config, "frames": 2}, encoders, width).eval()
    features = {
        name: VisionFeatures(torch.randn(4, *size), encoders[name].grid)
        for name, size in (("camera", (12, 6)), ("radar", (4, 10)))
    }
    layout = VisualLayout(tuple(Block(12, (1, 3, 4), view=2 * k) for k in range(2)), 4, frames=4)
    both = connector(features, layouts=[layout])
    second = {name: VisionFeatures(found.tokens[2:], found.grid) for name, found in features.items()}
    half = VisualLayout((Block(12, (1, 3, 4)),), 2, frames=2)
    assert both.shape == (24, width) and torch.allclose(both[12:], connector(second, layouts=[half]), atol=1e-6)
    swapped = {name: VisionFeatures(found.tokens.flip(0), found.grid) for name, found in second.items()}
    assert not torch.allclose(connector(swapped, layouts=[half]), both[12:], atol=1e-4), "frames have no order"
    still = {name: VisionFeatures(found.tokens[:1], found.grid) for name, found in features.items()}
    twice = {name: VisionFeatures(found.tokens[:1].repeat(2, 1, 1), found.grid) for name, found in features.items()}
    assert torch.allclose(connector(still), connector(twice, layouts=[half]), atol=1e-6), "a picture is equal frames"

    fusion = connector.fusion
    first, other = torch.randn(1, 8, 3, 4), torch.randn(1, 8, 3, 4)
    fusion.gate[2].norm.weight.zero_()
    fusion.gate[2].norm.bias.fill_(-50.0)
    assert torch.allclose(fusion(first, other), first), "a shut gate lets something pass"
    fusion.gate[2].norm.bias.fill_(50.0)
    fused = fusion.fuse(torch.cat([first, other], 1)).relu()
    assert torch.allclose(fusion(first, other), first + fused)
