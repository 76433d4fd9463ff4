"""Does exactly that learn what the recipe names, at its rate and decay?"""

from __future__ import annotations

import pytest
import torch

from mllm.errors import ConfigError
from mllm.models import lora
from mllm.recipe import StageSpec
from mllm.train.engine.groups import apply_learning, frozen_summary, groups_table, no_decay_names, set_modes
from tests.helpers import TINY_CLIP, tiny_model


@pytest.fixture
def model(tmp_path):
    return tiny_model(tmp_path)[0]


def _stage(learn, **changes):
    data = {"name": "sft", "data": "x", "steps": 1, "learn": learn, "optimizer": {"weight_decay": 0.1}, **changes}
    return StageSpec.model_validate(data)


def test_absent_parts_are_frozen_and_named_ones_learn_at_their_rate(model):
    groups = apply_learning(model, _stage({"connector": 1e-3, "encoders.semantic": {"lr": 1e-5, "weight_decay": 0.0}}))
    learning = {n for n, p in model.named_parameters() if p.requires_grad}
    assert learning == {
        n for n, _ in model.named_parameters() if model.part_of(n) in ("connector", "encoders.semantic")
    }
    assert {(g.name, g.lr, g.weight_decay) for g in groups} == {
        ("connector", 1e-3, 0.1),
        ("connector/no_decay", 1e-3, 0.0),
        ("encoders.semantic", 1e-5, 0.0),
    }
    assert set(frozen_summary(model)) == {"language_model", "encoders.detail"}


def test_norms_biases_and_single_tokens_get_no_decay_and_matrices_do(model):
    exempt = no_decay_names(model)
    for name, _ in model.named_parameters():
        last = name.rpartition(".")[2]
        if last == "bias" or "norm" in name.rpartition(".")[0].rpartition(".")[2] or "cls_token" in name:
            assert name in exempt, name
    assert "model.language_model.layers.0.input_layernorm.weight" in exempt
    assert "model.language_model.embed_tokens.weight" not in exempt
    assert not any(n.endswith(("proj.weight", "fc1.weight", "fc2.weight", "qkv.weight")) for n in exempt)


def test_encoders_means_all_of_them_and_naming_one_twice_is_refused(model):
    groups = apply_learning(model, _stage({"encoders": 1e-5}))
    assert {g.part for g in groups} == {"encoders.semantic", "encoders.detail"}
    with pytest.raises(ConfigError, match=r"stages\.sft\.learn: encoders\.semantic is given a rate twice"):
        apply_learning(model, _stage({"encoders": 1e-5, "encoders.semantic": 1e-4}))


@pytest.mark.parametrize(
    ("learn", "message"),
    [
        ({"conector": 1e-3}, r"stages\.sft\.learn\.conector: this model has no such part, did you mean 'connector'"),
        ({"router": 1e-3}, r"stages\.sft\.learn\.router: this model has no such part"),
        ({"encoders.sematic": 1e-3}, r"did you mean 'encoders\.semantic'"),
        ({"encoders.semantic": {"lr": 1e-5, "last_layers": 9}}, r"last_layers is 9, but this encoder has \d layers"),
        ({"connector": {"lr": 1e-5, "last_layers": 1}}, "only encoders can be unfrozen by layer"),
        ({"language_model": {"lr": 1e-4, "last_layers": 1, "lora": {"r": 2}}}, "exclude each other"),
        ({"language_model": {"lr": 1e-4, "lora": {"r": 2, "target": ["q_prj"]}}}, "did you mean 'q_proj'"),
    ],
)
def test_wrong_parts_are_told_with_their_path_and_what_was_meant(model, learn, message):
    with pytest.raises(ConfigError, match=message):
        apply_learning(model, _stage(learn))


