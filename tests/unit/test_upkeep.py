"""Do the examples, the hooks, the pinned packages and the templates agree with the rest of the repository?"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from mllm.serve.supervisor import ENDING, LEAVING
from tests.unit.test_docs import parse

ENDS = ENDING + LEAVING
"""Seconds that a server needs at most after ``--shutdown-timeout``."""
ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_the_hooks_before_a_commit_are_what_ci_lints_with() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"][0]["hooks"]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    linted = re.search(r"^lint: setup\n((?:\t.+\n)+)", makefile, re.M)
    assert linted is not None
    steps = [line.strip().replace("$(BIN)", ".venv/bin").removesuffix(" .") for line in linted[1].splitlines()]
    assert [hook["entry"] for hook in hooks] == steps
    assert "make test" in (ROOT / ".ci/run").read_text(encoding="utf-8") and "test: lint" in makefile


def test_what_builds_the_documentation_is_pinned() -> None:
    pinned = {line.split("==")[0] for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()}
    for requirement in PROJECT["optional-dependencies"]["docs"]:
        name = re.split(r"[\[>=]", requirement)[0]
        assert name in pinned and f"'{requirement}'" in (ROOT / "Makefile").read_text(encoding="utf-8")


def test_what_many_processes_import_is_compiled_once(tmp_path: Path) -> None:
    """Without bytecode each process that imports the trainer compiles for 8 s, and each that imports vLLM for 16 s."""
    for target in ("test", "test-all"):
        said = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        (line,) = [line for line in said.splitlines() if ".venv/bin/pytest" in line]
        settings = dict(word.split("=", 1) for word in shlex.split(line.partition(".venv/bin/pytest")[0]))
        kept = Path(settings["PYTHONPYCACHEPREFIX"])
        assert kept.is_absolute() and ".venv" in kept.parts, "not among the sources"
        (tmp_path / "small.py").write_text("")
        never = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}  # as images of Python often say
        here = {**never, **settings, "PYTHONPYCACHEPREFIX": str(tmp_path / target)}
        subprocess.run([sys.executable, "-c", "import small"], cwd=tmp_path, env=here, check=True)
        assert list((tmp_path / target).rglob("small.*.pyc"))


def test_what_is_forced_on_everybody_is_what_is_tested_together() -> None:
    forced = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["uv"]["override-dependencies"]
    held = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert set(forced) <= set(held) and any(line.startswith("torchvision==") for line in forced)


def test_the_examples_say_commands_that_can_be_typed() -> None:
    server, service = yaml.safe_load_all((ROOT / "examples/kubernetes.yaml").read_text(encoding="utf-8"))
    pod = server["spec"]["template"]["spec"]
    name, values = parse(pod["containers"][0]["args"])
    pause = int(pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][1])
    assert name == "serve" and pod["terminationGracePeriodSeconds"] > pause + values["shutdown_timeout"] + ENDS
    probes = [pod["containers"][0][f"{kind}Probe"]["httpGet"] for kind in ("startup", "readiness", "liveness")]
    assert {probe["path"] for probe in probes} == {"/health", "/ping"}
    (opened,), (sent,) = pod["containers"][0]["ports"], service["spec"]["ports"]
    assert {values["port"], opened["containerPort"], sent["targetPort"], *(probe["port"] for probe in probes)} == {8000}
    labels = server["spec"]["template"]["metadata"]["labels"]
    assert labels.items() >= service["spec"]["selector"].items() and labels == server["spec"]["selector"]["matchLabels"]
    assert {one["name"] for one in pod["containers"][0]["volumeMounts"]} == {one["name"] for one in pod["volumes"]}

    unit = (ROOT / "examples/mllm.service").read_text(encoding="utf-8")
    command = re.search(r"^ExecStart=\S+/mllm (.*)$", unit, re.M)
    assert command is not None
    name, values = parse(command[1].split())
    assert name == "serve" and int(re.findall(r"TimeoutStopSec=(\d+)", unit)[0]) > values["shutdown_timeout"] + ENDS
    if shutil.which("systemd-analyze"):
        told = subprocess.run(
            ["systemd-analyze", "verify", str(ROOT / "examples/mllm.service")],
            capture_output=True,
            text=True,
            check=False,
        )
        wrong = [
            line for line in told.stderr.splitlines() if "mllm.service" in line and "is not executable" not in line
        ]
        assert not wrong, wrong

    services = yaml.safe_load((ROOT / "examples/compose.yaml").read_text(encoding="utf-8"))["services"]
    assert [parse(service["command"])[0] for service in services.values()] == ["serve", "app"]
    probe = pod["containers"][0]["startupProbe"]
    started = int(services["server"]["healthcheck"]["start_period"].removesuffix("s"))
    assert started == probe["periodSeconds"] * probe["failureThreshold"], "a large model loads as long in both"
    port = parse(services["server"]["command"])[1]["port"]
    (published,), (page,) = services["server"]["ports"], services["page"]["ports"]
    assert published.endswith(f":{port}") and f":{port}/health" in services["server"]["healthcheck"]["test"][-1]
    asked = parse(services["page"]["command"])[1]
    assert asked["server"] == f"http://server:{port}" and page.endswith(f":{asked['port']}")
    grace = int(services["server"]["stop_grace_period"].removesuffix("s"))
    assert grace > parse(services["server"]["command"])[1]["shutdown_timeout"] + ENDS

    docker = (ROOT / "examples/Dockerfile").read_text(encoding="utf-8")
    for extras in re.findall(r"EXTRAS=([\w,-]+)", docker):
        assert set(extras.split(",")) <= set(PROJECT["optional-dependencies"]), extras
    copied = {
        path.removeprefix("./") for line in re.findall(r"^COPY ((?:\S+ )+)", docker, re.M) for path in line.split()
    }
    taken = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["hatch"]["build"]["targets"][
        "wheel"
    ]
    needed = {PROJECT["readme"], "LICENSE", "pyproject.toml", *taken["packages"], *taken["force-include"]}
    assert needed == copied, "what is copied into the image is what its wheel is built from"
    assert "--compile-bytecode" in docker, "USER cannot write it"
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert "*" in ignored and {line[1:] for line in ignored if line.startswith("!")} == copied
    (typed,) = re.findall(r"^#   docker run (.*) mllm (serve .*)$", docker, re.M)
    name, values = parse(typed[1].split())
    (exposed,) = re.findall(r"^EXPOSE (\d+)$", docker, re.M)
    assert f"-p 8000:{values['port']} " in typed[0] and int(exposed) == values["port"] and "--shm-size" in typed[0]

    batch = (ROOT / "examples/slurm.sbatch").read_text(encoding="utf-8")
    assert subprocess.run(["bash", "-n", str(ROOT / "examples/slurm.sbatch")], check=False).returncode == 0
    started = re.search(r"-m mllm\.cli\.main (.*)$", re.sub(r"\\\n\s*", " ", batch), re.M)
    assert started is not None
    name, values = parse(shlex.split(started[1].replace("$resume", "--resume").replace("$recipe", "demo")))
    assert name == "train" and values["resume"] and str(values["output"]) == "$output"

    container = json.loads((ROOT / ".devcontainer/devcontainer.json").read_text(encoding="utf-8"))
    target = container["postCreateCommand"].removeprefix("make ")
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M), container[
        "postCreateCommand"
    ]
    forms = [
        yaml.safe_load(path.read_text(encoding="utf-8")) for path in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml")
    ]
    assert sum("body" in form for form in forms) >= 2


def test_both_ends_of_each_range_are_named() -> None:
    told = subprocess.run(
        [sys.executable, str(ROOT / ".ci/bounds.py"), "--list"], capture_output=True, text=True, check=True, timeout=60
    ).stdout.split()
    for name in ("torch", "transformers", "vllm", "peft", "trl"):
        lowest, newest = [line for line in told if re.split(r"[=<>]", line)[0] == name]
        assert "==" in lowest and ">=" in newest


@pytest.fixture(scope="module")
def made_once() -> object:
    return object()


def _groups(request: pytest.FixtureRequest) -> list[str]:
    return [mark.args[0] for mark in request.node.iter_markers("xdist_group")]


def test_tests_that_share_what_their_module_made_go_to_one_worker(
    request: pytest.FixtureRequest, made_once: object
) -> None:
    """A fixture that trains for two minutes did so on both workers."""
    assert _groups(request) == ["tests/unit/test_upkeep.py"]


def test_tests_that_share_nothing_go_to_whichever_worker_is_free(request: pytest.FixtureRequest) -> None:
    assert _groups(request) == []
