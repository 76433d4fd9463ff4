"""Do the wheel and the source distribution hold what they must, and does what they install work in an environment of its own?"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
COMMON = {"HF_HUB_OFFLINE": "1", "COLUMNS": "160"}
WITHOUT = ("PYTHONPATH", "VIRTUAL_ENV")


def release() -> ModuleType:
    spec = importlib.util.spec_from_file_location("release", ROOT / ".ci/release.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(*command: str | Path, folder: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name not in WITHOUT} | COMMON
    done = subprocess.run(
        [str(word) for word in command], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-1500:]}\n{done.stderr[-3000:]}"
    return done.stdout


def git(folder: Path, *words: str) -> None:
    who = ("-c", "user.name=Nobody", "-c", "user.email=nobody@example.org")
    run("git", *who, *words, folder=folder)


def test_a_release_takes_its_words_from_the_changelog(tmp_path: Path) -> None:
    made = release()
    changelog = "# Changelog\n\n## Unreleased\n\n### Added\n- A thing.\n\n## 0.1.0 (2026-01-01)\n- The first.\n"
    (tmp_path / "CHANGELOG.md").write_text(changelog)
    (tmp_path / "CITATION.cff").write_text("title: x\nversion: 0.1.0\nauthors: []\n")
    assert made.section(changelog, "Unreleased") == "### Added\n- A thing.\n"
    assert made.section(changelog, "0.1.0") == "- The first.\n"
    made.prepare(tmp_path, "0.2.0", "2026-11-29")
    after = (tmp_path / "CHANGELOG.md").read_text()
    assert after.index("## Unreleased") < after.index("## 0.2.0 (2026-11-29)") < after.index("- A thing.")
    assert made.section(after, "0.2.0") == "### Added\n- A thing.\n"
    assert "version: 0.2.0\n" in (tmp_path / "CITATION.cff").read_text()
    with pytest.raises(SystemExit, match="nothing under '## Unreleased'"):
        made.prepare(tmp_path, "0.3.0", "2026-11-30")
    with pytest.raises(SystemExit, match="is no version"):
        made.prepare(tmp_path, "next", "2026-11-30")


@pytest.mark.nightly
@pytest.mark.skipif(shutil.which("uv") is None, reason="asks uv and the package index")
@pytest.mark.parametrize("python", ["3.11.5", "3.12"])
def test_the_constraints_resolve_for_the_extras_they_name_and_no_others(tmp_path: Path, python: str) -> None:
    def resolve(extras: list[str]) -> subprocess.CompletedProcess[str]:
        named = [word for extra in extras for word in ("--extra", extra)]
        command = [
            "uv",
            "pip",
            "compile",
            "--quiet",
            "--python-version",
            python,
            *named,
            "--constraint",
            "constraints.txt",
        ]
        command += ["pyproject.toml", "--output-file", str(tmp_path / "all.txt")]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    covered, not_covered = extras_of_constraints()
    done = resolve(covered)
    assert done.returncode == 0, done.stderr
    for extra in not_covered:
        assert resolve([extra]).returncode != 0, (
            f"{extra} resolves now: name it among those that constraints.txt is for"
        )


def test_every_extra_is_one_that_the_constraints_are_for_or_are_not_for() -> None:
    covered, not_covered = extras_of_constraints()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert sorted(covered + not_covered) == sorted(project["optional-dependencies"])
    makefile = re.search(r"^EXTRAS \?= (\S+)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    assert makefile is not None and set(makefile[1].split(",")) <= set(covered)


def extras_of_constraints() -> tuple[list[str], list[str]]:
    """The extras that constraints.txt says it is for, and is not for."""
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    named = [re.search(rf"^# {words}: ([\w -]+)", text, re.M) for words in ("For the extras", "Not for")]
    assert all(named)
    return named[0][1].split(), named[1][1].split()  # type: ignore[index]


@pytest.mark.nightly
@pytest.mark.skipif(shutil.which("uv") is None, reason="builds with uv")
def test_what_a_tag_builds_installs_and_works_in_a_fresh_environment(tmp_path: Path) -> None:
    made, source = release(), tmp_path / "source"
    run("git", "clone", "--quiet", ROOT, source, folder=tmp_path)
    for path in (".ci/release.py", "pyproject.toml", "mllm/__init__.py", "mllm/install.py"):
        shutil.copy(ROOT / path, source / path)  # as they are now, also before they are committed
    git(source, "add", "-A")
    git(source, "commit", "--quiet", "--allow-empty", "-m", "As it is now")
    git(source, "tag", "v9.8.7")
    wheel, sdist = made.build(source, tmp_path / "dist")
    assert made.version_of(wheel) == "9.8.7" and sdist.name == "mllm_toolkit-9.8.7.tar.gz"
    (source / "README.md").write_text("changed\n")
    git(source, "commit", "--quiet", "-am", "A change after the tag")
    later, _ = made.build(source, tmp_path / "later")
    assert made.version_of(later).startswith("9.8.8.dev1")

    unpacked = tmp_path / "unpacked"
    shutil.unpack_archive(sdist, unpacked)
    again, _ = made.build(unpacked / "mllm_toolkit-9.8.7", tmp_path / "again")
    assert sorted(zipfile.ZipFile(again).namelist()) == sorted(zipfile.ZipFile(wheel).namelist())

    python = tmp_path / "venv/bin/python"
    run("uv", "venv", "--quiet", "--python", sys.executable, tmp_path / "venv", folder=tmp_path)
    held = ("--constraint", ROOT / "constraints.txt")
    run("uv", "pip", "install", "--quiet", "--python", python, *held, wheel, folder=tmp_path)
    command = python.with_name("mllm")
    assert run(command, "--version", folder=tmp_path).strip() == "mllm 9.8.7"
    assert "llava_1_5" in run(command, "recipes", "ls", folder=tmp_path)
    assert "chartqa" in run(command, "list", "tasks", folder=tmp_path)
    assert "transformers" in run(command, "doctor", folder=tmp_path)
    code = "import mllm; print(mllm.MllmConfig.__module__, mllm.__version__)"
    assert run(python, "-c", code, folder=tmp_path).split() == ["mllm.models.configuration_mllm", "9.8.7"]
    told = run("uvx", "--quiet", "--python", sys.executable, "--constraints", ROOT / "constraints.txt", "--from", wheel, "mllm", "--help",
               folder=tmp_path)  # fmt: skip
    assert "Multimodal LLMs with pluggable vision encoders" in told
