"""``mllm eval judge / ablate / stress / contamination``: what stands behind a score?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mllm.cli import arguments

Data = Annotated[list[str] | None, typer.Option("--data", help="Where a task's files are: task=/folder (repeatable).")]


def folders(data: list[str] | None) -> dict[str, str]:
    """``task=/folder`` options as a mapping. Raises `ConfigError`."""
    from mllm.errors import ConfigError

    found: dict[str, str] = {}
    for item in data or []:
        name, separator, folder = item.partition("=")
        if not separator or not name or not folder:
            raise ConfigError(f"--data {item}: expected task=/folder")
        found[name] = folder
    return found


def there(path: Path, what: str) -> None:
    """Raises `ConfigError` when ``path`` does not exist."""
    from mllm.errors import ConfigError

    if not path.exists():
        raise ConfigError(f"{path}: no such file or folder; expected {what}")


def listed(text: str | None) -> list[str] | None:
    """Comma separated names; None when nothing is said."""
    names = [entry.strip() for entry in (text or "").split(",") if entry.strip()]
    return names or None


def say_aloud(text: str) -> None:
    typer.echo(text, err=True)


def finish(study: Any, folder: Path) -> None:
    """Print the study and put it into the folder's report, when there is a run to report."""
    from mllm.eval.predictions import iterate_files
    from mllm.eval.run import report_again
    from mllm.eval.studies.study import print_study

    print_study(study)
    written = [folder / f"{study.name}.md", folder / f"{study.name}.json"]
    if any(True for _ in iterate_files(folder)):
        report_again(folder, show=False)
        written += [folder / "report.md", folder / "report.html"]
    typer.echo(" · ".join(map(str, written)))


def ablate(
    checkpoints: Annotated[
        list[str],
        typer.Argument(help="A checkpoint folder of this toolkit; several, as CKPT or name=CKPT, stand side by side."),
    ],
    tasks: Annotated[str, typer.Option(help="Tasks or suites, comma separated; see `mllm list tasks`.")],
    control: Annotated[
        list[str] | None,
        typer.Option(
            help="A model trained without an encoder, to stand beside the masking: ENCODER=CKPT, or NAME:ENCODER=CKPT (repeatable)."
        ),
    ] = None,
    encoders: Annotated[
        str | None, typer.Option(help="Only these encoders or experts, comma separated; default: each one.")
    ] = None,
    modes: Annotated[
        str, typer.Option(help="drop: zeros; shuffle: another picture's features; mean: the benchmark's mean.")
    ] = "drop,shuffle,mean",
    limit: Annotated[int | None, typer.Option(help="Only N samples of each task, spread evenly over it.")] = None,
    batch_size: Annotated[int, typer.Option(help="Prompts per generation batch.")] = 8,
    output: Annotated[
        Path | None,
        typer.Option(help="Folder for the tables; default <checkpoint>/../eval, runs/ablations for several."),
    ] = None,
    data: Data = None,
    seed: Annotated[int, typer.Option(help="Seed of the bootstrap.")] = 0,
    resume: Annotated[bool, typer.Option(help="Keep answers that are already there.")] = True,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 …; default: the GPU when there is one.")] = None,
) -> None:
    """Is each encoder worth its cost? Ask everything again with one encoder masked, and compare on the same samples.

    Gives the score change with its interval for each encoder (or routed expert) and way of masking, latency and FLOPs per
    image, the effective rank of its features before the connector, and, with a router, who is chosen for which category.
    A video's frames shuffled, reversed or one in every place: mllm eval run --blind. Without a head or an encoder from training on: an
    arm of mllm study.
    Masking is not retraining: a model trained without the encoder learns to do without it, and the two rankings differ
    (arXiv 2606.03879). One run of the benchmark per encoder and mode: start with --limit. Killed or stopped, the same
    command goes on where it was.

    [dim]mllm eval ablate runs/demo/final --tasks demo_charts --limit 100[/]

    [dim]mllm eval ablate two=runs/a/final three=runs/b/final --tasks mmvp --control two:dinov2=runs/a_without/final[/]
    """
    from mllm.eval.studies.ablations import named_checkpoints, read_controls, run_ablations

    named = named_checkpoints(checkpoints)
    controls = read_controls(control or [], named)
    for place in (*named.values(), *(one.checkpoint for one in controls)):
        arguments.checkpoint(place)
    arguments.dtype(dtype, auto=False)
    arguments.device(device)
    arguments.tasks(listed(tasks) or [])
    from mllm.eval.studies.ablation_report import run_ablation

    options: dict[str, Any] = {
        "encoders": listed(encoders), "modes": listed(modes) or [], "limit": limit, "batch_size": batch_size, "data": folders(data),
        "seed": seed, "dtype": dtype, "device": device, "resume": resume, "progress": True, "say": say_aloud,
    }  # fmt: skip
    if len(named) > 1 or controls:
        folder = output or Path("runs/ablations")
        finish(run_ablations(named, listed(tasks) or [], folder, controls=controls, **options), folder)
        return
    (checkpoint,) = named.values()
    folder = output or Path(checkpoint).parent / "eval"
    finish(run_ablation(checkpoint, listed(tasks) or [], folder, **options), folder)


