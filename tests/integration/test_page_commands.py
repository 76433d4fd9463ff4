"""Does every command on every page do what the page says? Those that can run here are run, in one folder after another as a reader would;
of the others a table says why not, and which test stands for them. Nothing is in neither."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.test_readme import MLLM, block
from tests.unit.test_docs import blocks, commands

UNIT, WHOLE = "tests/unit", "tests/integration"
NOT_RUN = {
    r"^(serve|app)\b": f"serves until it is stopped: {WHOLE}/test_serve_http.py, {WHOLE}/test_serve_vllm.py",
    r"^parity (?!.*--no-vllm)": f"needs a vLLM of its own: {WHOLE}/test_serve_vllm.py",
    r"^push\b": f"writes to a hub: {WHOLE}/test_hub.py pushes to one of its own",
    r"^(compose|plan llava|train llava|recipes show real_charts|study real_charts)|^convert (llava-v1|prism)": (
        f"reads published weights or their settings: {WHOLE}/test_convert.py, {UNIT}/test_terminal.py"
    ),
    r"clip-vit|dinov2|siglip2|ppocr": f"reads published weights: {UNIT}/encoders, {UNIT}/eval/test_watch_and_mine.py",
    r"^edit ": f"trains for minutes: {WHOLE}/test_train_focus.py",
    r"^(train (tokenizer|unified)|tokenizer |draw )": (
        f"trains for minutes: {WHOLE}/test_unified_training.py, {UNIT}/visual_tokenizers"
    ),
    r"^route ": f"needs a model with a router: {WHOLE}/test_routing.py runs both commands",
    r"^(demo|new)$": f"is the set-up of these tests, or asks: {UNIT}/test_terminal.py",
    r"^demo --real": f"fetches published weights and trains for a quarter of an hour: {UNIT}/train/test_demo_data.py",
    r"^eval (judge|watch|mine|run NAME)|--generator openai": f"asks a server, waits for a run, or reads weights: {UNIT}/eval",
    r"--tasks (chartqa|charts|mmvp|pope|mine)|my_rules|CKPT --tasks": (
        f"needs a benchmark's files: {UNIT}/eval, {WHOLE}/test_plugins.py"
    ),
    r"^eval ablate a=|^export my_adapter|^serve CKPT --lora": (
        f"needs more than one trained model: {UNIT}/eval/test_ablations.py, {WHOLE}/test_train_stages.py"
    ),
    r"my_tables|tuxpaint|^data rebuild (real_charts|stamps)": f"draws thousands of charts, or needs Debian's: {UNIT}/data",
    r"/shared/|wandb|--extend|--processes 8": (
        f"needs machines, an account or a finished long run: {WHOLE}/test_train_engines.py, {WHOLE}/test_train_commands.py"
    ),
    r"runs/(good|bad|small)|^runs diff runs/a": f"needs runs of one's own: {WHOLE}/test_train_commands.py",
}
"""Pattern of a command → why it is not run here, and what stands for it."""
EXTRA = {
    r"^train (?!.*--no-evaluate)": ["--no-evaluate"],
    r"^train demo": ["--output", "runs/own", "stages.pretrain.steps=2", "stages.sft.steps=2"],
    r"^train my.yaml .*steps=100": ["stages.pretrain.steps=2", "stages.sft.steps=4"],
    r"^eval (run )?runs/\S+ .*--tasks": ["--limit", "4"],
    r"^eval (ablate|sensitivity)": ["--limit", "4"],
}
"""Pattern → words that make a command short without changing what it does."""


def cases() -> list[tuple[str, list[str]]]:
    """(where, words) of every command, each once, the first hour first."""
    found = sorted(commands(), key=lambda case: not case[0].startswith("docs/first-hour"))
    once: dict[str, tuple[str, list[str]]] = {}
    for where, words in found:
        once.setdefault(" ".join(words), (where, words))
    return list(once.values())


def why_not(words: list[str]) -> str | None:
    text = " ".join(words)
    return next((reason for pattern, reason in NOT_RUN.items() if re.search(pattern, text)), None)


def test_each_command_is_run_or_its_reason_is_told() -> None:
    all_cases = cases()
    run = [case for case in all_cases if why_not(case[1]) is None]
    assert len(run) >= 35 and len(all_cases) > 100
    for pattern, reason in NOT_RUN.items():
        assert any(re.search(pattern, " ".join(words)) for _, words in all_cases), f"no page has {pattern}"
        for path in re.findall(r"tests/[\w/]+(?:\.py)?", reason):
            assert Path(path).exists(), path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the demo ran with two steps a stage, with what the pages say that a reader has."""
    from tests.integration.test_convert import llava

    folder = tmp_path_factory.mktemp("pages")
    short = ["stages.pretrain.steps=2", "stages.sft.steps=2"]
    mllm(folder, "demo", "--charts", "80", "--limit", "12", *short)
    (code,) = [
        text
        for where, mark, text in blocks("python", [Path(__file__).parents[2] / "docs/first-hour.md"])
        if "run" in mark
    ]
    subprocess.run([sys.executable, "-c", code], cwd=folder, check=True)
    rows = [json.loads(line) for line in (folder / "mine/rows.jsonl").read_text().splitlines()]
    for row in rows:
        row["image"] = str(folder / "mine" / row["image"])
    (folder / "my.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    llava("small", folder / "llava-1.5-7b-hf")
    for name, file in {
        "plugin": "my_encoder.py",
        "plugin-routing": "my_routing.py",
        "plugin-head": "my_head.py",
    }.items():
        (folder / file).write_text(block(name))
    for name in ("a", "b", "c"):
        shutil.copytree(folder / "runs/demo/eval", folder / f"runs/{name}/eval")
    (folder / "runs/demo/data/charts/test/00001.png").rename(folder / "chart.png")
    shutil.copy(folder / "chart.png", folder / "runs/demo/data/charts/test/00001.png")
    return folder


def mllm(folder: Path, *words: str) -> str:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "160"}
    done = subprocess.run(
        [MLLM, *words], cwd=folder, env=environment, capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == 0, f"mllm {' '.join(words)}\n{done.stdout[-1500:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.mark.nightly
def test_the_commands_of_all_pages_run(place: Path) -> None:
    failed = []
    for where, words in cases():
        if why_not(words) is not None:
            continue
        text = " ".join(words)
        extra = [word for pattern, more in EXTRA.items() if re.search(pattern, text) for word in more]
        given = ["runs/demo/final" if word == "CKPT" else word for word in words]
        if "--limit" in extra and "--limit" in given:
            del given[given.index("--limit") : given.index("--limit") + 2]
        if words[:2] == ["train", "my.yaml"] and not {"--resume", "--output"} & set(words):
            shutil.rmtree(place / "runs/my", ignore_errors=True)  # a page begins anew where an earlier page has ended
        try:
            mllm(place, *given, *extra)
        except (AssertionError, subprocess.TimeoutExpired) as error:
            failed.append(f"{where}: {error}")
        if words[:2] == ["recipes", "cp"]:
            recipe = yaml.safe_load((place / "my.yaml").read_text())
            for stage in recipe["stages"]:
                stage["steps"] = 2
            (place / "my.yaml").write_text(yaml.safe_dump(recipe))
    assert not failed, "\n\n".join(failed)
