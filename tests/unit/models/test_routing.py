"""Do experts run where they are routed, only there, and with the result of running everything?"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from mllm.errors import AlignmentError, CheckpointError, ConfigError, UnknownName
from mllm.models.modeling_mllm import MllmForConditionalGeneration
from mllm.models.routing import limit_routing, routing_probabilities, routing_records
from mllm.processing.chat import render_prompt, routing_inputs
from mllm.processing.processor import MllmProcessor
from mllm.processing.questions import pad_questions
from mllm.routers.fixed import fixed_weights, fixed_weights_of
from mllm.types import IMAGE_MARK, Routing, Turn
from tests.helpers import TINY_CLIP, TINY_TIMM, picture, tiny_model

WIDE = {**TINY_CLIP, "architecture": {**TINY_CLIP["architecture"], "hidden_size": 64}}
ENCODERS = {
    "base": WIDE,
    "document": TINY_TIMM,
    "chart": {**TINY_TIMM, "image_size": 24},
    "region": {**TINY_CLIP, "architecture": {**TINY_CLIP["architecture"], "image_size": 14}},
}
EXPERTS = ["document", "chart", "region"]
CONNECTORS: dict[str, dict[str, Any]] = {
    "channel_concat": {"type": "channel_concat", "grid": [3, 3]},
    "sequence_concat": {"type": "sequence_concat", "weighting": "select"},
    "mova": {"type": "mova", "depth": 2},
    "spatial_aggregator": {"type": "spatial_aggregator", "grid": [2, 2], "hidden": 16, "depth": 1},
    "merv": {"type": "merv", "grid": [2, 2]},
}
MIXES = {
    "mixed": [[1, 0, 0], [0, 0.5, 0.5], [0, 0, 0], [0, 0, 1], [0.2, 0.3, 0.5]],
    "one expert": [[0, 1, 0]] * 5,
    "none": [[0, 0, 0]] * 5,
    "all": [[1 / 3] * 3] * 5,
}


def routed_model(
    folder: Any, connector: str = "channel_concat", router: dict[str, Any] | None = None, **changes: Any
) -> Any:
    router = {"type": "gate", "experts": EXPERTS, "hidden": 8, **(router or {})}
    return tiny_model(folder, encoders=dict(ENCODERS), connector=CONNECTORS[connector], router=router, **changes)


@pytest.fixture(scope="module")
def gated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    model, processor = routed_model(tmp_path_factory.mktemp("gated"))
    with torch.no_grad():  # decisive and diverse choices
        for parameter in model.model.vision_tower.router.mlp.parameters():
            parameter.normal_(std=0.7, generator=torch.Generator().manual_seed(5))
    return model, processor


def pixels_of(model: Any, count: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(count)
    return {
        name: torch.randn(count, 3, info.image.height, info.image.width, generator=generator)
        for name, info in model.config.encoder_infos().items()
    }


def run_everything(model: Any, pixels: Any, weights: torch.Tensor, text: torch.Tensor | None) -> torch.Tensor:
    """Every encoder on every image; the connector alone applies the routing."""
    bank = model.model.vision_tower
    features = {name: encoder(pixels[name]) for name, encoder in bank.encoders.items()}
    return model.model.multi_modal_projector(features, Routing(bank.experts, weights), text)


def distance(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """Largest difference; relative to the largest value where that is above 1."""
    return float((got - wanted).abs().max() / wanted.abs().max().clamp(min=1))


def never_used(model: Any, pixels: Any) -> set[str]:
    """Parameters that get no gradient even when everything runs (an encoder's last layer behind the features taken)."""
    bank = model.model.vision_tower
    model.zero_grad()
    weights = torch.full((len(pixels["base"]), 3), 1 / 3)
    run_everything(model, pixels, weights, torch.zeros(len(weights), 64)).sum().backward()
    named = [*bank.encoders.named_parameters(), *model.model.multi_modal_projector.named_parameters()]
    return {name for name, p in named if p.grad is None}


@pytest.mark.parametrize("mix", sorted(MIXES))
@pytest.mark.parametrize("connector", sorted(CONNECTORS))
def test_routed_encoding_equals_running_everything_with_its_gradients(connector: str, mix: str, tmp_path: Any) -> None:
    model, _ = routed_model(tmp_path, connector)
    for block in getattr(model.model.multi_modal_projector, "blocks", []):  # MoVA starts as the identity
        for parameter in block.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    weights = torch.tensor(MIXES[mix], dtype=torch.float32)
    pixels = pixels_of(model, len(weights))
    bank = model.model.vision_tower
    questions = torch.randint(5, 200, (len(weights), 4))
    text = model.model.question_summary(questions)
    bank.num_encoded.clear()
    with torch.no_grad():
        got, _ = model.model.encode_images(pixels, expert_weights=weights, router_input_ids=questions)
        wanted = run_everything(model, pixels, weights, text)
    assert distance(got, wanted) < 1e-5
    expected = {"base": len(weights), **dict(zip(EXPERTS, weights.gt(0).sum(0).tolist()))}
    assert {name: bank.num_encoded[name] for name in expected} == expected, "an expert ran on images not routed to it"
    for row in range(len(weights)):
        alone, _ = model.model.encode_images(
            {k: v[row : row + 1] for k, v in pixels.items()},
            expert_weights=weights[row : row + 1],
            router_input_ids=questions[row : row + 1],
        )
        assert distance(alone, got.unflatten(0, (len(weights), -1))[row]) < 1e-5

    model.train()
    gradients = []
    for way in range(2):
        model.zero_grad()
        if way:
            result = run_everything(model, pixels, weights, text)
        else:
            result, _ = model.model.encode_images(pixels, expert_weights=weights, router_input_ids=questions)
        (result * torch.linspace(-1, 1, result.numel()).view_as(result)).sum().backward()
        named = [*bank.encoders.named_parameters(), *model.model.multi_modal_projector.named_parameters()]
        gradients.append({name: p.grad.clone() if p.grad is not None else torch.zeros_like(p) for name, p in named})
        if not way:
            missing = [name for name, p in named if p.grad is None]
            assert set(missing) <= never_used(model, pixels), "every rank needs gradients of the same parameters"
    for name, gradient in gradients[0].items():
        assert distance(gradient, gradients[1][name]) < 1e-5, name


# Generation ----------------------------------------------------------------------------------------------------------


def prompts(processor: Any) -> tuple[dict[str, torch.Tensor], list[int]]:
    conversations = [
        ([Turn("user", f"{IMAGE_MARK}\nwhat is it?")], [picture(1)]),
        ([Turn("user", "no picture at all, a longer question")], []),
        ([Turn("user", f"{IMAGE_MARK} and {IMAGE_MARK} differ how?")], [picture(2, size=(9, 50)), picture(3)]),
        ([Turn("user", f"{IMAGE_MARK}\nread the 5 bars")], [picture(4)]),
    ]
    inputs = processor(
        text=[render_prompt(processor, turns) for turns, _ in conversations],
        images=[images for _, images in conversations],
        padding=True,
        padding_side="left",
        return_tensors="pt",
        add_special_tokens=False,
    )
    rows = [routing_inputs(processor, turns, len(images)) for turns, images in conversations]
    ids = [[i for i in row if i >= 0] for part in rows if part for row in part["router_input_ids"].tolist()]
    return {**inputs, "router_input_ids": pad_questions(ids)}, [len(images) for _, images in conversations]


def generate(model: Any, inputs: dict[str, torch.Tensor], **options: Any) -> list[list[int]]:
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, **options}
    return model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :].tolist()


