"""Does a checkpoint trained with a recipe's plug-ins reopen everywhere, and never run its code unasked?"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import yaml

from mllm.config import to_plain
from mllm.recipe import load_recipe
from mllm.train.run import run_recipe
from tests.helpers import picture
from tests.integration.train_helpers import make_recipe
from tests.test_readme import block

ROOT = Path(__file__).resolve().parents[2]
FILES = {"my_encoder.py": "plugin", "my_routing.py": "plugin-routing", "my_rules.py": "plugin-rules"}
TASK = {
    "name": "tiny", "version": 1, "description": "One picture.", "prompt": "{{ question }}", "metrics": ["first_word"],
    "sources": [{
        "name": "s", "format": "jsonl", "files": ["rows.jsonl"],
        "columns": {"question": "question", "answers": "answers", "images": "image"},
    }],
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the README's plug-ins beside a recipe that uses them, trained for one step, and a task."""
    folder = tmp_path_factory.mktemp("plugins")
    for name, example in FILES.items():
        (folder / name).write_text(block(example))
    picture(1).save(folder / "0.png")
    pairs = [{"picture": "0.png", "q": "Is it red?", "a": "yes"}] * 4
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    rows = [{"question": "Is it red?", "answers": ["yes"], "image": "0.png"}] * 2
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "tiny.yaml").write_text(yaml.safe_dump({**TASK, "data_dir": str(folder)}))
    colours = {"base": {"type": "mean-colour"}, "detail": {"type": "mean-colour", "cells": 4}}
    learn = {"encoders.base": 1e-3, "connector": 1e-3, "router": 1e-3}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        plain = to_plain(make_recipe(folder))
        plain["plugins"] = list(FILES)
        plain["model"] |= {
            "encoders": colours, "connector": {"type": "sum"}, "router": {"type": "linear", "experts": ["detail"]},
        }  # fmt: skip
        plain["stages"][0] |= {
            "steps": 1, "learn": learn, "data": {"format": "pairs", "path": str(folder / "pairs.jsonl")},
        }  # fmt: skip
        (folder / "recipe.yaml").write_text(yaml.safe_dump(plain))
        patch.chdir(ROOT)  # plug-ins lie beside the recipe, not in the working directory
        run_recipe(load_recipe(str(folder / "recipe.yaml")))
    return folder


def python(place: Path, code: str, **environment: str) -> str:
    """What a fresh process prints: this one has long known the plug-ins."""
    start = f"""
        import contextlib, io, sys
        sys.path.insert(0, {str(ROOT)!r})
        from mllm.cli.main import app
        from mllm.errors import CheckpointError, ConfigError
        place, ckpt = {str(place)!r}, {str(place / "run" / "final")!r}
        def mllm(*words):
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                app([*words], standalone_mode=False)
            return out.getvalue()
        def refused(call, *words):
            try:
                call()
            except CheckpointError as error:
                text = str(error)
                missing = [word for word in words if word not in text]
                assert not missing and "\\n" not in text, (missing, text)
                return
            raise AssertionError("not refused")
    """
    code = textwrap.dedent(start) + textwrap.dedent(code)
    known = {k: v for k, v in os.environ.items() if k not in ("MLLM_PLUGINS", "MLLM_TRUST_CHECKPOINT_PLUGINS")}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=place, env={**known, **environment}, capture_output=True, text=True, timeout=600
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return result.stdout


def test_the_checkpoint_carries_the_code(place: Path) -> None:
    final = place / "run" / "final"
    entries = {entry["file"]: entry for entry in json.loads((final / "config.json").read_text())["plugins"]}
    assert set(entries) == {"my_encoder.py", "my_routing.py"}, "what the model is built from"
    assert entries["my_routing.py"]["provides"] == ["connector 'sum'", "router 'linear'"]
    assert all((final / name).read_text() == (place / name).read_text() for name in FILES), "the recipe's are all there"


@pytest.mark.slow
def test_nothing_runs_unasked_and_everything_runs_when_named(place: Path) -> None:
    """One process: each command refuses; then the files are named and each works."""
    out = python(
        place,
        """
        from transformers import AutoModelForImageTextToText, AutoProcessor
        from mllm.models.chat import ChatSession
        from mllm.serve.server import ServeSettings, plan
        said = ["--plugin", ckpt + "/my_encoder.py", ckpt + "/my_routing.py", "MLLM_TRUST_CHECKPOINT_PLUGINS=1"]
        task = ["--tasks", place + "/tiny.yaml", "--plugin", place + "/my_rules.py"]
        calls = {
            "eval": lambda: mllm("eval", "run", ckpt, *task),
            "chat": lambda: mllm("chat", ckpt, "-i", place + "/0.png", "-q", "red?", "--max-new-tokens", "4"),
            "parity": lambda: mllm("parity", ckpt, "--no-vllm", "--cases", "2", "--tokens", "3"),
            "export": lambda: mllm("export", ckpt, place + "/exported"),
            "serve": lambda: plan(ServeSettings(checkpoint=ckpt)),
            "model": lambda: AutoModelForImageTextToText.from_pretrained(ckpt),
        }
        for name, call in calls.items():
            refused(call, *said)
        print("red", len(calls))
        import mllm as package
        package.use_plugins([place + "/my_encoder.py", place + "/my_routing.py"])
        for name, call in calls.items():
            call()
            print("ok", name)
        processor = AutoProcessor.from_pretrained(ckpt)
        print(mllm("eval", "run", "any", *task, "--generator", "always_yes", "--output", place + "/yes"))
        """,
    )
    assert "red 6" in out and out.count("ok ") == 6
    results = json.loads((place / "yes" / "results.json").read_text())
    assert '"first_word v1"' in json.dumps(results) and "100.0" in json.dumps(results)
    assert (place / "exported" / "my_routing.py").is_file(), "what is saved again carries the code again"


@pytest.mark.slow
def test_trusted_code_runs_and_changed_code_does_not(place: Path) -> None:
    """Trust covers the code that was saved, whose hash config.json holds; child processes are told too."""
    out = python(
        place,
        """
        import os, pathlib, shutil, subprocess
        from mllm.models.modeling_mllm import MllmForConditionalGeneration
        broken = place + "/broken"
        shutil.copytree(ckpt, broken)
        file = pathlib.Path(broken, "my_routing.py")
        file.write_text(file.read_text() + "raise SystemExit('ran')\\n")
        refused(lambda: MllmForConditionalGeneration.from_pretrained(broken), "my_routing.py: was changed since", "--plugin")
        file.unlink()
        refused(lambda: MllmForConditionalGeneration.from_pretrained(broken), "my_routing.py is missing")
        model = MllmForConditionalGeneration.from_pretrained(ckpt)
        print(type(model.model.multi_modal_projector).__name__, type(model.model.vision_tower.router).__name__)
        code = "from mllm.connectors import CONNECTORS; print('child knows', 'sum' in CONNECTORS)"
        print(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout)
        """,
        MLLM_TRUST_CHECKPOINT_PLUGINS="1",
    )
    assert "Sum LinearRouter" in out and "child knows True" in out
