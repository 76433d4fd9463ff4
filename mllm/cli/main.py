"""Where does the ``mllm`` command begin?"""

from __future__ import annotations

import gc
import multiprocessing
import os
import sys
from typing import Any

import typer
from typer.core import TyperGroup

from mllm.cli import (
    app as web_app,
)
from mllm.cli import (
    batch,
    bench,
    chat,
    check,
    compose,
    convert,
    data,
    demo,
    doctor,
    draw,
    edit,
    encoders,
    evaluate,
    inspect,
    listing,
    new,
    parity,
    parts,
    plan,
    recipes,
    route,
    runs,
    serve,
    study,
    tokenizer,
    train,
    verify,
)
from mllm.cli.common_options import add_common_options
from mllm.errors import GpuFull, Interrupted, MllmError

COLLECT_SELDOM = (50_000, 20, 20)
"""Python's own thresholds look for cycles thousands of times while torch and transformers are imported, a sixth of the time."""

WHOLE_SENTENCE = 400


class PlainFirstPage(TyperGroup):
    """``mllm --help`` without rich, whose import alone takes half of the 0.3 s that a first look may take."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        mode, self.rich_markup_mode = self.rich_markup_mode, None
        try:
            super().format_help(ctx, formatter)
        finally:
            self.rich_markup_mode = mode

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Each command's whole first sentence: click cuts it at the terminal's width."""
        commands = {name: self.get_command(ctx, name) for name in self.list_commands(ctx)}
        rows = [(name, c.get_short_help_str(WHOLE_SENTENCE)) for name, c in commands.items() if c and not c.hidden]
        with formatter.section("Commands"):
            formatter.write_dl(rows)


app = typer.Typer(
    name="mllm",
    cls=PlainFirstPage,
    help="Multimodal LLMs with pluggable vision encoders: recipes, staged training, evaluation, serving.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    add_completion=False,
)


def _version(value: bool) -> None:
    if value:
        from mllm.install import installed_version

        typer.echo(f"mllm {installed_version()}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Print the version and stop."
    ),
    # DeepSpeed's launcher puts it before every command; the variable LOCAL_RANK, which it sets too, is what counts.
    local_rank: int = typer.Option(0, "--local_rank", hidden=True),
) -> None:
    """A first look: mllm recipes ls, mllm list encoders, mllm doctor."""


for module in (
    demo,
    new,
    plan,
    inspect,
    train,
    verify,
    runs,
    evaluate,
    study,
    chat,
    draw,
    edit,
    serve,
    batch,
    bench,
    web_app,
    parity,
    data,
    recipes,
    route,
    tokenizer,
    convert,
    parts,
    compose,
    listing,
    encoders,
    check,
    doctor,
):
    module.add_to(app)
add_common_options(app)


def _leave(code: int) -> None:
    """End this process and its readers of data now, waiting for nobody. Three runs that had told of a full GPU (shared by NVIDIA MPS) held
    its 140 GB for twenty minutes more, waiting at their exit."""
    for child in multiprocessing.active_children():
        child.terminate()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main() -> None:
    """Run the command line; a user's mistake is one message on stderr and exit code 2."""
    gc.set_threshold(*COLLECT_SELDOM)
    try:
        app()
    except MllmError as error:
        if os.environ.get("MLLM_TRACEBACK"):
            raise
        if os.environ.get(error.told_by, "0") == "0":
            sys.stderr.write(f"error: {error}\n")
        if isinstance(error, GpuFull):
            _leave(2)
        sys.exit(2)
    except Interrupted as stop:
        sys.stderr.write(f"\nstopped: {stop}\n")
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt:
        sys.stderr.write("stopped\n")
        sys.exit(130)


if __name__ == "__main__":
    main()
