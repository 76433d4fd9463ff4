"""Is a run that is kept on an object store complete or absent there, and does it come back without its folder?"""

from __future__ import annotations

import json
import shutil

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from safetensors.torch import load_file

from mllm.errors import CheckpointError, ConfigError
from mllm.train import run_recipe
from mllm.train.checkpoint.files import MANIFEST
from mllm.train.checkpoint.mirror import Mirror, NotCopied
from tests.integration.train_helpers import make_recipe, metrics


class Failing(MemoryFileSystem):
    """A store of its own that takes no file whose name ends so."""

    protocol = "failing"
    store: dict = {}
    pseudo_dirs = [""]
    refused: tuple[str, ...] = ()

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.replace("failing://", "memory://"))

    def put_file(self, source, target, **options):
        if target.endswith(self.refused):
            raise PermissionError(f"{target}: not allowed")
        super().put_file(source, target, **options)


@pytest.fixture(autouse=True)
def stores(monkeypatch):
    monkeypatch.setattr("mllm.train.checkpoint.mirror.WAITS", (0,))
    fsspec.register_implementation("failing", Failing, clobber=True)
    for store in (MemoryFileSystem, Failing):
        store.store.clear()
        store.pseudo_dirs[:] = [""]
    yield
    Failing.refused = ()


def _recipe(folder, mirror, **stage):
    settings = {"name": "sft", "steps": 4, "save_every": 1, **stage}
    return make_recipe(folder, stages=[settings], rows=8).model_copy(update={"mirror": mirror})


def test_a_run_goes_on_from_the_store_alone_to_the_same_weights(tmp_path):
    recipe = _recipe(tmp_path, "memory://bucket/run", save_in_background=True)
    whole = run_recipe(recipe.model_copy(update={"mirror": ""}), output=tmp_path / "whole")
    run_recipe(recipe, output=tmp_path / "run", stop_after=3)
    mirror = Mirror("memory://bucket/run")
    assert mirror.checkpoints("sft") == ["step-00000002", "step-00000003"], "as many as on disk, the newest"
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(ConfigError, match="memory://bucket/run already holds a run; go on with --resume"):
        run_recipe(recipe, output=tmp_path / "run")
    again = run_recipe(recipe, output=tmp_path / "run", resume=True)
    wanted, found = (load_file(folder / "model.safetensors") for folder in (whole, again))
    assert all((wanted[name] == found[name]).all() for name in wanted)
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")
    shutil.rmtree(tmp_path / "run")
    back = run_recipe(recipe, output=tmp_path / "run", resume=True)  # the stage is finished: nothing is trained
    assert set(load_file(back / "model.safetensors")) == set(wanted)
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")


def test_a_checkpoint_whose_copy_was_cut_off_is_none(tmp_path, caplog):
    """The store takes no manifest from the third step on, as when the machine dies before it: the second is the newest."""
    recipe = _recipe(tmp_path, "failing://bucket/run")
    run_recipe(recipe, output=tmp_path / "run", stop_after=2)
    Failing.refused = (MANIFEST,)
    run_recipe(recipe, output=tmp_path / "run", stop_after=1, resume=True)
    assert "step-00000003 is on disk and not in the mirror" in caplog.text and "not allowed" in caplog.text
    mirror = Mirror(recipe.mirror)
    assert "step-00000003" in mirror.names("checkpoints/sft") and mirror.checkpoints("sft")[-1] == "step-00000002"
    Failing.refused = ()
    shutil.rmtree(tmp_path / "run")
    run_recipe(recipe, output=tmp_path / "run", resume=True)
    assert [record["step"] for record in metrics(tmp_path / "run")] == [1, 2, 3, 4]
    assert "sft" in mirror.names() and "stage.json" in mirror.names("sft")


def test_a_damaged_copy_and_an_output_on_a_store_are_told(tmp_path):
    recipe = _recipe(tmp_path, "memory://bucket/run")
    with pytest.raises(ConfigError, match=r"goes beside it: mirror=s3://bucket/run"):
        run_recipe(recipe, output="s3://bucket/run")
    run_recipe(recipe, output=tmp_path / "run", stop_after=1)
    mirror = Mirror(recipe.mirror)
    manifest = json.loads((tmp_path / "run/checkpoints/sft/step-00000001" / MANIFEST).read_text())
    mirror._system.rm(mirror._path(f"checkpoints/sft/step-00000001/{next(iter(manifest['files']))}"))
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"mirror: memory://bucket/run/checkpoints/sft/step-00000001"):
        run_recipe(recipe, output=tmp_path / "run", resume=True)
    with pytest.raises(NotCopied):
        mirror.put(tmp_path / "nothing", "x")
