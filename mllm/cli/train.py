"""``mllm train``: run a recipe's stages."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mllm.cli.common_options import Hostfile, NodeRank, Nodes, Rendezvous


def train(
    recipe: Annotated[str, typer.Argument(help="A recipe's name (`mllm recipes ls`) or a YAML file.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            help="Changes as key.sub=value; a stage by its name: stages.sft.batch_size=4", show_default=False
        ),
    ] = None,
    processes: Annotated[
        int, typer.Option(help="Processes on this machine; one per GPU, or per core group on a CPU.")
    ] = 1,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last complete checkpoint; finished stages are kept.")
    ] = False,
    extend: Annotated[
        bool,
        typer.Option(
            "--extend",
            help="As --resume, and the last stage may be longer than it was: it goes on from its optimizer's state, which "
            "stages.<name>.keep_state=true keeps when a stage is done.",
        ),
    ] = False,
    output: Annotated[Path | None, typer.Option(help="Output folder; default runs/<recipe>.")] = None,
    profile: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Record so many steps of every stage with the profiler: <output>/profile. Default: two steps of a stage of 50 or "
            "more, told in a line; 0: none.",
            show_default=False,
        ),
    ] = None,
    evaluate: Annotated[bool, typer.Option(help="Run the recipe's evaluation after the last stage.")] = True,
    nodes: Nodes = None,
    node_rank: NodeRank = None,
    rendezvous: Rendezvous = None,
    hostfile: Hostfile = None,
) -> None:
    """Train a recipe, stage by stage, into a Hugging Face checkpoint at <output>/final.

    [dim]mllm train demo stages.sft.steps=20 --output runs/try[/]

    On several machines, the same on each but for the number (srun, torchrun and deepspeed work too):

    [dim]mllm train my.yaml --processes 8 --nodes 2 --node-rank 0 --rendezvous node0:29500 --output /shared/runs/my[/]
    """
    from mllm import progress
    from mllm.install import uncompiled
    from mllm.machines import find_machines
    from mllm.recipe import load_recipe

    machines = find_machines(
        nodes=nodes, node_rank=node_rank, rendezvous=rendezvous, hostfile=hostfile, processes=processes
    )
    progress.begin()
    loaded = load_recipe(recipe, overrides)
    progress.tell(f"recipe {loaded.name}: {', '.join(stage.name for stage in loaded.stages)}")
    if evaluate:
        from mllm.eval.task import load_tasks

        load_tasks(loaded.evaluation.tasks)  # a name that no task has is said now, not after the training
    with progress.phase("importing torch and transformers"):
        from mllm.train.run import run_recipe
    if (slow := uncompiled()) is not None:
        progress.tell(f"! {slow}")

    final = run_recipe(
        loaded,
        processes=processes,
        resume=resume,
        output=output,
        profile=profile,
        extend=extend,
        machines=machines,
    )
    typer.echo(f"checkpoint: {final}")
    if evaluate and loaded.evaluation.tasks and (machines is None or machines.node_rank == 0):
        from mllm.eval.run import run_eval
        from mllm.eval.settings import EvalSettings

        run_eval(
            str(final),
            loaded.evaluation.tasks,
            EvalSettings(
                limit=loaded.evaluation.limit,
                batch_size=loaded.evaluation.batch_size,
                output_dir=Path(final).parent / "eval",
            ),
        )


def add_to(app: typer.Typer) -> None:
    """Register the verb."""
    app.command()(train)
