"""Do codes name classes as the teacher's own features do, through the text side of the same model?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch.nn import functional as F
from typer.testing import CliRunner

from mllm.cli.main import app
from mllm.config import validate
from mllm.errors import CheckpointError, ConfigError, DataError
from mllm.former_recipes import upgraded
from mllm.recipe import Recipe
from mllm.train.run import run_recipe
from mllm.types import ImageSpec
from mllm.visual_tokenizers.base import VisualTokenizer, build_tokenizer, pixel_spec
from mllm.visual_tokenizers.images import load_images, to_pixels
from mllm.visual_tokenizers.joint import JointModel, read_templates
from mllm.visual_tokenizers.recipe import TokenizerTraining, load_training, tokenizer_training
from mllm.visual_tokenizers.zero_shot import (
    Tap,
    TokenRestorer,
    semantic_features,
    teacher_tap,
    zero_shot,
    zero_shot_head,
)
from tests.helpers import tiny_tokenizer
from tests.unit.visual_tokenizers.tokenizer_configs import TINY

SIZES = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
VISION = {**SIZES, "image_size": 16, "patch_size": 4}
TEXT = {**SIZES, "vocab_size": 320, "max_position_embeddings": 24, "num_hidden_layers": 1, "projection_size": 24}
CLASSES = ("red_bus", "blue_car", "green_hat")
NO_SIZES = ("", 0, 0, 0)
CLIP_MEAN = ((0.48, 0.46, 0.41), (0.27, 0.26, 0.28))


def joint_folder(folder: Path, family: str = "siglip") -> Path:
    """A tiny random model of a family with its text tokenizer; weights large enough that every layer counts."""
    import transformers

    torch.manual_seed(3)
    vision = {**VISION, "num_patches": 16} if family == "siglip2" else VISION
    text = {**TEXT, "eos_token_id": 2} if family == "clip" else TEXT
    options = {"projection_dim": 20} if family == "clip" else {}
    kind = {"clip": "CLIP", "siglip": "Siglip", "siglip2": "Siglip2"}[family]
    config = getattr(transformers, f"{kind}Config")(vision_config=vision, text_config=text, **options)
    model = getattr(transformers, f"{kind}Model")(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.25)
            elif "bias" in name or "norm" in name:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    model.save_pretrained(folder)
    tiny_tokenizer(template=None).save_pretrained(folder)
    return folder


def teach(joint: JointModel, directions: torch.Tensor) -> None:
    """Set the last layer of SigLIP's text side so that class i's default prompt is embedded as ``directions[i]``."""
    texts = [f"a photo of a {name.replace('_', ' ')}." for name in CLASSES[: len(directions)]]
    head = joint.model.text_model.head
    head.weight.copy_(torch.eye(24))
    head.bias.zero_()
    ids = joint.tokenizer(texts, padding="max_length", max_length=24, return_tensors="pt")["input_ids"]
    hidden = joint.model.get_text_features(input_ids=ids)
    hidden = hidden if isinstance(hidden, torch.Tensor) else hidden.pooler_output
    head.weight.copy_((torch.linalg.pinv(hidden) @ directions).T)


def pictures(folder: Path, number: int = 24) -> Path:
    """Two classes of noisy plain pictures."""
    generator = np.random.default_rng(0)
    for index in range(number):
        name, colour = (CLASSES[0], (200, 30, 30)) if index % 2 else (CLASSES[1], (30, 60, 210))
        (folder / name).mkdir(parents=True, exist_ok=True)
        noise = generator.integers(-25, 26, (16, 16, 3))
        Image.fromarray((np.array(colour) + noise).clip(0, 255).astype(np.uint8)).save(folder / name / f"{index}.png")
    return folder


def encoder(source: Path, **changes: Any) -> dict[str, Any]:
    architecture = {"model_type": "siglip_vision_model", **VISION}
    weights = {"source": str(source), "licence": "none", "commercial": True}
    return {"type": "hf", "architecture": architecture, "layers": [-2], "weights": weights, **changes}


def recipe_of(kind: str, source: Path, images: Path, **changes: Any) -> dict[str, Any]:
    """A tokenizer recipe (of the short former format) with the SigLIP model in ``source`` as teacher."""
    config = json.loads(json.dumps(TINY[kind]))
    data: dict[str, Any] = {
        "name": "zero",
        "images": {"type": "folder", "options": {"path": str(images), "held_out": 8}},
    }
    if kind == "illume":
        config |= {"semantic_encoder": encoder(source), "noise_images": 0.0}
    elif kind == "tokenflow":
        data |= {"teacher": {"encoder": encoder(source)}, "losses": {"semantic": {"kind": "cosine"}}}
    else:
        config |= {"vision": VISION}
        data |= {"teacher": {"initial": True}, "losses": {"semantic": {"kind": "mse_cosine", "pooled": 1.0}}}
    return {**data, "tokenizer": config, "steps": 60, "batch_size": 8, "rate": 3e-3, "kmeans": 16, **changes}


@pytest.mark.parametrize("family", ["clip", "siglip", "siglip2"])
def test_unquantised_features_score_as_the_model_itself_does(tmp_path, family):
    joint = JointModel.open(str(joint_folder(tmp_path, family)))
    model, texts = joint.model, ["a photo of a red bus.", "a photo of a blue car.", "a photo of a green hat."]
    pixels = torch.rand(5, 3, 16, 16) * 2 - 1
    padding = {"padding": True} if family == "clip" else {"padding": "max_length", "max_length": 24}
    tokens = joint.tokenizer(texts, return_tensors="pt", **padding)
    inputs: dict[str, Any] = {"input_ids": tokens["input_ids"]}
    mean, std = CLIP_MEAN if family == "clip" else ((0.5,) * 3, (0.5,) * 3)
    own = (pixels / 2 + 0.5 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    if family == "clip":
        inputs |= {"attention_mask": tokens["attention_mask"], "pixel_values": own}
    elif family == "siglip":
        inputs |= {"pixel_values": own}
    else:
        patches = own.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 4, 5, 1).reshape(5, 16, 48)
        mask, shapes = torch.ones(5, 16, dtype=torch.int64), torch.full((5, 2), 4)
        inputs |= {"pixel_values": patches, "pixel_attention_mask": mask, "spatial_shapes": shapes}
    with torch.no_grad():
        expected = model(**inputs).logits_per_image
    classes = joint.embed_classes(CLASSES)
    image = ImageSpec(height=16, width=16, mean=mean, std=std)
    assert expected.std() > 1e-2
    for layer, normed in ((1, False), (2, False), (3, False), (3, True)):
        whole, seen = joint.embed_images(pixels, image, layer)
        assert torch.allclose(joint.logits(whole, classes), expected, atol=1e-5)
        tap = Tap(NO_SIZES, layer, normed, image, (4, 4))
        if family == "clip":
            with pytest.raises(ConfigError, match="class token"):
                zero_shot_head(joint, tap)
            continue
        seen = joint.vision.post_layernorm(seen) if normed else seen
        logits = joint.logits(zero_shot_head(joint, tap)(seen), classes)
        assert torch.allclose(logits, expected, atol=1e-5) and torch.equal(logits.argmax(1), expected.argmax(1))
    if family == "clip":
        pooled = model.vision_model(pixel_values=own).pooler_output
        logits = joint.logits(
            zero_shot_head(joint, Tap(NO_SIZES, 3, True, image, (4, 4), says="pooled"))(pooled), classes
        )
        assert torch.allclose(logits, expected, atol=1e-5)


def test_templates_are_averaged_at_length_one(tmp_path):
    joint = JointModel.open(str(joint_folder(tmp_path)))
    file = tmp_path / "templates.txt"
    file.write_text("a photo of a {}.\n\nA bad {}\n")
    templates = read_templates(file)
    assert templates == ("a photo of a {}.", "A bad {}")
    first, second = (joint.embed_texts([text]) for text in ("a photo of a red bus.", "a bad red bus"))
    expected = F.normalize((first + second) / 2, dim=-1)
    assert torch.allclose(joint.embed_classes(["red_bus"], templates), expected, atol=1e-6)
    assert torch.allclose(joint.embed_classes(CLASSES, templates)[:1], expected, atol=1e-6)
    for text, message in (("a photo\n", "line 1: needs one"), ("\n", "no templates")):
        file.write_text(text)
        with pytest.raises(DataError, match=message):
            read_templates(file)
    with pytest.raises(DataError, match="reads 24: shorten"):
        joint.embed_classes(["a thing with a name that is much too long"])


def images_of(data: dict[str, Any]) -> tuple[TokenizerTraining, Any, Any]:
    recipe = tokenizer_training(validate(Recipe, upgraded(data)))
    return recipe, load_images(recipe.images, 16, "train"), load_images(recipe.images, 16, "held_out")


@pytest.mark.parametrize("layer, final_norm", [(-2, True), (-1, True), (-1, False)])
@pytest.mark.parametrize("kind", ["tokenflow", "illume"])
def test_tokens_that_only_lost_their_size_score_as_the_teachers(tmp_path, kind, layer, final_norm):
    source = joint_folder(tmp_path / "model")
    settings = encoder(source, layers=[layer], final_norm=final_norm)
    data = recipe_of(kind, source, pictures(tmp_path / "images"))
    if kind == "tokenflow":
        data["teacher"]["encoder"] = settings
    else:
        data["tokenizer"]["semantic_encoder"] = settings
    recipe, _, held_out = images_of(data)
    joint, tokenizer = JointModel.open(str(source)), build_tokenizer(recipe.tokenizer).eval()
    tap = teacher_tap(recipe, tokenizer)
    assert (tap.layer, tap.normed) == (2 if layer == -2 else 3, layer == -1 and final_norm)
    pixels = to_pixels(held_out.batch(range(8)))
    whole, tokens = joint.embed_images(pixels, tap.image, tap.layer)
    tokens = joint.vision.post_layernorm(tokens) if tap.normed else tokens
    from mllm.visual_tokenizers.encoder import FeatureEncoder

    teacher = FeatureEncoder(settings)
    teacher.load_pretrained()
    assert torch.allclose(teacher(pixels), tokens, atol=1e-5)
    # A cosine loss leaves lengths open; ILLUME's targets have neither mean nor spread.
    lost = F.layer_norm(tokens, (24,)) if kind == "illume" else tokens * torch.rand(8, 16, 1)
    head = zero_shot_head(joint, tap)
    restore = TokenRestorer(joint, tap, held_out, batch_size=3)
    found = F.cosine_similarity(head(restore(lost)), whole, dim=-1)
    assert found.min() > 0.99
    if tap.layer < 3:
        assert found.mean() > F.cosine_similarity(head(lost * 0.01), whole, dim=-1).mean()


def test_dualtoken_goes_through_its_own_later_layers(tmp_path, monkeypatch):
    source = joint_folder(tmp_path / "model")
    recipe, train, held_out = images_of(recipe_of("dualtoken", source, pictures(tmp_path / "images")))
    joint = JointModel.open(str(source))
    tokenizer: Any = build_tokenizer(recipe.tokenizer).eval()
    for name, part in (("embeddings", "embeddings"), ("layers", "encoder.layers"), ("post_norm", "post_layernorm"),
                       ("head", "head")):  # fmt: skip
        getattr(tokenizer, name).load_state_dict(joint.vision.get_submodule(part).state_dict())
    quantised = zero_shot(tokenizer, joint, recipe, train, held_out, batch_size=3)
    assert quantised["cosine"] < 0.99 and quantised["n"] == 8 and quantised["classes"] == 2

    def unquantised(pixels):
        hidden = tokenizer._run(tokenizer.embeddings(pixels), 0, 3)
        return {"tokens": hidden[2], "pooled": tokenizer.head(tokenizer.post_norm(hidden[3]))}

    monkeypatch.setattr("mllm.visual_tokenizers.zero_shot.semantic_features", lambda model, pixels: unquantised(pixels))
    plain = zero_shot(tokenizer, joint, recipe, train, held_out, batch_size=3)
    assert plain["cosine"] > 1 - 1e-5 and plain["correct"] == plain["teacher_correct"]


class Pooling(torch.nn.Module):
    """A CLIP-taught tokenizer whose features have the class token."""

    name, image, grid, grids = "pooling", pixel_spec(16), (4, 4), {}

    def __init__(self, joint: JointModel, settings: dict[str, Any]):
        super().__init__()
        self.semantic_encoder, self.joint = torch.nn.Identity(), joint
        self.config = type("Config", (), {"semantic_encoder": settings})()

    def last_layer(self):
        return self.joint.model.logit_scale

    def encode(self, pixels):
        return pixels

    def semantic_features(self, codes):
        own = (codes / 2 + 0.5 - torch.tensor(CLIP_MEAN[0])[:, None, None]) / torch.tensor(CLIP_MEAN[1])[:, None, None]
        return {"pooled": self.joint.model.vision_model(pixel_values=own).pooler_output}


def test_clips_class_token_is_projected_where_a_tokenizer_says_it(tmp_path):
    joint = JointModel.open(str(joint_folder(tmp_path / "model", "clip")))
    architecture = {"model_type": "clip_vision_model", **VISION}
    settings = {"type": "hf", "architecture": architecture, "mean": CLIP_MEAN[0], "std": CLIP_MEAN[1]}
    data = recipe_of("tokenflow", tmp_path, pictures(tmp_path / "images"))
    recipe, train, held_out = images_of({**data, "teacher": None, "losses": {}})
    found = zero_shot(Pooling(joint, settings), joint, recipe, train, held_out, batch_size=5)  # type: ignore[arg-type]
    assert found["cosine"] > 1 - 1e-5 and found["correct"] == found["teacher_correct"] and found["n"] == 8


@pytest.mark.parametrize("kind", ["tokenflow", "illume", "dualtoken"])
def test_trained_codes_name_their_class_until_the_names_are_swapped(tmp_path, kind):
    source = joint_folder(tmp_path / "model")
    images = pictures(tmp_path / "images")
    data = recipe_of(kind, source, images, output=str(tmp_path / "run"))
    if kind == "dualtoken":
        data["tokenizer"]["weights"] = {"source": str(source), "licence": "none", "commercial": True}
    file = tmp_path / "zero.yaml"
    file.write_text(yaml.safe_dump(upgraded(data)))
    recipe = load_training(file)
    run_recipe(recipe.recipe)
    tokenizer = VisualTokenizer.from_pretrained(tmp_path / "run" / "final")
    train, held_out = (load_images(recipe.images, 16, split) for split in ("train", "held_out"))
    joint = JointModel.open(str(source))
    whole, _ = joint.embed_images(to_pixels(train.batch(range(len(train)))), ImageSpec(height=16, width=16), 1)
    # classes are in alphabetical order: blue_car, red_bus
    blue, red = (whole[train.labels == label].mean(0) for label in (0, 1))
    teach(joint, torch.stack([red - blue, blue - red]))
    found = zero_shot(tokenizer, joint, recipe, train, held_out, batch_size=3)
    assert (found["teacher_correct"], found["correct"], found["n"]) == (8, 8, 8)
    assert found["cosine"] > 0.5
    assert zero_shot(tokenizer, joint, recipe, train, held_out, limit=5)["n"] == 5
    held_out.classes = held_out.classes[::-1]
    swapped = zero_shot(tokenizer, joint, recipe, train, held_out, batch_size=8)
    assert swapped["correct"] == swapped["teacher_correct"] == 0
    if kind != "illume":
        return
    joint.model.save_pretrained(source)
    (tmp_path / "templates.txt").write_text("a photo of a {}.\n")
    command = [
        "tokenizer",
        "eval",
        str(tmp_path / "run" / "final"),
        "--recipe",
        str(file),
        "--no-probe",
        "--device",
        "cpu",
    ]
    command += ["--zero-shot", str(source), "--templates", str(tmp_path / "templates.txt"), "--batch-size", "5"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    row = json.loads(done.stdout)["zero_shot"]
    assert row["accuracy"] == row["teacher_accuracy"] == 1.0 and row["chance"] == 0.5 and row["n"] == 8
    assert row["interval_95"][0] == pytest.approx(0.6756, abs=1e-3) and row["interval_95"][1] == pytest.approx(1.0)


def test_what_does_not_fit_is_named(tmp_path):
    source = joint_folder(tmp_path / "model")
    images = pictures(tmp_path / "images", 8)
    joint = JointModel.open(str(source))
    data = recipe_of("tokenflow", source, images)

    def refused(message: str, tokenizer: Any, **changes: Any) -> None:
        recipe, train, held_out = images_of({**data, **changes})
        with pytest.raises(ConfigError, match=message):
            zero_shot(tokenizer, joint, recipe, train, held_out)

    tokenflow, plain = build_tokenizer(TINY["tokenflow"]).eval(), build_tokenizer(TINY["vq"]).eval()
    losses = data["losses"]
    refused("has no teacher", plain, teacher=None, losses={})
    refused("trained on its own classes", tokenflow, teacher={"supervised": {"patch_size": 4}}, losses=losses)
    refused("small_vit; only CLIP", tokenflow, teacher={"encoder": TINY["tokenflow"]["student"]}, losses=losses)
    refused("semantic_encoder is a small_vit", build_tokenizer(TINY["illume"]).eval())
    both = {"encoder": encoder(source, layers=[1, 2])}
    refused("needs the output of one block", tokenflow, teacher=both, losses=losses)
    other = encoder(source)
    other["architecture"] = {**other["architecture"], "hidden_size": 32}
    refused(
        "of width 32, 3 layers, patches of 4, the vision side .* of width 24", tokenflow, teacher={"encoder": other}
    )
    refused("mixes the channels", tokenflow, teacher={"encoder": encoder(source), "projection": "x"}, losses=losses)
    clip = {"type": "hf", "architecture": {"model_type": "clip_vision_model", **VISION}}
    refused("teacher.encoder: CLIP compares texts with its class token", tokenflow, teacher={"encoder": clip})
    refused("were not taught the teacher's tokens", tokenflow, losses={"semantic": {"tokens": 0, "pooled": 1}})
    refused("no semantic part", plain)
    head = {**TINY["tokenflow"]["semantic_head"], "teacher_dim": 20}
    refused("have 20 channels", build_tokenizer({**TINY["tokenflow"], "semantic_head": head}).eval())
    refused("teacher is a siglip_vision_model of width 32", build_tokenizer(TINY["dualtoken"]),
            teacher={"initial": True})  # fmt: skip
    recipe, train, held_out = images_of(data)
    held_out.labels = None
    with pytest.raises(DataError, match="no classes"):
        zero_shot(tokenflow, joint, recipe, train, held_out)


def test_a_model_that_cannot_compare_texts_is_refused(tmp_path):
    source = joint_folder(tmp_path / "whole")
    with pytest.raises(ConfigError, match="no model of transformers"):
        JointModel.open(str(tmp_path / "absent"))
    JointModel.open(str(source)).model.vision_model.save_pretrained(tmp_path / "vision")
    with pytest.raises(ConfigError, match="'siglip_vision_model' model has no text side"):
        JointModel.open(str(tmp_path / "vision"))
    from safetensors.torch import load_file, save_file

    state = load_file(source / "model.safetensors")
    kept = {key: value for key, value in state.items() if not key.startswith("text_model.head")}
    save_file(kept, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks the weights text_model\.head"):
        JointModel.open(str(source))
    for family in ("clip", "siglip"):
        folder = joint_folder(tmp_path / family, family)
        for file in folder.glob("*token*"):
            file.unlink()
        with pytest.raises(ConfigError, match="text tokenizer"):
            JointModel.open(str(folder))


def test_shipped_recipes_are_tapped_where_their_teacher_is_read():
    taps = {}
    for name in ("tokenizer_tokenflow_siglip_384", "tokenizer_dualtoken_384"):
        recipe = load_training(name)
        with torch.device("meta"):
            taps[name] = teacher_tap(recipe, build_tokenizer(recipe.tokenizer))
    tokenflow, dualtoken = taps.values()
    assert tokenflow.sizes == dualtoken.sizes == ("siglip_vision_model", 1152, 27, 14)
    assert (
        (tokenflow.layer, tokenflow.normed, tokenflow.grid)
        == (26, False, (27, 27))
        == (dualtoken.layer, False, dualtoken.grid)
    )
    assert (tokenflow.says, tokenflow.lost) == ("tokens", "length") and dualtoken.says == "pooled"


def test_a_teacher_at_another_size_sees_resized_positions(tmp_path):
    from mllm.visual_tokenizers.encoder import FeatureEncoder, encoder_settings

    source = joint_folder(tmp_path)
    teacher = FeatureEncoder(encoder_settings(encoder(source, image_size=24)))
    teacher.load_pretrained()
    pixels = torch.rand(2, 3, 16, 16) * 2 - 1
    _, tokens = JointModel.open(str(source)).embed_images(pixels, ImageSpec(height=24, width=24), 2)
    assert tokens.shape == (2, 36, 24) and torch.allclose(tokens, teacher(pixels), atol=1e-4)


def test_what_codes_say_is_what_training_taught(tmp_path):
    for name in ("tokenflow", "dualtoken", "illume"):
        tokenizer = build_tokenizer(TINY[name]).eval()
        pixels = torch.rand(2, 3, 16, 16) * 2 - 1
        with torch.no_grad():
            said, taught = semantic_features(tokenizer, pixels), tokenizer(pixels).features
        assert set(said) == set(taught)
        assert all(torch.allclose(said[key], taught[key], atol=1e-4) for key in said)
