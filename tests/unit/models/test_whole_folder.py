"""Is a checkpoint's folder written whole or not at all, whatever happens on the way?"""

from __future__ import annotations

import errno

import pytest
from safetensors import SafetensorError

from mllm.errors import ConfigError, UnavailableError
from mllm.models.export import export
from mllm.models.whole_folder import whole_folder
from tests.helpers import tiny_model


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("odd"), OSError(errno.EIO, "Input/output error")])
def test_what_is_cut_short_leaves_nothing(tmp_path, error):
    with pytest.raises(type(error)), whole_folder(tmp_path / "deep" / "new") as writing:
        (writing / "config.json").write_text("{}")
        raise error
    assert not list((tmp_path / "deep").iterdir())


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_said_in_one_line(tmp_path, error):
    with pytest.raises(UnavailableError, match="new was not written: No space left"), whole_folder(tmp_path / "new"):
        raise error
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_there_keeps_its_other_files(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    (tmp_path / "code").mkdir()
    with whole_folder(tmp_path) as writing:
        (writing / "code").mkdir()
        (writing / "code" / "a.py").write_text("a")
        (writing / "config.json").write_text("{}")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "code", "config.json"]
    assert (tmp_path / "code" / "a.py").read_text() == "a" and not list(tmp_path.parent.glob(".writing-*"))


def test_a_file_is_no_folder_to_write(tmp_path):
    (tmp_path / "new").write_text("mine")
    with pytest.raises(ConfigError, match="is a file"), whole_folder(tmp_path / "new"):
        pass
    assert (tmp_path / "new").read_text() == "mine"


def test_an_export_that_fails_does_not_stand_in_the_next_ones_way(tmp_path, monkeypatch):
    for part in (parts := tiny_model(tmp_path / "words")):
        part.save_pretrained(tmp_path / "ours")
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="cut"):
        patch.setattr(type(parts[1]), "save_pretrained", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("cut")))
        export(tmp_path / "ours", tmp_path / "made")
    assert not (tmp_path / "made").exists()
    assert (export(tmp_path / "ours", tmp_path / "made") / "config.json").is_file()
