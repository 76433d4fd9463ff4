"""Which pages of the documentation are made from the code: commands, recipe keys, recipes, encoders, components?

python docs/generate.py     # writes docs/generated; mkdocs.yml and tests/unit/test_docs.py name it
"""

from __future__ import annotations

import argparse
import importlib
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import costs
from pydantic import BaseModel

FOLDER = Path(__file__).resolve().parent / "generated"
ROOT = FOLDER.parents[1]
COMPONENTS = {
    "Connectors": ("mllm.connectors", "CONNECTORS", "model.connector"),
    "Views": ("mllm.processing.views", "VIEWS", "model.views"),
    "Routers": ("mllm.routers", "ROUTERS", "model.router"),
}
PLACES = {
    "Recipe": "top level",
    "HardwareSpec": "hardware",
    "ModelSpec": "model",
    "LanguageModelSpec": "model.language_model",
    "StageSpec": "stages[]",
    "LearnSpec": "stages[].learn.PART",
    "LoraSpec": "stages[].learn.PART.lora",
    "OptimizerSpec": "stages[].optimizer",
    "ScheduleSpec": "stages[].schedule",
    "DrawSpec": "stages[].draw",
    "EvaluationSpec": "evaluation",
}
"""Class of a recipe's part → where it stands."""


VERBOSE_HELP = "Show what other libraries print of themselves."


def pages(*, sizes: bool = True) -> dict[str, str]:
    """Path below docs/generated → Markdown. sizes: False leaves out pixels, grids and tokens, for which every encoder is described by
    its library."""
    return {
        "cli.md": cli_page(),
        "recipe-keys.md": recipe_keys(),
        "components.md": components_page(),
        "benchmarks.md": benchmarks_page(),
        "measured.md": measured_page(),
        "not-run.md": not_run_page(),
        **dict(recipe_pages(sizes)),
        **dict(encoder_pages(sizes)),
    }


def cli_page() -> str:
    """Every command with its arguments and options, in the order of ``mllm --help``."""
    import typer.main

    from mllm.cli.main import app

    lines = [
        "# Commands",
        "",
        "What `mllm COMMAND --help` says, on one page. Two options belong to every command: `--plugin FILE` "
        "(repeatable) registers parts of your own first, `--verbose` shows what other libraries print of themselves. "
        "A mistake is one line on stderr and exit code 2; `MLLM_TRACEBACK=1` shows where it was raised.",
        "",
    ]
    for path, command in commands(typer.main.get_command(app), ()):
        lines += _command_lines(" ".join(("mllm", *path)), command)
    return "\n".join(lines)


