"""Do the routers without parameters give the weights that were written down or answered?"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from mllm.errors import AlignmentError, ConfigError
from mllm.routers import ROUTERS
from mllm.routers.build import build_router
from mllm.routers.language_model import parse_answer, parse_answer_leniently, pool_routing_tokens
from tests.golden.fill import check, load, texts

GOLDEN = Path(__file__).parents[2] / "golden"


def constant(**options):
    return build_router({"type": "constant", "experts": ["a", "b", "c"], **options}, 6, 8)


def language_model(**changes):
    config, summary, text = ROUTERS.get("language_model").tiny()
    return build_router({**config, **changes}, summary, text)


# constant


def test_constant_weights_are_scaled_to_sum_one_in_the_experts_order():
    router = constant(weights={"c": 1.0, "a": 3.0})
    assert router(torch.zeros(2, 6)).weights.tolist() == [[0.75, 0.0, 0.25]] * 2
    assert router.config.top_k == 2


def test_constant_without_weights_uses_all_experts_alike():
    router = constant()
    torch.testing.assert_close(router(torch.zeros(1, 6)).weights, torch.full((1, 3), 1 / 3))
    assert router.config.top_k == 3


def test_constant_shares_what_disallowed_experts_leave():
    router = constant(weights={"a": 3.0, "b": 1.0, "c": 1.0})
    allowed = torch.tensor([[False, True, True], [False, False, False]])
    torch.testing.assert_close(
        router(torch.zeros(2, 6), allowed=allowed).weights, torch.tensor([[0, 0.5, 0.5], [0, 0, 0]])
    )


def test_constant_with_all_weights_zero_runs_no_expert():
    assert constant(weights={"a": 0.0})(torch.zeros(1, 6)).weights.tolist() == [[0.0, 0.0, 0.0]]


# language model: golden


def test_the_lenient_parser_equals_movas():
    meta, _, expected = load(GOLDEN / "mova_routing_parser.json")
    rows = np.zeros((len(texts(meta)), 7), np.int64)
    for row, text in enumerate(texts(meta)):
        rows[row, list(parse_answer_leniently(text, 7, top_k=3).experts)] = 1
    check(meta, expected, {"output.routing": rows})


def test_routing_tokens_are_pooled_as_movas():
    meta, inputs, expected = load(GOLDEN / "mova_routing_pool.json")
    x = torch.from_numpy(inputs["input.x"])
    check(meta, expected, {"output.y": pool_routing_tokens(x, (8, 8), (4, 4)).numpy()})
    batched = pool_routing_tokens(x[None].bfloat16(), (8, 8), (4, 4))
    assert batched.shape == (1, 16, 6) and batched.dtype == torch.bfloat16


# language model: the strict parser


@pytest.mark.parametrize(
    ("answer", "experts"),
    [
        ("A", (0,)),
        ("C, A", (2, 0)),
        ("b,a".upper(), (1, 0)),
        (" A ,B\n", (0, 1)),
        ("A, A, B", (0, 1)),
        ("A,B,C", (0, 1)),
        ("none", ()),
        ("None", ()),
        (" NONE \n", ()),
    ],
)
def test_the_strict_parser_reads_letters_and_none(answer, experts):
    parsed = parse_answer(answer, 3, top_k=2)
    assert parsed.experts == experts and parsed.error is None


@pytest.mark.parametrize(
    "answer", ["", "D", "a", "A.", "A;B", "A and B", "A,,B", "A, none", "AB", "None of them", "é", ","]
)
def test_the_strict_parser_reports_anything_else_and_chooses_nothing(answer):
    parsed = parse_answer(answer, 3, top_k=2)
    assert parsed.experts == ()
    assert parsed.error is not None and repr(answer) in parsed.error and "A, B, C" in parsed.error


# language model: prompt and decisions


def test_the_prompt_letters_the_pool_in_the_experts_order_and_never_shows_a_name():
    router = language_model(
        experts=["sam", "dino"], capabilities={"dino": "Sees objects.", "sam": "Cuts out things."}, top_k=1
    )
    prompt = router.prompt("How many {cats}?")
    assert prompt.index("A. Cuts out things.\nB. Sees objects.") < prompt.index("Question:\nHow many {cats}?")
    assert "up to 1 letters" in prompt and "sam" not in prompt and "dino" not in prompt
    assert language_model(instruction="Pick {top_k}.").prompt("?").startswith("Pick 2.\n")


def test_answers_become_equal_weights_and_errors_are_reported():
    router = language_model()
    routing, parsed = router.decide(["C, A", "none", "the first"])
    assert routing.experts == ("a", "b", "c")
    assert routing.weights.tolist() == [[0.5, 0.0, 0.5], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
    assert [answer.error is None for answer in parsed] == [True, True, False]
    lenient, parsed = language_model(parser="lenient").decide(["Cat"])
    assert lenient.weights.tolist() == [[0.0, 0.0, 1.0]] and parsed[0].error is None


def test_decisions_respect_what_is_allowed():
    allowed = torch.tensor([[True, True, False]])
    assert language_model().decide(["C, A"], allowed)[0].weights.tolist() == [[1.0, 0.0, 0.0]]


def test_before_a_decision_no_expert_runs():
    assert not language_model()(torch.zeros(2, 6)).weights.any()
    with pytest.raises(AlignmentError, match=r"decisions have shape \(2, 2\)"):
        language_model()(torch.zeros(2, 6), decisions=torch.zeros(2, 2))


@pytest.mark.parametrize("experts", [(), ("b",), ("c", "a")])
def test_the_training_target_is_read_back_as_the_experts_it_was_made_of(experts):
    router = language_model()
    parsed = router.parse(router.target(experts))
    assert parsed.error is None
    assert {router.config.experts[i] for i in parsed.experts} == set(experts)


def test_a_target_of_an_unknown_expert_or_too_many_is_refused():
    router = language_model()
    with pytest.raises(ConfigError, match="'d' is no expert"):
        router.target(["a", "d"])
    with pytest.raises(ConfigError, match="3 experts, but top_k is 2"):
        router.target(["a", "b", "c"])


def test_more_experts_than_letters_are_refused():
    names = [f"e{i}" for i in range(27)]
    with pytest.raises(ConfigError, match="27 experts, but there are 26 letters"):
        language_model(experts=names, capabilities=dict.fromkeys(names, "Sees."))
