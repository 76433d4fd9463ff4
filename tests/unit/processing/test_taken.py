"""Is a text made longer without waking torch's threads?"""

from __future__ import annotations

import torch

from mllm.processing.layout import taken


def test_each_value_is_taken_as_often_as_asked():
    values = torch.tensor([5, 7, 9, 11])
    repeats = torch.tensor([1, 3, 0, 2])
    got = taken(values, repeats)
    assert got.dtype == values.dtype and torch.equal(got, values.repeat_interleave(repeats))


def test_torch_repeats_nothing_for_a_text(monkeypatch, tmp_path):
    """By torch it costs milliseconds where the cores are held by other work."""
    from mllm.processing.chat import encode_text
    from mllm.types import IMAGE_MARK, Turn
    from tests.helpers import tiny_model

    _, processor = tiny_model(tmp_path)

    def refused(*_args, **_options):
        raise AssertionError("a parallel loop of torch for a few hundred numbers")

    monkeypatch.setattr(torch.Tensor, "repeat_interleave", refused)
    monkeypatch.setattr(torch, "repeat_interleave", refused)
    ids, labels = encode_text(processor, [Turn("user", f"{IMAGE_MARK}\nwhat?"), Turn("assistant", "a cat")])
    assert len(ids) == len(labels)
