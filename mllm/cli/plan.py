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
    processes: Annotated[
        int,
        typer.Option(
            "--processes", "--gpus", help="Planned processes, one per GPU; engines but none share memory over them."
        ),
    ] = 1,
    nodes: Annotated[int, typer.Option(help="Machines that the GPUs are in.")] = 1,
    gpu: Annotated[
        str | None,
        typer.Option(
            help="Kind of GPU (h200, h100, a100): also predicts memory, step time and scaling of each engine.",
            show_default=False,
        ),
    ] = None,
    network: Annotated[
        str | None,
        typer.Option(
            help="Between machines, with --gpu: the port of each GPU, as 400Gb, or ports of one machine, as 2x200Gb.",
            show_default=False,
        ),
    ] = None,
    rate: Annotated[
        float | None,
        typer.Option(
            help="With --gpu: TFLOP/s that one GPU does forward and backward, packed and compiled; default: measured at 7B.",
            show_default=False,
        ),
    ] = None,
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

    [dim]mllm plan llava_1_5 stages.sft.engine=sharded stages.sft.batch_size=4 --processes 8 --memory 80[/]

    GPUs that are not here, with a table for 8, 64 and 512 of them:

    [dim]mllm plan llava_1_5 --gpus 64 --nodes 8 --gpu h200 --network 400Gb[/]
    """
    from rich.console import Console

    from mllm.errors import ConfigError
    from mllm.recipe import load_recipe

    if processes < 1 or peak <= 0 or not 0 < mfu <= 1:
        raise ConfigError("--processes is at least 1, --peak is positive, and --mfu is a share between 0 and 1")
    if gpu is None and (nodes != 1 or network is not None or rate is not None):
        raise ConfigError("--nodes, --network and --rate are for a kind of GPU that is not here; name it: --gpu h200")
    if nodes < 1 or processes % nodes:
        raise ConfigError(f"--gpus {processes} --nodes {nodes}: every machine has the same number of GPUs")
    if nodes > 1 and network is None:
        raise ConfigError(
            "--nodes: how fast is the network between them? --network 400Gb (a port for each GPU), or 2x200Gb"
        )
    loaded = load_recipe(recipe, overrides)
    from mllm.train.preflight.scaling import Cluster, find_gpu, parse_network

    kind = find_gpu(gpu) if gpu is not None else None
    ports = parse_network(network or "400Gb", processes // nodes)
    if kind is not None:
        memory = memory or kind.memory / 1e9
    from mllm.recipe_of_stage import parts_of_run
    from mllm.train.preflight.plan import plan_recipe
    from mllm.train.preflight.plan_report import plan_tables, scaling_tables, too_large
    from mllm.train.preflight.tokenizer_plan import decoder_bytes_of, plan_tokenizer
    from mllm.train.stages.diffusion.model import PART as DECODER

    console, problems, decoder_bytes = Console(), [], None
    for part in parts_of_run(loaded, loaded.output_dir):
        if part.model.language_model is None:
            planned = plan_tokenizer(part, processes=processes, with_data=data)
            decoder_bytes = 4 * sum(n for name, n in planned.parameters.items() if name.startswith(DECODER))
        else:
            planned = plan_recipe(
                part, processes=processes, with_data=data, gpu_memory=memory * 1e9 if memory else 80e9,
                decoder_bytes=decoder_bytes_of(part) if decoder_bytes is None else decoder_bytes,
            )  # fmt: skip
        problems += too_large(planned, memory)
        for item in plan_tables(planned, peak_flops=peak * 1e12, mfu=mfu, processes=processes):
            console.print(item, soft_wrap=isinstance(item, str), highlight=False)
        if kind is not None:
            cluster = Cluster(kind, processes, nodes, ports)
            for item in scaling_tables(planned, cluster, rate=rate * 1e12 if rate else None):
                console.print(item, soft_wrap=isinstance(item, str), highlight=False)
    for line in problems:
        console.print(f"[red]! {line}", soft_wrap=True, highlight=False)
    if problems:
        raise typer.Exit(1)


def add_to(app: typer.Typer) -> None:
    """Register the verb."""
    app.command()(plan)
