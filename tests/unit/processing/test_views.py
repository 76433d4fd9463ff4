"""Are the ways of looking at a picture the published ones, down to the pixel?"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mllm.connectors.build import build_connector
from mllm.connectors.dual_perspective import DualPerspectiveConnector
from mllm.connectors.joining import spread_views
from mllm.connectors.partitions import crop_parts, join_crops, join_strided, strided_parts
from mllm.data.collate import collate
from mllm.encoders.backbones.falcon import FullAttention, Scenes, ask_across_tiles
from mllm.encoders.catalogue import build_encoder, encoder_config
from mllm.encoders.eve import GlobalAttention, LocalAttention
from mllm.errors import ConfigError, DataError
from mllm.processing.chat import encode_sample
from mllm.processing.layout import LayoutRules
from mllm.processing.views.base import views_config
from mllm.processing.views.native import solo_size
from mllm.processing.views.pixels import to_view_pixels
from mllm.processing.views.tiles import Tiles
from mllm.types import IMAGE_MARK, EncoderInfo, ImageSpec, Sample, Turn, ViewLayout, VisionFeatures
from tests.golden.fill import check, fill_all, load
from tests.helpers import picture, tiny_model


def golden(name: str) -> tuple[dict, dict[str, torch.Tensor], dict]:
    meta, given, expected = load(f"tests/golden/{name}.json")
    return meta, {key.removeprefix("input."): torch.from_numpy(value) for key, value in given.items()}, expected


def test_falcon_chooses_the_published_grids() -> None:
    meta, given, expected = golden("falcon_anchor_choice")
    config = views_config({"type": "tiles", "dialect": "falcon", "max_tiles": meta["ctor"]["N"]})
    tile = ImageSpec(height=meta["ctor"]["crop"], width=meta["ctor"]["crop"])
    anchors = [list(grid) for grid in config.candidates]
    assert anchors == expected["output.anchors"].tolist()
    for size, choice in zip(given["size"].tolist(), expected["output.choice"].tolist()):
        assert list(Tiles.grid(config, tile, tuple(size))) == anchors[choice], size
        assert (
            Tiles.layout(config, ViewLayout(num_tokens=3, grid=(1, 3), in_place=False), tile, tuple(size)).thumbnail
            == 0
        )


@torch.no_grad()
def test_registers_of_one_pictures_tiles_ask_each_other_as_published() -> None:
    meta, given, expected = golden("falcon_register_attention")
    sizes = meta["ctor"]
    attention = FullAttention(sizes["hidden"], sizes["heads"])
    attention.load_state_dict({k.removeprefix("att."): torch.from_numpy(v) for k, v in fill_all(meta).items()})
    owners = torch.arange(len(sizes["crops_per_image"])).repeat_interleave(torch.tensor(sizes["crops_per_image"]))
    have = ask_across_tiles(attention, given["x"], sizes["registers"], Scenes(owners))
    check(meta, expected, {"output.y": have.numpy()})
    mixed = torch.tensor([3, 0, 4, 1, 2])  # tiles of a picture need not lie together, only in order
    shuffled = ask_across_tiles(attention, given["x"][mixed], sizes["registers"], Scenes(owners[mixed]))
    torch.testing.assert_close(shuffled, have[mixed], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_falcons_tiles_see_their_own_picture_and_their_own_place() -> None:
    spec = {"width": 24, "depth": 2, "num_heads": 2, "mlp_width": 32, "patch_size": 4, "num_registers": 3}
    encoder = build_encoder(encoder_config({"type": "falcon", **spec, "image_size": 16}, where="encoder")).eval()
    for parameter in encoder.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.3)
    assert encoder.config.info.grid == (1, 3) and not encoder.config.info.in_place
    pixels, owners = torch.randn(4, 3, 16, 16), torch.tensor([0, 0, 0, 1])
    places = torch.tensor([[-1, -1], [0, 0], [0, 1], [-1, -1]])
    together = encoder(pixels, scene_ids=owners, places=places).tokens
    first = encoder(pixels[:3], scene_ids=owners[:3], places=places[:3]).tokens
    torch.testing.assert_close(together[:3], first, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(together[3:], encoder(pixels[3:]).tokens, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(together[0], encoder(pixels[:1]).tokens[0], atol=1e-4), "its tiles speak to the thumbnail"
    moved = encoder(pixels, scene_ids=owners, places=places.flip(1)).tokens
    assert not torch.allclose(moved[2], together[2], atol=1e-4), "the place of a tile is told"


def test_a_plain_siglip_starts_falcon(tmp_path: Any) -> None:
    from safetensors.torch import save_file
    from transformers import SiglipVisionConfig, SiglipVisionModel

    sizes = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    theirs = SiglipVisionModel(SiglipVisionConfig(**sizes, image_size=16, patch_size=4)).eval()
    save_file(
        {f"vision_model.{k.removeprefix('vision_model.')}": v for k, v in theirs.state_dict().items()},
        tmp_path / "w.safetensors",
    )
    spec = {
        "width": 24,
        "depth": 2,
        "num_heads": 2,
        "mlp_width": 32,
        "patch_size": 4,
        "num_registers": 3,
        "image_size": 16,
    }
    weights = {"source": str(tmp_path / "w.safetensors")}
    encoder = build_encoder(encoder_config({"type": "falcon", **spec, "weights": weights}, where="encoder")).eval()
    encoder.load_pretrained()
    layer = encoder.model.encoder.layers[1]
    assert torch.equal(layer.interact_attn.q_proj.weight, layer.self_attn.q_proj.weight)
    pixels = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        places, x = torch.full((2, 2), -1), None
        x = encoder.model.embeddings(pixels, places)[:, :16]  # without registers it is SigLIP
        for layer in encoder.model.encoder.layers:
            x = x + layer.self_attn(layer.layer_norm1(x))
            x = x + layer.mlp(layer.layer_norm2(x))
        torch.testing.assert_close(
            encoder.model.post_layernorm(x), theirs(pixel_values=pixels).last_hidden_state, atol=1e-5, rtol=1e-5
        )


def test_crops_and_strided_pictures_are_the_published_index_maps() -> None:
    meta, given, expected = golden("infllava_crop_stride_maps")
    n, index = meta["ctor"]["n"], given["index"]
    crops, strided = crop_parts(index, n), strided_parts(index, n)
    have = {"crop": crops[0, :, 0], "stride": strided[0, :, 0]}
    have |= {"recombined_crop": join_crops(crops, n)[0, 0], "recombined_stride": join_strided(strided, n)[0, 0]}
    check(meta, expected, {f"output.{key}": value.numpy() for key, value in have.items()})
    # The pixels that the encoder is given are cut in the same way.
    side = index.shape[2] // n
    spec = ImageSpec(height=side, width=side, mean=(0, 0, 0), std=(1 / 255,) * 3)
    rules = LayoutRules(
        ViewLayout(num_tokens=1, grid=(1, 1)), {"e": spec}, views_config({"type": "dual_perspective", "n": n})
    )
    picture = Image.fromarray(np.repeat(index[0, 0].numpy().astype(np.uint8)[..., None], 3, axis=2))
    seen = to_view_pixels(picture, {"e": spec}, rules.view_boxes((12, 12)))["e"][:, 0].round().long()
    check(meta, expected, {
        "output.crop": seen[: n * n].numpy(), "output.stride": seen[n * n : 2 * n * n].numpy(),
        "output.recombined_crop": index[0, 0].numpy(), "output.recombined_stride": index[0, 0].numpy(),
    })  # fmt: skip
    assert len(seen) == 2 * n * n + 1 == rules.layout((12, 12)).num_views


NAMES = {"attention.linears.0": "attention.query", "attention.linears.1": "attention.key"}
NAMES |= {
    "attention.linears.2": "attention.value",
    "attention.linears.3": "attention.out",
    "attention.ln": "attention.norm",
}
NAMES |= {"ffn_crop": "local_mlp", "ffn_stride": "global_mlp", "ln_fuse": "norm"}


@torch.no_grad()
def test_dual_perspective_enhancement_is_the_authors() -> None:
    meta, given, expected = golden("infllava_dual_perspective")
    sizes, state = meta["ctor"], {}
    for name, value in fill_all(meta).items():
        old = next(key for key in NAMES if name.startswith(key))
        state[NAMES[old] + name.removeprefix(old)] = torch.from_numpy(value)
    info = EncoderInfo(image=ImageSpec(height=24, width=24), grid=(sizes["spatial"],) * 2, width=sizes["channel"])
    spec = {"type": "dual_perspective", "num_heads": sizes["heads"], "reduction": "bilinear"}
    connector = build_connector(spec, {"clip": info}, 8).eval()
    assert isinstance(connector, DualPerspectiveConnector)
    connector.enhancement.load_state_dict(state)
    views = torch.stack([given[f"tile_{k:02d}"] for k in range(2 * sizes["n"] ** 2)], dim=1)
    check(meta, expected, {"output.y": connector.enhanced(views, sizes["n"]).numpy()})
    # The whole of it: thumbnail and enhanced map in the mean, then the projector; one picture or several.
    rules = LayoutRules(
        connector.layout(connector.config, {"clip": info}),
        {"clip": info.image},
        views_config({"type": "dual_perspective", "n": sizes["n"]}),
    )
    thumbnail, layouts = torch.randn(1, 1, *views.shape[2:]), [rules.layout((5, 7))]
    seen = torch.cat([views, thumbnail], dim=1)
    whole = connector({"clip": VisionFeatures(seen[0], info.grid)}, layouts=layouts)
    mean = (thumbnail[:, 0] + connector.enhanced(views, sizes["n"])) / 2
    torch.testing.assert_close(whole, connector.projector(mean)[0], atol=1e-5, rtol=1e-5)
    two = torch.cat([torch.randn_like(seen[0]), seen[0]])
    torch.testing.assert_close(
        connector({"clip": VisionFeatures(two, info.grid)}, layouts=layouts * 2)[576:], whole, atol=1e-5, rtol=1e-5
    )


@torch.no_grad()
def test_thinning_out_drops_what_the_mean_keeps() -> None:
    """For n = 3 the authors' resizing reads one of nine cells; ours all of them."""
    info = EncoderInfo(image=ImageSpec(height=8, width=8), grid=(2, 2), width=16)
    moved = {}
    for reduction in ("bilinear", "area"):
        torch.manual_seed(0)
        connector = build_connector(
            {"type": "dual_perspective", "num_heads": 2, "reduction": reduction}, {"e": info}, 8
        ).eval()
        views = torch.randn(1, 18, 4, 16)
        before = connector.enhanced(views, 3)
        views[:, 9] += 1.0  # the first strided picture
        moved[reduction] = float((connector.enhanced(views, 3) - before).abs().max())
    assert moved["area"] > 1e-3 and moved["bilinear"] < 1e-6, moved


