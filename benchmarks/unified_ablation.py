"""What does a vocabulary head need to draw and read as well as a separate head on the same digits?

Trains the data, teacher and tokenizer of ``unified_demo.py`` once, then variants of ``recipes/unified_demo.yaml`` whose codes are
ids of the language model's vocabulary, side by side; each prints one JSON line with its figures, then there is a table.

    python benchmarks/unified_ablation.py --device cuda --processes 9 --limit 280 --output runs/unified_ablation     # one H200
    python benchmarks/unified_ablation.py --device cpu --variants vocabulary --steps 20 --drawings 20               # a try
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from processes import choose_device, run_jobs
from torch import Tensor
from transformers import AutoModelForCausalLM
from unified_demo import evaluate, make_tokenizer, model_overrides

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mllm.demo.drawing import prepare_drawing, train_text_tokenizer
from mllm.models.build import build_model
from mllm.recipe import Recipe, load_recipe
from mllm.train.run import run_recipe
from mllm.visual_tokenizers.sequence import code_blocks, single_vectors


def _rates(rate: float) -> str:
    return f"stages.unified.learn={{connector: {rate}, language_model: {rate}}}"


_UNTIED = "model.language_model.config.tie_word_embeddings=false"
VOCABULARY = ("model.heads={draw: {type: vocabulary, text_dropout: 0.1}}", _rates(2e-3))


class Variant(NamedTuple):
    """Changes of the recipe, and where the embeddings of new tokens start, in units of the language model's
    ``initializer_range``: normal ones (``random``), or for codes the tokenizer's vectors (``vectors``). None: as `build_model`
    starts them."""

    overrides: tuple[str, ...]
    random: float | None = None
    vectors: float | None = None


VARIANTS: dict[str, Variant] = {
    "separate": Variant(()),
    "vocabulary": Variant(VOCABULARY),
    "vocabulary_large_start": Variant(VOCABULARY, random=50.0),
    "vocabulary_1800_steps": Variant((*VOCABULARY, "stages.unified.steps=1800")),
    "vocabulary_3600_steps": Variant((*VOCABULARY, "stages.unified.steps=3600")),
    "vocabulary_rate_5e-3": Variant((*VOCABULARY, _rates(5e-3))),
    "vocabulary_rate_1e-3": Variant((*VOCABULARY, _rates(1e-3))),
    "vocabulary_untied": Variant((*VOCABULARY, _UNTIED)),
    "vocabulary_from_codebook": Variant(VOCABULARY, vectors=1.0),
    "vocabulary_from_codebook_untied": Variant((*VOCABULARY, _UNTIED), vectors=1.0),
}


class Job(NamedTuple):
    variant: str
    seed: int
    output: str
    device: str
    steps: int | None
    drawings: int


def run_variant(job: Job) -> dict[str, Any]:
    """Train one variant, let it draw and read, and return the figures of `unified_demo.evaluate`."""
    variant, output, begun = VARIANTS[job.variant], Path(job.output), time.perf_counter()
    folder = output / f"{job.variant}-{job.seed}"
    changes = [
        *model_overrides(output),
        f"output={folder}",
        f"seed={job.seed}",
        "stages.unified.draw=null",
        *variant.overrides,
    ]
    if job.steps:
        changes.append(f"stages.unified.steps={job.steps}")
    recipe = load_recipe("unified_demo", changes)
    if variant.random is not None or variant.vectors is not None:
        recipe = with_started_rows(recipe, changes, folder / "language_model", variant)
    final = run_recipe(recipe, resume=True)
    trained = time.perf_counter()
    figures, _ = evaluate(final, job.drawings, 2.0, 1.0, job.device)
    unguided, _ = evaluate(final, job.drawings, 1.0, 1.0, job.device)
    stage = recipe.stages[0]
    return {
        "variant": job.variant,
        "seed": job.seed,
        "steps": stage.steps,
        "batch_size": stage.batch_size,
        "drawn_as_asked": figures["drawn_as_asked"],
        "drawn_as_asked_unguided": unguided["drawn_as_asked"],
        "read_from_codes": figures["read_from_codes"],
        "distance_to_nearest": figures["distance_to_nearest_training_digit"]["drawings"]["median"],
        "copies": figures["same_codes_as_a_training_digit"],
        "losses": _last_record(folder),
        "training_seconds": round(trained - begun, 1),
        "seconds": round(time.perf_counter() - begun, 1),
    }


def with_started_rows(recipe: Recipe, changes: list[str], folder: Path, variant: Variant) -> Recipe:
    """The recipe with a language model that is saved in ``folder`` with every id in its vocabulary already, the rows of new
    tokens started as `Variant` says. With the tokenizer's vectors under a random projection, codes that look alike start alike.
    """
    torch.manual_seed(recipe.seed)
    model, _ = build_model(recipe.model)
    known = (recipe.model.language_model.config or {})["vocab_size"]
    size = model.config.text_config.initializer_range
    embeddings: Any = model.get_input_embeddings()
    table, output = embeddings.weight.detach(), model.lm_head.weight.detach()
    rows = torch.randn(len(table) - known, table.shape[1]) * size * (variant.random or 1.0)
    table[known:], output[known:] = rows, rows
    if variant.vectors is not None:
        for block, ids in zip(code_blocks(model.image_tokenizer), model.visual_config.levels):
            vectors = single_vectors(model.image_tokenizer, block, torch.arange(block.size)[None])[0]
            place = slice(ids["first"], ids["first"] + block.size)
            table[place] = output[place] = projected(vectors, table.shape[1], seed=recipe.seed) * size * variant.vectors
    model.config.text_config.vocab_size = len(table)
    language: Any = AutoModelForCausalLM.from_config(model.config.text_config)
    language.base_model.load_state_dict(model.model.language_model.state_dict())
    language.get_output_embeddings().load_state_dict(model.lm_head.state_dict())
    language.save_pretrained(str(folder))
    more = [f"model.language_model.source={folder}", f"model.language_model.config.vocab_size={len(table)}"]
    return load_recipe("unified_demo", [*changes, *more])


def projected(vectors: Tensor, width: int, *, seed: int) -> Tensor:
    """``(K, D)`` → ``(K, width)``: standardised over the codes, a random projection, then unit variance over all entries."""
    vectors = vectors.detach().float().cpu()
    vectors = (vectors - vectors.mean(0)) / vectors.std(0).clamp_min(1e-6)
    generator = torch.Generator().manual_seed(seed)
    made = vectors @ torch.randn(vectors.shape[1], width, generator=generator)
    return made / made.std()


def _last_record(folder: Path) -> dict[str, float]:
    """The last losses that the training logged."""
    files = sorted(folder.glob("**/metrics.jsonl"))
    records = [json.loads(line) for line in files[0].read_text(encoding="utf-8").splitlines()] if files else []
    lines = [record for record in records if any("loss" in key for key in record)]
    return {
        key: round(value, 4)
        for key, value in (lines[-1] if lines else {}).items()
        if isinstance(value, float) and "loss" in key
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The figures of every run as text."""
    lines = [
        f"{'variant':38}{'seed':>5}{'steps':>7}{'drawn':>8}{'unguided':>10}{'read':>8}{'distance':>10}{'copies':>8}"
    ]
    for row in sorted(
        (r for r in rows if "error" not in r), key=lambda r: (list(VARIANTS).index(r["variant"]), r["seed"])
    ):
        lines.append(
            f"{row['variant']:38}{row['seed']:>5}{row['steps']:>7}{row['drawn_as_asked']:>8.1%}"
            f"{row['drawn_as_asked_unguided']:>10.1%}{row['read_from_codes']:>8.1%}{row['distance_to_nearest']:>10.3f}"
            f"{row['copies']:>8}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/unified_ablation"))
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: CUDA where there is one")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--limit", type=float, help="seconds after which what is not finished is left out")
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--seeds", nargs="*", type=int, default=[0])
    parser.add_argument("--steps", type=int, help="training steps of every variant instead of its own")
    parser.add_argument("--teacher-steps", type=int, default=600)
    parser.add_argument("--tokenizer-steps", type=int, help="instead of the recipe's")
    parser.add_argument("--drawings", type=int, default=200)
    arguments = parser.parse_args()
    started, output, device = time.monotonic(), arguments.output, choose_device(arguments.device)
    prepare_drawing(output / "data")
    train_text_tokenizer(output / "text_tokenizer")
    scores = make_tokenizer(output, arguments.teacher_steps, arguments.tokenizer_steps, device)
    print(json.dumps({"tokenizer": scores, "seconds": round(time.monotonic() - started, 1)}), flush=True)
    # Longest first; seed after seed.
    order = sorted(arguments.variants, key=lambda name: -_length(name))
    jobs = [
        Job(name, seed, str(output), device, arguments.steps, arguments.drawings)
        for seed in arguments.seeds
        for name in order
    ]
    limit = None if arguments.limit is None else max(1.0, arguments.limit - (time.monotonic() - started))
    rows = run_jobs(run_variant, jobs, processes=arguments.processes, limit=limit)
    report = {"device": device, "tokenizer": scores, "rows": rows, "seconds": round(time.monotonic() - started, 1)}
    (output / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(table(rows))
    print(f"{len(rows)} of {len(jobs)} runs, {report['seconds']} s; {output / 'report.json'}")


def _length(name: str) -> int:
    found = [o for o in VARIANTS[name].overrides if o.startswith("stages.unified.steps=")]
    return int(found[0].partition("=")[2]) if found else 0


if __name__ == "__main__":
    main()
