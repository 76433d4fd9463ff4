"""``mllm eval``: score a checkpoint, rescore predictions, compare two runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

evaluation = typer.Typer(help="Scores that say which rule gave them.", invoke_without_command=True)


@evaluation.command("run")
def run(
    checkpoint: Annotated[str, typer.Argument(help="A checkpoint folder (or hub id).")],
    tasks: Annotated[str, typer.Option(help="Tasks or suites, comma separated; see `mllm list tasks`.")],
    output: Annotated[
        Path | None, typer.Option(help="Folder for predictions and reports; default <checkpoint>/../eval.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="Only N samples of each task, spread evenly over it; groups stay whole.")
    ] = None,
    ids: Annotated[str | None, typer.Option(help="Only these sample ids, comma separated.")] = None,
    batch_size: Annotated[int, typer.Option(help="Prompts per generation batch; never changes answers in fp32.")] = 8,
    blind: Annotated[
        bool, typer.Option("--blind", help="Also score the same prompts with every image blanked.")
    ] = False,
    check_batch: Annotated[
        bool, typer.Option("--check-batch", help="Run some items alone and in batches; report differences.")
    ] = False,
    resume: Annotated[bool, typer.Option(help="Keep predictions that are already there.")] = True,
    data: Annotated[list[str] | None, typer.Option(help="Where a task's files are: task=/folder (repeatable).")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 …; default: the GPU when there is one.")] = None,
) -> None:
    """Generate answers and score them: predictions (one JSON line each), a table, Markdown and an HTML page.

    [dim]mllm eval run runs/demo/final --tasks demo_charts,demo_digits --blind[/]
    """
    from mllm.errors import ConfigError
    from mllm.eval.runner import run_eval

    folders: dict[str, str] = {}
    for item in data or []:
        name, separator, folder = item.partition("=")
        if not separator:
            raise ConfigError(f"--data {item}: expected task=/folder")
        folders[name] = folder
    run_eval(
        checkpoint,
        [task.strip() for task in tasks.split(",") if task.strip()],
        output_dir=output or Path(checkpoint).parent / "eval",
        limit=limit,
        ids=[item.strip() for item in ids.split(",")] if ids else None,
        batch_size=batch_size,
        blind=blind,
        check_batch=check_batch,
        resume=resume,
        data_dirs=folders,
        dtype=dtype,
        device=device,
    )


@evaluation.command("rescore")
def rescore(
    predictions: Annotated[Path, typer.Argument(help="A predictions .jsonl of an earlier run.")],
    metrics: Annotated[str | None, typer.Option(help="Other metrics than the task's own, comma separated.")] = None,
) -> None:
    """Score stored predictions again, without a model."""
    from mllm.eval.runner import rescore as rescore_file

    rescore_file(predictions, metrics=[m.strip() for m in metrics.split(",")] if metrics else None)


@evaluation.command("compare")
def compare(
    first: Annotated[Path, typer.Argument(help="Predictions folder or file of model A.")],
    second: Annotated[Path, typer.Argument(help="The same tasks, answered by model B.")],
    seed: Annotated[int, typer.Option(help="Seed of the bootstrap.")] = 0,
) -> None:
    """Paired comparison on matched ids: difference, interval, p value, Holm over tasks."""
    from mllm.eval.report import compare as compare_runs

    compare_runs(first, second, seed=seed)


def add_to(app: typer.Typer) -> None:
    """Register the group."""
    app.add_typer(evaluation, name="eval")