@torch.no_grad()
def test_scales_are_laid_side_by_side_averaged_and_joined_in_the_width() -> None:
    """S2: a map that holds its own coordinates comes back as the mean of the finer one under each cell."""
    info = EncoderInfo(image=ImageSpec(height=8, width=8, mean=(0, 0, 0), std=(1 / 255,) * 3), grid=(2, 2), width=1)
    connector = build_connector({"type": "multi_scale", "scales": [1, 3]}, {"e": info}, 8).eval()
    fine = torch.arange(36.0).view(1, 1, 6, 6)
    views = torch.cat(
        [
            torch.tensor([[[[7.0], [8.0], [9.0], [10.0]]]]),
            crop_parts(fine, 3).flatten(2).unsqueeze(-1),
        ],
        dim=1,
    )
    merged = connector.merged(views)[0]
    assert merged[:, 0].tolist() == [7, 8, 9, 10]
    assert merged[:, 1].tolist() == [fine[0, 0, r : r + 3, c : c + 3].mean() for r in (0, 3) for c in (0, 3)]
    rules = LayoutRules(
        connector.layout(connector.config, {"e": info}),
        {"e": info.image},
        views_config({"type": "multi_scale", "scales": [1, 3]}),
    )
    picture_of = Image.fromarray(np.arange(24 * 24 * 3, dtype=np.uint8).reshape(24, 24, 3))
    seen = to_view_pixels(picture_of, {"e": info.image}, rules.view_boxes((24, 24)))["e"]
    assert seen.shape == (10, 3, 8, 8) and rules.layout((24, 24)).num_tokens == 4
    want = torch.from_numpy(np.asarray(picture_of)[8:16, 16:24].copy()).permute(2, 0, 1).float()
    torch.testing.assert_close(seen[1 + 5], want, atol=1e-3, rtol=0)
    with pytest.raises(ConfigError, match=r"connector.scales: \[1, 3\] where model.views.scales is \[1, 2\]"):
        LayoutRules(rules.view, {"e": info.image}, views_config({"type": "multi_scale"})).layout((5, 5))


