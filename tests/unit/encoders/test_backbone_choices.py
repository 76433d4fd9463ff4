"""Do the backbones that choose (where to stop, which route, which experts, which tokens) choose as published, and tell what it costs?"""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from mllm.encoders.backbones import dependencyvit, dynperceiver, paratranscnn, s4d, snnet, vir
from mllm.encoders.backbones.dynperceiver_cnn import last_widths
from mllm.encoders.backbones.dynperceiver_exits import EXITS, Exits, exit_losses
from mllm.encoders.catalogue import build_encoder, encoder_config
from mllm.errors import CheckpointError, ConfigError
from mllm.testing.encoders import (
    build_example,
    check_batch_invariance,
    check_description,
    check_gradients,
    check_layer_groups,
    resolve_example,
    sample_pixels,
)
from tests.unit.encoders.test_backbones import compare, encoder_with, refused, vector

TINY_PERCEIVER = dynperceiver.DynPerceiverEncoder.tiny()
TINY_SNNET = snnet.SnNetEncoder.tiny()
TINY_DEPENDENCY = dependencyvit.DependencyVitEncoder.tiny()


def linear(x, state, name):
    return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])


def batch_norm(x, state, name):
    keys = ("running_mean", "running_var", "weight", "bias")
    return F.batch_norm(x, *(state[f"{name}.{key}"] for key in keys))


class Asked(TorchDispatchMode):
    """Which operations make the CPU wait for what a tensor holds, or give as many rows as it says."""

    def __init__(self):
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.name() in ("aten::_local_scalar_dense", "aten::nonzero"):
            self.names.add(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("choice", "asks"), [({}, False), ({"exit": 3}, False), ({"confidence": 0.5}, True)])
def test_only_an_encoder_that_may_stop_early_waits_for_its_pixels(choice, asks):
    """The others can be captured in a CUDA graph."""
    spec = {**TINY_PERCEIVER, "output": "latents", "classifier": True, **choice}
    encoder = build_encoder(encoder_config(spec, where="encoders.x")).eval()
    with torch.no_grad(), Asked() as asked:
        encoder(torch.randn(2, 3, 64, 96))
    assert bool(asked.names) is asks


# Dynamic Perceiver ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_an_exchange_of_dynamic_perceiver_is_the_authors():
    meta, inputs, outputs, state = vector("dynperceiver_stage")
    x, z = inputs["input.x"], inputs["input.z"]
    mixer = dynperceiver._change(8, 4)
    expander = dynperceiver._change(12, 16)
    parts = {
        "token_mixer": mixer,
        "token_expander": expander,
        "z2x": dynperceiver.CrossLayer(16, 16, 2),
        "dwc": torch.nn.Conv2d(16, 16, 7, padding=3, groups=16),
        "x2z": dynperceiver.CrossLayer(16, 16, 16, places=49),
        "self_att": torch.nn.ModuleList(dynperceiver.Block(16, 2, 4.0) for _ in range(2)),
    }
    for name, part in parts.items():
        part.load_state_dict({k.removeprefix(f"{name}."): v for k, v in state.items() if k.startswith(f"{name}.")})
    z = dynperceiver.mix(z, mixer, expander)
    tokens = parts["z2x"](x.flatten(2).transpose(1, 2), z)
    x = tokens.transpose(1, 2).unflatten(2, x.shape[2:])
    seen = F.adaptive_avg_pool2d(x + parts["dwc"](x), 7).flatten(2).transpose(1, 2)
    crossed = z = parts["x2z"](z, seen)
    for block in parts["self_att"]:
        z = block(z)
    compare(meta, outputs, {"output.x": x, "output.z_after_cross": crossed, "output.z": z})


def perceiver_spec(meta):
    sizes = meta["ctor"]
    return {
        "type": "dynperceiver",
        "cnn": "resnet18",
        "cnn_depths": [1, 1, 1, 1],
        "num_latents": sizes["num_latents"],
        "num_heads": sizes["num_SA_heads"],
        "mlp_ratio": sizes["SA_widening_factor"],
        "num_classes": sizes["num_classes"],
        "image_size": sizes["size"],
    }


