"""What does a recipe or an encoder take of a GPU, and what was it measured to reach? Rows and sections for docs/generate.py.

Memory is computed by what `mllm plan` computes with, scores are files of benchmarks/results as they are: nothing here holds a figure of
its own.
"""

from __future__ import annotations

import re
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results"
SCORES = {
    "demo": "demo_cpu",
    "real_charts": "real_charts_h200",
    "real_charts_small": "real_charts_small_cpu",
    "routed_demo": "routing_demo_cpu",
    "segmentation_demo": "segmentation_demo_cpu",
    "forgery_demo": "forgery_demo_cpu",
    "focus_demo": "focus_demo_cpu",
    "tiles_demo": "tiles_demo_cpu",
    "unified_demo": "unified_demo_cpu",
    "video_demo": "video_demo_cpu",
    "tokenizer_demo_dual": "tokenizer_demo_cpu",
    "tokenizer_diffusion_demo": "tokenizer_diffusion_demo_cpu",
    "tokenizer_demo_single": "tokenizer_demo_cpu",
    "tokenizer_demo_single_semantic": "tokenizer_demo_cpu",
}
"""Recipe → file of benchmarks/results that holds what it scored."""
NOT_MEASURED = "not measured"


def gpus(recipe: Any) -> int:
    """How many GPUs a recipe is written for; a CPU is one process."""
    found = re.match(r"(\d+) × \d+ GB", recipe.hardware.gpus or "")
    return int(found[1]) if found else 1


def memory_of_one(recipe: Any) -> float | None:
    """Bytes of one GPU of those that a recipe is written for; None: a CPU, or a GPU named without its memory."""
    found = re.match(r"\d+ × (\d+) GB", recipe.hardware.gpus or "")
    return 1e9 * int(found[1]) if found else None


def memory_of_stages(recipe: Any) -> list[tuple[str, int]]:
    """(stage, bytes of one process at its peak) as `mllm plan NAME --no-data` computes it: rows of max_length, the recipe's own number of
    GPUs. Empty where the recipe needs files that a run makes."""
    from mllm.errors import MllmError
    from mllm.recipe_of_stage import parts_of_run
    from mllm.train.preflight.plan import plan_recipe
    from mllm.train.preflight.tokenizer_plan import plan_tokenizer

    found: list[tuple[str, int]] = []
    for part in parts_of_run(recipe, recipe.output_dir):
        planner = plan_recipe if part.model.language_model is not None else plan_tokenizer
        try:
            planned = planner(part, processes=gpus(recipe), with_data=False)
        except (MllmError, OSError):
            return []
        found += [(stage.name, stage.peak) for stage in planned.stages]
    return found


def memory_row(recipe: Any, name: str) -> tuple[str, str]:
    """The row of a recipe's table."""
    from mllm.train.preflight.plan_report import size

    stages = memory_of_stages(recipe)
    if not stages:
        return "memory of one GPU", "not computed: the recipe needs files that another run makes"
    told = ", ".join(f"{stage} {size(peak)}" for stage, peak in stages)
    number = gpus(recipe)
    command = f"mllm plan {name} --no-data" + (f" --processes {number}" if number > 1 else "")
    what = (
        "memory of one GPU" if recipe.hardware.gpus and "CPU" not in recipe.hardware.gpus else "memory of the process"
    )
    return f"{what}, at its peak", f"{told}: computed (`{command}`, rows of `max_length`), not measured"


def encoder_memory(millions: float) -> str:
    """An encoder's own share of memory by its number of parameters: what `mllm plan` counts for AdamW in bf16."""
    from mllm.train.engine.optim import STATE_BYTES
    from mllm.train.preflight.plan_report import size

    weights, learning = 2, 2 + 2 + STATE_BYTES["adamw"] + 4
    return (
        f"weights in bf16 {size(weights * millions * 1e6)}; where it learns {size(learning * millions * 1e6)} "
        "(gradients, AdamW, fp32 copy; activations not counted): computed from the number of parameters, not measured"
    )


def score_row(name: str) -> tuple[str, str]:
    """Where a recipe's score stands, or that there is none."""
    if name not in SCORES:
        return "score", f"{NOT_MEASURED} here: nobody has trained this recipe; published figures are the paper's own"
    return "score", f"[{SCORES[name]}](#score){recorded(f'{SCORES[name]}.txt')}"


def score_section(name: str) -> list[str]:
    """The file with the score, as its script wrote it."""
    if name not in SCORES:
        return []
    file = f"benchmarks/results/{SCORES[name]}.txt"
    return ["## Score", "", f"`{file}`: rule, date, machine and versions stand in it.", "", *_included(file)]


def _included(file: str) -> list[str]:
    return ["```text", f'--8<-- "{file}"', "```", ""]


@cache
def recorded(file: str) -> str:
    """`, recorded with commit abc1234 (2026-11-29)` where git knows it."""
    command = ["git", "log", "-1", "--format=%h (%cs)", "--", f"benchmarks/results/{file}"]
    try:
        told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        told = ""
    return f", recorded with commit {told}" if told else ""


def results_naming(name: str) -> list[str]:
    """Names of the result files that name a recipe or an encoder as one word."""
    word = re.compile(rf"(?<![\w.-]){re.escape(name)}(?![\w-]|\.\w)")
    return [path.stem for path in sorted(RESULTS.glob("*.txt")) if word.search(path.read_text(encoding="utf-8"))]


def links(stems: list[str]) -> str:
    """To the page of measured figures."""
    return ", ".join(f"[{stem}](../measured.md#{stem}){recorded(f'{stem}.txt')}" for stem in stems)