def test_beside_a_tile_stands_the_part_of_the_whole_that_shows_it() -> None:
    """A map that holds its own coordinates, seen at the thumbnail, gives every tile the coordinates it shows."""
    lead, other = ImageSpec(height=40, width=40), ImageSpec(height=24, width=24)
    view = ViewLayout(num_tokens=100, grid=(10, 10))
    rules = LayoutRules(
        view, {"lead": lead, "other": other},
        views_config({"type": "tiles", "grids": [[1, 2], [2, 2]], "thumbnail_only": ["other"]}),
    )  # fmt: skip
    layouts = [rules.layout((40, 80)), rules.layout((80, 60))]
    assert [layout.rows_of("lead") for layout in layouts] == [3, 5] and {
        layout.rows_of("other") for layout in layouts
    } == {1}
    assert [len(boxes) for boxes in rules.view_boxes((80, 60)).values()] == [5, 1]
    rows = (torch.arange(20) + 0.5) / 20
    place = torch.stack([rows[:, None].expand(20, 20), rows[None, :].expand(20, 20)], dim=-1).reshape(1, 400, 2)
    spread = spread_views({"other": VisionFeatures(place.repeat(2, 1, 1), (20, 20))}, layouts)["other"].tokens
    assert spread.shape == (8, 400, 2)
    torch.testing.assert_close(spread[0], place[0])
    right = spread[2].view(20, 20, 2)  # the second tile of 1 × 2: all rows, the right half
    torch.testing.assert_close(right[10, 10], torch.tensor([0.525, 0.5 + 0.525 / 2]), atol=1e-5, rtol=0)
    lower = spread[6].view(20, 20, 2)[10, 19]  # third of 2 × 2 tiles; the picture is 60 of 80 wide, with 10 of padding
    torch.testing.assert_close(lower, torch.tensor([0.5 + 0.525 / 2, (0.975 * 40 - 10) / 60]), atol=1e-5, rtol=0)