@torch.no_grad()
def test_dynamic_perceiver_is_the_authors_at_all_four_exits(tmp_path):
    meta, inputs, outputs, state = vector("dynperceiver_resnet")
    spec, image = perceiver_spec(meta), inputs["input.image"]
    whole = encoder_with(state, {**spec, "output": "map"}, tmp_path)
    seen = {}
    for number in (1, 2, 3, 4):
        last = getattr(whole.model, f"self_att{number}")[-1]
        last.register_forward_hook(lambda _, __, out, number=number: seen.update({f"output.latent{number}": out}))
    x, z3 = whole.model.read(image)
    x, z4 = whole.model.finish(x, z3)
    last = whole.model.stage(4, x).mean((2, 3))
    read = whole.model.last_map(x, z4)
    early = linear(z3.mean(1), state, "early_classifier3")
    att = torch.cat([z4.mean(1), batch_norm(linear(early, state, "isc3.0"), state, "isc3.1").relu()], 1)
    att = linear(att, state, "classifier_att")
    merged = [read.mean((2, 3)), z4.mean(1), batch_norm(linear(att, state, "isc4.0"), state, "isc4.1").relu()]
    merged = linear(batch_norm(torch.cat(merged, 1), state, "classifier_merge.0"), state, "classifier_merge.1")
    exits = {"early3": early, "att": att, "cnn": linear(last, state, "classifier_cnn"), "merge": merged}
    compare(
        meta, outputs, seen | {f"output.exit_{name}": x for name, x in exits.items()} | {"output.stage4_mean": last}
    )
    torch.testing.assert_close(whole(image).tokens, read.flatten(2).transpose(1, 2))

    # An image stops where the published classifier is sure enough, and only then.
    sure = early.softmax(-1).amax(-1)
    between = float(sure.mean())
    late = encoder_with(state, spec, tmp_path)(image).tokens
    at_three = encoder_with(state, {**spec, "exit": 3}, tmp_path)
    torch.testing.assert_close(late, z4)
    some = encoder_with(state, {**spec, "confidence": between}, tmp_path)
    stopped = int(sure.argmax())
    mixed = some(image).tokens
    torch.testing.assert_close(mixed[stopped], at_three(image).tokens[stopped])
    torch.testing.assert_close(mixed[1 - stopped], late[1 - stopped])
    assert some.last_cost()["early"] == 0.5
    costs = some.exit_costs(some.config)
    assert some.last_cost()["gflops"] == pytest.approx(sum(costs.values()) / 2) and costs[3] < costs[4]
    assert not hasattr(at_three.model, "cnn_body_stage3"), "what is never run is not built"


def test_a_budget_chooses_dynamic_perceivers_exit_and_what_cannot_be_is_refused():
    spec = {**TINY_PERCEIVER, "output": "latents"}
    costs = dynperceiver.DynPerceiverEncoder.exit_costs(encoder_config(spec, where="e"))
    for number, cost in costs.items():
        encoder = build_encoder(encoder_config({**spec, "budget": cost * 1.001}, where="e"))
        assert encoder.model.deepest == number and encoder.config.info.grid == (1, 4)
        assert encoder.config.info.width == 16
    refused({**spec, "budget": costs[3] / 2}, "budget", "for exit 3", "for exit 4")
    refused({**spec, "confidence": 0.9}, "confidence", "random weights", "exit: 3")
    refused({**TINY_PERCEIVER, "exit": 3}, "set output: latents")
    refused({**spec, "num_latents": 36}, "36 is no multiple of 8")
    refused({**spec, "image_size": 72}, "72 x 72 is no multiple of 32")
    training = build_encoder(encoder_config({**spec, "exit": 3}, where="e")).train()
    training(torch.randn(2, 3, 64, 96)).tokens.sum().backward()
    assert training.model.latent.grad.any()


