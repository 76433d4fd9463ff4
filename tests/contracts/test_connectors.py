"""Does every registered connector keep the contract, and refuse what does not fit in words that help?"""

from __future__ import annotations

import re

import pytest

from mllm.connectors import CONNECTORS
from mllm.connectors.build import build_connector, connector_config
from mllm.errors import ConfigError, UnknownName
from mllm.testing.connectors import CHECKS, check_connector
from mllm.types import EncoderInfo, ImageSpec


def info(rows: int, cols: int, width: int = 64) -> EncoderInfo:
    return EncoderInfo(image=ImageSpec(height=8, width=8), grid=(rows, cols), width=width)


def test_there_are_connectors_to_test():
    assert len(CONNECTORS) >= 12


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", list(CONNECTORS))
def test_every_connector_keeps_the_contract(name, check):
    check(name, CONNECTORS.get(name).tiny())


VARIANTS = [
    (
        "mlp",
        {"depth": 3, "hidden": ["4x", 7], "activation": "silu", "norm_before": "rms_norm", "norm_after": "layer_norm"},
    ),
    ("channel_concat", {"interpolation": "area", "grid": [2, 2], "weighting": "select"}),
    ("channel_concat", {"interpolation": {"spatial": "bilinear_corners", "text": "nearest"}}),
    ("sequence_concat", {"grid": [2, 3], "weighting": "select"}),
    ("interleave", {"grid": [2, 3], "interpolation": "area"}),
    ("average_pool", {"grid": [3, 4], "overlap": True}),
    ("resampler", {"grid": None, "num_queries": 5, "hidden": 12}),
    ("spatial_aggregator", {"sampler": "sep", "row_separators": False, "windows": {"semantic": 2}}),
    ("mova", {"base": "base", "top_k": 1, "output_grid": [1, 3], "depth": 2}),
    ("merv", {"pooling": "attentive", "num_heads": 2}),
    ("attention_bias", {"query": "spatial", "source": "semantic"}),
    ("gated_fusion", {"first": "radar", "norm": "batch_norm", "add_second": True, "frames": 3}),
    ("geometry_exchange", {"scales": [1, 2, 3], "opposite": True, "field": [90, 60]}),
]


@pytest.mark.parametrize(("name", "changes"), VARIANTS, ids=lambda value: value if isinstance(value, str) else "")
def test_variants_keep_the_contract(name, changes):
    assert len(check_connector(name, changes)) == len(CHECKS)


