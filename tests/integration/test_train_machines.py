"""Do several machines train one model? Here they are several launchers on one machine's loopback address."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from mllm.errors import CheckpointError, ConfigError
from mllm.recipe import Recipe
from mllm.train import run_recipe
from mllm.visual_tokenizers.diffusion.library import diffusers_class
from tests.helpers import free_port
from tests.integration.train_helpers import ROOT, logged_steps, make_recipe, on_machines
from tests.unit.visual_tokenizers.diffusion_configs import DECODERS
from tests.unit.visual_tokenizers.test_tokenizer_training import FULL, TOKENFLOW

CALM = {"optimizer": {"eps": 1e-5}, "dtype": "float32"}


def _recipe(folder: Path, **stage) -> Recipe:
    recipe = make_recipe(folder, stages=[{"name": "sft", "steps": 3, "batch_size": 1, **CALM, **stage}])
    recipe.model.language_model.config["attention_dropout"] = 0.0
    return recipe


def test_two_launchers_train_what_two_processes_do_and_refuse_unlike_recipes(tmp_path):
    """Each in a folder of its own, which keeps its own share of a checkpoint: a resume needs both."""
    recipe = _recipe(tmp_path)
    recipe.stages.append(recipe.stages[0].model_copy(update={"name": "second", "engine": "zero2", "steps": 2}))
    own = tmp_path / "own-0", tmp_path / "own-1"  # as a disk that each machine has under the same name
    assert on_machines([recipe] * 2, *own, stop_after=4) == [None, None]
    checkpoints = [folder / "checkpoints" / "second" / "step-00000001" for folder in own]
    first, second = ({path.name for path in folder.glob("state-*")} for folder in checkpoints)
    assert first == {"state-00000-0000.safetensors"} and second == {"state-00001-0000.safetensors"}
    lost = (checkpoints[1] / "state-00001-0000.safetensors").rename(tmp_path / "lost")
    for error in on_machines([recipe] * 2, *own, resume=True):
        assert isinstance(error, CheckpointError) and "\n" not in str(error)
        assert "step-00000001: state-00001-0000.safetensors, which machine 1 (" in str(error)
        assert "is whole on none of these machines" in str(error)
    with pytest.raises(CheckpointError, match=r"state-00001\S+ is missing \(machine 1 \(.*wrote it"):
        run_recipe(recipe, output=own[0], resume=True)
    lost.rename(checkpoints[1] / "state-00001-0000.safetensors")
    assert on_machines([recipe] * 2, *own, resume=True) == [None, None]
    assert [path.name for path in own[1].iterdir() if path.name.startswith(".")] == []

    run_recipe(recipe, output=tmp_path / "one", processes=2)
    for stage in ("sft", "second", "final"):
        wanted, found, there = (load_file(folder / stage / "model.safetensors") for folder in (tmp_path / "one", *own))
        assert set(wanted) == set(found)
        assert max((wanted[name] - found[name]).abs().max().item() for name in wanted) < 1e-6
        assert all(found[name].equal(there[name]) for name in found)

    ended = on_machines([_recipe(tmp_path), _recipe(tmp_path, gradient_accumulation=3)], tmp_path / "unlike")
    assert all(isinstance(error, ConfigError) for error in ended), ended
    for error in ended:
        assert "the recipe of machine 1" in str(error) and "\n" not in str(error)
        assert "gradient_accumulation: 1 on machine 0" in str(error) and "3 on machine 1" in str(error)
    assert not (tmp_path / "unlike" / "run.json").exists()


@pytest.mark.nightly
def test_tokenizer_and_decoder_learn_in_folders_of_each_machines_own(tmp_path):
    """What one process writes for all (the teacher, a finished tokenizer) comes to the other machine; then one machine goes on alone."""
    common: dict[str, Any] = {
        "batch_size": 2, "dtype": "float32", "log_every": 1, "save_every": 1, "steps": 2, "schedule": {"type": "constant", "warmup": 0.0},
        "data": {"type": "digits_and_charts", "options": {"charts": 20, "digits": False}},
    }  # fmt: skip
    first = {"name": "tokenizer", "kind": "tokenizer", "learn": {"visual_tokenizer": 1e-3}, "options": FULL, **common}
    options = {"decoder": {"steps": 2, **DECODERS["unet"]}, "evaluate_images": 4}
    second = {
        "name": "decoder",
        "kind": "diffusion",
        "learn": {"diffusion_decoder": 1e-3},
        "options": options,
        **common,
    }
    model = {"visual_tokenizer": TOKENFLOW}
    recipe = Recipe.model_validate({"name": "own", "output": "own", "model": model, "stages": [first, second]})
    own = tmp_path / "own-0", tmp_path / "own-1"
    diffusers_class("UNet2DModel")  # two threads at once must not be the first to import it
    assert on_machines([recipe] * 2, *own, stop_after=3) == [None, None]
    assert (own[0] / "teacher.safetensors").read_bytes() == (own[1] / "teacher.safetensors").read_bytes()
    checkpoints = [folder / "checkpoints" / "decoder" / "step-00000001" for folder in own]
    with pytest.raises(CheckpointError, match=r"00001\S+ is missing \(machine 1 \(.*wrote it"):
        run_recipe(recipe, output=own[0], resume=True)
    for path in checkpoints[1].glob("*-00001*"):
        shutil.copy(path, checkpoints[0])
    final = run_recipe(recipe, output=own[0], resume=True)
    tokenizers = [load_file(folder / "tokenizer" / "model.safetensors") for folder in own]
    assert all(tokenizers[0][name].equal(tokenizers[1][name]) for name in tokenizers[0])
    assert (final / "evaluation.json").is_file() and len(_losses(own[0])) == 4


@pytest.mark.nightly
def test_a_machine_whose_disk_is_new_gets_all_from_the_mirror(tmp_path):
    """Two commands with two processes each and a folder each; the second machine's is gone when they go on."""
    port = ("--processes", "2", "--nodes", "2", "--rendezvous", f"127.0.0.1:{free_port()}")
    options = (
        *port,
        f"mirror={(tmp_path / 'store').as_uri()}",
        "stages.sft.keep_state=true",
        "stages.sft.engine=zero3",
    )
    for more in (("stages.sft.steps=4",), ("stages.sft.steps=6", "--extend")):
        commands = [_command(tmp_path, f"own-{k}", *options, *more, "--node-rank", str(k)) for k in range(2)]
        for command in commands:
            said = command.communicate(timeout=240)[0]
            assert command.returncode == 0, said
        if "--extend" not in more:
            shutil.rmtree(tmp_path / "own-1")
    assert len(_losses(tmp_path / "own-0")) == 6
    assert {path.name for path in (tmp_path / "own-1").iterdir()} >= {"sft", "final"}


