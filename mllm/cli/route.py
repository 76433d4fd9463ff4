"""``mllm route``: label data with the experts that help, and look at what a router chooses."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mllm.cli import arguments

route = typer.Typer(help="Routed vision experts: labels to train on, reports on what is chosen.", no_args_is_help=True)

_CHECKPOINT = Annotated[str, typer.Argument(help="A checkpoint folder, or a recipe whose run is finished.")]
_DATA = Annotated[str, typer.Argument(help="A dataset's or mixture's name, its YAML, or a json/jsonl file.")]
_DTYPE = Annotated[str, typer.Option(help="float32, bfloat16 or float16.")]
_DEVICE = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 …; default: the GPU when there is one.")]


@route.command("label")
def label(
    checkpoint: _CHECKPOINT,
    data: _DATA,
    output: Annotated[
        Path | None, typer.Option(help="Label file; default: beside the data, <file>.routing.jsonl.")
    ] = None,
    margin: Annotated[
        float, typer.Option(help="An expert helps when it lowers the loss (nats per token) by more than this.")
    ] = 0.05,
    top_k: Annotated[int | None, typer.Option(help="Most experts in a label; default: the router's own.")] = None,
    batch_size: Annotated[int, typer.Option(help="Samples at once.")] = 16,
    limit: Annotated[int | None, typer.Option(help="Only the first N samples of each dataset.")] = None,
    max_length: Annotated[int, typer.Option(help="Tokens of one sample, visual ones included.")] = 4096,
    dtype: _DTYPE = "float32",
    device: _DEVICE = None,
) -> None:
    """Measure every sample's loss without and with each expert; write which experts help. Started again, it goes on.

    A recipe's stage of [bold]kind: routing[/] with [bold]options: {labels: data}[/] trains the router on the result.
    [dim]mllm route label runs/routed_demo/final runs/routed_demo/data/train.jsonl[/]
    """
    _checked(checkpoint, data, dtype, device)
    from mllm.data.routing_labels import LabelFile, LabelRule, labels_path
    from mllm.errors import ConfigError
    from mllm.train.stages.routing.losses import label_source

    sources = _sources(data)
    if output is not None and len(sources) > 1:
        raise ConfigError(
            f"--output names one file, but {data} has {len(sources)} datasets; leave it out, or label them one by one"
        )
    model, processor = _open(checkpoint, dtype, device)
    for source, rows in sources:
        path = label_source(
            model,
            processor,
            source,
            output or labels_path(source),
            rule=LabelRule(margin=margin, top_k=top_k),
            num_rows=min(rows, limit or rows),
            batch_size=batch_size,
            max_length=max_length,
            made_by=str(checkpoint),
        )
        found = [tuple(entry["experts"]) for entry in LabelFile(path).rows.values() if entry.get("losses")]
        counts = {names: found.count(names) for names in sorted(set(found))}
        typer.echo(f"{path}: {len(found)} samples")
        for names, count in counts.items():
            typer.echo(f"  {', '.join(names) or 'none':<30} {count:>7}  {count / len(found):.1%}")


@route.command("report")
def report(
    checkpoint: _CHECKPOINT,
    data: _DATA,
    tasks: Annotated[
        str | None,
        typer.Option(help="Also score these tasks with the router, each expert alone, all and none; comma separated."),
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option(
            help="With --tasks: checkpoint of a single-encoder model of about the same cost, to compare with."
        ),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Folder of the report; default <checkpoint>/../routing.")] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first N samples of each dataset and task.")] = None,
    batch_size: Annotated[int, typer.Option(help="Samples at once.")] = 16,
    budget: Annotated[int | None, typer.Option(help="Most experts per image.")] = None,
    threshold: Annotated[float | None, typer.Option(help="Experts below this probability do not run.")] = None,
    card: Annotated[
        bool, typer.Option(help="With --tasks: put the table of scores and costs into the checkpoint's README.md.")
    ] = True,
    dtype: _DTYPE = "float32",
    device: _DEVICE = None,
) -> None:
    """Which experts are chosen per dataset and question kind, agreement with labels beside the data, and the cost saved.

    [dim]mllm route report runs/routed_demo/final runs/routed_demo/data/test.jsonl --tasks routed_demo[/]
    """
    _checked(checkpoint, data, dtype, device)
    if baseline is not None:
        arguments.checkpoint(baseline)
    arguments.tasks(task.strip() for task in (tasks or "").split(",") if task.strip())
    import json

    from rich.console import Console

    from mllm.models.routing import check_choices
    from mllm.train.stages.routing.report import routing_report

    model, processor = _open(checkpoint, dtype, device)
    bank = getattr(model.model, "vision_tower", None)
    check_choices(bank.experts if bank is not None else (), None, budget, threshold)
    found = routing_report(
        model,
        processor,
        _sources(data),
        batch_size=batch_size,
        limit=limit,
        expert_budget=budget,
        expert_threshold=threshold,
    )
    folder = output or Path(_folder(checkpoint)).parent / "routing"
    folder.mkdir(parents=True, exist_ok=True)
    console = Console()
    console.print(found.table())
    result: dict[str, Any] = found.as_dict()
    if tasks:
        from mllm.cli.route_scores import score_routings

        names = [task.strip() for task in tasks.split(",") if task.strip()]
        result["scores"] = score_routings(
            model, processor, names, folder, report=found, limit=limit, batch_size=batch_size, baseline=baseline,
            card=Path(_folder(checkpoint)) if card else None, dtype=dtype, device=device,
        )  # fmt: skip
    path = folder / "report.json"
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False), encoding="utf-8")
    console.print(f"{path}", highlight=False, soft_wrap=True)


def _checked(checkpoint: str, data: str, dtype: str, device: str | None) -> None:
    arguments.checkpoint(_folder(checkpoint))
    arguments.training_data(data)
    arguments.dtype(dtype, auto=False)
    arguments.device(device)


def _folder(checkpoint: str) -> str:
    """The checkpoint itself, or the last one of a recipe's run."""
    from mllm import assets

    is_recipe = checkpoint.endswith((".yaml", ".yml")) or checkpoint in assets.available("recipes")
    if Path(checkpoint).is_dir() or not is_recipe:
        return checkpoint
    from mllm.errors import ConfigError
    from mllm.recipe import load_recipe

    recipe = load_recipe(checkpoint)
    for name in ["final", *reversed([stage.name for stage in recipe.stages])]:
        if (recipe.output_dir / name / "config.json").is_file():
            return str(recipe.output_dir / name)
    raise ConfigError(
        f"recipe {checkpoint} has no finished stage in {recipe.output_dir}; run mllm train {checkpoint}, or give a checkpoint"
    )


def _open(checkpoint: str, dtype: str, device: str | None) -> tuple[Any, Any]:
    from mllm.eval.checkpoint import load_model

    return load_model(_folder(checkpoint), dtype=dtype, device=device)


def _sources(data: str) -> list[tuple[Any, int]]:
    from mllm.data.routing_labels import open_sources

    return open_sources(data)


def add_to(app: typer.Typer) -> None:
    """Register the group."""
    app.add_typer(route, name="route")
