"""Does every registered head keep the contract, and refuse what does not fit in words that help?"""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from mllm.cli.main import app
from mllm.errors import ConfigError, UnknownName
from mllm.heads import HEADS
from mllm.heads.base import HeadParts
from mllm.heads.build import head_config, head_configs, resolved_heads
from mllm.testing.heads import CHECKS, check_head

PLUGIN = '''
import torch
from torch import nn
from mllm.heads import HEADS
from mllm.heads.base import Head, HeadConfig, HeadLoss, HeadParts, Step


class CountConfig(HeadConfig):
    type: str = "{name}"


@HEADS.register("{name}")
class CountHead(Head):
    """How many things are there? Read off the last hidden state."""

    Config = CountConfig
    targets = ("target_counts",)

    def __init__(self, config, parts):
        super().__init__(config, parts)
        self.out = nn.Linear(parts.width, 1)

    @classmethod
    def tiny(cls):
        return {{"type": "{name}"}}, HeadParts(8)

    def example(self, parts, batch):
        ids = torch.arange(4).repeat(batch, 1)
        return Step(ids, ids.clone()), {{"target_counts": torch.ones(batch)}}

    def losses(self, model, step, laid, reading):
        loss = (self.out(reading.hidden[:, -1])[:, 0].float() - laid["target_counts"]).square().mean()
        return HeadLoss(loss, {{"square": {reported}}})
'''


def test_there_are_heads_to_test():
    assert len(HEADS) >= 4


@pytest.mark.parametrize("name", list(HEADS))
def test_every_head_keeps_the_contract(name):
    assert len(check_head(name)) == len(CHECKS)


@pytest.mark.parametrize(
    ("reported", "code", "words"), [("loss.detach()", 0, "keeps the contract"), ("loss", 1, "detach")]
)
def test_a_plug_in_head_is_checked_by_its_name(reported, code, words, tmp_path: Path, monkeypatch):
    monkeypatch.delenv("MLLM_PLUGINS", raising=False)
    name = f"count-{code}"
    (tmp_path / f"count_{code}.py").write_text(PLUGIN.format(name=name, reported=reported))
    result = CliRunner().invoke(app, ["check", name, "--kind", "head", "--plugin", str(tmp_path / f"count_{code}.py")])
    assert (result.exit_code != 0) == bool(code), result.output
    assert words in (result.output if code == 0 else str(result.exception))


def test_a_spec_without_a_type_an_unknown_type_and_an_unknown_key_are_told():
    with pytest.raises(ConfigError, match=r"heads: expected a mapping with type"):
        head_config({"text_dropout": 0.1})
    with pytest.raises(UnknownName, match="did you mean 'separate'"):
        head_config({"type": "seperate"})
    with pytest.raises(ConfigError, match=r"heads\.draw\.text_dropuot"):
        head_configs({"draw": {"type": "separate", "text_dropuot": 0.1}})


def test_two_heads_that_draw_and_one_without_a_tokenizer_are_told():
    with pytest.raises(ConfigError, match="a and b both draw"):
        head_configs({"a": {"type": "separate"}, "b": {"type": "vocabulary"}})
    with pytest.raises(
        ConfigError, match=r"model\.heads\.draw: a separate head draws, but there is no model\.visual_tokenizer"
    ):
        resolved_heads({"draw": {"type": "separate"}}, HeadParts(8), id_of=None, first_free=5, null=0)