@torch.no_grad()
@pytest.mark.parametrize("name", ["dynperceiver_regnet", "dynperceiver_mobilenet", "dynperceiver_narrow"])
def test_dynamic_perceiver_is_the_authors_on_their_other_cnns(name, tmp_path):
    """By their checkpoints' own keys, classifiers included."""
    meta, inputs, outputs, state = vector(name)
    sizes, image = meta["ctor"], inputs["input.image"]
    spec = {**perceiver_spec(meta), "cnn": sizes["cnn"], "cnn_width": sizes.get("cnn_width", 1.0), "cnn_depths": None}
    encoder = encoder_with(state, {**spec, "output": "map", "classifier": True}, tmp_path)
    seen = {}
    for number in (1, 2, 3, 4):
        last = getattr(encoder.model, f"self_att{number}")[-1]
        last.register_forward_hook(lambda _, __, out, number=number: seen.update({f"output.latent{number}": out}))
    exits = Exits(encoder.model.widths, 6, last_widths(encoder.config)).eval()
    if isinstance(exits.classifier_cnn, torch.nn.Linear):  # the authors leave the CNN's own classifier at 1000 classes
        exits.classifier_cnn = torch.nn.Linear(exits.classifier_cnn.in_features, 1000)
    own = exits.state_dict()
    exits.load_state_dict({key: state.get(key, value) for key, value in own.items()})
    assert {key for key in own if not key.endswith("tracked")} <= set(state)
    have = {f"output.exit_{exit}": logits for exit, logits in encoder.logits(image, exits).items()}
    compare(meta, outputs, seen | have)


@pytest.mark.parametrize("cnn", ["regnet_y_400mf", "mobilenet_v3_large"])
def test_dynamic_perceivers_other_cnns_keep_the_contract(cnn):
    spec = {"type": "dynperceiver", "cnn": cnn, "num_latents": 32, "image_size": [64, 96], "mlp_ratio": 1.0}
    config = encoder_config({**spec, "output": "map"}, where="e")
    for check in (check_description, check_gradients, check_layer_groups, check_batch_invariance):
        check(config)
    early = encoder_config({**spec, "exit": 3}, where="e")
    check_description(early)
    check_layer_groups(early)


def test_half_a_perceivers_keys_or_another_cnns_are_named(tmp_path):
    *_, state = vector("dynperceiver_regnet")
    spec = {"type": "dynperceiver", "num_latents": 16, "mlp_ratio": 2.0, "image_size": 64, "num_classes": 6}
    half = {key: value for key, value in state.items() if "block3" not in key}
    with pytest.raises(CheckpointError, match=r"missing: cnn_body_stage3\."):
        encoder_with(half, {**spec, "cnn": "regnet_y_400mf"}, tmp_path)
    with pytest.raises(CheckpointError, match=r"of another shape|missing"):
        encoder_with(state, {**spec, "cnn": "regnet_y_800mf"}, tmp_path)
    with pytest.raises(CheckpointError, match=r"early_classifier3\.weight \(6, 104\) instead of \(10, 104\)"):
        encoder_with(state, {**spec, "cnn": "regnet_y_400mf", "classifier": True, "num_classes": 10}, tmp_path)
    prefixed = {f"module.{key}": value for key, value in state.items()}
    encoder_with(prefixed, {**spec, "cnn": "regnet_y_400mf"}, tmp_path)


def test_the_last_exit_teaches_the_others_and_is_not_moved_by_it():
    torch.manual_seed(0)
    logits = {name: torch.randn(3, 4, requires_grad=True) for name in EXITS}
    labels = torch.tensor([0, 3, 1])
    weights = dict(zip(EXITS, (0.5, 0.5, 1.0, 1.0)))
    losses = exit_losses(logits, labels, weights=weights, distill=0.5, temperature=2.0)
    target = (logits["merge"] / 2).softmax(-1)
    want = sum(weights[name] * F.nll_loss(logits[name].log_softmax(-1), labels) for name in EXITS) + 0.5 * sum(
        (target * (target.log() - (logits[n] / 2).log_softmax(-1))).sum(-1).mean() * 4 for n in EXITS[:3]
    )
    torch.testing.assert_close(sum(losses.values()), want)
    losses["distilled"].backward()
    assert logits["merge"].grad is None and all(logits[name].grad.any() for name in EXITS[:3])
    assert "distilled" not in exit_losses(logits, labels, weights=weights, distill=0.0)


def test_a_perceivers_sizes_that_its_cnn_does_not_have_are_refused():
    spec = {"type": "dynperceiver", "image_size": 64, "num_latents": 32}
    regnet = {**spec, "cnn": "regnet_y_400mf"}
    refused({**regnet, "cnn_depths": [1, 1, 1, 1]}, "regnet_y_400mf has its own; these are a ResNet's")
    refused({**regnet, "cnn_width": 0.5}, "cnn_width: regnet_y_400mf has its own widths")
    refused({**regnet, "num_heads": [5, 2, 4, 8]}, "num_heads: 5 do not divide the 32 channels")