def stress(
    tasks: Annotated[list[str], typer.Argument(help="Tasks or suites; see `mllm list tasks`.")],
    scores: Annotated[
        Path | None,
        typer.Option(help="Predictions folder of a run: its scores are split by whether words alone answer."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="Folder for stress.md and .json; default: the --scores folder, else runs/stress."),
    ] = None,
    data: Data = None,
    limit: Annotated[int | None, typer.Option(help="Only N samples of each task, spread evenly over it.")] = None,
    folds: Annotated[int, typer.Option(help="Parts the benchmark is cut into; pictures stay whole.")] = 5,
    trees: Annotated[int, typer.Option(help="Trees of the forest.")] = 200,
    seed: Annotated[int, typer.Option(help="Seed of the forest.")] = 0,
) -> None:
    """How much of a benchmark can be answered without seeing? A text-only random forest, trained and tested on it.

    Needs no model and no GPU. Beside it stand guessing and always giving the commonest answer; what the forest gets
    above them, the questions and options give away. With --scores, a run's score is split into questions that words
    answer and questions that need seeing.

    [dim]mllm eval stress scienceqa mmmu --data scienceqa=/data/ScienceQA --scores runs/my/eval[/]
    """
    arguments.tasks(tasks)
    from mllm.eval.studies.stress_report import run_stress

    folder = output or scores or Path("runs/stress")
    study = run_stress(
        tasks,
        folder,
        data=folders(data),
        limit=limit,
        folds=folds,
        trees=trees,
        seed=seed,
        scores=scores,
        say=say_aloud,
    )
    finish(study, folder)


def contamination(
    train: Annotated[
        list[str],
        typer.Option(
            help="Mixture, dataset, json/jsonl file, or a checkpoint (all its stages' data); repeatable.",
            show_default=False,
        ),
    ],
    tasks: Annotated[str, typer.Option(help="Tasks or suites, comma separated; see `mllm list tasks`.")],
    scores: Annotated[
        Path | None, typer.Option(help="Predictions folder of a run, scored with and without the overlaps.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            help="Folder for contamination.md and .json; default: the --scores folder, else runs/contamination."
        ),
    ] = None,
    data: Data = None,
    images: Annotated[bool, typer.Option(help="Compare pictures too (reads every training picture).")] = True,
    max_distance: Annotated[int, typer.Option(help="Bits of 64 in which two pictures' hashes may differ.")] = 4,
    ngram: Annotated[int, typer.Option(help="Words in a run that both texts must share.")] = 8,
    min_share: Annotated[
        float, typer.Option(help="Share of a question's runs that one training text must hold.")
    ] = 0.5,
    limit: Annotated[int | None, typer.Option(help="Only the first N rows of each training dataset.")] = None,
    threads: Annotated[int, typer.Option(help="Threads that decode training pictures.")] = 4,
) -> None:
    """Were benchmark pictures or questions seen in training? Perceptual hashes and question n-grams, one pass.

    Every hit names both samples, so that it can be looked at. With --scores, each metric is given on all samples, without
    the overlapping ones, and on those alone, and the run's report gets the table.

    [dim]mllm eval contamination --train runs/demo/final --tasks demo_charts --scores runs/demo/eval[/]
    """
    for place in train:
        if Path(place).expanduser().is_dir():
            continue
        arguments.training_data(place)
    arguments.tasks(listed(tasks) or [])
    from mllm.eval.studies.contamination_report import run_contamination

    folder = output or scores or Path("runs/contamination")
    study = run_contamination(
        train,
        listed(tasks) or [],
        folder,
        data=folders(data),
        scores=scores,
        max_distance=max_distance,
        ngram=ngram,
        min_share=min_share,
        images=images,
        limit=limit,
        threads=threads,
    )
    finish(study, folder)


