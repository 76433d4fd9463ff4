"""``mllm tokenizer``: train a visual tokenizer, measure it, encode pictures with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

tokenizer = typer.Typer(help="Visual tokenizers: image ↔ discrete codes.", no_args_is_help=True)


@tokenizer.command("ls")
def list_recipes() -> None:
    """Shipped tokenizer recipes."""
    from rich.console import Console
    from rich.table import Table

    from mllm.config import read_yaml
    from mllm.visual_tokenizers.recipe import tokenizer_recipes

    table = Table("recipe", "what", box=None, pad_edge=False)
    for name, path in tokenizer_recipes().items():
        table.add_row(name, read_yaml(path).get("description", ""))
    Console().print(table)


@tokenizer.command("train")
def train(
    recipe: Annotated[str, typer.Argument(help="A tokenizer recipe (`mllm tokenizer ls`) or a YAML file.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Changes as key.sub=value.", show_default=False)] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest checkpoint in the output folder.")
    ] = False,
) -> None:
    """Train a tokenizer into <output>/final; several processes through torchrun.

    [dim]mllm tokenizer train tokenizer_demo_dual steps=200[/]
    """
    from mllm.visual_tokenizers.train import train_tokenizer

    typer.echo(json.dumps(train_tokenizer(recipe, overrides, resume), indent=2))


@tokenizer.command("eval")
def evaluate(
    folder: Annotated[Path, typer.Argument(help="A saved tokenizer.")],
    recipe: Annotated[str, typer.Option(help="Recipe whose images are measured on (its held-out part).")],
    limit: Annotated[int | None, typer.Option(help="Only the first N images.")] = None,
    probe: Annotated[
        bool, typer.Option(help="Linear-probe accuracy of the quantised features, where images have classes.")
    ] = True,
    grid: Annotated[
        Path | None, typer.Option(help="PNG of originals above reconstructions; default <folder>/grid.png.")
    ] = None,
    features: Annotated[
        str | None,
        typer.Option(help="Network for a Fréchet distance: `teacher`, a catalogue encoder, or an encoder's YAML/JSON."),
    ] = None,
    questions: Annotated[
        str | None,
        typer.Option(help="Answer from the codes alone: `classes` (which digit), `charts`, or a JSONL file."),
    ] = None,
) -> None:
    """PSNR, SSIM, tokens and bits per image, code usage, linear probe; a picture of originals and reconstructions."""
    from mllm.visual_tokenizers.base import VisualTokenizer
    from mllm.visual_tokenizers.evaluate import comparison_grid, evaluate_tokenizer, probe_tokenizer
    from mllm.visual_tokenizers.images import load_images, to_pixels
    from mllm.visual_tokenizers.recipe import load_tokenizer_recipe

    model = VisualTokenizer.from_pretrained(folder)
    spec = load_tokenizer_recipe(recipe).images
    images = load_images(spec, model.image.height, "test")
    network = None
    if features is not None:
        network, described = _feature_network(features, recipe, model, folder)
    result = evaluate_tokenizer(model, images, limit=limit, features=network)
    if network is not None:
        number, width = result["images"], described.pop("width")
        distance = {"value": result["frechet_distance"], "network": described, "images": number}
        if number < 2 * width:
            distance["warning"] = f"biased: {number} images for {width} features; use at least {2 * width}"
            typer.echo(f"frechet_distance is {distance['warning']}", err=True)
        result["frechet_distance"] = distance
    if questions is not None:
        result["questions"] = _question_scores(questions, spec, model)
    if probe and images.labels is not None:
        result["linear_probe"] = probe_tokenizer(model, load_images(spec, model.image.height, "train"), images)
    picture = grid or folder / "grid.png"
    comparison_grid(model, to_pixels(images.batch(range(min(8, len(images)))))).save(picture)
    typer.echo(json.dumps({**result, "grid": str(picture)}, indent=2))


def _feature_network(name: str, recipe: str, model: Any, folder: Path) -> tuple[Any, dict[str, Any]]:
    """Pixels in [-1, 1] → ``(B, D)``, and what it is: network, sha256 of its state, width."""
    import hashlib

    from mllm.config import read_yaml
    from mllm.errors import ConfigError
    from mllm.visual_tokenizers.images import load_images
    from mllm.visual_tokenizers.recipe import load_tokenizer_recipe
    from mllm.visual_tokenizers.teacher import TEACHER_FILE, EncoderTeacher, build_teacher

    if name == "teacher":
        whole = load_tokenizer_recipe(recipe)
        if whole.teacher is None:
            raise ConfigError(f"--features teacher: recipe {recipe} has no teacher; name an encoder instead")
        if whole.teacher.initial:
            raise ConfigError(
                "--features teacher: this teacher is the tokenizer before training; name an encoder instead"
            )
        places = [place for place in (folder, folder.parent) if (place / TEACHER_FILE).is_file()]
        if whole.teacher.supervised is not None and not places:
            raise ConfigError(f"--features teacher: no {TEACHER_FILE} in {folder} or {folder.parent}")
        images = load_images(whole.images, model.image.height, "train")
        teacher = build_teacher(whole.teacher, model, images, seed=0, directory=places[0] if places else None)
    else:
        settings = read_yaml(Path(name)) if Path(name).suffix in (".yaml", ".yml", ".json") else name
        teacher = EncoderTeacher(settings)
        weights = getattr(getattr(teacher.encoder.encoder, "config", None), "weights", None)
        if weights is None and getattr(teacher.encoder.encoder, "weights", None) is None:
            raise ConfigError(f"--features {name}: its config names no weights; a random network measures nothing")
        teacher.encoder.load_pretrained()
        teacher.requires_grad_(False).eval()
    device = model.last_layer().device
    digest = hashlib.sha256()
    for key, value in sorted(teacher.state_dict().items()):
        digest.update(key.encode() + value.detach().float().contiguous().cpu().numpy().tobytes())
    teacher.to(device)
    described = {"name": name, "sha256": digest.hexdigest(), "width": teacher.width}
    return lambda pixels: teacher(pixels)["pooled"].float(), described


def _chart_questions(size: int, split: str, *, number: int = 400) -> Any:
    """Bar charts with questions that have exact answers, one of each kind per chart; needs matplotlib."""
    import random

    import numpy as np
    from PIL import Image

    from mllm.data.charts import COLOURS, LABELS, MAX_VALUE, Chart, Renderer, questions
    from mllm.visual_tokenizers.questions import gather_questions

    generator, renderer, drawn = random.Random(1 if split == "train" else 2), Renderer(), []
    for _ in range(number):
        bars = generator.randint(2, 5)
        chart = Chart(
            "bar",
            tuple(generator.sample(list(COLOURS), bars)),
            tuple(generator.sample(range(1, MAX_VALUE + 1), bars)),
            LABELS[:bars],
        )
        asked = []
        for kind, choices in questions(chart).items():
            if choices:
                question = generator.choice(choices)
                asked.append((kind, question.text, question.answer))
        picture = Image.fromarray(renderer.draw(chart)).convert("RGB").resize((size, size), Image.Resampling.BOX)
        drawn.append((np.array(picture), asked))
    return gather_questions(drawn, split)


def _question_scores(name: str, spec: Any, model: Any) -> dict[str, Any]:
    from mllm.eval.statistics import wilson_interval
    from mllm.visual_tokenizers.images import load_images
    from mllm.visual_tokenizers.questions import answer_questions, class_questions, read_questions

    size = model.image.height
    if name == "classes":
        parts = tuple(class_questions(load_images(spec, size, split)) for split in ("train", "test"))
    elif name == "charts":
        parts = _chart_questions(size, "train"), _chart_questions(size, "test", number=200)
    else:
        parts = read_questions(Path(name), size)
    scores = answer_questions(model, *parts)
    return {
        source: {
            kind: {
                "accuracy": row["correct"] / row["n"],
                "n": row["n"],
                "interval_95": wilson_interval(row["correct"], row["n"]),
            }
            for kind, row in kinds.items()
        }
        for source, kinds in scores.items()
    }


@tokenizer.command("encode")
def encode(
    folder: Annotated[Path, typer.Argument(help="A saved tokenizer.")],
    recipe: Annotated[str, typer.Option(help="Recipe whose images are encoded.")],
    output: Annotated[
        Path, typer.Option(help="Folder for the code shards; a second call goes on where the first ended.")
    ],
    split: Annotated[str, typer.Option(help="train or test.")] = "train",
) -> None:
    """Write the codes of a recipe's images to disk, in shards; resumable."""
    from mllm.visual_tokenizers.base import VisualTokenizer
    from mllm.visual_tokenizers.images import load_images
    from mllm.visual_tokenizers.recipe import load_tokenizer_recipe
    from mllm.visual_tokenizers.storage import encode_images

    model = VisualTokenizer.from_pretrained(folder)
    images = load_images(load_tokenizer_recipe(recipe).images, model.image.height, split)
    typer.echo(f"{encode_images(model, images, output)} shards written to {output}")


def add_to(app: typer.Typer) -> None:
    """Register the group."""
    app.add_typer(tokenizer, name="tokenizer")