def test_generate_takes_a_routing_by_hand_and_records_it(gated: tuple[Any, Any]) -> None:
    model, processor = gated
    inputs, counts = prompts(processor)
    bank = model.model.vision_tower
    bank.num_encoded.clear()
    document = generate(model, inputs, experts=["document"])
    assert dict(bank.num_encoded) == {"base": 4, "document": 4}
    assert model.last_routing.experts == tuple(EXPERTS)
    assert model.last_routing.weights.tolist() == [[1, 0, 0]] * 4
    assert generate(model, inputs, experts="document") == document
    assert generate(model, inputs, experts={"document": 1.0}) == document
    fixed = {**inputs, "expert_weights": processor.image_processor.expert_weights(["document"]).repeat(4, 1)}
    assert generate(model, fixed) == document
    bank.num_encoded.clear()
    none = generate(model, inputs, experts="none")
    assert dict(bank.num_encoded) == {"base": 4} and none != document
    each = generate(model, inputs, experts=[["document"], "none", ["chart", "region"], None])
    assert model.last_routing.weights[:3].tolist() == [[1, 0, 0], [0, 0, 0], [0, 0.5, 0.5]]
    assert each[0] == document[0]
    records = routing_records(model.last_routing, counts)
    assert records[1] is None and records[0][1] == ["document"] and records[2][1] == ["chart", "region"]
    assert set(records[2][0]) == set(EXPERTS) and sum(records[2][0].values()) == pytest.approx(1, abs=1e-5)