# SN-Netv2 -------------------------------------------------------------------------------------------------------------


def snnet_row(route):
    """A route as the vector writes it."""
    models = [segment[0] for segment in route.segments]
    path = [v for segment in route.segments for v in segment[1:]] if len(models) > 1 else []
    joins = [*route.joins, -1] if len(models) > 1 else []
    pad = [*([-1] * (3 - len(models))), *path, *([-9] * (6 - len(path))), *joins, *([-9] * (3 - len(joins)))]
    return [route.id, len(models), *models, *pad]


@torch.no_grad()
def test_snnet_is_the_authors_on_every_route(tmp_path):
    meta, inputs, outputs, state = vector("snnetv2_stitching")
    sizes, table = meta["ctor"], snnet.routes(tuple(meta["ctor"]["depths"]))
    spec = {
        "type": "snnet",
        "widths": sizes["dims"],
        "depths": sizes["depths"],
        "num_heads": sizes["heads"],
        "patch_size": sizes["patch_size"],
        "mlp_ratio": sizes["mlp_ratio"],
        "trained_size": sizes["img_size"],
        "rank": sizes["lora_r"],
        "keep_prefix": True,
    }
    logits = []
    encoders = [encoder_with(state, {**spec, "ends": ends}, tmp_path) for ends in ("small", "large")]
    for route in table:
        last = route.segments[-1][0]
        encoder = encoders[last]
        encoder.choose(route=route.id)
        features = encoder(inputs["input.image"])
        logits.append(linear(features.prefix[:, 0], state, f"anchors.{last}.head"))
    ids = torch.tensor([r.id for r in snnet.sampled(tuple(sizes["depths"]))])
    rows = torch.tensor([snnet_row(route) for route in table])
    compare(
        meta,
        outputs,
        {"output.logits": torch.stack(logits), "output.configs": rows, "output.sampled_ids": ids},
    )


def test_snnets_tables_have_the_published_number_of_routes():
    assert [len(snnet.routes(d)) for d in ((12, 12), (12, 24), (24, 24))] == [135, 135, 555]
    assert [len(snnet.sampled(d)) for d in ((12, 12), (12, 24), (24, 24))] == [134, 134, 555]
    deep = build_encoder(encoder_config({**TINY_SNNET, "depths": [12, 12]}, where="e"))
    (untrained,) = {r.id for r in snnet.routes((12, 12))} - {r.id for r in snnet.sampled((12, 12))}
    assert untrained not in deep.route_costs(deep.config) and deep.choose(route=untrained).id == untrained


@torch.no_grad()
def test_a_route_is_chosen_by_what_an_image_may_cost_at_any_time():
    encoder = build_example(resolve_example(TINY_SNNET))
    costs = encoder.route_costs(encoder.config)
    assert all(snnet.routes((2, 4))[number].segments[-1][0] == 1 for number in costs)
    ordered = sorted(set(costs.values()))
    pixels = sample_pixels(encoder.config, 2)
    seen = []
    for cost in (ordered[0], ordered[-1]):
        route = encoder.choose(budget=cost * 1.001)
        assert costs[route.id] == cost and encoder.last_cost() == {"gflops": cost, "route": float(route.id)}
        seen.append(encoder(pixels).tokens)
    assert seen[0].shape == seen[1].shape and not torch.allclose(seen[0], seen[1], atol=1e-3)
    with pytest.raises(ConfigError, match=r"budget: .* too few; the cheapest route needs"):
        encoder.choose(budget=ordered[0] / 2)
    with pytest.raises(ConfigError, match=r"route: 0 is none of the \d+ routes that end in the large model"):
        encoder.choose(route=0)
    fixed = {k: v for k, v in TINY_SNNET.items() if k != "route"}
    by_config = build_encoder(encoder_config({**fixed, "budget": ordered[0] * 1.001}, where="e"))
    assert costs[by_config.route.id] == ordered[0]
    refused({**TINY_SNNET, "depths": [3, 4]}, "4 blocks are no multiple of 3")
    refused({**TINY_SNNET, "budget": 1.0}, "budget: route is given too")


