"""``mllm eval``: score a checkpoint, rescore predictions, compare two runs."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from mllm.cli import arguments, evaluate_files, evaluate_studies, evaluate_watch
from mllm.cli.evaluate_studies import Data, folders, listed


class RunByDefault(TyperGroup):
    """``mllm eval CKPT --tasks …`` is ``mllm eval run CKPT --tasks …``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and not args[0].startswith("-") and args[0] not in self.commands:
            close = get_close_matches(args[0], self.commands, n=1, cutoff=0.75)
            if not close or Path(args[0]).exists():
                args = ["run", *args]
        return super().parse_args(ctx, args)


evaluation = typer.Typer(help="Scores that say which rule gave them.", no_args_is_help=True, cls=RunByDefault)


@evaluation.command("run")
def run(
    checkpoint: Annotated[str, typer.Argument(help="A checkpoint folder or hub id; for openai, the model's name.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            help="Changes to tasks, task.key.sub=value: chartqa.generation.max_new_tokens=64", show_default=False
        ),
    ] = None,
    *,
    tasks: Annotated[
        str, typer.Option("--tasks", "--suite", help="Tasks or suites, comma separated; see `mllm list tasks`.")
    ],
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
    blind_as: Annotated[
        str, typer.Option(help="What a blind run shows: gray (mid-gray of the same size) or none (no picture).")
    ] = "gray",
    check_batch: Annotated[
        bool, typer.Option("--check-batch", help="Run some items alone and in batches; report differences.")
    ] = False,
    resume: Annotated[bool, typer.Option(help="Keep predictions that are already there.")] = True,
    processes: Annotated[
        int, typer.Option(help="Processes that share the questions; one per GPU, or per core group on a CPU.")
    ] = 1,
    cache: Annotated[
        Path | None, typer.Option(help="Folder of answers by prompt, pictures, model and settings, shared by runs.")
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Stop at any row of a benchmark that cannot be used.")
    ] = False,
    data: Data = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 …; default: the GPU when there is one.")] = None,
    generator: Annotated[
        str,
        typer.Option(
            help="hf: in this process; vllm; openai: any compatible server; ocr: a text model reads what rapidocr finds."
        ),
    ] = "hf",
    base_url: Annotated[
        str | None, typer.Option(help="openai: the server's address up to /v1; the key comes from $OPENAI_API_KEY.")
    ] = None,
    concurrency: Annotated[int, typer.Option(help="openai: requests under way at once.")] = 8,
    picture_cache: Annotated[
        int,
        typer.Option(help="hf: MiB for visual tokens of pictures that are asked about again, over all tasks; 0: none."),
    ] = 1024,
    plan: Annotated[
        bool, typer.Option("--plan", help="Say what would be asked and about how long it takes, and stop.")
    ] = False,
    earlier: Annotated[
        list[Path] | None,
        typer.Option(help="Folders of earlier runs that tell how long this one takes (repeatable); default: --output."),
    ] = None,
    price: Annotated[
        float | None,
        typer.Option(help="What an hour of one process (a GPU) costs: what the run will cost is said first."),
    ] = None,
) -> None:
    """Generate answers and score them: predictions (one JSON line each), a table, Markdown and an HTML page.

    Killed or stopped, the same command goes on where it was. Nothing is scored by a judge, a key or the network.

    [dim]mllm eval run runs/demo/final --tasks demo_charts,demo_digits --blind[/]

    [dim]mllm eval run CKPT --tasks charts --data chartqa=/data/ChartQA --processes 8 --dtype bfloat16[/]
    """
    from mllm.errors import ConfigError
    from mllm.eval.generators import GENERATORS

    arguments.one_of(generator, GENERATORS, "--generator")
    if generator in ("hf", "vllm"):  # a plug-in's own takes what it likes
        arguments.checkpoint(checkpoint, whole=generator == "vllm")
    elif generator == "openai" and not base_url:
        raise ConfigError("--generator openai: where is the server? --base-url http://localhost:8000/v1")
    arguments.dtype(dtype, auto=False)
    arguments.device(device)
    arguments.at_least(picture_cache, 0, "--picture-cache")
    for value, option in ((limit, "--limit"), (batch_size, "--batch-size"), (processes, "--processes")):
        arguments.at_least(value, 1, option)
    if plan:
        _show_plan(
            listed(tasks) or [],
            overrides or (),
            folders(data),
            limit,
            processes,
            earlier or ([output] if output else []),
            price,
            blind,
        )
        return
    from mllm.eval.run import run_eval
    from mllm.eval.settings import EvalSettings

    if blind_as not in ("gray", "none"):
        raise ConfigError(f"--blind-as {blind_as}: expected gray or none")
    run_eval(
        checkpoint,
        listed(tasks) or [],
        EvalSettings(
            output_dir=output or (Path("runs/eval") / Path(checkpoint).name if generator == "openai" else None),
            limit=limit,
            ids=listed(ids),
            batch_size=batch_size,
            blind=blind_as if blind else False,  # type: ignore[arg-type]
            check_batch=check_batch,
            resume=resume,
            data_dirs=folders(data),
            dtype=dtype,
            device=device,
            generator=generator,
            base_url=base_url,
            concurrency=concurrency,
            picture_cache=picture_cache,
            earlier=earlier or (),
            price=price,
            cache_dir=cache,
            overrides=overrides or (),
            strict=strict,
            processes=processes,
        ),
    )


