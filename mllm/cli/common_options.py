"""Which options do several commands share? ``--plugin`` and ``--verbose`` are taken by all."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from mllm.cli.stopped import KEPT
from mllm.errors import Interrupted

Plugin = Annotated[
    list[str] | None,
    typer.Option(
        "--plugin",
        help="Python file or module that registers encoders, connectors, routers, metrics, generators, data formats … (repeatable).",
        show_default=False,
    ),
]


Verbose = Annotated[
    bool, typer.Option("--verbose", help="Show what other libraries print of themselves.", show_default=False)
]
Nodes = Annotated[
    int | None,
    typer.Option(
        help="Machines that this command is started on, with --processes on each; no torchrun is needed.",
        show_default=False,
    ),
]
NodeRank = Annotated[
    int | None,
    typer.Option(
        help="This machine's number, 0 on the one that --rendezvous names. Slurm and a hostfile know it.",
        show_default=False,
    ),
]
Rendezvous = Annotated[
    str | None,
    typer.Option(
        help="HOST:PORT of the first machine, where all meet. Slurm and a hostfile know it.", show_default=False
    ),
]
Hostfile = Annotated[
    Path | None,
    typer.Option(
        help="DeepSpeed's list of machines, a line `host slots=8` each: gives --nodes, --processes and --rendezvous.",
        show_default=False,
    ),
]


def add_common_options(app: typer.Typer, group: str = "") -> None:
    """Give every command of ``app`` and of its groups the options; plug-ins are known, and other libraries quiet, before the command
    begins, and Ctrl-C says what is kept. A command with a ``verbose`` of its own keeps that. group: the words before a command's name."""
    for command in app.registered_commands:
        if command.callback is not None:
            name = command.name or command.callback.__name__.replace("_", "-")
            command.callback = _with_common(command.callback, f"{group} {name}".strip())
    for each in app.registered_groups:
        if each.typer_instance is not None:
            name = each.name or each.typer_instance.info.name
            add_common_options(each.typer_instance, f"{group} {name}".strip())


def _with_common(command: Callable[..., Any], name: str) -> Callable[..., Any]:
    signature = inspect.signature(command, eval_str=True)
    common = {"plugin": (Plugin, None)} | ({} if "verbose" in signature.parameters else {"verbose": (Verbose, False)})

    @functools.wraps(command)
    def whole(*args: Any, **kwargs: Any) -> Any:
        from mllm import progress
        from mllm.noise import VERBOSE, hush
        from mllm.plugins import use_plugins

        given = {name: kwargs.pop(name, default) for name, (_, default) in common.items()}
        if given.get("verbose"):
            os.environ[VERBOSE] = "1"
        try:
            hush()
            use_plugins(given["plugin"] or [])
            return command(*args, **kwargs)
        except KeyboardInterrupt:  # click ends such a command without a word
            raise Interrupted(KEPT[name]) from None
        finally:
            progress.end()  # whoever calls a command from Python hears no phases of what comes after it

    options = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)
        for name, (kind, default) in common.items()
    ]
    whole.__signature__ = signature.replace(parameters=[*signature.parameters.values(), *options])  # type: ignore[attr-defined]
    whole.__annotations__ = {
        **{name: each.annotation for name, each in signature.parameters.items()},
        **{name: kind for name, (kind, _) in common.items()},
    }
    return whole
