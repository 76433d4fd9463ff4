"""Do parts of generative systems give the numbers of their published code, and do right where that does not?"""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from mllm.errors import ConfigError
from mllm.visual_tokenizers.diffusion.occupancy import kept_labels, occupancy_map, occupancy_rays
from mllm.visual_tokenizers.diffusion.semantic_fusion import SemanticFusion, weighted_error
from mllm.visual_tokenizers.networks.equalize import Equalization, FeatureEqualization, level_widths
from mllm.visual_tokenizers.outliers import (
    gradient_masked,
    grid_regions,
    region_mask,
    render_loss,
    soft_mask,
    soft_mask_loss,
)
from mllm.visual_tokenizers.parallel import cosine_mask_ratio, generate_parallel, least_sure
from mllm.visual_tokenizers.sampling import filter_logits


def test_top_p_is_vilaus(golden):
    case = golden("vilau_top_p")
    case.check(y=filter_logits(case.inputs["probs"].log(), top_p=case.meta["ctor"]["p"]).softmax(-1))


def test_mask_schedule_is_showos(golden):
    case = golden("showo_mask_schedule")
    mask = least_sure(case.inputs["probs"], case.inputs["mask_len"])
    case.check(ratio=cosine_mask_ratio(case.inputs["t"]), mask=mask.long())
    with pytest.raises(ConfigError, match="0 to 7"):
        least_sure(case.inputs["probs"], torch.tensor([[8], [1]]))


def test_parallel_drawing_settles_the_surest_first_and_all_in_the_end():
    """A predictor that is surer of later places: they are settled first, and never changed again."""
    wanted = torch.tensor([[3, 1, 2, 0, 1, 3], [0, 0, 1, 2, 3, 1]])
    seen = []

    def predict(codes, opened):
        seen.append((codes.clone(), opened.clone()))
        return torch.nn.functional.one_hot(wanted, 4).float() * torch.arange(1, 7)[:, None]

    assert torch.equal(generate_parallel(predict, (2, 6), steps=4, temperature=0), wanted)
    numbers = [int(opened[0].sum()) for _, opened in seen]
    assert numbers == [6, 5, 4, 2], "cos(π t / 2) of six, rounded down"
    assert seen[1][1][0].tolist() == [True] * 5 + [False]
    for (before, open_before), (after, open_after) in pairwise(seen):
        assert not (open_after & ~open_before).any() and torch.equal(before[~open_before], after[~open_before])
    with pytest.raises(ConfigError, match="steps is 0"):
        generate_parallel(predict, (2, 6), steps=0)


def test_semantic_fusion_is_dualdiffs(golden):
    case = golden("dualdiff_semantic_fusion")
    sizes, x = case.meta["ctor"], case.inputs
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "out", "to_q_occ": "query"}
    names |= {"to_k_occ": "own_key", "to_v_occ": "own_value", "to_k_txt": "key", "to_v_txt": "value"}
    made = {}
    for part, twice in (("sfa", False), ("sfa_plus", True)):
        fusion = SemanticFusion(sizes["width"], sizes["text_width"], heads=sizes["heads"], twice=twice)
        weights = {
            name.removeprefix(f"{part}."): value
            for name, value in case.weights.items()
            if name.partition(".")[0] == part
        }
        fusion.load_state_dict(
            {names[key.rpartition(".")[0]] + "." + key.rpartition(".")[2]: v for key, v in weights.items()}
        )
        made[part] = fusion(x["cond"], x["text"])
    error = weighted_error(x["pred"], x["target"])
    case.check(
        **made, loss_plain=error.mean(), loss_foreground=weighted_error(x["pred"], x["target"], x["heat"]).mean()
    )


def test_occupancy_rays_are_dualdiffs(golden):
    case = golden("dualdiff_occupancy_rays")
    sizes, x = case.meta["ctor"], case.inputs
    voxels = x["occ_coarse"]
    for axis, times in enumerate((20, 20, 4)):
        voxels = voxels.repeat_interleave(times, axis)
    rays = occupancy_rays(
        voxels, x["rotation"], x["translation"], x["intrinsic"], size=tuple(sizes["latent_hw"]),
        ratio=sizes["compress_ratio"], points=sizes["points"], step=sizes["step_m"],
    )  # fmt: skip
    background = kept_labels(rays, "background")
    case.check(labels=rays, background=background)
    things = kept_labels(rays, "foreground")
    assert torch.equal(torch.minimum(things, background), rays) and ((things == 17) | (background == 17)).all()
    assert occupancy_map(rays, "all").shape == (6, sizes["points"], *sizes["latent_hw"])
    with pytest.raises(ConfigError, match="of as many cameras"):
        occupancy_rays(voxels, x["rotation"], x["translation"][:2], x["intrinsic"], size=(4, 7), ratio=0.125)