def test_the_last_layers_learn_together_with_the_final_norm_and_nothing_before(model):
    apply_learning(model, _stage({"encoders.detail": {"lr": 1e-4, "last_layers": 1}}))
    ((prefix, encoder),) = model.named_parts()["encoders.detail"]
    groups = dict(encoder.layer_groups())
    layers = [name for name in groups if name.startswith("layers.")]
    wanted = tuple(f"{prefix}.{p}" for name in [layers[-1], "norm"] for p in groups.get(name, []))
    learning = {n for n, p in model.named_parameters() if p.requires_grad}
    assert learning == {n for n, _ in model.named_parameters() if n.startswith(wanted)} and learning


def test_frozen_parts_are_in_evaluation_mode_and_learning_ones_in_training_mode(model):
    apply_learning(model, _stage({"connector": 1e-3}))
    set_modes(model)
    assert model.training and model.model.training and model.model.multi_modal_projector.training
    assert not model.model.language_model.training and not model.model.vision_tower.encoders["semantic"].training


def test_the_table_shows_parts_counts_rates_and_decay(model):
    from rich.console import Console

    stage = _stage({"connector": 1e-3})
    groups = apply_learning(model, stage)
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    console.print(groups_table(stage, groups, frozen_summary(model)))
    text = console.export_text()
    count = sum(p.numel() for p in model.model.multi_modal_projector.parameters() if p.dim() > 1)
    assert f"{count:,}" in text and "0.001" in text and "frozen" in text


@pytest.mark.parametrize("kind", [{}, {"use_dora": True}, {"use_rslora": True}, {"bits": 4}])
@pytest.mark.parametrize("part", ["language_model", "encoders.semantic", "connector"])
def test_merged_adapters_give_the_logits_of_the_unmerged_ones(model, part, kind):
    names = [n for n, _ in model.named_parameters()]
    if kind.get("bits") and part == "connector":
        with pytest.raises(ConfigError, match="only language_model and encoders"):
            apply_learning(model, _stage({part: {"lr": 1e-3, "lora": {"r": 4, **kind}}}))
        return
    groups = apply_learning(model, _stage({part: {"lr": 1e-3, "lora": {"r": 4, **kind}}}))
    learning = [n for n, p in model.named_parameters() if p.requires_grad]
    assert learning and all(lora.is_adapter(n) and model.part_of(n) == part for n in learning)
    assert {g.part for g in groups} == {part}
    torch.manual_seed(1)
    with torch.no_grad():
        for n, p in model.named_parameters():
            if p.requires_grad and "magnitude" not in n:
                p.copy_(torch.randn_like(p) * 0.2)
    model.eval()
    images = model.config.layout().num_tokens
    ids = torch.tensor([[7] + [model.config.image_token_id] * images + [9, 11]])
    infos = model.model.vision_tower.infos
    pixels = {
        model.model.pixel_keys[name]: torch.randn(1, 3, info.image.height, info.image.width)
        for name, info in infos.items()
    }
    with torch.no_grad():
        wanted = model(input_ids=ids, **pixels).logits
        assert lora.merge(model) > 0
        found = model(input_ids=ids, **pixels).logits
    assert (found - wanted).abs().max() < 1e-5
    assert [n for n, _ in model.named_parameters()] == names


def test_a_frozen_router_goes_on_exploring_for_the_parts_that_learn(tmp_path):
    router = {"type": "gate", "experts": ["spatial", "detail"], "hidden": 8, "explore": 1.0, "losses": {"z_loss": 0.1}}
    encoders = {"semantic": dict(TINY_CLIP), "spatial": dict(TINY_CLIP), "detail": dict(TINY_CLIP)}
    model, _ = tiny_model(tmp_path, encoders=encoders, router=router)
    apply_learning(model, _stage({"connector": 1e-3}))
    set_modes(model)
    gate = model.model.vision_tower.router
    routing = gate(torch.randn(64, gate.image_width), torch.randn(64, gate.text_width))
    assert {tuple(row) for row in routing.weights.ne(0).int().tolist()} == {(1, 0), (0, 1), (1, 1)}
    assert not routing.losses, "a frozen router has nothing to learn from losses of its own"
    model.eval()
    assert gate(torch.randn(64, gate.image_width)).weights.ne(0).sum(1).eq(1).all()