def commands(command: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """(words after ``mllm``, command) for every one that can be typed, groups first."""
    if path:
        yield path, command
    for name, below in getattr(command, "commands", {}).items():
        yield from commands(below, (*path, name))


def _command_lines(title: str, command: Any) -> list[str]:
    lines = [f"## {title}", "", plain(command.help or ""), ""]
    rows = []
    for parameter in command.params:
        common = parameter.name in ("help", "plugin") or getattr(parameter, "help", None) == VERBOSE_HELP
        if getattr(parameter, "hidden", False) or common:
            continue
        is_option = parameter.param_type_name == "option"
        names = ", ".join(f"`{name}`" for name in (*parameter.opts, *parameter.secondary_opts))
        what = names if is_option else f"`{(parameter.metavar or parameter.name or '').upper()}`"
        text = plain(getattr(parameter, "help", None) or "")
        if parameter.required:
            text += " Required."
        elif parameter.default not in (None, False, (), [], "") and not callable(parameter.default):
            text += f" Default: `{getattr(parameter.default, 'value', parameter.default)}`."
        rows.append((what, text))
    return [*lines, *table(("argument or option", "what it is"), rows)] if rows else lines


def plain(text: str) -> str:
    """Rich's markup as Markdown: dim text is an example, bold text stays bold."""
    text = re.sub(r"<(?=[\w/])", "&lt;", text) if "`" not in text else text
    text = re.sub(r"\[dim\](.*?)\[/(?:dim)?\]", lambda m: f"`{m[1].strip()}`", text, flags=re.DOTALL)
    return re.sub(r"\[bold\](.*?)\[/(?:bold)?\]", r"**\1**", text, flags=re.DOTALL)


def recipe_keys() -> str:
    """Every key of a recipe with its type, default and sentence."""
    from mllm.config import nested_models
    from mllm.recipe import Recipe

    lines = [
        "# Recipe keys",
        "",
        "Every key of a recipe. An unknown key is an error that names the one meant. `mllm recipes show NAME` writes all defaults out, "
        "`mllm recipes schema` is the same as a JSON schema for your editor.",
        "",
    ]
    for model in nested_models(Recipe):
        lines += [f"## {PLACES[model.__name__]}", "", " ".join((model.__doc__ or "").split()), "", *keys_table(model)]
    lines += [
        "## Data sets and mixtures",
        "",
        "Keys of `data/datasets/*.yaml`, `data/mixtures/*.yaml` and of a stage's `data: {datasets: [...]}`.",
        "",
    ]
    from mllm.data.spec import ColumnMap, DatasetSpec, MixtureItem, MixtureSpec

    for model in (DatasetSpec, ColumnMap, MixtureSpec, MixtureItem):
        lines += [f"### {model.__name__}", "", " ".join((model.__doc__ or "").split()), "", *keys_table(model)]
    return "\n".join(lines)


def keys_table(model: Any, leave_out: Sequence[str] = ()) -> list[str]:
    """Rows of a config class: key, type, default, sentence."""
    from mllm.config import field_sentences

    sentences, rows = field_sentences(model), []
    for name, field in model.model_fields.items():
        if name in leave_out:
            continue
        kind = _type_name(field.annotation)
        default = "required" if field.is_required() else f"`{_default(field)}`"
        rows.append((f"`{name}`", f"`{kind}`", default, sentences.get(name, field.description or "")))
    return table(("key", "type", "default", "what it is"), rows)


def _type_name(annotation: Any) -> str:
    text = (
        annotation.__name__
        if isinstance(annotation, type) and not getattr(annotation, "__args__", ())
        else str(annotation)
    )
    text = re.sub(r"(?:typing\.|mllm\.[\w.]+\.)", "", text)
    text = re.sub(r"Literal\[([^\]]*)\]", lambda m: m[1].replace("'", "").replace(", ", " or "), text)
    return text.replace(" | None", "").replace("Optional[", "").replace("Annotated[", "").replace("|", "or")


def _default(field: Any) -> str:
    value = field.get_default(call_default_factory=True)
    if value is None:
        return "none"
    if isinstance(value, BaseModel):
        return "its own defaults"
    return str(value).replace("|", "or") or '""'


def components_page() -> str:
    """Connectors, views and routers with the settings of their configs."""
    lines = [
        "# Connectors, views, routers",
        "",
        "Settings of each type, beside `type` itself. Your own: [a connector](../how-to/own-connector.md).",
        "",
    ]
    for title, (module, attribute, place) in COMPONENTS.items():
        registry = getattr(importlib.import_module(module), attribute)
        lines += [f"## {title}", "", f"Under `{place}` of a recipe.", ""]
        for name in registry:
            kind = registry.get(name)
            lines += [f"### {name}", "", first_paragraph(kind.__doc__), ""]
            rows = keys_table(kind.Config, leave_out=("type", "experts"))
            lines += rows if len(rows) > 3 else []
    return "\n".join(lines)


def first_paragraph(text: str | None) -> str:
    """A docstring's first paragraph on one line, without reStructuredText's double backticks."""
    return " ".join((text or "").split("\n\n")[0].split()).replace("``", "`")


def benchmarks_page() -> str:
    """Every task: description, samples, licence, rules."""
    from mllm import assets
    from mllm.eval.task import load_task

    rows = []
    for name, _ in assets.iterate("eval/tasks"):
        task = load_task(name)
        rules = ", ".join(f"`{metric.label}`" for metric in task.build_metrics())
        rows.append((f"`{name}`", task.description, str(task.size or ""), task.licence, rules))
    head = [
        "# Benchmarks",
        "",
        "`mllm eval run CKPT --tasks NAME` asks one. The first rule is the headline. What the rules mean: "
        "[what our numbers mean](../concepts/numbers.md). Licences are those that the authors state for the questions.",
        "",
    ]
    return "\n".join([*head, *table(("task", "what it asks", "samples", "licence", "rules"), rows)])


def measured_page() -> str:
    """Every file of benchmarks/results, as its script wrote it."""
    lines = [
        "# Measured figures",
        "",
        "Files of `benchmarks/results`, as the scripts wrote them: date, command, machine first.",
    ]
    lines += ["A figure elsewhere in these pages is included from here.", ""]
    for path in sorted((ROOT / "benchmarks/results").glob("*.txt")):
        lines += [f"## {path.stem}", "", "```text", f'--8<-- "benchmarks/results/{path.name}"', "```", ""]
    return "\n".join(lines)


def not_run_page() -> str:
    """Commands of the pages that the test of all commands leaves out, with its reasons and what stands for them."""
    sys.path.insert(0, str(ROOT))
    try:
        from tests.integration.test_page_commands import cases, why_not
    finally:
        sys.path.remove(str(ROOT))
    found = [(where, " ".join(words), why_not(words)) for where, words in cases()]
    rows = [(f"`mllm {text}`", where.partition(":")[0], why) for where, text, why in found if why is not None]
    head = [
        "# Commands that are not run",
        "",
        f"`make test-all` types {len(found) - len(rows)} of the {len(found)} different commands on these pages, one after "
        "another as a reader would, and names the page of one that fails. These are the others, why they are left out, and "
        "the tests that stand for them; all are parsed by the real command line.",
        "",
    ]
    return "\n".join([*head, *table(("command", "page", "why, and what stands for it"), rows)])


def measured(recipe: str) -> str:
    """Links to the figures that name the recipe, with their dates and commands."""
    named = {path.stem for path in costs.RESULTS.glob(f"{recipe}_*.txt")} - {costs.SCORES.get(recipe)}
    named |= set(costs.results_naming(recipe)) if "_" in recipe else set()
    return costs.links(sorted(named))


def recipe_pages(sizes: bool) -> Iterator[tuple[str, str]]:
    """A page for each recipe, and a table of all."""
    from mllm.recipe import load_recipe

    rows, tokenizers = [], []
    for path in sorted((ROOT / "recipes").glob("*.yaml")):
        head = [line[2:].strip() for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("# ")]
        recipe = load_recipe(str(path))
        if recipe.model.language_model is None:
            tokenizers.append((f"[`{path.stem}`]({path.stem}.md)", recipe.description))
            yield (
                f"recipes/{path.stem}.md",
                _page(path, recipe.description, head, _training_facts(recipe, path.stem, sizes)),
            )
            continue
        encoders = " + ".join(_encoder_name(spec) for spec in recipe.model.encoders.values()) or "none"
        connector = (recipe.model.connector or {}).get("type", "none")
        text = recipe.model.text_model
        hardware = _hardware(recipe)
        model = text.source or f"{(text.config or {}).get('model_type')}, from scratch"
        facts = [
            ("encoders", encoders),
            ("connector", f"`{connector}`"),
            ("visual tokens of a picture", _num_tokens(recipe) if sizes else ""),
            ("language model", model),
            ("its licence", text.licence if text.source else "made here"),
            ("licences of encoders' weights", _licences(recipe)),
            ("from", recipe.source),
            ("evaluation", ", ".join(f"`{task}`" for task in recipe.evaluation.tasks)),
            *_training_facts(recipe, path.stem, sizes),
        ]
        score = f"[measured]({path.stem}.md#score)" if path.stem in costs.SCORES else costs.NOT_MEASURED
        rows.append((f"[`{path.stem}`]({path.stem}.md)", encoders, f"`{connector}`", model, hardware, score))
        yield f"recipes/{path.stem}.md", _page(path, recipe.description, head, facts)
    yield (
        "recipes/index.md",
        "\n".join(
            [
                "# Recipes",
                "",
                "`mllm recipes cp NAME my.yaml` makes a copy to edit. Hours are the papers' own or estimated; "
                "none of the large recipes has been trained here.",
                "",
                *table(("recipe", "encoders", "connector", "language model", "hardware", "score"), rows),
                "## Visual tokenizers",
                "",
                "`mllm train NAME`.",
                "",
                *table(("recipe", "what"), tokenizers),
            ]
        ),
    )


def _page(path: Path, description: str, head: Sequence[str], facts: Sequence[tuple[str, str]]) -> str:
    lines = [f"# {path.stem}", "", description + ("" if description.endswith(".") else "."), ""]
    lines += table(("", ""), [(name, value) for name, value in facts if value]) if facts else []
    lines += [f"> {' '.join(head)}" if head else "", "", *costs.score_section(path.stem)]
    lines += ["## The recipe", "", "```yaml", f'--8<-- "recipes/{path.name}"', "```", ""]
    return "\n".join(lines)


def _hardware(recipe: Any) -> str:
    return " · ".join(part for part in (recipe.hardware.gpus, recipe.hardware.hours, recipe.hardware.note) if part)


def _training_facts(recipe: Any, name: str, sizes: bool) -> list[tuple[str, str]]:
    """What training takes and gave: hardware and hours as the recipe states them, memory, score, stages."""
    return [
        ("hardware, hours", _hardware(recipe)),
        *([costs.memory_row(recipe, name)] if sizes else []),
        costs.score_row(name),
        ("other figures", measured(name)),
        *_stage_facts(recipe),
    ]


def _licences(recipe: Any) -> str:
    """Of the encoders' published weights, as the catalogue or the recipe has them."""
    from mllm.encoders.catalogue import catalogue

    found = []
    for name, spec in recipe.model.encoders.items():
        preset = spec if isinstance(spec, str) else spec.get("preset")
        entry = catalogue().get(preset, spec)
        weights = entry.get("weights") if isinstance(entry, dict) else None
        if isinstance(weights, dict) and weights.get("licence"):
            found.append(f"{name}: {weights['licence']}")
    return ", ".join(found)


def _stage_facts(recipe: Any) -> list[tuple[str, str]]:
    facts = []
    for stage in recipe.stages:
        learns = ", ".join(
            f"{part} {spec.lr:g}" + (" (LoRA)" if spec.lora else "") for part, spec in stage.learning().items()
        )
        length = f"{stage.steps} steps" if stage.steps else f"{stage.epochs:g} × the data"
        engine = stage.engine if isinstance(stage.engine, str) else "DeepSpeed json"
        facts.append(
            (
                f"stage {stage.name}",
                f"{stage.kind}: {learns}; {length}, batch {stage.batch_size} a process, {engine}, {stage.dtype}",
            )
        )
    return facts


def _encoder_name(spec: Any) -> str:
    if isinstance(spec, str):
        return f"[`{spec}`](../encoders/{spec}.md)"
    if "preset" in spec:
        return f"[`{spec['preset']}`](../encoders/{spec['preset']}.md)"
    architecture = spec.get("architecture")
    name = architecture.get("model_type") if isinstance(architecture, dict) else architecture
    return f"`{spec['type']}" + (f": {name}`" if name else "`")


def _num_tokens(recipe: Any) -> str:
    """Of a picture seen once; empty where the recipe needs files that a run makes."""
    from mllm.encoders.catalogue import encoder_config
    from mllm.errors import MllmError
    from mllm.processing.layout import layout_rules

    try:
        specs = recipe.model.encoders.items()
        infos = {name: encoder_config(spec, where=name).info for name, spec in specs}
        return str(layout_rules(recipe.model, infos).view.num_tokens) if infos else ""
    except (MllmError, OSError):
        return ""


def encoder_pages(sizes: bool) -> Iterator[tuple[str, str]]:
    """A page for each entry of the catalogue, and a table of all."""
    import yaml

    from mllm.encoders.catalogue import catalogue, encoder_config

    used = {}
    for path in sorted((ROOT / "recipes").glob("*.yaml")):
        for name in re.findall(r"[\w.-]+", path.read_text(encoding="utf-8")):
            used.setdefault(name, set()).add(path.stem)
    rows = []
    words = {True: "yes", False: "**no**", None: "not known"}
    for name, entry in sorted(catalogue().items()):
        weights = entry.get("weights") or {}
        info = encoder_config(name, where=name).info if sizes else None
        size = f"{info.image.height} × {info.image.width}" if info else ""
        grid = f"{info.grid[0]} × {info.grid[1]}" if info else ""
        rows.append(
            (
                f"[`{name}`]({name}.md)",
                entry["type"],
                size,
                grid,
                str(info.width) if info else "",
                weights.get("licence", "–"),
                words[weights.get("commercial")] if weights else "–",
            )
        )
        recipes = ", ".join(f"[`{r}`](../recipes/{r}.md)" for r in sorted(used.get(name, ())))
        facts = [
            ("adapter", f"`type: {entry['type']}`"),
            ("kind", f"{entry['about']['kind']}, {entry['about']['millions']:.4g} M parameters"),
            ("learned from", entry["about"]["objective"]),
            ("pixels", f"{size}, {info.image.resize}" if info else ""),
            ("tokens", f"{grid} = {info.grid[0] * info.grid[1]} of width {info.width}" if info else ""),
            (
                "weights",
                f"`{weights['source']}`" + (f" at `{weights['revision']}`" if weights.get("revision") else "")
                if weights
                else "none: trained from scratch",
            ),
            ("licence of the weights", weights.get("licence", "")),
            ("commercial use", words[weights.get("commercial")] if weights else ""),
            ("territory", weights.get("territory", "")),
            ("note", entry.get("note", "")),
            ("memory", costs.encoder_memory(entry["about"]["millions"]) if sizes else ""),
            ("hours", "those of the recipe that trains it"),
            ("score, speed", costs.links(costs.results_naming(name)) or f"{costs.NOT_MEASURED} here"),
            ("recipes", recipes),
        ]
        body = [
            f"# {name}",
            "",
            (entry.get("capability") or "Vision encoder").capitalize() + ".",
            "",
            *table(("", ""), [f for f in facts if f[1]]),
        ]
        body += [
            "In a recipe:",
            "",
            "```yaml",
            "model:",
            f"  encoders: {{vision: {name}}}",
            "```",
            "",
            "The whole entry, every key of which `{preset: …, key: value}` changes:",
            "",
        ]
        shown = {key: value for key, value in entry.items() if key not in ("note",)}
        body += ["```yaml", yaml.safe_dump(shown, sort_keys=False, allow_unicode=True, width=110).rstrip(), "```", ""]
        yield f"encoders/{name}.md", "\n".join(body)
    head = [
        "# Encoders",
        "",
        "What `mllm list encoders` shows, with sizes. Pixels, tokens and width are the catalogue's settings; "
        "`{preset: NAME, image_size: 448}` changes one. Licences are those of the weights as published; this is no legal advice. "
        "Your own: [an encoder](../../how-to/own-encoder.md).",
        "",
    ]
    columns = ("encoder", "adapter", "pixels", "grid", "width", "licence", "commercial use")
    yield "encoders/index.md", "\n".join([*head, *table(columns, rows)])


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table and an empty line."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(" ".join(str(cell).split()).replace("|", "\\|") for cell in cells) + " |"

    return [line(head), "|" + "---|" * len(head), *(line(row) for row in rows), ""]


def main() -> None:
    """Write all pages anew."""
    made = pages()
    shutil.rmtree(FOLDER, ignore_errors=True)
    for name, text in made.items():
        path = FOLDER / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.rstrip() + "\n", encoding="utf-8")
    sys.stdout.write(f"{len(made)} pages in {FOLDER}\n")


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    main()
