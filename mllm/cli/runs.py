"""``mllm runs``: what was trained, and how two runs differ."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mllm.errors import ConfigError

runs = typer.Typer(help="Finished and interrupted runs: list them, compare two.", no_args_is_help=True)


@runs.command("ls")
def list_runs(
    folder: Annotated[Path, typer.Argument(help="Where to look for output folders.")] = Path("runs"),
) -> None:
    """Every run below a folder: when, from which commit, its stages, steps and last loss."""
    import json

    from rich.console import Console

    from mllm.cli.tables import show, table
    from mllm.train.observe.run_info import FILE
    from mllm.train.observe.tracking import read_metrics

    if not folder.is_dir():
        raise ConfigError(
            f"{folder}: no such folder; `mllm train` makes runs/NAME where it is started, `mllm runs ls FOLDER` looks elsewhere"
        )
    shown = table("run", "started", "commit", "stages", "steps", "last loss", "finished", names=("run", "commit"))
    for path in sorted(folder.glob(f"*/{FILE}")):
        info = json.loads(path.read_text(encoding="utf-8"))
        records = read_metrics(path.parent)
        git = info.get("git", {})
        commit = git.get("commit", "")[:10] + ("+" if git.get("dirty") else "")
        loss = f"{records[-1]['loss']:.4f}" if records else ""
        steps = " → ".join(str(stage.get("steps", "?")) for stage in info["stages"].values())
        done = "yes" if (path.parent / "final").is_dir() else "no"
        shown.add_row(str(path.parent), info["started"][:16], commit, " → ".join(info["stages"]), steps, loss, done)
    if not shown.row_count:
        Console().print(f"no run below {folder}", highlight=False)
        return
    show(shown)


@runs.command("diff")
def diff(
    a: Annotated[Path, typer.Argument(help="An output folder of `mllm train`.")],
    b: Annotated[Path, typer.Argument(help="The other one.")],
) -> None:
    """What differs between two runs: code, packages, machine, recipe, data, and where the numbers part.

    Exit code 1 when anything differs.

    [dim]mllm runs diff runs/demo runs/try[/]
    """
    from rich.console import Console
    from rich.markup import escape

    from mllm.cli.tables import show, table
    from mllm.train.observe.run_diff import diff_runs

    console, found = Console(), diff_runs(a, b)
    if found.settings:
        shown = table("key", str(a), str(b), names=("key",))
        for key, one, two in found.settings:
            shown.add_row(key, escape(_short(one)), escape(_short(two)))
        show(shown)
    for stage, (one, two) in found.last.items():
        console.print(f"{stage}: last loss {_short(one)} and {_short(two)}", highlight=False)
    if found.first is not None:
        stage, step, what, one, two = found.first
        console.print(
            f"the numbers part at {stage} step {step}: {what} is {_short(one)} and {_short(two)}",
            highlight=False,
            soft_wrap=True,
        )
    elif found.common:
        console.print(f"{found.common} logged steps are equal bit for bit", highlight=False)
    else:
        console.print("no logged step in common", highlight=False)
    if not found.equal:
        raise typer.Exit(1)


def _short(value: Any) -> str:
    text = "-" if value is None else str(value)
    return text if len(text) <= 60 else text[:40] + " … " + text[-16:]


def add_to(app: typer.Typer) -> None:
    """Register the group."""
    app.add_typer(runs, name="runs")
