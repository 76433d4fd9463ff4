"""``mllm eval export / import``: answers in other harnesses' forms."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mllm.cli import arguments
from mllm.cli.evaluate_studies import Data, folders


def export(
    predictions: Annotated[Path, typer.Argument(help="A predictions .jsonl of a run.")],
    output: Annotated[
        Path, typer.Argument(help="The file to write: .jsonl for lmms-eval, .tsv or .csv for VLMEvalKit.")
    ],
    form: Annotated[str, typer.Option("--as", help="lmms-eval (samples lines) or vlmevalkit (a table).")] = "lmms-eval",
) -> None:
    """Write a run's answers as lmms-eval's samples or as VLMEvalKit's table, to be scored there.

    [dim]mllm eval export runs/my/eval/mmvp.jsonl mmvp.tsv --as vlmevalkit[/]
    """
    from mllm.eval.harnesses.answer_files import FORMS, export_answers

    arguments.one_of(form, FORMS, "--as")
    count = export_answers(predictions, output, form)  # type: ignore[arg-type]
    typer.echo(f"{output}: {count} answers")


def import_file(
    answers: Annotated[Path, typer.Argument(help="lmms-eval's samples .jsonl, or VLMEvalKit's table as .tsv or .csv.")],
    task: Annotated[str, typer.Option(help="Which of our tasks they answer; see `mllm list tasks`.")],
    output: Annotated[Path, typer.Option(help="Folder for our prediction file.")],
    data: Data = None,
    model: Annotated[str, typer.Option(help="What to call the model.")] = "imported",
) -> None:
    """Score another harness's answers by our rules. Questions, answers and targets must match one to one.

    [dim]mllm eval import samples_mmvp.jsonl --task mmvp --data mmvp=/data/MMVP --output runs/theirs/eval[/]
    """
    arguments.tasks([task])
    from mllm.eval.harnesses.answer_files import import_answers
    from mllm.eval.report.show import print_results

    result = import_answers(answers, task, output, data=folders(data), model=model)
    print_results({result.task: result})


def add_to(group: typer.Typer) -> None:
    """Register both verbs in ``mllm eval``."""
    group.command("export")(export)
    group.command("import")(import_file)
