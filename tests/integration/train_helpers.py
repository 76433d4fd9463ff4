"""What tiny recipe and data do the training tests share? Everything is written to a temporary folder, nothing is
downloaded."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mllm.errors import MllmError
from mllm.machines import Machines
from mllm.recipe import Recipe
from mllm.train import run_recipe
from tests.helpers import free_port, picture, tiny_spec, tiny_tokenizer

ROOT = Path(__file__).resolve().parents[2]
LLM = {
    "model_type": "llama",
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 512,
    "attention_dropout": 0.1,
    "tie_word_embeddings": True,
}
COMPARED = ("stage", "step", "loss", "grad_norm", "lr", "samples", "tokens", "supervised", "images", "data")


def write_data(folder: Path, *, rows: int = 24, name: str = "mixed", text_only_every: int = 3) -> Path:
    """A LLaVA-format file: rows with no, one or two pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    data = []
    for row in range(rows):
        images = 0 if text_only_every and row % text_only_every == 0 else 1 + (row % 5 == 4)
        names = [f"{name}-{row}-{k}.png" for k in range(images)]
        for number, file in enumerate(names):
            picture(row * 7 + number, size=(28, 28)).save(folder / file)
        question = "<image>\n" * images + "what is " + "it " * (row % 7)
        data.append(
            {
                "id": f"{name}{row}",
                **({"image": names if len(names) > 1 else names[0]} if names else {}),
                "conversations": [
                    {"from": "human", "value": question},
                    {"from": "gpt", "value": f"it is {row} " * (1 + row % 3)},
                ],
            }
        )
    path = folder / f"{name}.json"
    path.write_text(json.dumps(data), encoding="utf-8")
    return path


def small_is_large(folder: Path) -> str:
    """A plug-in by which the sharded engine cuts this recipe's weights one by one, as it cuts those of a million elements."""
    path = folder / "small_is_large.py"
    path.write_text(
        "from mllm.train.engine.sharded import ShardedEngine\n\nShardedEngine.alone_elements = 256\n", encoding="utf-8"
    )
    return str(path)


def make_recipe(
    folder: Path, *, stages: list[dict[str, Any]] | None = None, model: dict[str, Any] | None = None, **data: Any
) -> Recipe:
    """A recipe over `write_data`; each stage is filled up with small defaults."""
    tokenizer = folder / "tokenizer"
    if not tokenizer.is_dir():
        tiny_tokenizer().save_pretrained(str(tokenizer))
    file = folder / "data" / "mixed.json"
    if not file.is_file():
        write_data(folder / "data", **data)
    defaults = {
        "data": {"format": "llava", "path": str(file)},
        "batch_size": 2,
        "max_length": 160,
        "dtype": "float32",
        "schedule": {"type": "cosine", "warmup": 0.2},
        "learn": {"language_model": 1e-3, "connector": 3e-3},
    }
    stages = stages if stages is not None else [{"name": "sft", "steps": 6}]
    spec = tiny_spec(str(tokenizer), language_model={"config": dict(LLM), "tokenizer": str(tokenizer)}, **(model or {}))
    return Recipe.model_validate(
        {
            "name": "tiny",
            "seed": 3,
            "output": str(folder / "run"),
            "model": spec.model_dump(),
            "stages": [{**defaults, **stage} for stage in stages],
        }
    )


def on_machines(recipes: list[Recipe], *outputs: Path, **settings) -> list[MllmError | None]:
    """Train as two launchers would, each in a thread of this process, in one folder or each in its own; the error of each."""
    port, ended = free_port(), [None] * len(recipes)

    def launcher(rank: int) -> None:
        machines = Machines(len(recipes), rank, "127.0.0.1", port, 1)
        try:
            run_recipe(recipes[rank], output=outputs[rank % len(outputs)], machines=machines, **settings)
        except MllmError as error:
            ended[rank] = error

    threads = [threading.Thread(target=launcher, args=(rank,)) for rank in range(len(recipes))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return ended


def metrics(output: Path) -> list[dict[str, Any]]:
    """What must be equal between two runs, floats as exact hexadecimal."""
    lines = (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    return [{key: _exact(record[key]) for key in COMPARED} for record in records]


def _exact(value: Any) -> Any:
    if isinstance(value, float):
        return value.hex()
    if isinstance(value, dict):
        return {k: _exact(v) for k, v in value.items()}
    return value


def start(
    recipe: Recipe, folder: Path, output: Path, *, processes: int = 1, resume: bool = False, before: str = ""
) -> subprocess.Popen:
    """Train in a process of its own, as a user would; ``before`` is Python run first."""
    path = folder / f"recipe-{output.name}.json"
    path.write_text(recipe.model_dump_json(), encoding="utf-8")
    script = folder / f"run-{output.name}.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import sys
            sys.path.insert(0, {str(ROOT)!r})
            {before}
            if __name__ == "__main__":
                from mllm.recipe import Recipe
                from mllm.train import run_recipe
                recipe = Recipe.model_validate_json(open({str(path)!r}).read())
                run_recipe(recipe, processes={processes}, resume={resume}, output={str(output)!r})
            """
        ),
        encoding="utf-8",
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    log = (folder / f"log-{output.name}.txt").open("ab")
    return subprocess.Popen(
        [sys.executable, str(script)], stdout=log, stderr=log, env=environment, start_new_session=True, cwd=folder
    )


def kill_when(process: subprocess.Popen, condition: Any, *, limit: float = 120) -> None:
    """SIGKILL the whole process group as soon as ``condition()`` holds."""
    end = time.monotonic() + limit
    while not condition():
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < end, "the run did not get there in time"
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(30)


@contextmanager
def kill_workers_when(condition: Any) -> Iterator[None]:
    """SIGKILL every training process that this test started, all at once, as soon as ``condition()`` holds."""
    done = threading.Event()

    def watch() -> None:
        while not done.is_set():
            if condition():
                for child in multiprocessing.active_children():
                    os.kill(child.pid, signal.SIGKILL)
                return
            time.sleep(0.005)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def logged_steps(output: Path) -> int:
    path = output / "metrics.jsonl"
    return path.read_text(encoding="utf-8").count("\n") if path.is_file() else 0
