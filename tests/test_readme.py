"""Does what the README says to type really work?"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*/*.md"))]
MLLM = str(Path(sys.executable).parent / "mllm")


def block(name: str) -> str:
    """The block under ``<!-- test: name -->`` in the README or on a page of docs/."""
    mark = re.compile(rf"<!-- test: {name} -->\n```\w+\n(.*?)```", re.DOTALL)
    found = [text for page in PAGES for text in mark.findall(page.read_text(encoding="utf-8"))]
    assert len(found) == 1, f"{len(found)} blocks are called {name}"
    return found[0]


def run(command: list[str], folder: Path, *, timeout: int = 400) -> str:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "160"}
    result = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=timeout, check=False
    )
    assert result.returncode == 0, f"{command}\n{result.stdout[-2000:]}\n{result.stderr[-4000:]}"
    return result.stdout


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the demo has run, with two steps a stage."""
    folder = tmp_path_factory.mktemp("readme")
    steps = ["stages.pretrain.steps=2", "stages.sft.steps=2"]
    out = run([MLLM, "demo", "--charts", "80", "--limit", "12", *steps], folder)
    assert (
        "without the right picture at most" in out
        and (folder / "runs/demo/report.json").is_file()
        and (folder / "runs/demo/demo.html").is_file()
    )
    return folder


@pytest.mark.slow
@pytest.mark.xdist_group("readme")
def test_the_python_example_runs(place: Path) -> None:
    out = run([sys.executable, "-c", block("python")], place)
    assert out.strip() or out == "\n"


@pytest.mark.slow
@pytest.mark.xdist_group("readme")
def test_the_commands_run(place: Path) -> None:
    from tests.integration.test_convert import llava

    llava("small", place / "llava-1.5-7b-hf")
    commands = [shlex.split(line, comments=True) for line in block("commands").splitlines()]
    assert len(commands) == 9 and all(command[0] == "mllm" for command in commands)
    for command in commands:
        extra = {"train": ["--no-evaluate"], "eval": ["--limit", "4"]}.get(command[1], [])
        out = run([MLLM, *command[1:], *extra], place)
        if command[1:3] == ["recipes", "cp"]:
            recipe = yaml.safe_load((place / "my.yaml").read_text())
            for stage in recipe["stages"]:
                stage["steps"] = 1
            (place / "my.yaml").write_text(yaml.safe_dump(recipe))
            assert "mllm train my.yaml" in out
    assert (place / "runs/my/final/model.safetensors").is_file() and (place / "ours/config.json").is_file()


def test_import_and_help_load_no_torch() -> None:
    code = "import sys, mllm, mllm.cli.main; sys.exit(any(m in sys.modules for m in ('torch', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
