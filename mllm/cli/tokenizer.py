"""``mllm tokenizer``: measure a visual tokenizer, encode pictures with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from mllm.cli import arguments

if TYPE_CHECKING:
    from mllm.visual_tokenizers.base import VisualTokenizer
    from mllm.visual_tokenizers.images import Split

_DEVICE = Annotated[str, typer.Option(help="auto (CUDA where there is one), cpu, cuda, cuda:1 … or mps.")]
_BATCH_SIZE = Annotated[int, typer.Option(help="Images at a time.", min=1)]
_DTYPE = Annotated[
    str, typer.Option(help="float32, or bfloat16 for the networks; weights, codebooks and search stay in float32.")
]
_COMPILE = Annotated[
    bool,
    typer.Option(
        "--compile",
        help="Compile the networks first (a minute or so): faster for many images. Codes then differ as between two GPUs, where two "
        "are nearly as near.",
    ),
]

tokenizer = typer.Typer(help="Visual tokenizers: image ↔ discrete codes.", no_args_is_help=True)


@tokenizer.command("ls")
def list_recipes() -> None:
    """Recipes that train a visual tokenizer; mllm train NAME."""
    from rich.console import Console
    from rich.table import Table

    from mllm.config import read_yaml
    from mllm.visual_tokenizers.recipe import tokenizer_recipes

    table = Table("recipe", "what", box=None, pad_edge=False)
    for name, path in tokenizer_recipes().items():
        table.add_row(name, read_yaml(path).get("description", ""))
    Console().print(table)


@tokenizer.command("train", hidden=True)
def train(
    recipe: Annotated[str, typer.Argument(help="A recipe that trains a tokenizer, or a YAML file.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Changes as key.sub=value.", show_default=False)] = None,
    resume: Annotated[bool, typer.Option("--resume", help="As of mllm train.")] = False,
) -> None:
    """The same as `mllm train`, which trains tokenizers too."""
    from mllm.cli.train import train as train_recipe

    train_recipe(recipe, overrides, processes=1, resume=resume, extend=False, output=None, profile=None, evaluate=False)


@tokenizer.command("eval")
def evaluate(
    folder: Annotated[Path, typer.Argument(help="A saved tokenizer.")],
    recipe: Annotated[str, typer.Option(help="Recipe whose images are measured on (its held-out part).")],
    limit: Annotated[int | None, typer.Option(help="Only the first N images.", min=1)] = None,
    probe: Annotated[
        bool, typer.Option(help="Linear-probe accuracy of the quantised features, where images have classes.")
    ] = True,
    grid: Annotated[
        Path | None, typer.Option(help="PNG of originals above reconstructions; default <folder>/grid.png.")
    ] = None,
    features: Annotated[
        str | None,
        typer.Option(
            help="Network for a Fréchet distance: `teacher`, a catalogue encoder, an encoder's YAML/JSON, or "
            "`inception=WEIGHTS`, the FID network, for rFID."
        ),
    ] = None,
    zero_shot: Annotated[
        str | None,
        typer.Option(
            help="Name the class of each image by its semantic codes: the whole CLIP or SigLIP model (folder or hub name) "
            "whose vision side is the teacher."
        ),
    ] = None,
    templates: Annotated[
        Path | None,
        typer.Option(help="For --zero-shot: a file of templates, one per line; `a photo of a {}.` if none."),
    ] = None,
    questions: Annotated[
        str | None,
        typer.Option(help="Answer from the codes alone: `classes` (which digit), `charts`, or a JSONL file."),
    ] = None,
    decoder: Annotated[
        str | None,
        typer.Option(help="diffusion: also score the diffusion decoder that the folder holds, at the same codes."),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="For --decoder: denoising steps; default: the decoder's own.", min=1)
    ] = None,
    guidance: Annotated[
        float | None, typer.Option(help="For --decoder: guidance scale, 1 is none; default: the decoder's own.", min=0)
    ] = None,
    seed: Annotated[int, typer.Option(help="For --decoder: of the noise.")] = 0,
    perceptual: Annotated[
        Path | None,
        typer.Option(
            help="LPIPS: file of torchvision's VGG-16 weights (channels count equally; compares with itself only)."
        ),
    ] = None,
    device: _DEVICE = "auto",
    batch_size: _BATCH_SIZE = 32,
    dtype: _DTYPE = "float32",
    compiled: _COMPILE = False,
) -> None:
    """PSNR, SSIM, tokens and bits per image, code usage, linear probe; a picture of originals and reconstructions.

    More on demand: rFID, zero-shot accuracy of the semantic codes, answers to questions, a diffusion decoder beside the plain one.

    [dim]mllm tokenizer eval CKPT --recipe NAME --features inception=weights-inception-2015-12-05-6726825d.pth[/]

    [dim]mllm tokenizer eval CKPT --recipe NAME --zero-shot google/siglip2-so400m-patch16-256 --device cuda[/]

    [dim]mllm tokenizer eval CKPT --recipe NAME --decoder diffusion --steps 20 --guidance 1.5 --features teacher[/]
    """
    from mllm.errors import ConfigError

    _checked(folder, recipe, device, dtype)
    from mllm.visual_tokenizers.evaluate import comparison_grid, evaluate_tokenizer, probe_tokenizer
    from mllm.visual_tokenizers.images import load_images, to_pixels
    from mllm.visual_tokenizers.recipe import load_images_spec
    from mllm.visual_tokenizers.running import watched

    if decoder is None and (steps is not None or guidance is not None or seed):
        raise ConfigError("--steps, --guidance and --seed go with --decoder diffusion")
    arguments.one_of(decoder or "diffusion", ("diffusion",), "--decoder")
    if templates is not None and zero_shot is None:
        raise ConfigError("--templates goes with --zero-shot MODEL")
    model = _open(folder, device, dtype, compiled)
    spec = load_images_spec(recipe)
    images = load_images(spec, model.image.height, "held_out")
    number = len(images) if limit is None else min(limit, len(images))
    decoders, sampling = ({}, {}) if decoder is None else _diffusion(model, steps, guidance, seed)
    network, described = (None, {}) if features is None else _feature_network(features, recipe, model, folder)
    distances = _distances(network, perceptual, model)
    # First, since a model that does not fit is told before the long part.
    named = None if zero_shot is None else _zero_shot(zero_shot, templates, recipe, model, images, batch_size, limit)
    with watched("reconstruct", images, total=number) as (seen,):
        pooled = None if network is None else network.pooled
        result = evaluate_tokenizer(
            model, seen, batch_size=batch_size, limit=limit, features=pooled, distances=distances, decoders=decoders
        )
    if network is not None:
        key = "rfid" if described["name"].startswith("inception=") else "frechet_distance"
        result[key] = _described_distance(key, result.pop("frechet_distance"), described, number)
        for scores in result.get("decoders", {}).values():
            scores[key] = scores.pop("frechet_distance")
    for name, scores in result.get("decoders", {}).items():
        result["decoders"][name] = {**scores, **sampling}
    if named is not None:
        result["zero_shot"] = named
    if questions is not None:
        result["questions"] = _question_scores(questions, spec, model, batch_size)
    if probe and images.labels is not None:
        train = load_images(spec, model.image.height, "train")
        with watched("probe", train, images) as (first, second):
            result["linear_probe"] = probe_tokenizer(model, first, second, batch_size=batch_size)
    picture = grid or folder / "grid.png"
    comparison_grid(model, to_pixels(images.batch(range(min(8, len(images))))), decoders=decoders).save(picture)
    result |= {"device": str(model.last_layer().device), "dtype": dtype, "grid": str(picture)}
    typer.echo(json.dumps(result, indent=2))


def _checked(folder: Path, recipe: str, device: str, dtype: str) -> None:
    from mllm.recipe import load_recipe

    arguments.folder_of(folder, "a saved visual tokenizer")
    load_recipe(recipe)
    arguments.device(device)
    arguments.one_of(dtype, ("float32", "bfloat16"), "--dtype")


def _open(folder: Path, device: str, dtype: str, compiled: bool) -> Any:
    """The saved tokenizer on its device, computing in its type."""
    from mllm.errors import ConfigError
    from mllm.visual_tokenizers.base import VisualTokenizer
    from mllm.visual_tokenizers.running import choose_device, run_in_bfloat16

    if dtype not in ("float32", "bfloat16"):
        raise ConfigError(f"--dtype {dtype}: give float32 or bfloat16")
    model = VisualTokenizer.from_pretrained(folder).to(choose_device(device))
    if compiled:
        from mllm.models.compilation import compile_tokenizer

        compile_tokenizer(model)
    return run_in_bfloat16(model) if dtype == "bfloat16" else model


def _diffusion(
    model: VisualTokenizer, steps: int | None, guidance: float | None, seed: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The diffusion decoder by name, and how it samples. Raises what its first use would."""
    decoder = model.diffusion
    number, scale = decoder.settings(steps, guidance)
    sampling = {"steps": number, "guidance": scale, "seed": seed}

    def decode(codes: Any) -> Any:
        return decoder.shrunk(decoder.decode(codes, steps=number, guidance=scale, seed=seed))

    return {"diffusion": decode}, sampling