def test_the_budget_and_the_threshold_bound_what_runs(gated: tuple[Any, Any]) -> None:
    model, processor = gated
    inputs, _ = prompts(processor)
    router = model.model.vision_tower.router
    before = router.config.top_k
    router.config.top_k = 3
    try:
        free = generate(model, inputs)
        everything = model.last_routing
        assert (everything.weights > 0).all()
        for budget in (0, 1, 2, 3):
            answers = generate(model, inputs, expert_budget=budget)
            routing = model.last_routing
            assert (routing.weights > 0).sum(-1).tolist() == [budget] * 4
            if budget:
                best = routing_probabilities(everything).topk(budget).indices
                assert (routing.weights.gather(1, best) > 0).all()
                torch.testing.assert_close(routing.weights.sum(-1), torch.ones(4))
        assert answers == free
        probabilities = routing_probabilities(everything)
        middle = float(probabilities.flatten().sort().values[6])
        generate(model, inputs, expert_threshold=middle)
        assert ((model.last_routing.weights > 0) == (probabilities >= middle)).all()
        generate(model, inputs, expert_threshold=1.0)
        assert not model.last_routing.weights.any()
        generate(model, inputs, experts=["chart", "region"], expert_budget=1)
        assert model.last_routing.weights.tolist() == [[0, 0.5, 0.5]] * 4, "a routing by hand is not cut"
    finally:
        router.config.top_k = before