def _command(folder: Path, output: str, *options: str, environment: dict[str, str] | None = None, before: tuple = ()):
    recipe = folder / "recipe.json"
    if not recipe.is_file():
        stage = {"batch_size": 1, "steps": 40, "save_every": 2, "gradient_accumulation": 2}
        recipe.write_text(_recipe(folder, **stage).model_dump_json(), encoding="utf-8")
    around = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        [*(before or (sys.executable, "-m", "mllm.cli.main")), "train", str(recipe), "--output", str(folder / output), *options],
        env=around | (environment or {}), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        cwd=folder,
    )  # fmt: skip


def _errors(said: str) -> list[str]:
    return [line for line in said.splitlines() if line.startswith("error: ")]


def _losses(output: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.nightly
def test_a_lost_machine_ends_the_run_with_one_line_and_fewer_go_on(tmp_path):
    """Two commands with two processes each; one machine is cut off as a pulled plug would."""
    line = ("--processes", "2", "--nodes", "2", "--rendezvous", f"127.0.0.1:{free_port()}")
    commands = [_command(tmp_path, "run", *line, "--node-rank", str(rank)) for rank in range(2)]
    checkpoints = tmp_path / "run" / "checkpoints" / "sft"
    end = time.monotonic() + 240
    while not list(checkpoints.glob("step-*")):
        assert all(command.poll() is None for command in commands) and time.monotonic() < end
        time.sleep(0.05)
    os.killpg(commands[1].pid, signal.SIGKILL)
    said = commands[0].communicate(timeout=120)[0]
    commands[1].communicate(timeout=30)
    assert commands[0].returncode == 2, said
    assert len(_errors(said)) == 1 and "machine 1 (" in _errors(said)[0] and "is lost" in _errors(said)[0], said
    assert "Traceback" not in said
    done = len(_losses(tmp_path / "run"))
    again = _command(tmp_path, "run", "--processes", "2", "--resume")
    said = again.communicate(timeout=240)[0]
    assert again.returncode == 0 and "started with 4 processes, now 2" in said, said
    assert (tmp_path / "run" / "final" / "model.safetensors").is_file() and len(_losses(tmp_path / "run")) > done


@pytest.mark.nightly
@pytest.mark.parametrize("launcher", ["slurm", "deepspeed", "hostfile"])
def test_other_launchers_start_the_same_command(tmp_path, launcher):
    hosts = tmp_path / "hosts"
    hosts.write_text("127.0.0.1 slots=1\nlocalhost slots=1\n" if launcher == "hostfile" else "localhost slots=2\n")
    if launcher == "slurm":
        step = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_STEP_NODELIST": "localhost,other",
                "SLURM_LOCALID": "0", "SLURM_JOB_ID": str(free_port())}  # fmt: skip
        places = [{**step, "SLURM_PROCID": str(rank), "SLURM_NODEID": str(rank)} for rank in range(2)]
        commands = [_command(tmp_path, "run", "stages.sft.steps=4", environment=place) for place in places]
    elif launcher == "hostfile":
        common = ("stages.sft.steps=4", "--hostfile", str(hosts), "--rendezvous", f"127.0.0.1:{free_port()}")
        commands = [_command(tmp_path, "run", *common, "--node-rank", str(rank)) for rank in range(2)]
    else:
        tool = str(Path(sys.executable).parent / "deepspeed")
        before = (
            tool,
            "--num_gpus",
            "2",
            "--hostfile",
            "/nowhere",
            "--master_port",
            str(free_port()),
            "--module",
            "mllm.cli.main",
        )
        settings = {"DS_ACCELERATOR": "cpu", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        commands = [_command(tmp_path, "run", "stages.sft.steps=4", environment=settings, before=before)]
    for command in commands:
        said = command.communicate(timeout=240)[0]
        assert command.returncode == 0, said[-3000:]
    started = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))["starts"]
    assert [start["processes"] for start in started] == [2] and len(_losses(tmp_path / "run")) == 4


