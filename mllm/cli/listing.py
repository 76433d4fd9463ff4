"""``mllm list``: what is registered and shipped."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer


class Kind(StrEnum):
    """What can be listed."""

    encoders = "encoders"
    connectors = "connectors"
    views = "views"
    routers = "routers"
    visual_tokenizers = "visual-tokenizers"
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
) -> None:
    """Names that recipes can use; encoders with their weights' source and licence."""
    from rich.console import Console

    from mllm.cli.tables import show, table

    console = Console()
    if kind is Kind.encoders:
        from mllm.encoders import ENCODERS
        from mllm.encoders.catalogue import catalogue

        shown = table("encoder", "adapter", "weights", "licence", "commercial use", names=("encoder", "weights"))
        words = {True: "yes", False: "[red]no[/]", None: "not known"}
        for name, entry in sorted(catalogue().items()):
            weights = entry.get("weights") or {}
            shown.add_row(
                name,
                entry["type"],
                weights.get("source", "-"),
                weights.get("licence", "-"),
                words[weights.get("commercial")],
            )
        show(shown)
        console.print("\nadapters (type: …): " + ", ".join(ENCODERS))
        return
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
        Kind.heads: ("mllm.heads", "HEADS"),
        Kind.metrics: ("mllm.eval.metrics", "METRICS"),
        Kind.generators: ("mllm.eval.generators", "GENERATORS"),
        Kind.formats: ("mllm.data.spec", "SOURCES"),
    }[kind]
    registry = getattr(importlib.import_module(module), attribute)
    for name in registry:
        console.print(f"{name}  [dim]{registry.where(name)}[/]", highlight=False, soft_wrap=True)


def add_to(app: typer.Typer) -> None:
    """Register the verb."""
    app.command("list")(list_)
