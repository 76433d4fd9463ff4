"""May the users read a checkpoint whom the umask lets read it, and who may not is told so?"""

from __future__ import annotations

import ast
import os
import re
import stat
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mllm.cli import arguments
from mllm.data import lengths
from mllm.errors import CheckpointError
from mllm.modes import by_umask, unreadable, whole_file
from mllm.processing import scene_points
from tests.helpers import ROOT, tiny_model


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


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_a_file_is_whole_or_absent_and_may_be_read_by_whom_the_umask_lets(tmp_path, umask):
    before = os.umask(umask)
    try:
        with whole_file(tmp_path / "a.npy") as file:
            file.write(b"first")
        with pytest.raises(KeyboardInterrupt), whole_file(tmp_path / "a.npy") as file:
            file.write(b"half")
            raise KeyboardInterrupt
    finally:
        os.umask(before)
    assert [path.name for path in tmp_path.iterdir()] == ["a.npy"] and (tmp_path / "a.npy").read_bytes() == b"first"
    assert mode(tmp_path / "a.npy") == 0o666 & ~umask


def test_whatever_leaves_files_to_their_owner_alone_is_followed_by_the_umask():
    """In every module, function by function: what safetensors writes, and files of tempfile that are kept."""
    writes, kept = [], []
    for path in sorted((ROOT / "mllm").rglob("*.py")):
        if path.parent.name == "testing" or path.name == "modes.py":
            continue
        text = path.read_text(encoding="utf-8")
        if not re.search(r"save_file|NamedTemporaryFile|mkstemp|mkdtemp", text):
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                called = {
                    getattr(call.func, "attr", getattr(call.func, "id", ""))
                    for call in ast.walk(node)
                    if isinstance(call, ast.Call)
                }
                writes += [(path.name, node.name, "by_umask" in called)] if "save_file" in called else []
                kept += [(path.name, node.name)] if called & {"NamedTemporaryFile", "mkstemp"} else []
    assert len(writes) >= 8 and not kept, f"{kept}: use mllm.modes.whole_file"
    covered = {("export.py", "save_adapters")}  # its caller does, for the whole folder
    assert {(file, name) for file, name, followed in writes if not followed} == covered


def test_lengths_and_chosen_frames_may_be_read_by_others(tmp_path, monkeypatch):
    monkeypatch.setenv("MLLM_CACHE", str(tmp_path))
    lengths._store(np.zeros(3, np.int32), tmp_path / "lengths" / "a.npy")
    scene_points._remembered("ab" * 16, lambda: (1, 2))
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    (tmp_path / "plain").touch()
    assert len(files) == 2 and {mode(path) for path in files} == {mode(tmp_path / "plain")}


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
