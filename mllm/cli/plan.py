"""``mllm plan``: what a recipe will cost and what is wrong with it, before any GPU is paid for."""

from __future__ import annotations

from typing import Annotated

import typer


def plan(
    recipe: Annotated[str, typer.Argument(help="A recipe's name (`mllm recipes ls`) or a YAML file.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Changes as key.sub=value, the same as for `mllm train`.", show_default=False),
    ] = None,
    processes: Annotated[int, typer.Option(help="Planned processes, one per GPU; ZeRO shares memory over them.")] = 1,
    data: Annotated[
        bool, typer.Option(help="Look at the data that are on this machine: lengths, truncation, steps.")
    ] = True,
    peak: Annotated[
        float, typer.Option(help="Dense bf16 peak of one GPU in TFLOP/s that times are stated at (989: H100, H200).")
    ] = 989.0,
    mfu: Annotated[float, typer.Option(help="Share of that peak which the language model reaches.")] = 0.45,
    memory: Annotated[
        float | None, typer.Option(help="GPU memory in GB; a stage that does not fit is a hazard and exit code 1.")
    ] = None,
) -> None:
    """What a recipe will cost, and what is wrong with it; no GPU, no weights, seconds.

    Shapes of every join, what learns in each stage and at which rate, token lengths of the data, memory of one GPU by part,
    operations, time, disk, and hazards. Try a change before you pay for it:

    [dim]mllm plan llava_1_5 stages.sft.engine=zero2 stages.sft.batch_size=4 --processes 8 --memory 80[/]
    """
    from rich.console import Console

    from mllm.errors import ConfigError
    from mllm.recipe import load_recipe

    if processes < 1 or peak <= 0 or not 0 < mfu <= 1:
        raise ConfigError("--processes is at least 1, --peak is positive, and --mfu is a share between 0 and 1")
    loaded = load_recipe(recipe, overrides)
    from mllm.train.preflight.plan import plan_recipe
    from mllm.train.preflight.plan_report import plan_tables, too_large
    from mllm.train.preflight.tokenizer_plan import plan_tokenizer

    planner = plan_recipe if loaded.model.language_model is not None else plan_tokenizer
    planned = planner(loaded, processes=processes, with_data=data)
    problems = too_large(planned, memory)
    console = Console()
    for item in plan_tables(planned, peak_flops=peak * 1e12, mfu=mfu, processes=processes):
        console.print(item, soft_wrap=isinstance(item, str), highlight=False)
    for line in problems:
        console.print(f"[red]! {line}", soft_wrap=True, highlight=False)
    if problems:
        raise typer.Exit(1)


def add_to(app: typer.Typer) -> None:
    """Register the verb."""
    app.command()(plan)