def test_snnets_training_takes_every_route_and_goes_on_where_it_stopped():
    spec = {**TINY_SNNET, "sample_routes": True, "cost_groups": 3}
    encoder = build_encoder(encoder_config(spec, where="e")).train()
    drawn = [encoder._drawn().id for _ in range(60)]
    assert set(drawn) == set(encoder.route_costs(encoder.config))
    again = build_encoder(encoder_config(spec, where="e")).train()
    again.load_state_dict(encoder.state_dict())
    assert [encoder._drawn().id for _ in range(5)] == [again._drawn().id for _ in range(5)]
    assert encoder.model.stitch_layers[0][0]["transform"].weight.requires_grad is False


# S4D ------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_s4ds_experts_are_the_authors_with_their_capacity():
    meta, inputs, outputs, state = vector("s4d_adapter_experts")
    sizes = meta["ctor"]
    shape = (sizes["dim"], sizes["hidden"], sizes["num_experts"], sizes["top_k"])
    experts = s4d.AdapterExperts(*shape, capacity_factor=sizes["capacity_factor"]).eval()
    experts.load_state_dict(state)
    x, noise = inputs["input.x"], inputs["input.noise"]
    gates, chosen, logits = experts.router(x)
    have = {
        "output.gates": gates,
        "output.indices": chosen,
        "output.y": experts(x),
        "output.y_noisy": experts(x, noise),
    }
    compare(meta, outputs, have | {"output.balance_loss": s4d.balance_loss(gates, logits)[None]})
    free = s4d.AdapterExperts(*shape).eval()
    free.load_state_dict(state)
    alone = torch.cat([free(x[:1]), free(x[1:])])
    torch.testing.assert_close(free(x), alone)
    assert not torch.allclose(experts(x), torch.cat([experts(x[:1]), experts(x[1:])]), atol=1e-4), (
        "the authors' capacity makes a picture depend on the others of its batch"
    )


@torch.no_grad()
def test_a_picture_is_a_clip_of_itself_to_s4d():
    encoder = build_example(resolve_example("s4d"))
    picture = sample_pixels(encoder.config, 2)
    still = encoder.model(picture)[-1]
    clip = encoder.model(picture[:, :, None].expand(-1, -1, 4, -1, -1))[-1]
    torch.testing.assert_close(still, clip)
    assert encoder.model.blocks[0].moe is None and encoder.model.blocks[1].moe is not None
    refused({**s4d.S4dEncoder.tiny(), "top_k": 5}, "top_k: 5 of 4 experts")


# DependencyViT, ViR, ParaTransCNN -------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("name", ["dependencyvit_thirdparty", "dependencyvit_lite_thirdparty"])
def test_dependencyvit_is_the_third_partys_port(name, tmp_path):
    meta, inputs, outputs, state = vector(name)
    sizes = meta["ctor"]
    spec = {
        "type": "dependencyvit",
        "width": sizes["embed_dim"],
        "depth": sizes["depth"],
        "num_heads": sizes["num_heads"],
        "patch_size": sizes["patch_size"],
        "trained_size": sizes["img_size"],
        "image_size": sizes["img_size"],
    }
    if "prune_layers" in sizes:
        spec |= {"prune_after": sizes["prune_layers"], "prune_ratio": sizes["prune_ratio"]}
    encoder = encoder_with(state, spec, tmp_path)
    image = inputs["input.image"]
    _, messages, places = encoder.model(image)[-1]
    tokens = encoder(image).tokens
    have = {"output.pooled": tokens.mean(1)}
    if "prune_layers" in sizes:  # the port's order of kept tokens is not defined; the vector sorts by message
        order = messages.argsort(1)
        assert torch.equal(encoder.last_places, places) and bool((places.diff(dim=1) > 0).all())
        tokens, messages = tokens.gather(1, order[..., None].expand_as(tokens)), messages.gather(1, order)
    else:
        found = encoder.model.dependencies(image)
        have |= {"output.dependency_first": found[0], "output.dependency_last": found[-1]}
    compare(meta, outputs, have | {"output.final": tokens, "output.messages_last": messages})


