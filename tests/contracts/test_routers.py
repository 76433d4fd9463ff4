"""Does every registered router keep the contract, and refuse what does not fit in words that help?"""

from __future__ import annotations

import pytest

from mllm.errors import ConfigError, UnknownName
from mllm.routers import ROUTERS
from mllm.routers.build import build_router, router_config
from mllm.testing.routers import CHECKS, check_router


def test_there_are_routers_to_test():
    assert len(ROUTERS) >= 3


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", list(ROUTERS))
def test_every_router_keeps_the_contract(name, check):
    check(name, ROUTERS.get(name).tiny())


VARIANTS = [
    ("constant", {"weights": {}}),
    ("constant", {"weights": {"b": 0.0}, "top_k": 1}),
    ("gate", {"top_k": 1, "depth": 1, "temperature": 0.5, "noise": 1.0, "threshold": 0.5}),
    ("gate", {"top_k": 3, "straight_through": True}),
    ("gate", {"inputs": "image", "losses": {}}),
    ("language_model", {"parser": "lenient", "top_k": 3}),
]


@pytest.mark.parametrize(("name", "changes"), VARIANTS)
def test_variants_keep_the_contract(name, changes):
    assert len(check_router(name, changes)) == len(CHECKS)


MISFITS = [
    ("constant", {"top_k": 4}, ["top_k is 4", "3 experts"]),
    ("constant", {"weights": {"d": 1.0}}, ["weights: 'd' is no expert", "Experts: a, b, c"]),
    ("constant", {"weights": {"a": -1.0}}, ["weights.a is -1.0"]),
    ("constant", {"top_k": 1}, ["top_k is 1", "2 experts have a weight"]),
    ("gate", {"top_k": 4}, ["model.router", "top_k is 4", "3 experts"]),
    ("gate", {"experts": ["a", "a", "b"]}, ["names must differ"]),
    ("gate", {"losses": {"z_loss": 0.0}}, ["losses.z_loss is 0.0"]),
    ("gate", {"losses": {"balance": 1.0}}, ["model.router.losses", "load_balance"]),
    ("gate", {"temprature": 1.0}, ["model.router.temprature", "did you mean 'temperature'"]),
    ("language_model", {"capabilities": {"a": "Reads text.", "b": "Finds objects."}}, ["capabilities.c is missing"]),
    ("language_model", {"top_k": 4}, ["top_k is 4"]),
]


@pytest.mark.parametrize(("name", "changes", "words"), MISFITS)
def test_a_misfit_is_told_with_its_value_and_the_cure(name, changes, words):
    config, summary, text = ROUTERS.get(name).tiny()
    with pytest.raises(ConfigError) as caught:
        build_router({**config, **changes}, summary, text)
    for word in words:
        assert word in str(caught.value), f"{word!r} not in: {caught.value}"


def test_an_expert_that_is_no_encoder_is_told():
    config, summary, text = ROUTERS.get("gate").tiny()
    with pytest.raises(ConfigError, match=r"model\.router\.experts: the model has no encoder 'b'"):
        build_router(config, summary, text, encoders=["a", "c", "base"])


def test_a_gate_with_nothing_to_look_at_is_told():
    config, _, text = ROUTERS.get("gate").tiny()
    with pytest.raises(ConfigError, match="nothing to look at"):
        build_router({**config, "inputs": "image"}, 0, text)


def test_a_spec_without_a_type_and_an_unknown_type_are_told():
    with pytest.raises(ConfigError, match=r"model\.router: expected a mapping with a type"):
        router_config({"experts": ["a"]})
    with pytest.raises(UnknownName, match="did you mean 'gate'"):
        router_config({"type": "gates", "experts": ["a"]})
