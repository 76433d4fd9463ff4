"""May the users read a checkpoint whom the umask lets read it, and who may not is told so?"""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mllm.cli import arguments
from mllm.errors import CheckpointError
from mllm.modes import by_umask, unreadable
from tests.helpers import tiny_model


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o027])
def test_weights_may_be_read_by_whom_the_umask_lets(tmp_path, umask):
    before = os.umask(umask)
    try:
        save_file({"a": torch.zeros(2)}, tmp_path / "a.safetensors")
        (tmp_path / "config.json").touch()
        by_umask(tmp_path, tmp_path / "not there.safetensors")
    finally:
        os.umask(before)
    assert mode(tmp_path / "a.safetensors") == mode(tmp_path / "config.json") == 0o666 & ~umask


def test_a_model_is_saved_so_that_a_server_of_another_user_can_read_it(tmp_path):
    """A container's user, or systemd's, got "No such file" minutes after the start of a server."""
    model, processor = tiny_model(tmp_path / "made")
    model.save_pretrained(tmp_path / "saved")
    processor.save_pretrained(tmp_path / "saved")
    modes = {path.name: mode(path) for path in (tmp_path / "saved").iterdir() if path.is_file()}
    assert "model.safetensors" in modes and set(modes.values()) == {modes["config.json"]}, modes


def test_weights_that_may_not_be_read_are_named_before_anything_is_loaded(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text("{}")
    save_file({"a": torch.zeros(2)}, tmp_path / "model.safetensors")
    assert unreadable(tmp_path) is None and arguments.checkpoint(str(tmp_path)) == str(tmp_path)
    monkeypatch.setattr("mllm.modes.os.access", lambda path, kind: False)  # root may read everything
    with pytest.raises(CheckpointError, match=r"model\.safetensors belongs to user \d+ \(mode 600\).*chmod a\+r"):
        arguments.checkpoint(str(tmp_path))
