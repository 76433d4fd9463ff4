"""``mllm list``: what is registered and shipped."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any

import typer


class Kind(StrEnum):
    """What can be listed."""

    encoders = "encoders"
    connectors = "connectors"
    views = "views"
    routers = "routers"
    visual_tokenizers = "visual-tokenizers"
    branches = "branches"
    heads = "heads"
    metrics = "metrics"
    generators = "generators"
    formats = "formats"
    tasks = "tasks"
    suites = "suites"
    datasets = "datasets"
    mixtures = "mixtures"
    recipes = "recipes"
    templates = "templates"


def list_(
    kind: Annotated[Kind, typer.Argument(help="What to list.")],
    licence: Annotated[
        str | None, typer.Option(help="Encoders: part of the weights' licence, such as apache or MIT.")
    ] = None,
    commercial: Annotated[
        bool, typer.Option("--commercial", help="Encoders: only weights free for commercial use.")
    ] = False,
    built_as: Annotated[
        str | None, typer.Option("--kind", help="Encoders: vit, pyramid, cnn or hybrid.", show_default=False)
    ] = None,
    objective: Annotated[
        str | None,
        typer.Option(
            help="Encoders: what they learned from: image-text, self-supervised, classes, regions, text, distilled, geometry."
        ),
    ] = None,
    least: Annotated[float | None, typer.Option("--min-size", help="Encoders: millions of parameters.")] = None,
    most: Annotated[float | None, typer.Option("--max-size", help="Encoders: millions of parameters.")] = None,
    words: Annotated[
        str | None,
        typer.Option("--search", help="Encoders: words in the name, capability or note.", show_default=False),
    ] = None,
    names: Annotated[bool, typer.Option("--names", help="Encoders: only the names, one a line.")] = False,
) -> None:
    """Names that recipes can use; encoders with their size, weights' source and licence.

    [dim]mllm list encoders --commercial --objective image-text --max-size 500[/]
    """
    from rich.console import Console

    console = Console()
    filters = {
        "licence": licence,
        "commercial": commercial,
        "kind": built_as,
        "objective": objective,
        "least": least,
        "most": most,
        "words": words,
    }
    if kind is Kind.encoders:
        _list_encoders(console, filters, names)
        return
    if names or any(value not in (None, False) for value in filters.values()):
        raise typer.BadParameter(f"filters are for `mllm list encoders`; {kind.value} has none")
    from mllm import assets

    folders = {
        Kind.tasks: "eval/tasks",
        Kind.suites: "eval/suites",
        Kind.datasets: "data/datasets",
        Kind.mixtures: "data/mixtures",
        Kind.recipes: "recipes",
    }
    if kind in folders:
        for name, path in assets.iterate(folders[kind]):
            console.print(f"{name}  [dim]{path}[/]", highlight=False, soft_wrap=True)
        return
    if kind is Kind.templates:
        from mllm.processing.template import shipped_templates

        for name in shipped_templates():
            console.print(name)
        return
    import importlib

    module, attribute = {
        Kind.connectors: ("mllm.connectors", "CONNECTORS"),
        Kind.views: ("mllm.processing.views", "VIEWS"),
        Kind.routers: ("mllm.routers", "ROUTERS"),
        Kind.visual_tokenizers: ("mllm.visual_tokenizers", "VISUAL_TOKENIZERS"),
        Kind.branches: ("mllm.visual_tokenizers.diffusion.branches", "CONDITIONING_BRANCHES"),
        Kind.heads: ("mllm.heads", "HEADS"),
        Kind.metrics: ("mllm.eval.metrics", "METRICS"),
        Kind.generators: ("mllm.eval.generators", "GENERATORS"),
        Kind.formats: ("mllm.data.spec", "SOURCES"),
    }[kind]
    registry = getattr(importlib.import_module(module), attribute)
    for name in registry:
        console.print(f"{name}  [dim]{registry.where(name)}[/]", highlight=False, soft_wrap=True)


def _list_encoders(console: Any, filters: dict[str, Any], names: bool) -> None:
    from mllm.cli.tables import show, table
    from mllm.encoders import ENCODERS
    from mllm.encoders.catalogue import catalogue, matching

    found = matching(**filters)
    if names:
        for name in found:
            console.print(name, highlight=False, soft_wrap=True)
        return
    shown = table(
        "encoder",
        "adapter",
        "kind",
        "objective",
        "size",
        "weights",
        "licence",
        "commercial use",
        names=("encoder", "weights", "size"),
    )
    words = {True: "yes", False: "[red]no[/]", None: "not known"}
    for name, entry in found.items():
        weights, about = entry.get("weights") or {}, entry["about"]
        shown.add_row(
            name,
            entry["type"],
            about["kind"],
            about["objective"],
            f"{about['millions']:.0f} M",
            weights.get("source", "-"),
            weights.get("licence", "-"),
            words[weights.get("commercial")],
        )
    show(shown)
    if not found:
        console.print("\nnothing fits all of these; leave one filter out, or search for fewer words")
    whole = len(catalogue())
    adapters = "; adapters (type: …): " + ", ".join(ENCODERS) if len(found) == whole else ""
    console.print(f"\n{len(found)} of {whole} encoders{adapters}")


def add_to(app: typer.Typer) -> None:
    """Register the verb."""
    app.command("list")(list_)