def equalization(case, **how) -> FeatureEqualization:
    """The published names in ours."""
    network = FeatureEqualization(case.meta["ctor"]["u"], sigma=case.meta["ctor"]["sigma"], **how).eval()
    parts = {
        "down_128.model": "texture_1.layers", "down_64.model": "texture_2.layers", "down_32.model": "texture_3.layers",
        "down_16.model": "back_deep.0.layers", "down_8.model": "back_deep.1.layers", "down_4.model": "back_deep.2.layers",
        "down.model": "join.layers", "fuse.model": "fuse.layers",
    }  # fmt: skip
    ups = {"up": "structure", "up_128": "back_shallow.0", "up_64": "back_shallow.1", "up_32": "back_shallow.2"}
    state = {}
    for name, value in case.weights.items():
        name = name.removeprefix("pc.")
        head, _, rest = name.partition(".")
        if name.endswith("mask_conv.weight"):
            assert (value == 1).all()
        elif head == "base":
            rest = (
                rest.replace("model.0.fc.0", "excite.1").replace("model.0.fc.2", "excite.3").replace("down.0", "join")
            )
            state[f"equalize.{rest}"] = value
        elif head.startswith("cov_"):
            stack = {"3": 0, "5": 1, "7": 2}[head.removeprefix("cov_")]
            rest = rest.replace("conv.input_conv", "conv").replace("bn", "norm")
            state[f"fill.{stack}.{rest}"] = value
        elif head in ups:
            state[f"{ups[head]}.conv.layers.0.weight"] = value
        else:
            part, number = rest.split(".")[:2]
            state[f"{parts[f'{head}.{part}']}.{int(number) // 3}.weight"] = value
    network.load_state_dict(state)
    return network


@torch.no_grad()
def test_equalized_branches_are_medfes(golden):
    case = golden("medfe_equalization")
    x = case.inputs
    maps = [x[f"f{n}"] for n in range(1, 7)]
    network = equalization(case, threshold=1.0, scramble=True)
    seen = {}
    network.equalize.excite.register_forward_hook(lambda _m, given, out: seen.update(map=given[0] * out))
    plain = network(maps, x["mask"])
    excited = seen["map"]
    with_holes = equalization(case, threshold=0.5, scramble=True)(maps, x["mask"])
    some = lambda one: one[:, ::3]  # noqa: E731
    case.check(
        structure=plain.structure, texture=plain.texture, mask_published=(~plain.holes).long(),
        gauss=some(network.equalize.by_distance(excited)), bilateral=some(network.equalize.by_likeness(excited)),
        equalized=some(plain.equalized),
        **{f"f{n}": one[:, :1] if n < 3 else one for n, one in enumerate(plain.maps, 1)},
        structure_holes=some(with_holes.structure), texture_holes=some(with_holes.texture),
        equalized_holes=some(with_holes.equalized), mask_holes=(~with_holes.holes).long(),
    )  # fmt: skip


@torch.no_grad()
def test_ours_keeps_positions_and_takes_batches(golden):
    torch.manual_seed(0)
    block = Equalization(8)
    x = torch.zeros(1, 8, 9, 10)
    x[0, 3, 4, 5] = 1.0
    near = block.by_distance(x)[0]
    assert near[3].argmax() == 4 * 10 + 5 and near[[0, 1, 2, 4]].abs().max() == 0, "a channel stays a channel"
    network = equalization(golden("medfe_equalization"))
    maps = [torch.randn(2, c, s, s) for c, s in zip(level_widths(4), (64, 32, 16, 8, 4, 2))]
    mask = torch.zeros(2, 1, 128, 128)
    mask[1, :, 20:90, 30:100] = 1
    both = network(maps, mask)
    alone = network([one[1:] for one in maps], mask[1:])
    for first, second in zip(both.maps, alone.maps):
        torch.testing.assert_close(first[1:], second, atol=1e-4, rtol=1e-4)
    with pytest.raises(ConfigError, match="multiple of 16"):
        network([one[..., :-1] for one in maps], mask)


def test_outlier_masks_are_asymmetric_duals(golden):
    case = golden("asymgs_complementary_masks")
    sizes, x = case.meta["ctor"], {name: value[None] for name, value in case.inputs.items()}
    made = x["render"].requires_grad_()
    residual = (made - x["target"]).abs().mean(1, keepdim=True).detach()
    hard = region_mask(residual, x["feature_residual"], x["regions"], quantile=sizes["quantile"])
    soft = soft_mask(x["logits"], slope=sizes["slope"])
    got = {"hard_mask": hard.long(), "soft_mask": soft, "soft_mask_loss": soft_mask_loss(soft, x["feature_residual"])}
    for name, keep in (("hard", hard), ("soft", soft)):
        loss = render_loss(made, x["target"], keep, dissimilarity=sizes["lambda_dssim"])
        (got[f"grad_{name}"],) = torch.autograd.grad(loss, made)
        got[f"loss_{name}"] = loss
    case.check(**got)


def test_squares_stand_in_for_regions_and_values_stay():
    squares = grid_regions(5, 6, 2)
    assert squares.shape == (9, 5, 6) and torch.equal(squares.sum(0), torch.ones(5, 6))
    made = torch.randn(2, 3, 5, 6, requires_grad=True)
    masked = gradient_masked(made, torch.zeros(2, 1, 5, 6))
    assert torch.equal(masked, made) and not torch.autograd.grad(masked.sum(), made)[0].any()
    pixels = torch.rand(1, 1, 5, 6) * 0.1
    pixels[..., :2, :2] = torch.tensor([[0.9, 0.8], [0.7, 0.95]])
    keep = region_mask(pixels, pixels, squares, quantile=0.8)
    assert not keep[0, 0, :2, :2].any() and keep[0, 0, 2:, 2:].float().mean() > 0.8