def test_solos_sizes_are_the_published_ones() -> None:
    meta, given, expected = golden("solo_resize")
    have = [
        solo_size(tuple(size), meta["ctor"]["patch"], meta["ctor"]["max_resolution"]) for size in given["size"].tolist()
    ]
    check(meta, expected, {"output.target": np.array(have)})
    rules = native({"rule": "solo"}, patch=32)
    assert rules.layout((1, 1025)).patches == (1, 32), (
        "a strip keeps one row of patches, where the published size has none"
    )


def native(spec: dict[str, Any], *, patch: int = 16, cell: int = 1) -> LayoutRules:
    image = ImageSpec(height=64, width=64, patch=patch)
    return LayoutRules(
        ViewLayout(num_tokens=16, grid=(4, 4), cell=cell), {"e": image}, views_config({"type": "native", **spec})
    )


@pytest.mark.parametrize("budget", [64, 256, 1024])
def test_native_sizes_are_transformers_own(budget: int) -> None:
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize
    from transformers.models.siglip2.image_processing_siglip2 import get_image_size_for_max_num_patches

    random = np.random.default_rng(budget)
    for _ in range(60):
        height, width = (int(2**power) for power in random.uniform(4, 11, 2))
        want = get_image_size_for_max_num_patches(height, width, 16, budget)
        rows, columns = native({"max_patches": budget}).layout((height, width)).patches or (0, 0)
        assert (rows * 16, columns * 16) == tuple(want), (height, width)
        if max(height, width) / min(height, width) < 100:
            want = smart_resize(height, width, factor=32, min_pixels=8 * 32 * 32, max_pixels=budget // 4 * 32 * 32)
            rules = native({"rule": "qwen", "max_patches": budget, "min_patches": 32}, cell=2)
            rows, columns = rules.layout((height, width)).patches or (0, 0)
            if rows * columns <= budget == want[0] * want[1] // 256:
                assert (rows * 16, columns * 16) == tuple(want), (height, width)


def test_no_picture_becomes_more_than_the_budget() -> None:
    for rule in ("naflex", "qwen", "solo", "eve", "evev2"):
        rules = native({"rule": rule, "max_patches": 100, **({"newlines": True} if rule == "naflex" else {})}, patch=28)
        for size in [(1, 4000), (4000, 1), (10000, 10000), (1, 1), (333, 77)]:
            rows, columns = rules.layout(size).patches or (0, 0)
            assert 1 <= rows * columns <= 100 and min(rows, columns) >= 1, (rule, size)
        assert rules.layout(rules.largest()).num_tokens >= max(
            rules.layout(s).num_tokens for s in [(1, 4000), (4000, 1)]
        )
    eve = native({"rule": "eve"}, patch=28)
    assert eve.layout((336, 336)).patches == (24, 24) and eve.layout((100, 400)).patches == (6, 24)


@torch.no_grad()
@pytest.mark.parametrize("name", ["eve_local_attention", "eve_global_attention"])
def test_eves_attentions_are_the_authors(name: str) -> None:
    meta, given, expected = golden(name)
    sizes = meta["ctor"]
    module = (
        LocalAttention(sizes["input_size"], sizes["conv_stride"], sizes["num_heads"])
        if "local" in name
        else GlobalAttention(sizes["input_size"], sizes["num_heads"])
    )
    module.load_state_dict({key: torch.from_numpy(value) for key, value in fill_all(meta).items()})
    have = module(given["x"]) if "local" in name else module(given["cls"], given["x"])
    check(meta, expected, {"output.y": have.numpy()})


@torch.no_grad()
def test_eves_patch_embedding_is_the_authors_from_a_canvas_and_from_patches() -> None:
    meta, given, expected = golden("eve_patch_embedding_layer")
    sizes = meta["ctor"]
    spec = {
        "type": "eve",
        "width": sizes["input_size"],
        "patch_size": sizes["patch_stride"],
        "stride": sizes["conv_stride"],
    }
    spec |= {"num_heads": sizes["num_heads"], "image_size": given["pixels"].shape[2]}
    encoder = build_encoder(encoder_config(spec, where="encoder"))
    encoder.layer.load_state_dict({key: torch.from_numpy(value) for key, value in fill_all(meta).items()})
    tokens, grids = encoder.layer.of_canvas(given["pixels"])
    have = {f"output.tokens_{k}": part.numpy() for k, part in enumerate(tokens)}
    check(meta, expected, have | {"output.hw": np.array(grids)})
    unit, patches = encoder.config.info.image.patch, []
    for image, (rows, columns) in zip(given["pixels"], grids):
        inside = (image[3] > 0).nonzero()
        (top, left), (bottom, right) = inside[0].tolist(), (inside[-1] + 1).tolist()
        cells = image[:3, top:bottom, left:right].reshape(3, rows, unit, columns, unit)
        patches.append(cells.permute(1, 3, 0, 2, 4).reshape(rows * columns, -1))
    features = encoder(torch.cat(patches), grids=grids)
    torch.testing.assert_close(features.tokens[0], torch.cat(tokens), atol=1e-5, rtol=1e-5)


SIGLIP2 = {"model_type": "siglip2_vision_model", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
SIGLIP2 |= {"num_attention_heads": 2, "num_patches": 16, "patch_size": 4}
GRIDS = [(2, 3), (5, 1), (4, 4), (2, 3)]


def siglip2_and_patches(**changes: Any) -> tuple[Any, torch.Tensor, list[torch.Tensor]]:
    torch.manual_seed(0)
    encoder = build_encoder(encoder_config({"type": "hf", "architecture": SIGLIP2, **changes}, where="encoder")).eval()
    pictures = [torch.randn(3, rows * 4, columns * 4) for rows, columns in GRIDS]
    patches = [p.reshape(3, r, 4, c, 4).permute(1, 3, 0, 2, 4).reshape(r * c, -1) for p, (r, c) in zip(pictures, GRIDS)]
    return encoder, torch.cat(patches), pictures


@torch.no_grad()
@pytest.mark.parametrize("layers", [[-1], [-2]])
def test_siglip2_sees_pictures_of_any_grid_as_transformers_does(layers: list[int]) -> None:
    """Packed end to end, none padded, against transformers' own model on each alone."""
    encoder, patches, pictures = siglip2_and_patches(layers=layers)
    features = encoder(patches, grids=GRIDS)
    assert features.tokens.shape == (1, 33, 32) and features.grids == tuple(GRIDS)
    parts = features.tokens[0].split([r * c for r, c in GRIDS])
    for seen, (rows, columns), part in zip(pictures, GRIDS, parts):
        flat = seen.reshape(3, rows, 4, columns, 4).permute(1, 3, 2, 4, 0).reshape(1, rows * columns, -1)
        mask, shapes = torch.ones(1, rows * columns), torch.tensor([[rows, columns]])
        theirs = encoder.model.float()
        x = theirs.embeddings(flat, shapes)
        for layer in theirs.encoder.layers:
            x = layer(x, attention_mask=None)
        want = theirs.post_layernorm(x) if layers == [-1] else x
        assert mask.shape[1] == len(part)
        torch.testing.assert_close(part, want[0], atol=1e-5, rtol=1e-5)
    assert encoder(patches[:0], grids=[]).tokens.shape == (1, 0, 32)


def test_packed_pictures_have_the_same_gradients_recomputed() -> None:
    encoder, patches, _ = siglip2_and_patches()
    encoder.train()
    found = []
    for recompute in (False, True):
        encoder.zero_grad()
        encoder.set_gradient_checkpointing(recompute)
        encoder(patches, grids=GRIDS).tokens.square().sum().backward()
        found.append({n: p.grad.clone() for n, p in encoder.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() and len(found[0]) > 10
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_unit_sees_native_pictures_as_it_sees_fixed_ones() -> None:
    spec = {"type": "unit", "width": 24, "depth": 2, "num_heads": 3, "patch_size": 4, "cpe_max_size": 30}
    encoder = build_encoder(encoder_config({**spec, "image_size": 16}, where="encoder")).eval()
    _, patches, pictures = siglip2_and_patches()
    parts = encoder(patches, grids=GRIDS).tokens[0].split([r * c for r, c in GRIDS])
    for seen, part in zip(pictures, parts):
        torch.testing.assert_close(part, encoder.read_layers(seen[None])[0].tokens[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"type": "tiles", "dialect": "falcon", "min_tiles": 2}, "falcon takes max_tiles"),
        ({"type": "dual_perspective", "n": 0}, "model.views.n"),
    ],
)
def test_settings_that_do_not_fit_are_told(spec: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        views_config(spec)


def test_a_budget_leaves_the_tilings_that_fit_it() -> None:
    view, spec = ViewLayout(num_tokens=16, grid=(4, 4)), {"e": ImageSpec(height=32, width=32)}
    sizes = [(64, 64), (32, 96), (400, 400), (1, 4000), (4000, 1), (33, 31)]
    kinds: list[tuple[dict[str, Any], int]] = [
        ({"type": "tiles"}, 60),
        ({"type": "tiles", "dialect": "internvl"}, 90),
        ({"type": "tiles", "dialect": "falcon"}, 70),
        ({"type": "native", "newlines": True}, 50),
    ]
    for config, limit in kinds:
        native_view, images = view, spec
        if config["type"] == "native":
            native_view = view.model_copy(update={"cell": 1})
            images = {"e": spec["e"].model_copy(update={"patch": 8})}
        free = LayoutRules(native_view, images, views_config(config))
        tight = LayoutRules(native_view, images, views_config({**config, "max_visual_tokens": limit}))
        counts = [(tight.layout(size).num_tokens, free.layout(size).num_tokens) for size in sizes]
        assert all(count <= limit for count, _ in counts) and any(count < before for count, before in counts), config
        assert tight.layout(tight.largest()).num_tokens <= limit
        for size in sizes:  # the pixels follow
            (views,) = tight.view_boxes(size).values()
            rows = sum((v.picture[0] // 8) * (v.picture[1] // 8) if v.patch else 1 for v in views)
            assert rows == tight.layout(size).rows_of("e"), (config, size)
        shared = LayoutRules(native_view, images, views_config({**config, "max_sample_tokens": 4 * limit}))
        assert shared.layouts([(*size, shared.share(4)) for size in sizes]) == [tight.layout(size) for size in sizes]
        with pytest.raises(DataError, match="a picture may take 1 visual tokens, and the smallest"):
            shared.layout((64, 64), shared.share(4 * limit))
        with pytest.raises(DataError, match="pictures cannot share"):  # a token each would be more than the budget
            shared.share(4 * limit + 1)


def test_pictures_in_one_list_belong_to_the_text_that_holds_their_place(tmp_path: Any) -> None:
    """One of a text's own is seen in tiles, several of one text are seen whole, however the list is given."""
    views = {"type": "tiles", "grids": [[1, 2], [2, 2]], "several": "whole"}
    _, processor = tiny_model(tmp_path, views=views)
    pictures = [picture(k, size=(60, 40)) for k in range(3)]
    texts = ["<image> one", "<image> and <image>"]
    flat = processor(text=texts, images=pictures, padding=True, return_tensors="pt")
    nested = processor(text=texts, images=[pictures[:1], pictures[1:]], padding=True, return_tensors="pt")
    assert flat.keys() == nested.keys() and all(torch.equal(flat[key], nested[key]) for key in flat)
    assert [len(layout.blocks) for layout in processor.rules.layouts(flat["image_sizes"])] == [2, 2, 2]
    views_of = [layout.num_views for layout in processor.rules.layouts(flat["image_sizes"])]
    assert views_of[0] > 1 and views_of[1:] == [1, 1]


def test_a_samples_pictures_share_its_budget_and_it_is_said_once(tmp_path: Any, caplog: Any) -> None:
    """60 pictures in one sample, a 1 × 4000 strip among them: fewer tiles, or a clear refusal, never a crop."""
    views = {"type": "tiles", "dialect": "internvl", "max_sample_tokens": 20 * 16 * 3}
    model, processor = tiny_model(tmp_path, views=views)
    pictures = [picture(1, size=(84, 84)), picture(2, size=(4000, 1)), *[picture(3, size=(60, 30))] * 18]
    text = [Turn("user", IMAGE_MARK * 20), Turn("assistant", "a")]
    with caplog.at_level("WARNING"):
        encoded = [encode_sample(processor, Sample(f"s{k}", text, pictures)) for k in range(2)]
    assert sum("max_sample_tokens (960)" in record.message for record in caplog.records) == 1
    assert int((encoded[0].input_ids == processor.image_token_id).sum()) <= 960
    assert encoded[0].extras["image_sizes"].tolist()[1] == [1, 4000, 48]
    alone = encode_sample(processor, Sample("one", [Turn("user", IMAGE_MARK), Turn("assistant", "a")], pictures[:1]))
    assert len(alone) > len(encoded[0]) / 20
    with torch.no_grad():
        assert bool(torch.isfinite(model(**collate([encoded[0], alone], pad_token_id=0).inputs).loss))
    batch = processor(text=["<image>" * 20], images=[pictures], return_tensors="pt")
    assert int((batch["input_ids"] == processor.image_token_id).sum()) == int(
        (encoded[0].input_ids == processor.image_token_id).sum()
    )
    many = Sample("many", [Turn("user", IMAGE_MARK * 70), Turn("assistant", "a")], [pictures[0]] * 70)
    with pytest.raises(
        DataError, match=r"sample 'many'.*70 images: a picture may take 13 visual tokens.*smallest tiling takes 16"
    ):
        encode_sample(processor, many)
    with pytest.raises(DataError, match=r"100.0 megapixels|110.0 megapixels"):
        processor(text=["<image>"], images=[[Image.new("L", (11000, 10000))]])