def _show_plan(
    tasks: list[str],
    overrides: Sequence[str],
    data: dict[str, str],
    limit: int | None,
    processes: int,
    earlier: list[Path],
    price: float | None,
    blind: bool,
) -> None:
    from rich.console import Console

    from mllm.eval.planning import HEADINGS, plan_rows, plan_tasks
    from mllm.eval.run import overridden_tasks
    from mllm.eval.studies.study import print_table

    specs = overridden_tasks(tasks, overrides)
    plans = plan_tasks(specs, data=data, limit=limit, earlier=earlier, processes=processes, blind=blind)
    headings, hour = (HEADINGS, None) if price is None else ((*HEADINGS, "cost, about"), price * processes)
    print_table(Console(), headings, plan_rows(plans, hour), (0,))
    if not earlier:
        typer.echo("No earlier run tells the time: --earlier FOLDER, or --output of one.")


@evaluation.command("rescore")
def rescore(
    predictions: Annotated[
        Path, typer.Argument(help="A predictions .jsonl of an earlier run, or its folder: all of them.")
    ],
    metrics: Annotated[str | None, typer.Option(help="Other metrics than the task's own, comma separated.")] = None,
) -> None:
    """Score stored predictions again, without a model: new scores go into the file, the table to the console."""
    from mllm.errors import DataError
    from mllm.eval.predictions import header_path
    from mllm.eval.report.show import print_results
    from mllm.eval.run import rescore as rescore_file

    files = [predictions]
    if predictions.is_dir():
        files = [path for path in sorted(predictions.glob("*.jsonl")) if header_path(path).is_file()]
        if not files:
            raise DataError(f"{predictions}: holds no predictions of an evaluation (TASK.jsonl beside TASK.run.json)")
    print_results({path.stem: rescore_file(path, metrics=listed(metrics)) for path in files})


@evaluation.command("compare")
def compare(
    first: Annotated[Path, typer.Argument(help="Predictions folder or file of model A.")],
    second: Annotated[Path, typer.Argument(help="The same tasks, answered by model B.")],
    seed: Annotated[int, typer.Option(help="Seed of the bootstrap.")] = 0,
) -> None:
    """Paired comparison on matched ids: difference, interval, p value, Holm over tasks."""
    from mllm.eval.report.show import compare as compare_runs

    compare_runs(first, second, seed=seed)


@evaluation.command("report")
def report(
    folder: Annotated[Path, typer.Argument(help="Folder of an earlier run.")],
    against: Annotated[
        list[Path] | None,
        typer.Option(
            help="Folders of other runs of the same tasks: scores by how many of them are right (repeatable)."
        ),
    ] = None,
) -> None:
    """Make a run's report anew: its predictions under the metrics as they are now, with the studies beside them.

    [dim]mllm eval report runs/my/eval --against runs/a/eval --against runs/b/eval[/]
    """
    from mllm.eval.run import report_again

    report_again(folder, against=against or ())


def add_to(app: typer.Typer) -> None:
    """Register the group."""
    evaluate_studies.add_to(evaluation)
    evaluate_files.add_to(evaluation)
    evaluate_watch.add_to(evaluation)
    app.add_typer(evaluation, name="eval")