def test_dependencyvits_pruning_that_cannot_be_is_refused():
    refused({**TINY_DEPENDENCY, "prune_after": [3]}, "prune_after", "1 to 2")
    refused({**TINY_DEPENDENCY, "prune_after": [1, 2], "prune_ratio": 0.5}, "leaves no token")
    refused({**TINY_DEPENDENCY, "prune_after": [1], "layers": [-2, -1]}, "name one layer")
    assert encoder_config({**TINY_DEPENDENCY, "prune_after": [1]}, where="e").info.grid == (1, 16)


@torch.no_grad()
def test_retention_is_the_third_partys_in_its_three_forms_and_looks_back_only():
    meta, inputs, outputs, state = vector("vir_retention_thirdparty")
    heads, width = meta["ctor"]["heads"], meta["ctor"]["embed_dim"]
    inner = width // heads
    weight, bias = torch.zeros(3 * width, width), torch.zeros(3 * width)
    for h in range(heads):  # the port projects each head from its own slice of the input
        own = slice(h * inner, (h + 1) * inner)
        for part in range(3):
            rows = slice(part * width + h * inner, part * width + (h + 1) * inner)
            weight[rows, own] = state[f"heads.{h}.qkv.weight"][part * inner : (part + 1) * inner]
            bias[rows] = state[f"heads.{h}.qkv.bias"][part * inner : (part + 1) * inner]
    whole = {"qkv.weight": weight, "qkv.bias": bias} | {k: v for k, v in state.items() if not k.startswith("heads")}
    x = inputs["input.x"]
    for form in ("parallel", "recurrent", "chunkwise"):
        config = vir.VirConfig(type="vir", width=width, num_heads=heads, form=form, chunk=5)
        module = vir.Retention(config).eval()
        module.load_state_dict(whole)
        compare(meta, outputs, {"output.y": module(x), "output.retention": module.read(x)})
        changed = x.clone()
        changed[:, 9:] += 1
        torch.testing.assert_close(module(changed)[:, :9], module(x)[:, :9])
        assert not torch.allclose(module(changed)[:, 9], module(x)[:, 9], atol=1e-3)


@torch.no_grad()
def test_paratranscnn_is_the_authors_with_its_decoder_behind_it(tmp_path):
    meta, inputs, outputs, state = vector("paratranscnn")
    sizes = meta["ctor"]
    spec = {"type": "paratranscnn", "width": sizes["dim"], "depths": sizes["depth"], "num_heads": sizes["heads"]}
    spec |= {"image_size": sizes["size"], "layers": [1, 2, -1]}
    encoder = encoder_with(state, spec, tmp_path)
    image = inputs["input.image"]
    attended, convolved = encoder.model.branches(image)
    fine, middle, coarse = encoder.model(image)
    have = {
        "output.resnet2_mean": convolved[0].mean((2, 3)),
        "output.resnet4": convolved[2],
        "output.transformer1": attended[0].flatten(2).transpose(1, 2),
        "output.transformer3": attended[2].flatten(2).transpose(1, 2),
        "output.attention1": coarse,
        "output.attention2_mean": middle.mean((2, 3)),
        "output.attention3_mean": fine.mean((2, 3)),
    }

    def decode(x, name):  # the published decoder, which is no part of the encoder
        for k in (1, 3):
            x = F.conv2d(x, state[f"{name}.conv{k}.weight"], state[f"{name}.conv{k}.bias"], padding=1)
            x = batch_norm(x, state, f"{name}.norm{k}").relu()
        return x

    def raised(x, name, stride):
        return F.conv_transpose2d(x, state[f"{name}.weight"], state[f"{name}.bias"], stride=stride)

    x = decode(coarse, "decoder1")
    have["output.decoder1_mean"] = x.mean((2, 3))
    x = raised(x, "up3_1", 2)
    have["output.up1_mean"] = x.mean((2, 3))
    x = raised(decode(torch.cat([middle, x], 1), "decoder2"), "up2_1", 2)
    have["output.up2_mean"] = x.mean((2, 3))
    x = raised(decode(torch.cat([fine, x], 1), "decoder3"), "up1_1", 4)
    have["output.logits"] = F.conv2d(x, state["out.weight"], state["out.bias"])
    compare(meta, outputs, have)
    refused({**paratranscnn.ParaTransCnnEncoder.tiny(), "image_size": 24}, "24 x 24 is no multiple of 16")
    assert np.prod(encoder(image).grid) == 4
