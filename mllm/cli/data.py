"""``mllm data``: check a training file before paying for a run; draw charts with questions from tables."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mllm.cli import arguments, data_frozen, data_points

data = typer.Typer(help="Look at training data: what is broken, how long samples are.", no_args_is_help=True)


@data.command("check")
def check(
    source: Annotated[
        str, typer.Argument(help="A dataset's name (`mllm list datasets`), its YAML, a file, a folder, or a hub id.")
    ],
    image_root: Annotated[
        Path | None,
        typer.Option("--image-root", "--images", help="Folder that image paths start from; default: beside the file."),
    ] = None,
    checkpoint: Annotated[str | None, typer.Option(help="Checkpoint (or tokenizer) to count tokens with.")] = None,
    write_quarantine: Annotated[
        bool, typer.Option("--write-quarantine", help="Write the list of bad samples that training leaves out.")
    ] = False,
    quarantine: Annotated[
        Path | None, typer.Option(help="Write that list here; default: beside the file, where training looks.")
    ] = None,
    processes: Annotated[int, typer.Option(help="Worker processes.")] = 1,
    limit: Annotated[int | None, typer.Option(help="Only the first N samples.")] = None,
) -> None:
    """Report corrupt images, missing files, mismatched placeholders, samples without labels, duplicates and lengths.

    Nothing is written unless you ask for it: --write-quarantine makes the list of bad rows that training leaves out, each for
    as long as the files it was judged by stay as they are."""
    arguments.training_data(source)
    if checkpoint is not None and not Path(checkpoint).is_dir():  # a folder may hold a tokenizer alone
        arguments.checkpoint(checkpoint)
    arguments.at_least(processes, 1, "--processes")
    arguments.at_least(limit, 1, "--limit")
    from mllm.data.check import check_source

    report = check_source(
        source,
        image_root=image_root,
        checkpoint=checkpoint,
        quarantine=quarantine,
        write=write_quarantine,
        processes=processes,
        limit=limit,
    )
    report.print()
    if report.num_bad:
        raise typer.Exit(1)


build = typer.Typer(help="Make training data and a benchmark out of what you have.", no_args_is_help=True)
data.add_typer(build, name="build")


@build.command("charts")
def build_charts(
    sources: Annotated[
        list[str], typer.Argument(help="Folders or files of tables (csv, tsv, parquet, RData), or package:NAME.")
    ],
    output: Annotated[Path, typer.Option(help="Folder to write.")] = Path("runs/charts"),
    charts: Annotated[int, typer.Option(help="Training charts.")] = 2000,
    test_charts: Annotated[int, typer.Option(help="Test charts; each is drawn by every test renderer.")] = 200,
    renderers: Annotated[str, typer.Option(help="Who draws training charts, comma separated.")] = "matplotlib",
    test_renderers: Annotated[str, typer.Option(help="Who draws test charts, comma separated.")] = "matplotlib",
    test_sources: Annotated[
        str, typer.Option(help="Sources (subfolders, inner packages) kept for the test; default: an eighth of them.")
    ] = "",
    questions: Annotated[int, typer.Option(help="Questions per training chart, at most.")] = 6,
    test_questions: Annotated[int, typer.Option(help="Questions per test chart.")] = 2,
    kinds: Annotated[str, typer.Option(help="Only these kinds of questions, comma separated; default: all.")] = "",
    worked: Annotated[
        bool,
        typer.Option(
            "--worked", help="Training answers to differences and comparisons name the values first: 842 - 616 = 226."
        ),
    ] = False,
    new_labels: Annotated[
        float, typer.Option(help="Share of training charts whose labels are other words than the table's.")
    ] = 0.0,
    axis_rounding: Annotated[
        float,
        typer.Option(
            help="Training answers and captions say a value that is not printed to the nearest step (1, 2 or 5 times a power of ten) of at "
            "most this share of its axis, e.g. 0.01."
        ),
    ] = 0.0,
    per_table: Annotated[int, typer.Option(help="Charts per table, at most.")] = 10,
    max_rows: Annotated[int, typer.Option(help="Longer training tables are left out.")] = 20_000,
    size: Annotated[int, typer.Option(help="Pixels of a side.")] = 448,
    seed: Annotated[int, typer.Option(help="The same seed gives the same tables, questions and answers.")] = 0,
    processes: Annotated[int, typer.Option(help="Worker processes.")] = 1,
    cache: Annotated[
        Path | None, typer.Option(help="Where a package's tables are unpacked; default: in the output.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Write over a folder built with other settings.")] = False,
) -> None:
    """Draw charts with questions and exact answers from tables: a training set, and a test on tables of other sources.

    Nine kinds of questions (value, extreme, count, colour, comparison, trend, difference, two_step, unanswerable), asked only
    where the chart answers beyond doubt, with answers balanced within each wording; which bar is red (label) is of kind colour unless
    --kinds names one of the two alone. Sources never lie on both sides of the
    split, and a training table that repeats a test table, or a part of it, is left out. Tables that cannot be drawn are counted
    with the reason (manifest.json, tables.json). Renderers: matplotlib, altair, ggplot2, gnuplot, or a plug-in's.

    [dim]mllm data build charts my_tables --output runs/mine --charts 5000 --test-renderers matplotlib,altair[/]
    """
    for value, option in (
        (size, "--size"),
        (questions, "--questions"),
        (per_table, "--per-table"),
        (processes, "--processes"),
    ):
        arguments.at_least(value, 1, option)
    for value, option in ((charts, "--charts"), (test_charts, "--test-charts")):
        arguments.at_least(value, 0, option)
    from mllm import progress
    from mllm.data.charts.build import ChartSettings
    from mllm.data.charts.build import build_charts as build_now
    from mllm.data.charts.renderers import RENDERERS

    names = {"--renderers": _names(renderers), "--test-renderers": _names(test_renderers)}
    for option, chosen in names.items():
        for name in chosen:
            arguments.one_of(name, RENDERERS, option)
    progress.begin()
    manifest = build_now(
        ChartSettings(
            sources=tuple(sources), train_charts=charts, test_charts=test_charts, renderers=names["--renderers"],
            test_renderers=names["--test-renderers"], test_sources=_names(test_sources), train_questions=questions,
            test_questions=test_questions, charts_per_table=per_table, max_rows=max_rows, size=size, seed=seed,
            kinds=_names(kinds), worked=worked, new_labels=new_labels, axis_rounding=axis_rounding,
        ),
        output,
        cache=cache,
        processes=processes,
        force=force,
    )  # fmt: skip
    tables = manifest["tables"]
    typer.echo(f"tables: {', '.join(f'{number} {split}' for split, number in sorted(tables.items()))}")
    for reason, number in list(manifest["skipped"].items())[:8]:
        typer.echo(f"  {number} skipped: {reason}")
    for name, entry in manifest["files"].items():
        typer.echo(f"{output / name}: {entry['rows']} rows")


@build.command("captions")
def build_captions(
    folder: Annotated[Path, typer.Argument(help="Folder of pictures, each with a .txt of the same name beside it.")],
    output: Annotated[Path, typer.Option(help="Folder to write.")] = Path("runs/captions"),
    test: Annotated[int, typer.Option(help="Captions kept for the test.")] = 150,
    options: Annotated[int, typer.Option(help="Options of a test question.")] = 4,
    size: Annotated[int, typer.Option(help="Pixels of a side.")] = 448,
    seed: Annotated[int, typer.Option(help="The same seed keeps the same captions.")] = 0,
) -> None:
    """Make captions to train on, and a multiple-choice test on captions never trained on, from pictures with a text beside each.

    [dim]mllm data build captions /usr/share/tuxpaint/stamps --output runs/stamps[/]
    """
    for value, option in ((test, "--test"), (size, "--size")):
        arguments.at_least(value, 1, option)
    from mllm.data.captioned import build_captioned

    manifest = build_captioned(folder, output, num_test=test, num_options=options, size=size, seed=seed)
    for reason, number in manifest["skipped"].items():
        typer.echo(f"  {number} skipped: {reason}")
    for name, entry in manifest["files"].items():
        typer.echo(f"{output / name}: {entry['rows']} rows")


@build.command("pairs")
def build_pairs(
    predictions: Annotated[Path, typer.Argument(help="What `mllm eval` wrote: EVAL/TASK.jsonl.")],
    rows: Annotated[Path, typer.Argument(help="The questions that it asked, e.g. the test.jsonl of drawn charts.")],
    output: Annotated[
        Path | None,
        typer.Option(help="File to write, in the questions' folder; default: pairs.jsonl there.", show_default=False),
    ] = None,
    kinds: Annotated[str, typer.Option(help="Only these kinds of questions, comma separated; default: all.")] = "",
) -> None:
    """Make pairs of a right and a wrong answer, for a stage of kind dpo, from what a model answered wrongly.

    Right is what the question's row has, wrong is what the model said where the evaluation's first rule gives it nothing. Ask about
    training charts (`mllm data build questions`): the benchmark's own questions are refused.

    [dim]mllm data build pairs runs/answers/real_charts.jsonl runs/charts_pairs/test.jsonl[/]
    """
    from mllm.eval.studies.pairs import write_pairs

    made = write_pairs(predictions, rows, output or rows.parent / "pairs.jsonl", kinds=_names(kinds))
    for reason, number in made.skipped.items():
        typer.echo(f"  {number} left out: {reason}")
    typer.echo(f"{made.path}: {made.rows} rows ({', '.join(f'{n} {kind}' for kind, n in made.kinds.items())})")


@build.command("questions")
def build_questions(
    charts: Annotated[Path, typer.Argument(help="The train.jsonl of drawn charts.")],
    output: Annotated[Path, typer.Option(help="Folder for test.jsonl; the pictures are linked there.")] = Path(
        "runs/charts_pairs"
    ),
    kinds: Annotated[str, typer.Option(help="Only these kinds of questions, comma separated; default: all.")] = "",
    limit: Annotated[int | None, typer.Option(help="Only so many, picked by a hash of their names.")] = None,
) -> None:
    """Write what training charts ask in the form that `mllm eval` asks, a question a row.

    A model that is evaluated on them shows what it says wrongly about charts that it may learn from: the first step of `mllm data build
    pairs`. They are not a benchmark.

    [dim]mllm data build questions runs/charts/train.jsonl --kinds value,difference,two_step --limit 6000[/]
    """
    from mllm.eval.studies.pairs import write_questions

    if limit is not None:
        arguments.at_least(limit, 1, "--limit")
    made = write_questions(charts, output, kinds=_names(kinds), limit=limit)
    typer.echo(f"{made.path}: {made.rows} rows ({', '.join(f'{n} {kind}' for kind, n in made.kinds.items())})")


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def add_to(app: typer.Typer) -> None:
    """Register the group."""
    data_frozen.add_to(data)
    data.command("points")(data_points.points)
    app.add_typer(data, name="data")
