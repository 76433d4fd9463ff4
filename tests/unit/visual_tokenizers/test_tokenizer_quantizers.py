"""Do the quantizers give the published codes, losses and codebook updates?"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from mllm.errors import ConfigError
from mllm.testing.running import run_checks
from mllm.testing.visual_tokenizers import CHECKS
from mllm.visual_tokenizers import VISUAL_TOKENIZERS
from mllm.visual_tokenizers.quantizers import QUANTIZERS, build_quantizer
from mllm.visual_tokenizers.quantizers.codebook import kmeans
from mllm.visual_tokenizers.quantizers.history import HistoryFusion, MapHistory
from mllm.visual_tokenizers.quantizers.multi_scale import bicubic_weights, enlarge
from mllm.visual_tokenizers.quantizers.search import nearest_codes
from mllm.visual_tokenizers.quantizers.vector import entropy_loss

EXAMPLES = {
    "vq": {"type": "vq", "size": 16, "parts": {"pixel": 8}},
    "vq shared": {
        "type": "vq", "size": 16, "parts": {"semantic": 8, "pixel": 4}, "l2_norm": True, "entropy_weight": 0.1,
    },
    "vq ema": {"type": "vq", "size": 16, "parts": {"pixel": 8}, "codebook": {"learn": "ema", "restart": True}},
    "simvq": {"type": "vq", "size": 16, "parts": {"pixel": 8}, "codebook": {"learn": "frozen_linear"}},
    "residual": {"type": "residual", "size": 16, "dim": 8, "depth": 3},
    "residual separate": {
        "type": "residual", "size": 16, "dim": 8, "depth": 3, "shared": False, "codebook": {"learn": "gradient"},
    },
    "multi_scale": {
        "type": "multi_scale", "scales": [1, 2, 4], "drop": 0.5,
        "inner": {"type": "vq", "size": 16, "parts": {"semantic": 8, "pixel": 4}, "l2_norm": True},
    },
    "intra_inter": {"type": "intra_inter", "size": 16, "dim": 8, "grid": [4, 4], "stages": 2, "history": 1},
    "product": {"type": "product", "size": 16, "dim": 8, "chunks": 4},
    "lookup_free": {"type": "lookup_free", "dim": 12, "groups": 2},
    "lookup_free spherical": {"type": "lookup_free", "dim": 12, "spherical": True},
    "finite_scalar": {"type": "finite_scalar", "levels": [8, 5, 5, 4]},
}  # fmt: skip


def to_tokens(maps: torch.Tensor) -> torch.Tensor:
    return maps.flatten(2).transpose(1, 2)


def to_maps(tokens: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return tokens.transpose(1, 2).reshape(like.shape)


def shared_quantizer(case, **changes):
    config = {
        "type": "vq", "size": 64, "parts": {"semantic": 8, "pixel": 4}, "l2_norm": True, "beta": 0.25,
        "entropy_weight": 0.1, **changes,
    }  # fmt: skip
    quantizer = build_quantizer(config)
    names = {"semantic": "quantize.embedding_vqkd.weight", "pixel": "quantize.embedding_vqgan.weight"}
    for part, name in names.items():
        quantizer.books[part].set_entries(case.weights[name])
    return quantizer


def test_shared_index_quantizer_is_tokenflows(golden):
    case = golden("tokenflow_quantizer")
    quantizer = shared_quantizer(case).train()
    z = case.inputs["z"]
    out = quantizer(to_tokens(z))
    case.check(
        zq=to_maps(out.quantized, z),
        vq_loss=out.losses["codebook"],
        commit_loss=out.losses["commitment"],
        entropy_loss=out.losses["entropy"],
        indices=out.codes.flatten(),
    )
    assert torch.allclose(quantizer.embed(out.codes).norm(dim=-1), torch.tensor(2.0).sqrt())


def test_multi_scale_encode_is_tokenflows(golden):
    case = golden("tokenflow_multiscale_encode")
    inner = shared_quantizer(case, entropy_weight=0.0)
    quantizer = build_quantizer({"type": "multi_scale", "scales": [1, 2, 4], "inner": inner.config})
    quantizer.inner.load_state_dict(inner.state_dict())
    f = case.inputs["f"]
    out = quantizer.eval()(to_tokens(f))
    case.check(
        sum=to_maps(out.quantized, f),
        indices=out.codes[..., 0],
        from_indices=to_maps(quantizer.embed(out.codes), f),
    )


def intra_inter_case(golden):
    case = golden("iiworld_intra_inter_quantizer")
    ctor, given = case.meta["ctor"], case.weights
    quantizer = build_quantizer(
        {
            "type": "intra_inter", "size": ctor["n_e"], "dim": ctor["e_dim"], "grid": ctor["hw"],
            "stages": ctor["recover_stage"], "history": ctor["recover_time"], "beta": ctor["beta"],
        }
    )  # fmt: skip
    state = {"book.weight": given["vq.embedding.weight"]}
    for index in range(len(quantizer.grids)):
        stages = ctor["recover_stage"]
        name = f"scale_conv.{index}" if index < stages else f"time_conv.{index - stages}"
        state |= {f"convolutions.{index}.{end}": given[f"vq.recover_{name}.{end}"] for end in ("weight", "bias")}
    quantizer.load_state_dict(state, strict=True)
    z = torch.nn.functional.conv2d(case.inputs["curr"], given["vq.quant_conv.weight"], given["vq.quant_conv.bias"])
    return case, quantizer.eval(), z


def test_scales_and_former_frames_are_quantised_as_in_i2_world(golden):
    case, quantizer, z = intra_inter_case(golden)
    given = case.weights
    out = quantizer(to_tokens(z), case.inputs["history"].flatten(3).transpose(2, 3))

    def result(tokens):
        return torch.nn.functional.conv2d(
            to_maps(tokens, z), given["vq.post_quant_conv.weight"], given["vq.post_quant_conv.bias"]
        )

    parts, stages = quantizer.split_stages(out.codes), case.meta["ctor"]["recover_stage"]
    case.check(
        z_q=result(out.quantized),
        loss=sum(out.losses.values()),
        **{f"codes_scale{k}": part.flatten() for k, part in enumerate(parts[:stages])},
        **{f"codes_time{k}": part.flatten() for k, part in enumerate(parts[stages:])},
    )
    assert torch.allclose(quantizer.embed(out.codes), out.quantized, atol=5e-6, rtol=2e-5)


def test_without_history_the_later_stages_quantise_what_the_scales_left_over(golden):
    _, quantizer, z = intra_inter_case(golden)
    tokens = to_tokens(z)
    none = quantizer(tokens)
    zeros = quantizer(tokens, torch.zeros(len(z), quantizer.config.history, *tokens.shape[1:]))
    assert torch.equal(none.codes, zeros.codes) and torch.equal(none.quantized, zeros.quantized)
    before, after = (part[..., 0] for part in quantizer.split_stages(none.codes)[2:4])
    plain = build_quantizer({**quantizer.config.model_dump(), "history": 0}).eval()
    kept = {k: v for k, v in quantizer.state_dict().items() if k in plain.state_dict()}
    plain.load_state_dict(kept, strict=True)
    left = tokens - _unconvolved(plain, plain(tokens).codes)
    assert torch.equal(before, plain.split_stages(plain(tokens).codes)[2][..., 0])
    assert torch.equal(after.flatten(), nearest_codes(left.flatten(0, 1), quantizer.book.table()))
    with pytest.raises(ConfigError, match=r"history is \(2, 1, .* expected \(B, history, N, D\) = \(2, 2, "):
        quantizer(tokens, torch.zeros(2, 1, *tokens.shape[1:]))


def _unconvolved(quantizer, codes):
    total = 0.0
    for grid, part in zip(quantizer.grids, quantizer.split_stages(codes)):
        maps = quantizer.code_vectors(part)[..., 0, :].transpose(1, 2).unflatten(2, grid)
        total = total + torch.nn.functional.interpolate(maps, size=quantizer.config.grid, mode="bilinear")
    return to_tokens(total)


def test_former_maps_are_warped_as_in_i2_world(golden):
    case = golden("iiworld_align_history")
    bounds = [case.meta["ctor"][f"{axis}_bound"] for axis in "xyz"]
    history = MapHistory(
        tuple(low for low, _, _ in bounds), tuple(step for _, _, step in bounds), case.meta["ctor"]["frames"]
    )
    steps = zip(case.inputs["curr_to_prev"], case.inputs["aug"], case.inputs["start"])
    case.check(**{f"sampled{k}": history.step(case.inputs[f"bev{k}"], *step) for k, step in enumerate(steps)})


def test_tokens_read_former_ones_as_in_i2_world(golden):
    case = golden("iiworld_temporal_fusion")
    fusion = HistoryFusion(case.meta["ctor"]["embed_dims"], case.meta["ctor"]["history"]).eval()
    names = {"fusion.history_fusion": "fuse", "fusion.output_proj": "out"}
    state = {}
    for name, value in case.weights.items():
        for former, present in names.items():
            name = name.replace(former, present)
        state[name] = value
    fusion.load_state_dict(state, strict=True)
    case.check(y=fusion(*(case.inputs[name] for name in ("query", "pos", "history"))))


def test_a_tokenizer_of_pictures_takes_the_intra_inter_quantizer():
    quantizer = {"type": "intra_inter", "size": 16, "dim": 8, "grid": [4, 4], "stages": 2}
    run_checks(CHECKS, {**VISUAL_TOKENIZERS.get("vq").tiny(), "quantizer": quantizer})


def test_entropy_loss_is_tokenflows(golden):
    case = golden("tokenflow_entropy_loss")
    case.check(loss=entropy_loss(case.inputs["affinity"], case.meta["ctor"]["temperature"]))


def residual_quantizer(case, entries, **changes):
    ctor = case.meta["ctor"]
    quantizer = build_quantizer(
        {
            "type": "residual",
            "size": ctor["n_embed"],
            "dim": ctor["latent_shape"][-1],
            "depth": ctor["code_shape"][-1],
            **changes,
        }
    )
    quantizer.book(0).set_entries(entries)
    return quantizer


def test_residual_codes_are_dualtokens(golden):
    case = golden("dualtoken_rvq_eval")
    quantizer = residual_quantizer(case, case.weights["codebooks.0.weight"][:-1]).eval()
    x = case.inputs["x"]
    out = quantizer(x.flatten(1, 2))
    vectors = quantizer.code_vectors(out.codes)
    case.check(
        q=out.quantized,
        commit=out.losses["commitment"],
        codes=out.codes,
        embed=quantizer.embed(out.codes),
        embed_with_depth=vectors,
    )


@pytest.mark.parametrize("update", ["after_loop", "per_depth"])
def test_moving_average_step_is_dualtokens_as_intended(golden, update):
    case = golden(f"dualtoken_rvq_ema_{update}")
    quantizer = residual_quantizer(case, case.inputs["codebook"], update=update).train()
    book = quantizer.book(0)
    book.counts.copy_(case.inputs["cluster_size"])
    book.sums.copy_(case.inputs["codebook"] * case.inputs["cluster_size"][:, None])
    out = quantizer(case.inputs["x"].flatten(1, 2))
    got = {
        "q": out.quantized, "commit": out.losses["commitment"], "codes": out.codes,
        "new_cluster_size": book.counts, "new_codebook": book.weight, "new_embed_ema": book.sums,
    }  # fmt: skip
    if update == "after_loop":
        # The published code sums a view that later depths change; the intended sums are the "copied" ones.
        for name in ("codebook", "embed_ema"):
            case.outputs.pop(f"output.new_{name}")
            case.outputs[f"output.new_{name}"] = case.outputs.pop(f"output.copied_new_{name}")
    case.check(**got)


def test_frozen_linear_codebook_is_simvq(golden):
    case = golden("illume_simvq")
    quantizer = build_quantizer(
        {"type": "vq", "size": 32, "parts": {"pixel": 8}, "beta": 0.25, "codebook": {"learn": "frozen_linear"}}
    ).eval()
    book = quantizer.books["pixel"]
    book.set_entries(case.weights["frozen_codebook"])
    book.linear.weight.data.copy_(case.weights["code_transform.weight"])
    x = case.inputs["x"]
    out = quantizer(to_tokens(x))
    case.check(
        q=to_maps(out.quantized, x),
        indices=out.codes,
        loss=out.losses["codebook"] + out.losses["commitment"],
        codes_from_indices=to_maps(quantizer.embed(out.codes), x),
    )


def test_normalised_single_codebook_is_janus(golden):
    case = golden("janus_vq")
    quantizer = build_quantizer(
        {"type": "vq", "size": 32, "parts": {"pixel": 8}, "l2_norm": True, "beta": 0.25}
    ).train()
    quantizer.books["pixel"].set_entries(case.weights["embedding.weight"])
    z = case.inputs["z"]
    out = quantizer(to_tokens(z))
    case.check(
        zq=to_maps(out.quantized, z),
        vq_loss=out.losses["codebook"],
        commit_loss=out.losses["commitment"],
        indices=out.codes.flatten(),
    )


def test_nearest_code_is_the_fp64_nearest_and_blocks_change_nothing():
    generator = torch.Generator().manual_seed(0)
    z, table = torch.randn(700, 40, generator=generator), torch.randn(999, 40, generator=generator)
    table[500] = table[3] + 1e-6  # closer than fp32 products can tell
    z[10] = table[3]
    expected = torch.cdist(z.double(), table.double(), compute_mode="donot_use_mm_for_euclid_dist").argmin(1)
    for max_scores in (999, 64_000, 2**24):
        assert torch.equal(nearest_codes(z, table, max_scores=max_scores), expected)


def test_ties_go_to_the_lowest_index():
    table = torch.randn(50, 6, generator=torch.Generator().manual_seed(1))
    table[40] = table[7]
    table[23] = table[7]
    z = table[7].repeat(5, 1) + 0.01
    assert nearest_codes(z, table).tolist() == [7] * 5
    assert nearest_codes(torch.zeros(2, 3), torch.ones(4, 3)).tolist() == [0, 0]


def test_large_search_holds_only_a_block_of_scores():
    z, table = torch.randn(2048, 8), torch.randn(4096, 8)
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                sizes.append(out.numel())
            return out

    with Watch():
        nearest_codes(z, table, max_scores=2**17)
    assert max(sizes) <= 2**17 < 2048 * 4096


@pytest.mark.parametrize(("small", "side"), [(1, 14), (4, 14), (12, 14), (14, 14), (3, 4)])
def test_the_weights_of_the_enlargement_do_what_torchs_own_does(small, side):
    maps = torch.randn(2, 3, small, small)
    expected = torch.nn.functional.interpolate(maps, size=(side, side), mode="bicubic")
    made = maps.flatten(2) @ bicubic_weights(small, side, torch.device("cpu"))
    torch.testing.assert_close(made.unflatten(2, (side, side)), expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(enlarge(maps, side), expected)


INTERPRETED = """
import torch
from mllm.visual_tokenizers.quantizers.search import Launch, best_two
Launch.codes = 16
generator = torch.Generator().manual_seed(0)
for positions, codes, dim in ((70, 300, 5), (3, 1001, 40), (130, 200, 17)):
    z, table = torch.randn(positions, dim, generator=generator), torch.randn(codes, dim, generator=generator)
    table[codes - 1] = table[codes // 2] = table[20] = table[7]  # in one block, in two, in other parts of the codes
    z[:3] = table[7] * torch.tensor([1.0, 2.0, 3.0])[:, None]
    bias = -0.5 * table.square().sum(1)
    scores = torch.addmm(bias, z, table.T)
    first, second = best_two(z, table, bias)
    assert first[:3].tolist() == [7, 7, 7] and second[:3].tolist() == [20, 20, 20], (first[:3], second[:3])
    assert torch.equal(first[3:], scores.argmax(1)[3:])
    assert torch.equal(second[3:], scores.scatter(1, first[:, None], -torch.inf).argmax(1)[3:])
print("searched")
"""


def test_the_kernel_finds_the_best_two_codes_and_of_equal_ones_the_first():
    pytest.importorskip("triton")
    env = {**os.environ, "TRITON_INTERPRET": "1"}  # Triton's own interpreter runs the kernel's code on a CPU
    done = subprocess.run([sys.executable, "-c", INTERPRETED], env=env, capture_output=True, text=True, timeout=300)
    assert done.stdout == "searched\n", done.stderr[-2000:]


@pytest.mark.parametrize("example", EXAMPLES)
def test_encoding_gives_the_codes_of_the_whole_forward_and_only_those(example):
    torch.manual_seed(0)
    quantizer = build_quantizer(EXAMPLES[example]).eval()
    z = torch.randn(2, 16, quantizer.dim)
    before = {name: value.clone() for name, value in quantizer.state_dict().items()}
    assert torch.equal(quantizer.encode(z), quantizer(z).codes)
    quantizer.train().encode(z)
    assert all(torch.equal(value, before[name]) for name, value in quantizer.state_dict().items())
    assert quantizer.encode(z[:0]).shape[0] == 0


@pytest.mark.parametrize("example", EXAMPLES)
def test_every_quantizer_keeps_the_interface(example):
    torch.manual_seed(0)
    quantizer = build_quantizer(EXAMPLES[example])
    z = torch.randn(2, 16, quantizer.dim, requires_grad=True)
    quantizer.train()
    out = quantizer(z)
    assert out.quantized.shape == z.shape and out.codes.dtype == torch.int64
    assert out.codes.shape[-1] == quantizer.num_codes
    (out.quantized.square().sum() + sum(out.losses.values(), torch.zeros(()))).backward()
    assert z.grad is not None and z.grad.isfinite().all() and z.grad.abs().sum() > 0
    assert {"usage", "perplexity"} == set(out.usage)
    quantizer.eval()
    out = quantizer(z)
    assert torch.allclose(quantizer.embed(out.codes), out.quantized, atol=1e-5), (
        "codes alone must give the vectors back"
    )
    assert torch.equal(quantizer(z[1:]).codes, out.codes[1:]), "an image's codes depend on its batch"
    assert quantizer(z[:0]).codes.shape[0] == 0
    assert quantizer(z.bfloat16()).quantized.dtype == torch.float32
    with pytest.raises(ConfigError, match="out of range"):
        quantizer.embed(torch.full_like(out.codes, quantizer.size))
    with pytest.raises(ConfigError, match="takes"):
        quantizer(torch.zeros(2, 16, quantizer.dim + 1))


@pytest.mark.parametrize("example", EXAMPLES)
def test_every_quantizer_builds_on_meta_and_reloads(example):
    with torch.device("meta"):
        build_quantizer(EXAMPLES[example])
    first, second = build_quantizer(EXAMPLES[example]).eval(), build_quantizer(EXAMPLES[example]).eval()
    second.load_state_dict(first.state_dict())
    z = torch.randn(1, 16, first.dim)
    assert torch.equal(first(z).codes, second(z).codes)


def test_examples_cover_the_registry():
    assert {example.get("type") for example in EXAMPLES.values()} == set(QUANTIZERS)


def test_how_a_book_learns_decides_what_has_a_gradient():
    def trainable(learn):
        return {n for n, _ in build_quantizer({**EXAMPLES["vq"], "codebook": {"learn": learn}}).named_parameters()}

    assert trainable("gradient") == {"books.pixel.weight"}
    assert trainable("ema") == set()
    assert trainable("frozen_linear") == {"books.pixel.linear.weight"}


@pytest.mark.parametrize("learn", ["ema", "gradient"])
def test_dead_codes_are_restarted_from_the_batch(learn):
    torch.manual_seed(0)
    quantizer = build_quantizer(
        {
            "type": "vq", "size": 64, "parts": {"pixel": 4},
            "codebook": {"learn": learn, "restart": True, "decay": 0.5, "patience": 2},
        }
    ).train()  # fmt: skip
    book = quantizer.books["pixel"]
    far = torch.full_like(book.table().detach(), 100.0) + torch.arange(64)[:, None]
    far[0] = 0
    book.set_entries(far)
    z = torch.randn(4, 64, 4)
    before = len(quantizer(z).codes.unique())
    for _ in range(6):
        quantizer(z)
    after = len(quantizer.eval()(z).codes.unique())
    assert before == 1 and after > 32


def test_entries_in_use_are_not_restarted_when_a_step_holds_few_vectors():
    torch.manual_seed(0)
    z = torch.randn(1, 16, 4)

    def moved(below):
        config = {"learn": "ema", "restart": True, "restart_below": below, "decay": 0.9}
        quantizer = build_quantizer({"type": "vq", "size": 64, "parts": {"pixel": 4}, "codebook": config}).train()
        book = quantizer.books["pixel"]
        book.set_entries(torch.cat([z[0], torch.full((48, 4), 50.0)]))
        for _ in range(3):
            quantizer(z)
        return int((book.weight[16:].abs().amax(1) < 40).sum()), float((book.weight[:16] - z[0]).abs().max())

    assert moved(0.1) == (0, pytest.approx(0, abs=1e-3)), "counts are still above the threshold: nothing moves"
    assert moved(1.0)[0] == 48, "never chosen: all restarted"


def test_without_restart_counts_start_at_one_so_weights_stay_bounded():
    quantizer = build_quantizer({"type": "residual", "size": 32, "dim": 4, "depth": 2}).train()
    quantizer(torch.randn(1, 4, 4))
    assert quantizer.book(0).weight.abs().max() < 10


def test_lookup_free_bits_and_levels_enumerate_all_codes():
    lfq = build_quantizer({"type": "lookup_free", "dim": 6})
    codes = torch.arange(64).view(1, 64, 1)
    assert torch.equal(lfq.eval()(lfq.embed(codes)).codes, codes)
    fsq = build_quantizer({"type": "finite_scalar", "levels": [4, 3, 5]})
    codes = torch.arange(60).view(1, 60, 1)
    vectors = fsq.embed(codes)
    assert vectors.abs().max() <= 1 and len(vectors[0].unique(dim=0)) == 60
    bounded = fsq._bound(torch.linspace(-20, 20, 400).view(1, 400, 1).expand(1, 400, 3))
    for channel, level in enumerate(fsq.levels):
        assert len(bounded[..., channel].round().unique()) == level


def test_bit_entropy_is_the_softmax_entropy_over_all_corners():
    quantizer = build_quantizer({"type": "lookup_free", "dim": 5, "entropy_weight": 1.0, "temperature": 0.7})
    z = torch.randn(1, 1, 5)
    corners = quantizer.embed(torch.arange(32).view(1, 32, 1))[0]
    p = (-(z[0] - corners).square().sum(-1) / 0.7).softmax(-1)
    direct = -(p * p.log()).sum()
    logit = 4 * z.flatten(0, 1) / 0.7
    bits = logit.sigmoid()
    factored = -(bits * bits.log() + (1 - bits) * (1 - bits).log()).sum()
    assert torch.allclose(direct, factored, atol=1e-5)
    assert torch.allclose(quantizer(z).losses["entropy"], torch.zeros(()), atol=1e-5), "one position: both terms agree"


def test_product_quantizer_books_are_independent():
    quantizer = build_quantizer(EXAMPLES["product"]).eval()
    z = torch.randn(1, 3, 8)
    changed = z.clone()
    changed[..., :2] += 5
    assert torch.equal(quantizer(z).codes[..., 1:], quantizer(changed).codes[..., 1:])


def test_search_weight_shifts_the_shared_choice_to_a_part():
    base = {"type": "vq", "size": 2, "parts": {"semantic": 1, "pixel": 1}}
    z = torch.tensor([[[0.0, 1.0]]])

    def choose(weights):
        quantizer = build_quantizer({**base, "weights": weights}).eval()
        quantizer.books["semantic"].set_entries(torch.tensor([[0.0], [1.0]]))
        quantizer.books["pixel"].set_entries(torch.tensor([[0.0], [1.0]]))
        return int(quantizer(z).codes)

    assert choose({"semantic": 2.0}) == 0 and choose({"pixel": 2.0}) == 1


def test_kmeans_lowers_the_distance_to_the_centres():
    points = torch.randn(200, 3, generator=torch.Generator().manual_seed(0))

    def spread(steps):
        centres = kmeans(points, 8, steps=steps, seed=1)
        return float((points - centres[nearest_codes(points, centres)]).square().sum())

    assert spread(10) < 0.8 * spread(0)


def test_multi_scale_drop_leaves_out_one_scale_but_never_the_first():
    quantizer = build_quantizer({**EXAMPLES["multi_scale"], "drop": 1.0}).train()
    z = torch.randn(1, 16, 12, requires_grad=True)
    lengths = {quantizer(z).codes.shape[1] for _ in range(20)}
    assert lengths == {21 - 4, 21 - 16}
    assert quantizer.eval()(z).codes.shape[1] == 21


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"type": "vqq"}, "did you mean 'vq'"),
        ({"type": "vq", "size": 8, "parts": {"a": 2}, "sizes": 3}, "did you mean 'size'"),
        ({"type": "product", "size": 8, "dim": 9, "chunks": 2}, "multiple of chunks"),
        ({"type": "multi_scale", "scales": [2, 1], "inner": {"size": 4, "parts": {"a": 1}}}, "grow"),
        ({"type": "lookup_free", "dim": 64}, "more groups"),
    ],
)
def test_bad_configs_say_what_to_change(config, message):
    with pytest.raises(ConfigError, match=message):
        build_quantizer(config)