MISFITS = [
    ("come_vl", {}, {"a": info(2, 2), "b": info(3, 4)}, ["'b' has grid 3×4", "pool 2 does not divide", "pool: 1"]),
    ("linear", {}, {"a": info(2, 2), "b": info(3, 3)}, ["exactly one encoder", "'a'|a \\(2×2\\)", "channel_concat"]),
    ("mlp", {}, {}, ["exactly one encoder", "has 0"]),
    (
        "channel_concat",
        {"interpolation": "none"},
        {"a": info(2, 2), "b": info(3, 3)},
        ["'b'", "3×3", "2×2", "bilinear"],
    ),
    (
        "channel_concat",
        {"interpolation": "pixel_unshuffle"},
        {"a": info(2, 2), "b": info(3, 3)},
        ["'b'", "3×3", "2×2", "multiple"],
    ),
    ("channel_concat", {"interpolation": {"c": "area"}}, {"a": info(2, 2)}, ["no encoder 'c'", "Encoders: a"]),
    ("sequence_concat", {"grid": [2, 2], "interpolation": "none"}, {"b": info(3, 3)}, ["'b'", "3×3", "2×2"]),
    ("interleave", {}, {"a": info(2, 2), "b": info(3, 3)}, ["'b'", "3×3", "2×2", "interpolation"]),
    ("pixel_shuffle", {}, {"a": info(27, 27)}, ["'a'", "27×27", "factor 2", "28×28", "average_pool"]),
    ("average_pool", {"grid": [4, 4]}, {"a": info(6, 6)}, ["'a'", "6×6", "4×4", "overlap"]),
    ("average_pool", {"grid": [8, 8]}, {"a": info(6, 6)}, ["'a'", "6×6", "8×8", "cannot be averaged"]),
    ("resampler", {"hidden": 10, "num_heads": 3}, {"a": info(2, 2)}, ["10", "num_heads", "3"]),
    ("resampler", {"grid": [2, 2], "num_queries": 4}, {"a": info(2, 2)}, ["num_queries or grid"]),
    (
        "spatial_aggregator",
        {"grid": [2, 2], "interpolation": "none"},
        {"a": info(2, 2), "b": info(5, 5)},
        ["'b'", "5×5", "4×4", "bilinear"],
    ),
    ("spatial_aggregator", {"windows": {"x": 2}}, {"a": info(2, 2)}, ["no encoder 'x'"]),
    ("spatial_aggregator", {"hidden": 30}, {"a": info(24, 24)}, ["30", "num_heads", "16"]),
    ("mova", {}, {"a": info(27, 27), "b": info(4, 4)}, ["'a'", "27×27", "output_grid"]),
    ("mova", {}, {"a": info(4, 4, 100), "b": info(4, 4)}, ["'a'", "100", "64"]),
    ("mova", {"top_k": 3}, {"a": info(4, 4), "b": info(4, 4)}, ["top_k is 3", "1 experts", "'b'"]),
    ("mova", {"base": "clip"}, {"clap": info(4, 4), "b": info(4, 4)}, ["no encoder 'clip'", "did you mean 'clap'"]),
    ("mova", {}, {"a": info(4, 4)}, ["at least 2 encoders", "has 1"]),
    ("merv", {}, {"a": info(7, 7)}, ["'a'", "7×7", "8×8"]),
    ("merv", {"pooling": "attentive"}, {"a": info(8, 8, 12)}, ["'a'", "12", "num_heads"]),
    ("attention_bias", {}, {"a": info(2, 2), "b": info(3, 3)}, ["'a'", "2×2", "'b'", "3×3", "image size"]),
    ("attention_bias", {"query": "a", "source": "a"}, {"a": info(2, 2), "b": info(2, 2)}, ["both 'a'"]),
    ("attention_bias", {}, {"a": info(2, 2)}, ["exactly two encoders"]),
    ("dual_perspective", {}, {"a": info(2, 2, 20)}, ["width 20", "multiple of 16"]),
    ("multi_scale", {}, {"a": info(2, 2), "b": info(2, 2)}, ["exactly one encoder"]),
    ("deepstack", {}, {"a": info(2, 2, 30)}, ["'a'", "30 channels", "4 layers", "levels: 3"]),
    ("deepstack", {"each": {"type": "pixle_shuffle"}}, {"a": info(2, 2, 32)}, ["each", "did you mean 'pixel_shuffle'"]),
    ("deepstack", {"each": {"type": "multi_scale"}}, {"a": info(2, 2, 32)}, ["multi_scale joins several views"]),
    ("pvc", {}, {"a": info(6, 6)}, ["'a'", "6×6", "factor 4"]),
    ("slow_fast", {}, {"a": info(3, 3)}, ["3×3", "cell 2", "side 1", "image size"]),
    ("slow_fast", {"each": {"type": "multi_scale"}}, {"a": info(2, 2)}, ["multi_scale", "mlp"]),
    ("branch_fusion", {}, {"a": info(2, 2)}, ["at least 2 encoders", "has 1"]),
    ("branch_fusion", {"vit": "c"}, {"a": info(2, 2), "b": info(2, 2)}, ["no encoder 'c'"]),
    ("gated_cross", {}, {"a": info(2, 2)}, ["exactly two encoders", "has 1"]),
    ("gated_fusion", {}, {"a": info(2, 2)}, ["at least 2 encoders", "has 1"]),
    ("gated_fusion", {}, {"a": info(2, 2), "b": info(2, 2), "c": info(2, 2)}, ["two encoders", "a, b, c"]),
    ("gated_fusion", {"first": "c"}, {"a": info(2, 2), "b": info(2, 2)}, ["no encoder 'c'"]),
    ("geometry_exchange", {}, {"a": info(2, 2), "b": info(2, 2)}, ["exactly one encoder"]),
    ("geometry_exchange", {"scales": [2, 3]}, {"a": info(2, 2)}, ["[1, 2]", "[2, 3]"]),
    ("geometry_exchange", {}, {"a": info(2, 2, 48)}, ["width 48", "multiple of 32"]),
    ("geometry_exchange", {"field": [360, 360]}, {"a": info(2, 2)}, ["180", "360"]),
    ("geometry_exchange", {"code": "published"}, {"a": info(2, 2, 640)}, ["320", "640", "bounded"]),
    ("spatial_mllm", {}, {"a": info(2, 2)}, ["two encoders", "has 1: a"]),
    ("spatial_mllm", {}, {"a": info(2, 2), "b": info(4, 4)}, ["'a'", "2×2", "'b'", "4×4"]),
    ("mlp", {"hidden": "4y"}, {"a": info(2, 2)}, ["model.connector.hidden", "4x"]),
    ("mlp", {"hidden": [8, 8]}, {"a": info(2, 2)}, ["2 hidden widths", "depth 2", "depth: 3"]),
    ("mlp", {"detph": 2}, {"a": info(2, 2)}, ["model.connector.detph", "did you mean 'depth'"]),
]


