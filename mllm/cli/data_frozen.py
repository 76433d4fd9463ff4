"""``mllm data freeze / rebuild``: a benchmark of charts or captioned pictures that anyone can build again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mllm.cli import arguments


def freeze(
    folder: Annotated[Path, typer.Argument(help="Folder that `mllm data build charts` or `build captions` wrote.")],
    manifest: Annotated[Path, typer.Argument(help="YAML file to write.")],
    description: Annotated[str, typer.Option(help="One line on what is asked.")] = "Questions about charts",
    source: Annotated[
        str | None, typer.Option(help="Of captions: the folder of pictures and texts that they were built from.")
    ] = None,
    package: Annotated[str, typer.Option(help="Of captions: the package and version that the folder comes with.")] = "",
) -> None:
    """Write what somebody else's build of these test pictures must equal: settings, versions, hashes of questions and pictures."""
    from mllm.data.charts.frozen import freeze as freeze_now

    if source is not None:
        from mllm.data.frozen_captions import freeze_captions

        of_captions = freeze_captions(folder, manifest, source=source, description=description, package=package)
        typer.echo(f"{manifest}: {of_captions.num_questions} questions, captions of {source}")
        return
    frozen = freeze_now(folder, manifest, description=description)
    typer.echo(f"{manifest}: {frozen.num_questions} questions, {', '.join(frozen.pictures)}")


def rebuild(
    name: Annotated[str, typer.Argument(help="A frozen benchmark (data/frozen) or its YAML file.")],
    output: Annotated[
        Path | None,
        typer.Option(help="Folder to write; default runs/charts_test, of captions runs/NAME.", show_default=False),
    ] = None,
    processes: Annotated[int, typer.Option(help="Worker processes.")] = 1,
    renderers: Annotated[
        str | None, typer.Option(help="Only these renderers, comma separated; others' pictures are not compared.")
    ] = None,
    cache: Annotated[
        Path | None, typer.Option(help="Where a package's tables are unpacked; default: in the output.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Write over a folder built with other settings.")] = False,
    source: Annotated[
        Path | None,
        typer.Option(help="Of captions: the folder of pictures and texts, where it is not the manifest's own."),
    ] = None,
) -> None:
    """Build a frozen benchmark's pictures and compare: other questions are an error, other pixels are told.

    [dim]mllm data rebuild real_charts --processes 8[/]
    [dim]mllm data rebuild stamps[/]
    """
    arguments.at_least(processes, 1, "--processes")
    from mllm import progress
    from mllm.data.charts.frozen import rebuild as rebuild_now
    from mllm.data.frozen_captions import is_of_captions, rebuild_captions
    from mllm.errors import ConfigError

    progress.begin()
    if is_of_captions(name):
        if renderers is not None or cache is not None:
            raise ConfigError(f"{name}: captioned pictures have neither renderers nor a cache; leave these options out")
        output = output or Path("runs") / Path(name).stem
        _say(output, rebuild_captions(name, output, source=source)[1])
        return
    if source is not None:
        raise ConfigError(f"--source: {name} is of charts; its tables' package is in its manifest")
    output = output or Path("runs/charts_test")
    only = None if renderers is None else tuple(name.strip() for name in renderers.split(",") if name.strip())
    _say(output, rebuild_now(name, output, renderers=only, cache=cache, processes=processes, force=force)[1])


def _say(output: Path, differences: list[str]) -> None:
    questions = len((output / "test.jsonl").read_bytes().splitlines())
    typer.echo(f"{output}: {questions} questions, the frozen ones")
    for line in differences or ["every picture is the frozen one"]:
        typer.echo(line)


def add_to(group: typer.Typer) -> None:
    """Register these verbs in ``mllm data``."""
    group.command("freeze")(freeze)
    group.command("rebuild")(rebuild)