def _distances(network: Any, perceptual: Path | None, model: VisualTokenizer) -> dict[str, Any]:
    """Distances of each picture to the real one, by name: of a feature network's tokens, and LPIPS."""
    from mllm.visual_tokenizers.evaluate import feature_distance
    from mllm.visual_tokenizers.perceptual import PerceptualLoss
    from mllm.visual_tokenizers.recipe import PerceptualSpec

    found: dict[str, Any] = {}
    if network is not None and network.tokens is not None:
        found["feature_distance"] = feature_distance(network.tokens)
    if perceptual is not None:
        found["lpips"] = PerceptualLoss(PerceptualSpec(vgg=str(perceptual))).to(model.last_layer().device).distances
    return found


def _described_distance(key: str, value: float, described: dict[str, Any], number: int) -> dict[str, Any]:
    """A Fréchet distance with its network and number of images, and what makes it no result to compare with."""
    width, network = described["width"], {k: v for k, v in described.items() if k != "published"}
    distance: dict[str, Any] = {"value": value, "network": network, "images": number}
    warnings = []
    if number < 2 * width:
        warnings.append(f"biased: {number} images for {width} features; use at least {2 * width}")
    if not described.get("published", True):
        warnings.append("these are not the weights that published FIDs are measured with")
    if warnings:
        distance["warning"] = "; ".join(warnings)
        typer.echo(f"{key} is {distance['warning']}" if number < 2 * width else f"{key}: {warnings[0]}", err=True)
    return distance