def judge(
    predictions: Annotated[Path, typer.Argument(help="Predictions folder or file of a run.")],
    judge: Annotated[
        str | None,
        typer.Option(help="The judge: a model's name at --base-url, or a checkpoint folder.", show_default=False),
    ] = None,
    base_url: Annotated[
        str | None, typer.Option(help="An OpenAI-compatible address up to /v1; the key comes from $OPENAI_API_KEY.")
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(help="A prompt of eval/judges or a file of that form; default: each task's own.")
    ] = None,
    tasks: Annotated[str | None, typer.Option(help="Only these tasks of the folder, comma separated.")] = None,
    hand: Annotated[
        Path | None, typer.Option(help="A CSV of hand verdicts (id, verdict) to measure the judges against.")
    ] = None,
    sheet: Annotated[
        int | None,
        typer.Option(help="Write a sheet of N random answers to fill in by hand, and stop.", show_default=False),
    ] = None,
    cache: Annotated[
        Path | None, typer.Option(help="Verdicts by content, shared by runs; default: in the folder.")
    ] = None,
    concurrency: Annotated[int, typer.Option(help="Requests under way at once.")] = 8,
    batch_size: Annotated[int, typer.Option(help="Prompts per batch of a checkpoint that judges.")] = 8,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 …; default: the GPU when there is one.")] = None,
) -> None:
    """Have a model judge a run's answers, where no exact rule gives the published score (opt-in; a run never asks one).

    Verdicts are kept by content, so a second call asks nothing twice and goes on where a judge went away. The report gets a
    chapter with each judge's name, version and prompt beside its number, the replies without a verdict, and the agreement
    (kappa) of judges with each other and with --hand.

    [dim]mllm eval judge runs/my/eval --judge gpt-4o-2024-05-13 --base-url https://api.openai.com/v1[/]

    [dim]mllm eval judge runs/my/eval --judge CKPT --tasks mmvet --hand hand.csv[/]
    """
    arguments.dtype(dtype, auto=False)
    arguments.device(device)
    there(predictions, "the predictions of a run")
    arguments.at_least(concurrency, 1, "--concurrency")
    arguments.at_least(batch_size, 1, "--batch-size")
    if sheet is not None:
        arguments.at_least(sheet, 1, "--sheet")
    if judge is not None and not base_url:
        arguments.checkpoint(judge)
    from mllm.eval.judging.run import run_judge

    study, folder = run_judge(
        predictions,
        judge,
        base_url=base_url,
        prompt=prompt,
        tasks=listed(tasks),
        hand=hand,
        sheet=sheet,
        cache_path=cache,
        concurrency=concurrency,
        batch_size=batch_size,
        dtype=dtype,
        device=device,
        say=say_aloud,
    )
    if study is None:
        return
    finish(study, folder)
    if judge is not None and any(each["missing"] and each["judge"].endswith(judge) for each in study.data["judged"]):
        raise typer.Exit(1)  # a script that goes on with the score would have none


def add_to(group: typer.Typer) -> None:
    """Register these verbs in ``mllm eval``."""
    group.command("judge")(judge)
    group.command("ablate")(ablate)
    group.command("stress")(stress)
    group.command("contamination")(contamination)
