"""Is it said what would go to the hub, and is nothing written or sent by that?"""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save

from mllm.cli.main import app
from mllm.errors import ConfigError
from mllm.models.card import _joining, planned


def test_what_would_be_sent_is_told_and_nothing_is_written(tmp_path, capsys):
    (tmp_path / "config.json").write_text(
        json.dumps(
            {"model_type": "mllm", "encoders": {"eye": {"type": "hf", "weights": {"source": "a/b", "licence": "mit"}}}}
        )
    )
    (tmp_path / "model.safetensors").write_bytes(save({"weight": torch.zeros(300)}))
    (tmp_path / "code").mkdir()
    for name in ("code/part.py", "code/part.pyc", ".secret"):
        (tmp_path / name).write_text("x")
    before = sorted(path.name for path in tmp_path.rglob("*"))
    upload = planned(tmp_path, "me/it")
    sizes = dict(upload.files)
    assert list(sizes) == ["README.md", "code/part.py", "config.json", "model.safetensors"] and upload.writes_card
    assert sizes["model.safetensors"] == (tmp_path / "model.safetensors").stat().st_size
    assert ("encoder eye", "a/b", "mit", "not known") in upload.licences
    app(["push", str(tmp_path), "me/it", "--dry-run"], standalone_mode=False)
    said = capsys.readouterr().out
    assert "1.3 kB  model.safetensors" in said and "encoder eye: a/b; licence mit" in said
    assert "nothing was sent: 4 files" in said and "pyc" not in said
    assert sorted(path.name for path in tmp_path.rglob("*")) == before
    with pytest.raises(ConfigError, match="expected owner/name"):
        planned(tmp_path, "it")


def test_a_card_of_parts_says_which_weights_only_their_maker_has(tmp_path):
    """It said that opening fetches them, of a file on the maker's disk."""
    gguf = tmp_path / "model.gguf"
    gguf.touch()
    published = {"source": "package:tiny", "revision": None, "tensors": {}}
    text = _joining(
        "me/parts", {"language_model": published | {"source": str(gguf)}, "encoders": {"objects": published}}
    )
    assert f"`{gguf}` (language model): a place on the machine that wrote this" in text and "left_out.json" in text
    text = _joining(
        "me/parts", {"language_model": published | {"source": "owner/model"}, "encoders": {"objects": published}}
    )
    assert "a place on the machine" not in text