def _zero_shot(
    name: str,
    templates: Path | None,
    recipe: str,
    model: VisualTokenizer,
    images: Any,
    batch_size: int,
    limit: int | None,
) -> dict[str, Any]:
    from transformers.utils import logging as transformers_logging

    from mllm.eval.report.statistics import wilson_interval
    from mllm.visual_tokenizers.images import load_images
    from mllm.visual_tokenizers.joint import TEMPLATE, JointModel, read_templates
    from mllm.visual_tokenizers.recipe import load_training
    from mllm.visual_tokenizers.running import watched
    from mllm.visual_tokenizers.zero_shot import teacher_tap, zero_shot

    transformers_logging.disable_progress_bar()
    whole = load_training(recipe)
    teacher_tap(whole, model)  # what cannot be measured is told before a large model is read
    lines = (TEMPLATE,) if templates is None else read_templates(templates)
    train = load_images(whole.images, model.image.height, "train")
    joint = JointModel.open(name)
    number = len(images) if limit is None else min(limit, len(images))
    with watched("zero-shot", images, total=number) as (seen,):
        row = zero_shot(model, joint, whole, train, seen, templates=lines, batch_size=batch_size, limit=limit)
    return {
        "accuracy": row["correct"] / row["n"],
        "interval_95": wilson_interval(row["correct"], row["n"]),
        "teacher_accuracy": row["teacher_correct"] / row["n"],
        "chance": 1 / row["classes"],
        "n": row["n"],
        "cosine": row["cosine"],
        "model": name,
        "templates": len(lines),
    }


