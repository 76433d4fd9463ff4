"""Does every command find its arguments wrong at once, without importing torch for it?"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys

import pytest

from mllm.cli import arguments
from mllm.errors import CheckpointError, ConfigError, DataError

NOT_THERE = {  # command line → words of its one error; {d} is an empty folder, {f} an empty file
    "chat {d}/nope": "no such folder",
    "chat {d}": "no config.json",
    "chat nobody/nothing": "HF_HUB_OFFLINE",
    "eval {d}/nope --tasks demo_charts": "no such folder",
    "eval run {d}/nope --tasks demo_charts": "no such folder",
    "eval run {d}/nope --tasks demo_charts --generator hg": "did you mean 'hf'",
    "eval ablate {d}/nope --tasks demo_charts": "no such folder",
    "eval rescore {d}/nope.jsonl": "nope.jsonl",
    "eval report {d}/nope": "nope",
    "eval compare {d}/nope {d}/other": "no such prediction file or folder",
    "eval judge {d}/nope --judge x --base-url http://127.0.0.1:1/v1": "no such file or folder",
    "eval leaderboard {d}/nope {d}/other": "no such folder",
    "eval scores {d}/nope": "no such file or folder",
    "eval export {d}/nope.jsonl {d}/x.tsv --as vlmeval": "did you mean 'vlmevalkit'",
    "eval import {f} --task mmvpp --output {d}/x": "did you mean 'mmvp'",
    "eval attack {d}/nope": "no such folder",
    "encoders probe {d}/nope -e efficientnet-lite0-448": "expected a folder",
    "eval watch {d}/nope --tasks demo_charts": "no such folder",
    "eval sensitivity {d}/nope --tasks demo_charts": "no such folder",
    "eval budgets {d}/nope --tasks demo_charts": "no such folder",
    "eval budgets {c} --tasks demo_charts --tokens 64,x": "--tokens x: expected whole numbers",
    "eval mine {d}/nope": "no such folder",
    "eval stress nope": "unknown task 'nope'",
    "eval contamination --train {d}/nope.jsonl --tasks demo_charts": "no such file or folder",
    "draw {d}/nope x": "no such folder",
    "edit {d}/nope {f} x": "no such folder",
    "edit {c} {d}/nope.png x": "nope.png",
    "serve {d}/nope": "no such folder",
    "serve {c} --memory lots": "--memory lots: expected a share",
    "serve {c} --keys {d}/nope.yaml": "cannot be read",
    "serve {c} --port {p}": "take another --port",
    "bench serve {d}/nope": "no such folder",
    "bench serve": "--server",
    "bench serve --server 127.0.0.1:8000": "try http://127.0.0.1:8000",
    "bench serve --server http://127.0.0.1:1 --clients 1,x": "whole numbers",
    "app {d}/nope": "no such folder",
    "app --server localhost:8000": "try http://localhost:8000",
    "app {c} --server http://127.0.0.1:1": "or --server",
    "parity {d}/nope": "no such folder",
    "data check {d}/nope.json": "no such file or folder",
    "data points {d}/nope.mp4": "no such video",
    "data points {d} --chunk 1": "--chunk 1: must be at least 2",
    "data points {d} --rays --encoder pi3": "pi3 tells no rays",
    "data check nope": "unknown dataset 'nope'",
    "data build charts {d} --size 0": "--size 0",
    "data build captions {d}/nope": "no such folder",
    "data freeze {d}/nope {d}/x.yaml": "no such folder of charts",
    "data rebuild nope": "unknown frozen benchmark 'nope'",
    "compose {d}/x -e vision=clip-vit-b-32": "what is the model made of",
    "new x --yes": "--data: where are your pictures",
    "parts get nope": "nope",
    "study nope": "nope",
    "train nope": "unknown recipe 'nope'",
    "train demo stages.sft.stepz=3": "did you mean 'steps'",
    "plan demo stages.sft.stepz=3": "did you mean 'steps'",
    "inspect demo stages.sft.stepz=3": "did you mean 'steps'",
    "inspect demo --stage nope": "has the stages",
    "verify-resume demo stages.sft.stepz=3": "did you mean 'steps'",
    "demo stages.sft.stepz=3 --output {d}/demo": "did you mean 'steps'",
    "runs ls {d}/nope": "no such folder",
    "runs diff {d}/nope {d}/other": "holds no run",
    "recipes show nope": "unknown recipe 'nope'",
    "recipes cp nope {d}/x.yaml": "unknown recipe 'nope'",
    "route label {d}/nope demo_charts": "no such folder",
    "route report {d}/nope demo_charts": "no such folder",
    "tokenizer train nope": "unknown recipe 'nope'",
    "tokenizer train tokenizer_demo_dual stages.tokenizer.stepz=3": "did you mean 'steps'",
    "tokenizer eval {d}/nope --recipe tokenizer_demo_dual": "no such folder",
    "tokenizer encode {d}/nope --recipe tokenizer_demo_dual --output {d}/codes": "no such folder",
    "convert {d}/nope {d}/out": "no such folder",
    "export {d}/nope {d}/out": "no such folder",
    "push {d}/nope me/model": "no such folder",
    "batch {d}/nope.jsonl --server http://127.0.0.1:1": "No such file",
    "batch {f} --server ftp://host": "try http://host",
    "check nope": "unknown component 'nope'",
    "list nope": "'nope' is not one of",
}
_EVERY = """
import contextlib, io, json, sys, time
from mllm.cli.main import app
for line in json.loads(sys.argv[1]):
    start, said = time.perf_counter(), io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            app(line.split(), standalone_mode=False)
        error = "none"
    except BaseException as raised:
        error = f"{type(raised).__name__}: {raised}"
    print(json.dumps([error, "torch" in sys.modules, time.perf_counter() - start]), flush=True)
