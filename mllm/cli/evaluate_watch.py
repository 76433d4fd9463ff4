"""``mllm eval watch / sensitivity / budgets / mine / attack``: scores over a run, under changes that should not matter, at fewer visual
tokens, and of encoders alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mllm.cli import arguments
from mllm.cli.evaluate_studies import Data, finish, folders, listed, say_aloud


def watch(
    run: Annotated[Path, typer.Argument(help="A run's folder, such as runs/my; training may be under way.")],
    tasks: Annotated[str, typer.Option(help="Tasks or suites, comma separated; see `mllm list tasks`.")],
    limit: Annotated[int | None, typer.Option(help="Only N samples of each task, spread evenly over it.")] = None,
    once: Annotated[bool, typer.Option("--once", help="Evaluate what is there and stop.")] = False,
    interval: Annotated[float, typer.Option(help="Seconds between looks.")] = 30.0,
    until: Annotated[str, typer.Option(help="Stop when this checkpoint has been evaluated.")] = "final",
    output: Annotated[
        Path | None, typer.Option(help="Folder for results and curve.html; default <run>/eval/watch.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Prompts per generation batch.")] = 8,
    data: Data = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 …; default: the GPU when there is one.")] = None,
) -> None:
    """Evaluate each checkpoint of a run as it appears, and draw the curve: stages of ours, checkpoints of a Hugging Face trainer.

    Stopped, the same command goes on. Weights that appear again under another name are not evaluated again.

    [dim]mllm eval watch runs/my --tasks quick --limit 200 --device cuda:1[/]
    """
    arguments.dtype(dtype, auto=False)
    arguments.device(device)
    arguments.at_least(batch_size, 1, "--batch-size")
    arguments.tasks(listed(tasks) or [])
    arguments.folder_of(run, "a run, such as runs/my")
    from mllm.eval.run import run_eval
    from mllm.eval.settings import EvalSettings
    from mllm.eval.studies.study import print_study
    from mllm.eval.studies.watch import watch as watch_run

    def evaluate(checkpoint: Path, folder: Path) -> None:
        settings = EvalSettings(
            output_dir=folder, limit=limit, batch_size=batch_size, data_dirs=folders(data), dtype=dtype, device=device
        )
        run_eval(str(checkpoint), listed(tasks) or [], settings)

    print_study(watch_run(run, evaluate, output=output, interval=interval, once=once, until=until, say=say_aloud))
    typer.echo(str((output or run / "eval" / "watch") / "curve.html"))


def sensitivity(
    checkpoint: Annotated[
        str, typer.Argument(help="A checkpoint folder or hub id; with --base-url, the model's name there.")
    ],
    tasks: Annotated[str, typer.Option(help="Tasks or suites, comma separated; see `mllm list tasks`.")],
    ways: Annotated[
        str, typer.Option(help="wording: five ways to ask; options: other orders; resize and jpeg: the pictures.")
    ] = "wording,options,resize,jpeg",
    limit: Annotated[int | None, typer.Option(help="Only N samples of each task, spread evenly over it.")] = None,
    output: Annotated[Path | None, typer.Option(help="Folder of the run; default <checkpoint>/../eval.")] = None,
    batch_size: Annotated[int, typer.Option(help="Prompts per generation batch.")] = 8,
    base_url: Annotated[str | None, typer.Option(help="Ask a server instead: its address up to /v1.")] = None,
    resume: Annotated[bool, typer.Option(help="Keep answers that are already there.")] = True,
    data: Data = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 …; default: the GPU when there is one.")] = None,
) -> None:
    """How much does the score hang on what should not matter? The share of verdicts that flip, beside the score.

    Thirteen more runs of the benchmark with all ways: start with --limit.

    [dim]mllm eval sensitivity runs/demo/final --tasks demo_charts --limit 50 --ways wording,jpeg[/]
    """
    if not base_url:
        arguments.checkpoint(checkpoint)
    arguments.dtype(dtype, auto=False)
    arguments.device(device)
    arguments.at_least(batch_size, 1, "--batch-size")
    arguments.tasks(listed(tasks) or [])
    from mllm.eval.checkpoint import open_generator
    from mllm.eval.studies.sensitivity import run_sensitivity, variations

    list(variations(listed(ways) or []))  # a misspelt way is found before the model is loaded
    folder = output or (Path("runs/eval") / Path(checkpoint).name if base_url else Path(checkpoint).parent / "eval")
    generator = open_generator(
        checkpoint,
        kind="openai" if base_url else "hf",
        batch_size=batch_size,
        dtype=dtype,
        device=device,
        base_url=base_url,
    )
    study = run_sensitivity(
        generator, listed(tasks) or [], folder, ways=listed(ways) or [], limit=limit, data=folders(data), resume=resume
    )
    finish(study, folder)


def budgets(
    checkpoint: Annotated[str, typer.Argument(help="A checkpoint folder of this toolkit.")],
    tasks: Annotated[str, typer.Option(help="Tasks or suites, comma separated; see `mllm list tasks`.")],
    tokens: Annotated[
        str | None,
        typer.Option(
            help="Most visual tokens of a picture, comma separated; default: all that it takes, a half, a quarter, an eighth."
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Only N samples of each task, spread evenly over it.")] = None,
    output: Annotated[Path | None, typer.Option(help="Folder of the run; default <checkpoint>/../eval.")] = None,
    batch_size: Annotated[int, typer.Option(help="Prompts per generation batch.")] = 8,
    resume: Annotated[bool, typer.Option(help="Keep answers that are already there.")] = True,
    data: Data = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 …; default: the GPU when there is one.")] = None,
) -> None:
    """What do visual tokens buy? One model's score at several numbers of them, as a table that its model card shows.

    For models whose number is chosen after training: views tiles and native, connectors resampler and average_pool, encoder
    lookupvit. `mllm push` puts the table into the model card.

    [dim]mllm eval budgets runs/tiles_demo/native/final --tasks tiles_demo --tokens 64,36,16,4[/]
    """
    arguments.checkpoint(checkpoint)
    arguments.dtype(dtype, auto=False)
    arguments.device(device)
    arguments.at_least(batch_size, 1, "--batch-size")
    arguments.tasks(listed(tasks) or [])
    wanted = _numbers(tokens)
    from mllm.eval.checkpoint import load_model
    from mllm.eval.studies.budgets import run_budgets

    folder = output or Path(checkpoint).parent / "eval"
    model, processor = load_model(checkpoint, dtype=dtype, device=device)
    study = run_budgets(
        model, processor, listed(tasks) or [], folder, tokens=wanted, limit=limit, batch_size=batch_size, data=folders(data),
        resume=resume, say=say_aloud,
    )  # fmt: skip
    finish(study, folder)


def _numbers(text: str | None) -> list[int] | None:
    """Comma separated whole numbers of 1 or more. Raises `ConfigError`."""
    from mllm.errors import ConfigError

    found = listed(text)
    if wrong := [word for word in found or [] if not word.isdigit() or int(word) < 1]:
        raise ConfigError(f"--tokens {wrong[0]}: expected whole numbers of 1 or more, comma separated, e.g. 64,36,16,4")
    return None if found is None else [int(word) for word in found]


def mine(
    pictures: Annotated[
        Path | None, typer.Argument(help="Folder of pictures to look for pairs in.", show_default=False)
    ] = None,
    encoders: Annotated[
        str, typer.Option(help="Two or more, comma separated: of `mllm list encoders`, a YAML file, or a checkpoint.")
    ] = "clip-vit-l-14-336,dinov2-l",
    mmvp: Annotated[
        Path | None,
        typer.Option(help="Measure the encoders on the pairs of this MMVP folder instead.", show_default=False),
    ] = None,
    alike: Annotated[float, typer.Option(help="Cosine from which an encoder takes two pictures for alike.")] = 0.95,
    unlike: Annotated[float, typer.Option(help="Cosine up to which another tells them apart.")] = 0.6,
    most: Annotated[int, typer.Option(help="Pairs to keep, the widest differences first.")] = 500,
    output: Annotated[
        Path, typer.Option(help="Folder for pairs.html, pairs.jsonl, Questions.csv and features.")
    ] = Path("runs/mine"),
    batch_size: Annotated[int, typer.Option(help="Pictures at a time.")] = 16,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 …; default: the GPU when there is one.")] = None,
) -> None:
    """Find pictures that one encoder takes for alike and another tells apart, as MMVP was made: where a second encoder can help.

    Write a question for each pair into Questions.csv and ask models with `--tasks mmvp --data mmvp=<output>`.

    [dim]mllm eval mine photos/ --encoders clip-vit-l-14-336,dinov2-l[/]
    """
    arguments.device(device)
    arguments.at_least(batch_size, 1, "--batch-size")
    arguments.at_least(most, 1, "--most")
    for place, what in ((pictures, "a folder with pictures"), (mmvp, "the folder of MMVP's files")):
        if place is not None:
            arguments.folder_of(place, what)
    from mllm.eval.studies.mine import run_mine
    from mllm.eval.studies.study import print_study

    study = run_mine(
        listed(encoders) or [], output, pictures=pictures, mmvp=mmvp, alike=alike, unlike=unlike, most=most,
        batch_size=batch_size, device=device, say=say_aloud,
    )  # fmt: skip
    print_study(study)


def attack(
    pictures: Annotated[Path, typer.Argument(help="Folder of pictures; they are changed in memory and never written.")],
    encoders: Annotated[
        str,
        typer.Option(help="Comma separated: of `mllm list encoders`, a YAML file, or a checkpoint folder of your own."),
    ] = "clip-vit-l-14-336,dinov2-l",
    epsilon: Annotated[float, typer.Option(help="Largest change of a pixel, in 255ths (at most 8).")] = 2.0,
    steps: Annotated[int, typer.Option(help="Gradient steps (at most 50).")] = 5,
    limit: Annotated[int, typer.Option(help="Pictures.")] = 64,
    seed: Annotated[int, typer.Option(help="Of the start and of the noise it is compared with.")] = 0,
    output: Annotated[Path, typer.Option(help="Folder for attack.json and attack.md.")] = Path("runs/attack"),
    batch_size: Annotated[int, typer.Option(help="Pictures at a time.")] = 8,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 …; default: the GPU when there is one.")] = None,
) -> None:
    """How far do changes too small to see move an encoder's features, and do they fool another encoder too?

    Each encoder is attacked alone, and all of them by one change (dSVA's question: do a contrastive and a masked encoder fall together?).
    Noise of the same size stands beside it. For encoders that you run yourself.

    [dim]mllm eval attack photos/ --encoders runs/demo/final --epsilon 2[/]
    """
    arguments.device(device)
    arguments.at_least(batch_size, 1, "--batch-size")
    arguments.at_least(limit, 2, "--limit")
    arguments.folder_of(pictures, "a folder with pictures")
    from mllm.eval.studies.attack import AttackSettings, run_attack
    from mllm.eval.studies.study import print_study

    settings = AttackSettings(epsilon=epsilon, steps=steps, seed=seed, batch_size=batch_size)
    print_study(run_attack(listed(encoders) or [], output, pictures, settings, limit=limit, device=device))


def add_to(group: typer.Typer) -> None:
    """Register the five verbs in ``mllm eval``."""
    group.command("watch")(watch)
    group.command("sensitivity")(sensitivity)
    group.command("budgets")(budgets)
    group.command("mine")(mine)
    group.command("attack")(attack)