def _feature_network(name: str, recipe: str, model: VisualTokenizer, folder: Path) -> tuple[Any, dict[str, Any]]:
    """``pooled``: pixels in [-1, 1] → ``(B, D)``, ``tokens``: → ``(B, N, D)`` where it has some; and what it is: network, sha256 of its
    state or file, width."""
    import hashlib
    from types import SimpleNamespace

    from mllm.config import read_yaml
    from mllm.errors import ConfigError
    from mllm.visual_tokenizers.images import load_images
    from mllm.visual_tokenizers.inception import InceptionFeatures
    from mllm.visual_tokenizers.recipe import load_training
    from mllm.visual_tokenizers.teacher import TEACHER_FILE, EncoderTeacher, build_teacher

    device = model.last_layer().device
    if name.partition("=")[0] == "inception":
        inception = InceptionFeatures(name.partition("=")[2]).to(device)
        described = {"name": name, "sha256": inception.sha256, "width": inception.width}
        return SimpleNamespace(pooled=inception, tokens=None), {**described, "published": inception.published}
    if name == "teacher":
        whole = load_training(recipe)
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
    digest = hashlib.sha256()
    for key, value in sorted(teacher.state_dict().items()):
        digest.update(key.encode() + value.detach().float().contiguous().cpu().numpy().tobytes())
    teacher.to(device)
    described = {"name": name, "sha256": digest.hexdigest(), "width": teacher.width}
    found = SimpleNamespace(
        pooled=lambda pixels: teacher(pixels)["pooled"].float(), tokens=lambda pixels: teacher(pixels)["tokens"].float()
    )
    return found, described


def _chart_questions(size: int, split: Split, *, number: int = 400) -> Any:
    """Bar charts with questions that have exact answers, one of each kind per chart; needs matplotlib."""
    import random

    import numpy as np
    from PIL import Image

    from mllm.demo.charts import COLOURS, LABELS, MAX_VALUE, Chart, Renderer, questions
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
        of_picture = []
        for kind, choices in questions(chart).items():
            if choices:
                question = generator.choice(choices)
                of_picture.append((kind, question.text, question.answer))
        picture = Image.fromarray(renderer.draw(chart)).convert("RGB").resize((size, size), Image.Resampling.BOX)
        drawn.append((np.array(picture), of_picture))
    return gather_questions(drawn, split)


def _question_scores(name: str, spec: Any, model: VisualTokenizer, batch_size: int) -> dict[str, Any]:
    from mllm.eval.report.statistics import wilson_interval
    from mllm.visual_tokenizers.images import load_images
    from mllm.visual_tokenizers.questions import QuestionSet, answer_questions, class_questions, read_questions
    from mllm.visual_tokenizers.running import watched

    size = model.image.height
    if name == "classes":
        parts = tuple(class_questions(load_images(spec, size, split)) for split in ("train", "held_out"))
    elif name == "charts":
        parts = _chart_questions(size, "train"), _chart_questions(size, "held_out", number=200)
    else:
        parts = read_questions(Path(name), size)
    pictures = [part.images for part in parts]
    with watched("questions", *pictures, total=2 * sum(map(len, pictures))) as (first, second):
        seen = (QuestionSet(first, parts[0].questions), QuestionSet(second, parts[1].questions))
        scores = answer_questions(model, *seen, batch_size=batch_size)
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
    split: Annotated[str, typer.Option(help="train or held_out.")] = "train",
    device: _DEVICE = "auto",
    batch_size: _BATCH_SIZE = 32,
    dtype: _DTYPE = "float32",
    compiled: _COMPILE = False,
) -> None:
    """Write the codes of a recipe's images to disk, in shards; resumable."""
    from mllm.errors import ConfigError

    _checked(folder, recipe, device, dtype)
    if split == "test":
        raise ConfigError("--split: test is now held_out, as recipes and logs say")
    arguments.one_of(split, ("train", "held_out"), "--split")
    from mllm.visual_tokenizers.images import load_images
    from mllm.visual_tokenizers.recipe import load_images_spec
    from mllm.visual_tokenizers.running import watched
    from mllm.visual_tokenizers.storage import SHARD_SIZE, encode_images

    model = _open(folder, device, dtype, compiled)
    images = load_images(load_images_spec(recipe), model.image.height, cast("Split", split))
    done = min(len(images), SHARD_SIZE * len(list(output.glob("codes-*.safetensors"))))
    with watched("encode", images, done=done) as (seen,):
        number = encode_images(model, seen, output, batch_size=batch_size)
    typer.echo(f"{number} shards written to {output}")


def add_to(app: typer.Typer) -> None:
    """Register the group."""
    app.add_typer(tokenizer, name="tokenizer")