@pytest.mark.parametrize(("name", "changes", "encoders", "words"), MISFITS)
def test_a_misfit_names_the_encoder_both_sizes_and_the_cure(name, changes, encoders, words):
    required = {"grid": [2, 2]} if name == "average_pool" else {}
    with pytest.raises(ConfigError) as caught:
        build_connector({"type": name, **required, **changes}, encoders, 64)
    for word in words:
        pattern = word if "\\" in word else re.escape(word)
        assert re.search(pattern, str(caught.value)), f"{word!r} not in: {caught.value}"


def test_every_connector_has_a_misfit_that_is_tested():
    # Those of the documentation's pages may be registered as well, where their tests ran in this process before.
    shipped = {name for name in CONNECTORS if CONNECTORS.get(name).__module__.startswith("mllm.")}
    assert {name for name, *_ in MISFITS} == shipped


def test_a_spec_without_a_type_and_an_unknown_type_are_told():
    with pytest.raises(ConfigError, match=r"model\.connector: expected a mapping with a type"):
        connector_config({"depth": 2})
    with pytest.raises(UnknownName, match="did you mean 'channel_concat'"):
        connector_config({"type": "chanel_concat"})


def test_a_broken_connector_fails_the_check():
    from mllm.connectors.mlp import MlpConnector
    from mllm.types import ViewLayout

    class Lying(MlpConnector):
        @classmethod
        def layout(cls, config, encoders):
            return ViewLayout(num_tokens=5, grid=(1, 5))

    CONNECTORS.register("lying")(Lying)
    try:
        with pytest.raises(AssertionError, match="check_shapes: forward gives shape"):
            check_connector("lying")
    finally:
        del CONNECTORS._classes["lying"]


def test_a_connector_from_before_there_were_views_keeps_the_contract():
    from mllm.connectors.mlp import MlpConnector
    from mllm.types import ImageLayout

    class Former(MlpConnector):
        @classmethod
        def layout(cls, config, encoders):
            return ImageLayout(num_tokens=6, grid=(2, 3))

        def forward(self, features, routing=None, text=None):
            return MlpConnector.view_tokens(self, features, routing, text)

    CONNECTORS.register("former")(Former)
    try:
        assert len(check_connector("former")) == len(CHECKS)
    finally:
        del CONNECTORS._classes["former"]


def test_a_component_is_found_by_its_name_alone():
    from mllm.testing import find_check

    kind, run = find_check("mlp")
    assert kind == "connector" and len(run()) == len(CHECKS)
    assert find_check("gate")[0] == "router"
    with pytest.raises(UnknownName, match="did you mean 'interleave'"):
        find_check("interleav")
