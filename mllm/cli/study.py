"""``mllm study``: train and evaluate every arm of a study, and say what came out."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import typer

from mllm.cli import arguments
from mllm.cli.evaluate_studies import listed


def study(
    name: Annotated[str, typer.Argument(help="A study's name (eval/arms) or its YAML file.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            help="Changes to every arm's recipe, key.sub=value: stages.answer.steps=300", show_default=False
        ),
    ] = None,
    *,
    arms: Annotated[str | None, typer.Option(help="Only these arms, comma separated.")] = None,
    seeds: Annotated[str | None, typer.Option(help="Only these seeds, comma separated.")] = None,
    output: Annotated[Path | None, typer.Option(help="Folder; default runs/studies/<name>.")] = None,
    parallel: Annotated[int, typer.Option(help="Arms at once on this machine.")] = 1,
    limit: Annotated[int | None, typer.Option(help="Evaluate only N questions, spread evenly.")] = None,
    batch_size: Annotated[int, typer.Option(help="Prompts per generation batch.")] = 64,
    dtype: Annotated[str, typer.Option(help="Of the evaluation: float32, bfloat16 or float16.")] = "float32",
    report_only: Annotated[bool, typer.Option("--report", help="Train nothing; report what is finished.")] = False,
) -> None:
    """Train every arm of a study with every seed, evaluate it on the same questions, and write the page.

    Arms that are finished are kept, interrupted ones go on: the same command again continues. Each run's folder is an ordinary
    run (`mllm runs`), its log lies beside it. The page sets what was expected beforehand against what came out; answers.html shows
    twenty questions with every arm's answer, right and wrong marked; arms that have a size are drawn as a curve (curve.svg).

    [dim]mllm study real_charts --arms A,B,C --parallel 3[/]
    """
    from mllm.errors import ConfigError
    from mllm.eval.studies.arm_answers import save_answers
    from mllm.eval.studies.arms import arms_study, load_arms, run_folder
    from mllm.eval.studies.study import print_study, save_study

    arguments.dtype(dtype, auto=False)
    for value, option in ((parallel, "--parallel"), (limit, "--limit"), (batch_size, "--batch-size")):
        arguments.at_least(value, 1, option)
    spec = load_arms(name)
    folder = output or Path("runs/studies") / spec.name
    chosen = listed(arms) or list(spec.arms)
    if unknown := [arm for arm in chosen if arm not in spec.arms]:
        raise ConfigError(f"--arms: there is no arm {unknown[0]!r}; the study has {', '.join(spec.arms)}")
    wanted = None if seeds is None else {int(seed) for seed in listed(seeds) or []}
    jobs = [
        (arm, s)
        for s in _all_seeds(spec, chosen)
        for arm in chosen
        if s in spec.arms[arm].seeds and (wanted is None or s in wanted)
    ]
    _check_stages(spec, chosen, overrides or [])
    failed = []
    if not report_only:
        folder.mkdir(parents=True, exist_ok=True)
        evaluation = ["--batch-size", str(batch_size), "--dtype", dtype, *(["--limit", str(limit)] if limit else [])]
        with ThreadPoolExecutor(parallel) as pool:
            codes = pool.map(lambda job: _run(spec, run_folder(folder, *job), job, overrides or [], evaluation), jobs)
            failed = [f"{arm}-{seed} ({_ended(code)})" for (arm, seed), code in zip(jobs, codes) if code]
    if failed:  # before the page: where nothing is finished there is none
        typer.echo(f"failed: {', '.join(failed)}; see their .log in {folder}", err=True)
    found = arms_study(spec, folder, _costs(spec, folder, overrides or []))
    print_study(found)
    pages = [*save_study(found, folder).values(), save_answers(spec, folder), *_curve(spec, folder)]
    typer.echo(" · ".join(map(str, pages)))
    if failed:
        raise typer.Exit(1)


def _ended(code: int) -> str:
    """How a process ended, in words; one that the system killed has left no word in its log."""
    if code >= 0:
        return f"exit status {code}"
    return f"killed by signal {-code}" + (", as a system out of memory does" if code == -signal.SIGKILL else "")


def _curve(spec: Any, folder: Path) -> list[Path]:
    """The picture of scores over the arms' sizes, where two of them or more are finished."""
    from mllm.eval.predictions import write_atomic
    from mllm.eval.studies.arms import curve_lines
    from mllm.svg_charts import line_chart

    lines = curve_lines(spec, folder)
    sizes = [size for size, _ in next(iter(lines.values()), [])]
    if len(set(sizes)) < 2:
        return []
    picture = line_chart(
        lines, across=spec.size_is, label=f"{spec.name}: right in percent by {spec.size_is}", ticks=sizes
    )
    spaces = (
        'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'  # a file, no part of a page
    )
    write_atomic(folder / "curve.svg", picture.replace("<svg class=chart", f"<svg {spaces}", 1))
    return [folder / "curve.svg"]


