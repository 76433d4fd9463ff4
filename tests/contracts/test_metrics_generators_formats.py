"""Do our own metrics, generators and dataset formats keep the contract that `mllm check` asks of a plug-in's?"""

from __future__ import annotations

import pytest

from mllm.data.spec import SOURCES
from mllm.errors import ConfigError, MllmError
from mllm.eval.generators import GENERATORS
from mllm.eval.metrics import METRICS, Metric, Score
from mllm.testing import find_check
from mllm.testing.formats import check_format
from mllm.testing.generators import check_generator
from mllm.testing.metrics import check_metric
from tests.helpers import tiny_model

OURS = [name for name in METRICS if METRICS.where(name).startswith("mllm.")]


@pytest.mark.parametrize("name", OURS)
def test_metric(name):
    check_metric(name)


@pytest.mark.parametrize("name", ["llava", "sharegpt", "messages", "columns"])
def test_format(name):
    check_format(name)


def test_a_format_without_an_example_says_what_to_write():
    with pytest.raises(ConfigError, match=r"tiny\(folder\)"):
        check_format("routing_labels")


def test_hf_generator(tmp_path):
    model, processor = tiny_model(tmp_path / "tokenizer")
    for part in (model, processor):
        part.save_pretrained(tmp_path / "ckpt")
    assert len(check_generator("hf", str(tmp_path / "ckpt"))) == 5


def test_a_generator_without_a_model_says_what_to_type():
    with pytest.raises(ConfigError, match="--checkpoint"):
        check_generator("hf")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"protocol": ""}, "check_words: protocol"),
        ({"score": lambda self, p, t, m: Score(float("nan"))}, "check_odd_replies: .*scored nan"),
        ({"score": lambda self, p, t, m: Score(0.5)}, "check_odd_replies: binary is set"),
        (
            {"score": lambda self, p, t, m: Score(float(p.encode() == t.encode()))},
            "check_odd_replies: .*raises UnicodeEncodeError",
        ),
        (
            {"score": lambda self, p, t, m: Score(float(sum(1 for i in range(len(p)) for j in range(3 * i)) < 0))},
            "check_time: a reply of 10,000 characters .* time must grow with the length",
        ),
        ({"aggregate": lambda self, items: {"mean": 0.0}}, "check_aggregate: aggregate gives"),
    ],
)
def test_a_broken_metric_is_found(monkeypatch, change, words):
    body = {"protocol": "Ours.", "score": lambda self, p, t, m: Score(float(p == t)), **change}
    monkeypatch.setitem(METRICS._classes, "broken", type("Broken", (Metric,), {"name": "broken", **body}))
    with pytest.raises(AssertionError, match=words):
        check_metric("broken")


def test_a_broken_generator_is_found(monkeypatch):
    class Silent:
        name = "silent"
        tiny = classmethod(lambda cls: cls())
        open = classmethod(lambda cls, checkpoint, settings: cls())
        fingerprint = lambda self: "1"  # noqa: E731
        generate = lambda self, requests: iter(())  # noqa: E731

    monkeypatch.setitem(GENERATORS._classes, "silent", Silent)
    with pytest.raises(AssertionError, match="check_every_request_once"):
        check_generator("silent")


def test_kinds_are_told_apart():
    assert find_check("hf")[0] == "encoder" and find_check("hf", kind="generator")[0] == "generator"
    assert (
        find_check("vqa_official")[0] == "metric"
        and find_check("llava")[0] == "format"
        and find_check("vq")[0] == "visual-tokenizer"
    )
    with pytest.raises(MllmError, match="kind of component 'metrics', did you mean 'metric'"):
        find_check("letter", kind="metrics")
    assert "columns" in SOURCES