"""


def test_wrong_arguments_are_told_before_torch_is_imported(tmp_path):
    folder, file, checkpoint = tmp_path / "empty", tmp_path / "file", tmp_path / "checkpoint"
    folder.mkdir()
    file.touch()
    checkpoint.mkdir()
    (checkpoint / "config.json").write_text("{}")
    taken = socket.create_server(("127.0.0.1", 0))
    lines = [line.format(d=folder, f=file, c=checkpoint, p=taken.getsockname()[1]) for line in NOT_THERE]
    done = subprocess.run(
        [sys.executable, "-c", _EVERY, json.dumps(lines)], text=True, capture_output=True, check=False, timeout=300,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    taken.close()
    told = [json.loads(row) for row in done.stdout.splitlines()]
    assert len(told) == len(lines), done.stderr
    for line, words, (error, torch, _) in zip(lines, NOT_THERE.values(), told):
        assert words in error and "\n" not in error, f"mllm {line}: {error}"
        assert not torch, f"mllm {line} imported torch"
    assert sorted(seconds for *_, seconds in told)[len(told) // 2] < 1.0
    assert not list(folder.iterdir())


def test_every_command_has_a_line_of_wrong_arguments():
    from typer.main import get_command

    from mllm.cli.main import app

    without_arguments = {"doctor", "recipes ls", "recipes schema", "tokenizer ls", "parts ls"}
    commands = set()
    for name, command in getattr(get_command(app), "commands").items():  # noqa: B009  (click types the group as a command)
        children = getattr(command, "commands", None)
        commands |= {f"{name} {child}" for child in children} if children else {name}
    missing = {c for c in commands - without_arguments if not any(f"{line} ".startswith(f"{c} ") for line in NOT_THERE)}
    assert not missing, f"commands that no line above tries: {sorted(missing)}"


def test_arguments_that_are_good_pass(tmp_path):
    (tmp_path / "final").mkdir()
    with pytest.raises(CheckpointError, match=r"did you mean .*final\?"):
        (tmp_path / "final" / "config.json").write_text("{}")
        arguments.checkpoint(tmp_path)
    assert arguments.checkpoint(tmp_path / "final") == str(tmp_path / "final")
    with pytest.raises(CheckpointError, match="is a file"):
        arguments.checkpoint(tmp_path / "final" / "config.json")
    with pytest.raises(CheckpointError, match=r"did you mean .*final\?"):
        arguments.checkpoint(tmp_path / "finale")
    arguments.pictures(["https://host/a.png", tmp_path / "final" / "config.json"])
    with pytest.raises(DataError, match="--image nope"):
        arguments.pictures(["nope.png"])
    for good in (None, "cpu", "cuda", "cuda:1", "mps"):
        arguments.device(good)
    for wrong, call in (("gpu", arguments.device), ("float31", arguments.dtype), ("5 bananas", arguments.shard_size)):
        with pytest.raises(ConfigError, match=wrong):
            call(wrong)


def test_a_hub_id_passes_when_the_hub_may_be_asked(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.delenv("TRANSFORMERS_OFFLINE", raising=False)
    assert arguments.checkpoint("owner/name") == "owner/name"
