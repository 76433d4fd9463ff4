"""``mllm new``: an interview that writes a recipe and a data declaration, plans them, and says what to type next."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mllm.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from mllm.recipe import Recipe

LEARNS = ("adapter", "whole", "connector")
_RATES = {
    "connector": {"connector": 1e-3},
    "adapter": {"connector": 1e-3, "language_model": {"lr": 1e-4, "lora": {"r": 64}}},
    "whole": {"connector": 2e-5, "language_model": 2e-5},
}
_SIZES = ((70, "Qwen/Qwen2.5-7B-Instruct"), (20, "Qwen/Qwen2.5-3B-Instruct"), (0, "Qwen/Qwen2.5-0.5B-Instruct"))
"""GPU memory in GB from which a language model is proposed."""


def new(
    name: Annotated[str, typer.Argument(help="The recipe's name: writes NAME.yaml and NAME_data.yaml here.")] = "my",
    data: Annotated[
        str | None,
        typer.Option(help="Your pictures and words: a json, jsonl or table file, a folder of these, or a hub id."),
    ] = None,
    gpus: Annotated[
        int | None, typer.Option(min=0, help="GPUs to train on; 0: the CPU. Default: what is found here.")
    ] = None,
    memory: Annotated[float | None, typer.Option(help="Memory of one GPU in GB. Default: what is found here.")] = None,
    language_model: Annotated[str | None, typer.Option(help="Hub id or folder. Default: by the memory.")] = None,
    encoder: Annotated[
        list[str] | None,
        typer.Option("--encoder", "-e", help="Of `mllm list encoders` (repeatable: several are joined)."),
    ] = None,
    learn: Annotated[
        str | None,
        typer.Option(help="adapter (LoRA on the language model), whole (all of it), or connector (that alone)."),
    ] = None,
    tasks: Annotated[str | None, typer.Option(help="Tasks to score afterwards, comma separated.")] = None,
    yes: Annotated[
        bool, typer.Option("--yes", "-y", help="Ask nothing: what no option says takes its default.")
    ] = False,
    plan: Annotated[bool, typer.Option(help="Plan what was written: memory, time, hazards.")] = True,
) -> None:
    """What do you have? A few questions, and a recipe that works: pictures and words, GPUs, language model, encoders.

    Every question has a default and an option. With --yes, or where no terminal is, nothing is asked.

    [dim]mllm new charts --data charts.jsonl --gpus 1 --memory 80 --yes[/]
    """
    import sys

    from mllm.recipe import load_recipe

    asks = not yes and sys.stdin.isatty()
    recipe_file, data_file = _files(name)
    source, dataset = _data(data, asks)
    found_gpus, found_memory = gpus_here()
    number = _ask(gpus, "How many GPUs (0: the CPU)?", found_gpus, asks, int)
    room = _ask(memory, "How much memory has one, in GB?", found_memory or 80.0, asks, float) if number else 0.0
    if number and not room > 0:
        raise ConfigError(f"--memory {room:g}: expected one GPU's memory in GB, such as 80; --gpus 0 is the CPU")
    default = next(model for least, model in _SIZES if room >= least)
    text = _ask(language_model, "Which language model (hub id or folder)?", default, asks, str).strip()
    if not text:
        raise ConfigError(f"--language-model is empty; expected a hub id or a folder, such as {default}")
    encoders = _encoders(encoder, asks)
    part = _ask(learn, f"What learns ({', '.join(LEARNS)})?", "adapter", asks, str)
    if part not in LEARNS:
        raise ConfigError(f"--learn {part}: expected one of {', '.join(LEARNS)}{did_you_mean(part, LEARNS)}")
    recipe = new_recipe(
        str(data_file),
        encoders,
        text,
        learn=part,
        gpus=number,
        memory=room,
        tasks=_tasks(tasks),
    )
    typed_data, typed_recipe = shlex.quote(str(data_file)), shlex.quote(str(recipe_file))
    _write(data_file, dataset, f"How {source} is read. `mllm data check {typed_data}` looks at all of it.")
    _write(recipe_file, recipe, f"Made by `mllm new`. Every key: `mllm recipes show {typed_recipe}`.")
    try:
        loaded = load_recipe(str(recipe_file))
    except (
        BaseException
    ):  # what no recipe can be made of leaves no files behind, which would stand in the next try's way
        for file in (data_file, recipe_file):
            file.unlink(missing_ok=True)
        raise
    processes = f" --processes {number}" if number > 1 else ""
    planned = _plan(loaded, max(number, 1), room) if plan else True
    typer.echo(
        f"\nwritten: {recipe_file}, {data_file}\n"
        + ("" if planned else "change what the plan names, then\n")
        + f"next:\n  mllm data check {typed_data}        # broken pictures, missing files\n"
        f"  mllm inspect {typed_recipe}           # what the model will really see\n"
        f"  mllm train {typed_recipe}{processes}"
    )


def new_recipe(
    data: str, encoders: list[str], language_model: str, *, learn: str, gpus: int, memory: float, tasks: list[str]
) -> dict[str, Any]:
    """The recipe as plain data. memory: of one GPU in GB, 0 without one."""
    names = ["vision"] if len(encoders) == 1 else [f"vision_{k}" for k in range(1, len(encoders) + 1)]
    small = memory < 40
    stage: dict[str, Any] = {
        "name": "sft",
        "learn": _RATES[learn],
        "data": data,
        "epochs": 1,
        "batch_size": 1 if small else 4,
        "gradient_accumulation": max(1, 32 // ((1 if small else 4) * max(gpus, 1))),
        "max_length": 2048,
        "dtype": "float32" if gpus == 0 else "bfloat16",
        "engine": "zero2" if learn == "whole" and gpus > 1 else "none",
        "gradient_checkpointing": gpus > 0,
        "num_workers": 0 if gpus == 0 else "auto",
        "save_every": 500,
    }
    return {
        "model": {
            "language_model": {"source": language_model},
            "encoders": dict(zip(names, encoders)),
            "connector": {"type": "mlp" if len(encoders) == 1 else "channel_concat"},
        },
        "stages": [stage],
        **({"evaluation": {"tasks": tasks}} if tasks else {}),
    }


def gpus_here() -> tuple[int, float | None]:
    """(GPUs, memory of the smallest in GB) by nvidia-smi; (0, None) where there is none."""
    if shutil.which("nvidia-smi") is None:
        return 0, None
    query = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        numbers = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return 0, None
    sizes = [float(word) * 2**20 / 1e9 for word in numbers if word.replace(".", "").isdigit()]
    return len(sizes), round(min(sizes), 1) if sizes else None


def _data(data: str | None, asks: bool) -> tuple[str, dict[str, Any]]:
    """(what was named, its declaration as plain data). Raises what `recognise` raises: the rows are looked at now."""
    from mllm.data.recognise import recognise

    if data is None:
        if not asks:
            raise ConfigError(
                "--data: where are your pictures and words? A json, jsonl or table file, a folder of these, or a hub id"
            )
        data = str(typer.prompt("Where are your pictures and words (json, jsonl, parquet, folder, hub id)?")).strip()
    spec = recognise(data)
    typer.echo(spec.recognised or "", err=True)
    plain = spec.model_dump(mode="json", exclude_defaults=True)
    plain.pop("name", None)
    if plain.get("path") and Path(plain["path"]).expanduser().exists():
        plain["path"] = str(Path(plain["path"]).expanduser().absolute())
    return data, plain | {"licence": "unknown", "image_licence": "unknown"}


def _encoders(given: list[str] | None, asks: bool) -> list[str]:
    from mllm.encoders.catalogue import catalogue
    from mllm.errors import UnknownName

    text = _ask(
        ",".join(given) if given else None, "Which encoders (comma separated)?", "siglip2-so400m-384", asks, str
    )
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise ConfigError(
            f"--encoder {text!r} names none; expected names of `mllm list encoders`, such as siglip2-so400m-384"
        )
    for name in names:
        if name not in catalogue():
            raise UnknownName("encoder", name, catalogue())
        if names.count(name) > 1:
            raise ConfigError(f"--encoder {name} is given {names.count(name)} times; several encoders must differ")
    return names


def _files(name: str) -> tuple[Path, Path]:
    """(recipe, declaration of the data) that a name means. Raises `ConfigError` for a name that no file can have, and for files that
    exist."""
    stem = name.strip().removesuffix(".yaml").removesuffix(".yml")
    folder = Path(stem).parent
    if not stem or stem.endswith(("/", ".")) or not folder.is_dir():
        missing = f" (there is no folder {folder})" if stem and not folder.is_dir() else ""
        raise ConfigError(f"{name!r} is no name for a recipe{missing}; expected one such as my: mllm new my")
    files = Path(f"{stem}.yaml"), Path(f"{stem}_data.yaml")
    for file in files:
        if file.exists():
            raise ConfigError(f"{file} exists; choose another name: mllm new NAME")
    return files


def _tasks(text: str | None) -> list[str]:
    """The tasks named. Raises `UnknownName` for one that is not there: else it would be found after the training."""
    from mllm.eval.task import load_tasks

    names = [name.strip() for name in (text or "").split(",") if name.strip()]
    load_tasks(names)
    return names


def _ask(given: Any, question: str, default: Any, asks: bool, kind: Callable[[Any], Any]) -> Any:
    """What an option said, else the answer, else the default."""
    if given is not None:
        return given
    return typer.prompt(question, default=default, type=kind) if asks else default


def _write(file: Path, data: dict[str, Any], head: str) -> None:
    import yaml

    file.write_text(f"# {head}\n" + yaml.safe_dump(data, sort_keys=False, allow_unicode=True), encoding="utf-8")


def _plan(loaded: Recipe, processes: int, memory: float) -> bool:
    """Show the plan; whether it fits. A language model that cannot be read now (no network) is told, and no error."""
    from rich.console import Console

    from mllm.errors import UnavailableError
    from mllm.train.preflight.plan import plan_recipe
    from mllm.train.preflight.plan_report import plan_tables, too_large

    console = Console()
    try:
        planned = plan_recipe(loaded, processes=processes, with_data=True)
    except UnavailableError as error:
        console.print(f"[yellow]! not planned: {error}", soft_wrap=True, highlight=False)
        return True
    problems = too_large(planned, memory or None)
    for item in plan_tables(planned, processes=processes):
        console.print(item, soft_wrap=isinstance(item, str), highlight=False)
    for line in problems:
        console.print(f"[red]! {line}", soft_wrap=True, highlight=False)
    return not problems


def add_to(app: typer.Typer) -> None:
    """Register the verb."""
    app.command()(new)