@pytest.mark.nightly
@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("ip") is None, reason="network namespaces are root's")
def test_machines_with_a_network_of_their_own_meet_though_their_names_lead_nowhere(tmp_path):
    """Two network namespaces joined by a cable, which is drawn for a while in the middle of the run; the machine's own name means
    127.0.0.1 in both, as in many containers."""
    names = [f"mllm-{os.getpid()}-{k}" for k in range(2)]
    cable = [f"mllm{os.getpid() % 10**6}{k}" for k in "ab"]
    try:
        for name in names:
            if subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode:
                pytest.skip("no network namespaces here")
        link = ["ip", "link", "add", cable[0], "netns", names[0], "type", "veth", "peer", cable[1], "netns", names[1]]
        subprocess.run(link, check=True)
        for k, name in enumerate(names):
            for words in (f"addr add 10.211.7.{k + 1}/30 dev {cable[k]}", f"link set {cable[k]} up", "link set lo up"):
                subprocess.run(["ip", "-n", name, *words.split()], check=True)
        python = (sys.executable, "-m", "mllm.cli.main")
        steps = 200
        options = (f"stages.sft.steps={steps}", "--nodes", "2", "--rendezvous", "10.211.7.1:29500")
        commands = [
            _command(
                tmp_path, f"own-{k}", *options, "--node-rank", str(k), before=("ip", "netns", "exec", name, *python)
            )
            for k, name in enumerate(names)
        ]
        end = time.monotonic() + 240
        while logged_steps(tmp_path / "own-0") < 3:
            assert all(command.poll() is None for command in commands) and time.monotonic() < end
            time.sleep(0.05)
        done = list[int]()
        for state, seconds in (("down", 20.0), ("up", 0.0)):
            subprocess.run(["ip", "-n", names[0], "link", "set", cable[0], state], check=True)
            time.sleep(seconds and 2.0)  # what was under way
            done.append(logged_steps(tmp_path / "own-0"))
            time.sleep(seconds)
        assert done[0] == done[1] < steps, "the cable was drawn from a run that was over, or did not need it"
        for command in commands:
            said = command.communicate(timeout=240)[0]
            assert command.returncode == 0, said[-3000:]
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)
    assert len(_losses(tmp_path / "own-0")) == steps