def test_routed_batches_answer_like_single_prompts_and_beams_encode_images_once(gated: tuple[Any, Any]) -> None:
    model, processor = gated
    inputs, counts = prompts(processor)
    together = generate(model, inputs)
    chosen = model.last_routing.weights
    assert len({tuple(row) for row in chosen.gt(0).tolist()}) > 1, "the batch should mix experts"
    assert generate(model, inputs, use_cache=False) == together
    start = 0
    for row, count in enumerate(counts):
        mask = inputs["attention_mask"][row].bool()
        images = slice(start, start + count)
        start += count
        alone: dict[str, Any] = {k: inputs[k][row : row + 1][:, mask] for k in ("input_ids", "attention_mask")}
        if count:
            alone |= {k: v[images] for k, v in inputs.items() if k not in alone}
        assert generate(model, alone)[0] == together[row]
        if count:
            torch.testing.assert_close(model.last_routing.weights, chosen[images])
        else:
            assert model.last_routing is None
    bank = model.model.vision_tower
    bank.num_encoded.clear()
    output = model.generate(**inputs, num_beams=3, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    assert bank.num_encoded["base"] == 4 and sum(bank.num_encoded[e] for e in EXPERTS) == 4
    torch.testing.assert_close(output.routing.weights, chosen)


def test_forward_with_pixels_equals_generates_first_step(gated: tuple[Any, Any]) -> None:
    model, processor = gated
    inputs, _ = prompts(processor)
    with torch.no_grad():
        output = model(**inputs)
    first = generate(model, inputs, max_new_tokens=1)
    assert output.logits[:, -1].argmax(-1).tolist() == [row[0] for row in first]
    torch.testing.assert_close(output.routing.weights, model.last_routing.weights)


def test_settings_that_cannot_be_followed_are_refused(gated: tuple[Any, Any], tmp_path: Any) -> None:
    model, processor = gated
    inputs, _ = prompts(processor)
    for options, error, words in [
        ({"experts": ["documents"]}, UnknownName, "unknown expert 'documents', did you mean 'document'"),
        ({"experts": ""}, ConfigError, "names nothing"),
        ({"experts": 3}, ConfigError, "experts is 3"),
        ({"experts": {"chart": -1.0}}, ConfigError, "the weight of 'chart' is -1.0"),
        ({"experts": [["chart"], []]}, AlignmentError, "2 entries for 4 images"),
        ({"expert_budget": 4}, ConfigError, "expert_budget is 4; expected 0 to 3"),
        ({"expert_budget": -1}, ConfigError, "expert_budget is -1"),
        ({"expert_threshold": 1.5}, ConfigError, "expert_threshold is 1.5"),
    ]:
        with pytest.raises(error, match=words):
            model.generate(**inputs, **options)
    with pytest.raises(ConfigError, match="top_k is 4, but there are 3 experts"):
        routed_model(tmp_path, router={"top_k": 4})
    with pytest.raises(ConfigError, match="'text' is no encoder of this model"):
        routed_model(tmp_path, router={"experts": ["text"]})
    plain, reader = tiny_model(tmp_path)
    single = reader(text="<image> a", images=picture(), return_tensors="pt")
    with pytest.raises(ConfigError, match="this model has no router"):
        plain.generate(**single, experts=["semantic"])


def test_saved_opened_and_adapted_a_routed_model_is_the_same(gated: tuple[Any, Any], tmp_path: Any) -> None:
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import load_file, save_file

    model, processor = gated
    inputs, _ = prompts(processor)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, reader = (
        MllmForConditionalGeneration.from_pretrained(tmp_path).eval(),
        MllmProcessor.from_pretrained(tmp_path),
    )
    assert reader.image_processor.experts == EXPERTS
    assert generate(again, inputs) == generate(model, inputs)
    torch.testing.assert_close(again.last_routing.logits, model.last_routing.logits)
    adapted = get_peft_model(
        copy.deepcopy(model), LoraConfig(r=2, target_modules=r".*(language_model.*q_proj|encoders\.document.*qkv)")
    ).eval()
    assert generate(adapted, inputs) == generate(model, inputs)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(
        {k: v for k, v in tensors.items() if "encoders.chart." not in k},
        tmp_path / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(CheckpointError, match=r"weights are missing .*encoders\.chart"):
        MllmForConditionalGeneration.from_pretrained(tmp_path)


def test_gradient_checkpointing_changes_no_gradient_of_a_routed_batch(gated: tuple[Any, Any]) -> None:
    model = copy.deepcopy(gated[0]).train()
    inputs, _ = prompts(gated[1])
    found = []
    for checkpointing in (False, True):
        model.zero_grad()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(**inputs, labels=inputs["input_ids"], use_cache=False).loss.backward()
        found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() and any("router" in name for name in found[0])
    for name in found[0]:
        torch.testing.assert_close(found[0][name], found[1][name], atol=1e-6, rtol=1e-4, msg=name)


# Parts ---------------------------------------------------------------------------------------------------------------


def test_a_routing_by_hand_is_read_in_every_spelling() -> None:
    pool = ["a", "b", "c"]
    assert fixed_weights(["b", "a", "b"], pool).tolist() == [[0.5, 0.5, 0]]
    assert fixed_weights("a, c", pool).tolist() == [[0.5, 0, 0.5]]
    assert fixed_weights("none", pool).tolist() == fixed_weights([], pool).tolist() == [[0, 0, 0]]
    assert fixed_weights({"c": 0.25}, pool).tolist() == [[0, 0, 0.25]]
    assert fixed_weights(None, pool).isnan().all()
    assert fixed_weights_of(["a"], pool, 2).tolist() == [[1, 0, 0]] * 2
    assert fixed_weights_of([["a"], "none"], pool, 2).tolist() == [[1, 0, 0], [0, 0, 0]]


def test_limits_keep_the_likeliest_and_share_the_weight() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 0.1, 3.0]])
    routing = Routing(("a", "b", "c"), torch.tensor([[0.6, 0.4, 0.0], [0.0, 0.5, 0.5]]), logits)
    assert limit_routing(routing) is routing
    assert limit_routing(routing, budget=1).weights.tolist() == [[1, 0, 0], [0, 0, 1]]
    assert limit_routing(routing, budget=1, fixed=torch.tensor([True, False])).weights[0].tolist() == pytest.approx(
        [0.6, 0.4, 0]
    )
    assert limit_routing(routing, threshold=0.5).weights.tolist() == [[1, 0, 0], [0, 0, 1]]
    assert not limit_routing(routing, budget=0).weights.any()
    torch.testing.assert_close(limit_routing(routing, budget=2).weights, routing.weights)


def test_router_losses_weigh_the_same_however_the_step_is_split(gated: tuple[Any, Any]) -> None:
    model = copy.deepcopy(gated[0]).train()
    inputs, _ = prompts(gated[1])
    one = {k: v[:1] for k, v in inputs.items()}
    one = {**one, "labels": one["input_ids"], "routing_targets": torch.tensor([[0.0, 1.0, 0.0]]), "use_cache": False}
    own = int((one["labels"][:, 1:] != -100).sum())
    whole = model(**one, num_items_in_batch=own).loss
    halves = sum(model(**one, num_items_in_batch=2 * own).loss for _ in range(2))
    torch.testing.assert_close(halves, whole)
    plain = model(**{k: v for k, v in one.items() if k != "routing_targets"}, num_items_in_batch=own).loss
    assert whole > plain
