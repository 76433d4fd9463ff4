"""``mllm parity``: does a checkpoint answer the same everywhere?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from mllm.cli import arguments


def parity(
    checkpoint: Annotated[str, typer.Argument(help="A checkpoint folder, or a PEFT adapter trained on one.")],
    cases: Annotated[
        int,
        typer.Option(
            help="Prompts to compare: 0 to 5 pictures (clips and scenes), odd sizes, short and long text, several turns."
        ),
    ] = 12,
    tokens: Annotated[int, typer.Option(help="Tokens to generate for each.")] = 24,
    image: Annotated[
        list[Path] | None, typer.Option("--image", "-i", help="Own pictures (repeatable), all in one prompt.")
    ] = None,
    question: Annotated[str, typer.Option("--question", "-q", help="The question to own pictures.")] = "What is shown?",
    dtype: Annotated[str, typer.Option(help="float32 (exact), bfloat16 or float16.")] = "float32",
    device: Annotated[
        str | None, typer.Option(help="Where transformers runs: cpu, cuda; default: the GPU when there is one.")
    ] = None,
    vllm: Annotated[bool, typer.Option(help="Compare vLLM too.")] = True,
    unmerged: Annotated[
        bool, typer.Option(help="For an adapter on the language model: let vLLM serve it beside the base, not merged.")
    ] = False,
    backend: Annotated[str, typer.Option(help="vLLM's model: auto, native or transformers.")] = "auto",
    memory: Annotated[
        str | None, typer.Option(help="What vLLM may take of the GPU's or machine's memory: 0.5, 50% or 8GB.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Also write the result as JSON.")] = None,
) -> None:
    """Compare trainer-style forward, generate, merged adapter and vLLM: prompt, pixels, tokens, log probabilities; of a model with heads
    masks to the pixel, probabilities to 1e-4, edited pictures.

    Exits with 1 when anything differs from [bold]generate[/]. Log probabilities differ by rounding: in float32 by less than 1e-4.
    """
    arguments.checkpoint(checkpoint, whole=vllm)
    arguments.dtype(dtype, auto=False)
    arguments.device(device)
    arguments.one_of(backend, ("auto", "native", "transformers"), "--backend")
    arguments.pictures(image)
    arguments.at_least(cases, 1, "--cases")
    arguments.at_least(tokens, 1, "--tokens")
    from rich.console import Console
    from rich.table import Table

    from mllm.serve.head_parity import HEAD, OWN
    from mllm.serve.parity import ALONE, Case, run_parity
    from mllm.types import IMAGE_MARK, Turn

    own = None
    if image:
        own = [
            Case(
                OWN,
                [Turn("user", "\n".join([IMAGE_MARK] * len(image)) + "\n" + question)],
                list(_open(image)),
            )
        ]
    differences, moved = run_parity(
        checkpoint,
        own,
        num_cases=cases,
        num_tokens=tokens,
        dtype=dtype,
        device=device,
        vllm=vllm,
        model_impl={"native": "vllm"}.get(backend, backend),
        memory=memory,
        unmerged=unmerged,
    )
    console = Console()
    table = Table(
        "case",
        "path",
        "tokens",
        "first other token",
        "largest log-probability gap",
        "other differences",
        title=checkpoint,
    )
    for item in differences:
        colour = "green" if item.same else "red"
        first = "-" if item.first is None else str(item.first)
        table.add_row(
            item.case,
            item.path,
            str(item.num_tokens),
            f"[{colour}]{first}[/]",
            f"{item.gap:.1e}",
            ", ".join(item.notes),
        )
    console.print(table)
    for name, value in moved.items():
        if name.startswith(HEAD):
            console.print(f"{name}: answers {value:.0f} cases")
            if value == 0:
                console.print(
                    f"[yellow]{name}: answers nothing here, so nothing here tests it; ask what it answers by -i and -q[/]"
                )
            continue
        changed = "is what" if name.endswith(ALONE) else "another picture"
        console.print(f"encoder {name}: {changed} moves a logit by up to {value:.3g}")
        if value == 0:
            console.print(f"[yellow]encoder {name}: moves no logit, so nothing here tests it[/]")
    different = sum(not item.same for item in differences)
    console.print(f"{len(differences) - different} of {len(differences)} comparisons equal to generate")
    if output is not None:
        output.write_text(
            json.dumps({"differences": [vars(d) for d in differences], "encoders": moved}, indent=1), encoding="utf-8"
        )
    if different:
        raise typer.Exit(1)


def _open(paths: list[Path]):
    from mllm.processing.images import load_image

    return (load_image(path, where=f"--image {path}") for path in paths)


def add_to(app: typer.Typer) -> None:
    """Register the verb."""
    app.command()(parity)