def _all_seeds(spec: Any, chosen: list[str]) -> list[int]:
    return sorted({seed for arm in chosen for seed in spec.arms[arm].seeds})


def _run(spec: Any, folder: Path, job: tuple[str, int], overrides: list[str], evaluation: list[str]) -> int:
    """Train and evaluate one arm; 0 when both are done."""
    arm, seed = job
    mine, mllm = spec.arms[arm], [sys.executable, "-m", "mllm.cli.main"]
    changes = [*mine.overrides, f"seed={seed}", *_fitting(mine.recipe or spec.recipe, overrides)]
    train = [*mllm, "train", mine.recipe or spec.recipe, *changes, "--output", str(folder), "--no-evaluate"]
    if any((folder / name).exists() for name in ("run.json", "checkpoints", "final")):
        train.append("--resume")
    blind = ["--blind"] if mine.blind and seed == mine.seeds[0] else []
    asked = mine.checkpoint or str(folder / "final")
    to = ["--tasks", spec.task, "--output", str(folder / "eval"), "--generator", mine.generator]
    ask = [*mllm, "eval", "run", asked, *to, *evaluation, *blind]
    typer.echo(f"{arm}, seed {seed}: {mine.what}", err=True)
    with folder.with_name(f"{folder.name}.log").open("a", encoding="utf-8") as log:
        for command in (train, ask) if mine.checkpoint is None else (ask,):
            code = subprocess.run(command, stdout=log, stderr=log, env=dict(os.environ), check=False).returncode
            if code:
                return code
    return 0


def _fitting(recipe: str, overrides: list[str]) -> list[str]:
    """Those changes that concern a recipe: arms of other recipes may have other stages."""
    from mllm.recipe import load_recipe

    stages = {stage.name for stage in load_recipe(recipe).stages}
    return [o for o in overrides if not o.startswith("stages.") or o.split(".")[1] in stages]


def _check_stages(spec: Any, arms: list[str], overrides: list[str]) -> None:
    """Raises `ConfigError` for a change of a stage that no chosen arm has."""
    from mllm.errors import ConfigError

    recipes = {spec.arms[arm].recipe or spec.recipe for arm in arms if spec.arms[arm].checkpoint is None}
    for change in overrides:
        if recipes and not any(_fitting(recipe, [change]) for recipe in recipes):
            raise ConfigError(
                f"{change.partition('=')[0]}: no chosen arm has this stage ({', '.join(sorted(recipes))})"
            )


def _costs(spec: Any, folder: Path, overrides: list[str]) -> dict[str, Any]:
    """What a picture or clip costs each arm that is trained and finished; counted once, kept beside the run."""
    from mllm.eval.studies.arms import Cost, run_folder

    found = {}
    for name, arm in spec.arms.items():
        run = run_folder(folder, name, arm.seeds[0])
        kept = run / "cost.json"
        if arm.checkpoint is not None or not (run / "eval" / "results.json").is_file():
            continue
        cost = json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() else {}
        if "frames" not in cost:  # or counted before clips were
            from mllm.recipe import load_recipe
            from mllm.train.preflight.picture_cost import picture_cost

            own = arm.recipe or spec.recipe
            cost = picture_cost(load_recipe(own, [*arm.overrides, *_fitting(own, overrides)]))
            kept.write_text(json.dumps(cost) + "\n", encoding="utf-8")
        found[name] = Cost(**cost)
    return found


def add_to(app: typer.Typer) -> None:
    """Register the verb."""
    app.command()(study)
