"""Does a diffusion decoder learn beside a tokenizer, resume exactly, and is it planned and scored?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mllm.config import validate
from mllm.errors import ConfigError, MllmError
from mllm.recipe import Recipe, load_recipe
from mllm.train.preflight.tokenizer_plan import plan_tokenizer
from mllm.train.run import run_recipe
from mllm.train.stages.diffusion.stage import odd_diffusion_settings
from mllm.visual_tokenizers.base import VisualTokenizer, build_tokenizer
from mllm.visual_tokenizers.diffusion.decoder import DiffusionDecoder
from mllm.visual_tokenizers.diffusion.library import diffusers_class
from mllm.visual_tokenizers.recipe import diffusion_training, load_images_spec
from tests.unit.visual_tokenizers.diffusion_configs import DECODERS, DIT, UNET, VAE
from tests.unit.visual_tokenizers.tokenizer_configs import TINY

EMA_VQ = {**TINY["vq"], "quantizer": {**TINY["vq"]["quantizer"], "codebook": {"learn": "ema"}}}
DATA = {"type": "digits_and_charts", "options": {"charts": 40, "digits": False}}
SHARED: dict[str, Any] = {
    "batch_size": 4, "dtype": "float32", "log_every": 1, "data": DATA, "schedule": {"type": "constant", "warmup": 0.0},
}  # fmt: skip


@pytest.fixture
def saved(tmp_path) -> Path:
    torch.manual_seed(0)
    build_tokenizer(EMA_VQ).save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def stage(name: str = "decoder", decoder: Any = None, options: Any = None, **changes: Any) -> dict[str, Any]:
    decoder = decoder or DECODERS["unet"]
    options = {"decoder": {"steps": 2, **decoder}, "evaluate_images": 4, **(options or {})}
    return {
        "name": name,
        "kind": "diffusion",
        "learn": {"diffusion_decoder": 1e-3},
        "steps": 4,
        "options": options,
        **SHARED,
        **changes,
    }


def recipe(folder: Path, tokenizer: Any, *stages: dict[str, Any]) -> Recipe:
    plain = {
        "name": "tiny",
        "output": str(folder / "run"),
        "model": {"visual_tokenizer": tokenizer},
        "stages": list(stages),
    }
    return validate(Recipe, plain)


def log(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


def test_tokenizer_and_decoder_in_one_recipe(tmp_path):
    first = {"name": "tokenizer", "kind": "tokenizer", "learn": {"visual_tokenizer": 1e-3}, "steps": 2, **SHARED}
    second = stage(steps=25, options={"evaluate_every": 20}, optimizer={"ema": 0.5}, learn={"diffusion_decoder": 3e-3})
    final = run_recipe(recipe(tmp_path, EMA_VQ, first, second))
    lines = [line for line in log(tmp_path) if line["stage"] == "decoder"]
    early, late = (sum(line["losses"]["flow_matching"] for line in part) / 5 for part in (lines[:5], lines[-5:]))
    assert len(lines) == 25 and late < 0.8 * early
    assert [line["step"] for line in lines if "evaluation" in line] == [20]
    result = json.loads((final / "evaluation.json").read_text())
    assert result["images"] == 4 and {"psnr", "ssim"} <= set(result["decoders"]["diffusion"]) and result["psnr"] > 0
    record = json.loads((tmp_path / "run" / "run.json").read_text())["stages"]["decoder"]
    assert record["evaluation"] == result and record["steps"] == 25
    before = VisualTokenizer.from_pretrained(tmp_path / "run" / "tokenizer")
    after = VisualTokenizer.from_pretrained(final)
    assert all(torch.equal(v, after.state_dict()[k]) for k, v in before.state_dict().items()), "the tokenizer is frozen"
    assert after.diffusion.decode(before.encode(torch.zeros(2, 3, 16, 16))).shape == (2, 3, 16, 16)
    assert load_images_spec(final / "recipe.yaml").type == "digits_and_charts"


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, saved):
    """Times, noise, what is dropped and hidden go on where they were, and so does the moving average."""
    changes: dict[str, Any] = {"decoder": DECODERS["edit"], "options": {"masks": {}}, "optimizer": {"ema": 0.9}}
    changes |= {"save_every": 3, "steps": 5, "data": {**DATA, "crop": [0.5, 1.0], "flip": True}}
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    given = {"weights": str(saved)}
    run_recipe(recipe(whole, given, stage(**changes)))
    run_recipe(recipe(broken, given, stage(**changes)), stop_after=3)
    assert not (broken / "run" / "final").exists()
    run_recipe(recipe(broken, given, stage(**changes)), resume=True)
    first, second = (
        DiffusionDecoder.from_pretrained(folder / "run" / "final").state_dict() for folder in (whole, broken)
    )
    assert set(first) == set(second) and all(torch.equal(first[key], second[key]) for key in first)
    assert [line["losses"] for line in log(whole)] == [line["losses"] for line in log(broken)]


def test_a_second_stage_goes_on_with_the_decoder_of_the_first(tmp_path, saved):
    autoencoder = tmp_path / "vae"
    diffusers_class("AutoencoderKL")(**VAE).save_pretrained(autoencoder)
    latent = {**DECODERS["latent"], "sampler": "ddim", "autoencoder": {"source": str(autoencoder)}}
    parts = {"diffusion_decoder.sequence": 1e-3}
    run_recipe(
        recipe(
            tmp_path, {"weights": str(saved)}, stage("one", latent, steps=1), stage("two", latent, steps=2, learn=parts)
        )
    )
    one, two = (DiffusionDecoder.from_pretrained(tmp_path / "run" / name).state_dict() for name in ("one", "two"))
    changed = {key.partition(".")[0] for key in one if not torch.equal(one[key], two[key])}
    assert changed == {"sequence"}, "what the stage does not name is frozen, the autoencoder always"
    other = recipe(tmp_path / "b", {"weights": str(saved)}, stage("one", latent, steps=1), stage("two", steps=1))
    with pytest.raises(ConfigError, match=r"stages\.two\.options\.decoder: does not fit"):
        run_recipe(other)


def test_a_branch_learns_beside_a_frozen_network_and_files_of_one_branch_open(tmp_path, saved):
    branch = DECODERS["branch"]
    changes: dict[str, Any] = {"decoder": branch, "options": {"masks": {"emphasis": True}}, "steps": 2}
    first = stage(**changes, learn={"diffusion_decoder.branches": 1e-2}, gradient_checkpointing=True)
    run_recipe(recipe(tmp_path, {"weights": str(saved)}, first))
    final = tmp_path / "run" / "final"
    trained = DiffusionDecoder.from_pretrained(final)
    torch.manual_seed(0)
    moved = [n for n, p in trained.branches["context"].named_parameters() if "project" in n and p.abs().sum() > 0]
    assert len(moved) == 4, "two layers that started at zero, with their biases"
    start = log(tmp_path)
    assert len(start) == 2
    config, weights = final / "diffusion_decoder.json", final / "diffusion_decoder.safetensors"
    plain = json.loads(config.read_text())
    one = plain.pop("branches")["context"]
    config.write_text(json.dumps({**plain, "branch": {k: one[k] for k in ("depth", "placement", "outside_only")}}))
    tensors = {n.replace("branches.context.copy.", "branch."): v for n, v in trained.state_dict().items()}
    save_file(tensors, str(weights))
    opened = DiffusionDecoder.from_pretrained(final)
    assert opened.config == trained.config
    assert all(torch.equal(v, opened.state_dict()[n]) for n, v in trained.state_dict().items())


def test_a_plan_counts_both(saved, tmp_path):
    first = {"name": "tokenizer", "kind": "tokenizer", "learn": {"visual_tokenizer": 1e-3}, "steps": 2, **SHARED}
    plan = plan_tokenizer(
        recipe(tmp_path, EMA_VQ, first, stage(decoder=DECODERS["latent"], gradient_checkpointing=True))
    )
    decoder = DiffusionDecoder(DECODERS["latent"], VisualTokenizer.from_pretrained(saved))
    learned = sum(p.numel() for part in (decoder.network, decoder.sequence) for p in part.parameters())
    beside = plan.stages[1]
    assert sum(group.num_parameters for group in beside.groups) == learned
    assert plan.parameters["diffusion_decoder.autoencoder"] == sum(p.numel() for p in decoder.autoencoder.parameters())
    assert beside.memory["activations and loss"] > 0 and beside.flops_step > 0 and beside.steps == 4
    assert beside.hazards == [
        "the frozen tokenizer is left out of operations, and of activations, of which it keeps none"
    ]
    assert "denoises 4 × 8 × 8 beside cross_attention, reconstruction" in plan.joins[1]


def test_illumes_decoder_has_the_published_sizes():
    """Of the specification: 4 noisy latents, 32 semantic and 32 pixel channels; SDXL's UNet of 2.57 B and autoencoder of 84 M."""
    recipe = load_recipe("tokenizer_illume_sdxl_decoder")
    training = diffusion_training(recipe, recipe.stages[0])
    with torch.device("meta"):
        decoder = DiffusionDecoder(training.options.decoder, build_tokenizer(training.tokenizer))
    assert sum(p.numel() for p in decoder.network.conv_in.parameters()) == 196_160
    sizes = [sum(p.numel() for p in part.parameters()) for part in (decoder.network, decoder.autoencoder)]
    assert round(sizes[0] / 1e9, 2) == 2.57 and round(sizes[1] / 1e6) == 84
    assert (decoder.size, decoder.image_side, decoder.config.guidance) == ((64, 64), 512, 2.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learn": {"visual_tokenizer": 1e-3}}, "did you mean|Its parts: diffusion_decoder"),
        ({"learn": {"diffusion_decoder": {"lr": 1e-3, "lora": {"r": 2}}}}, "take lora"),
        ({"compile": True}, "a diffusion stage learns from single pictures and has no compile"),
        ({"packing": True}, "a diffusion stage learns from single pictures and has no packing"),
        ({"engine": "zero3"}, "use none, sharded, zero1 or zero2"),
        ({"engine": "fsdp2"}, "use none, sharded, zero1 or zero2"),
        ({"options": {"decoder": {"network": "unet", "settings": {**UNET, "block_out_channels": [8] * 7}}}}, "16 × 16 picture"),
        ({"options": {"decoder": {"network": "sd4"}}}, r"stages\.decoder\.options\.decoder\.network"),
        ({"options": {"masks": {}}}, "masks and the decoder's condition source go together"),
        ({"options": {"masks": {"boxes": [0.5, 0.2]}, "decoder": DECODERS["edit"]}}, "smallest, largest"),
        ({"options": {"decoder": DECODERS["latent"]}}, r"autoencoder\.source: the autoencoder is frozen"),
        ({"data": "/no/such/folder"}, "no folder"),
        ({"kind": "sft"}, "all kinds but tokenizer and diffusion"),
    ],
)  # fmt: skip
def test_bad_recipes_say_what_to_change(tmp_path, saved, changes, message):
    with pytest.raises(MllmError, match=message):
        run_recipe(recipe(tmp_path, {"weights": str(saved)}, stage(**changes)))


def test_a_decoder_without_a_trained_tokenizer_is_refused(tmp_path):
    own = {
        **TINY["dualtoken"],
        "weights": {"source": "google/siglip2"},
    }  # of the tokenizer's vision model: no trained tokenizer
    with pytest.raises(ConfigError, match="put a stage of kind tokenizer before it"):
        run_recipe(recipe(tmp_path, own, stage()))
    with pytest.raises(ConfigError, match="put a stage of kind tokenizer before it"):
        run_recipe(recipe(tmp_path, TINY["vq"], stage()))
    with pytest.raises(MllmError, match="nowhere"):
        run_recipe(recipe(tmp_path, {"weights": str(tmp_path / "nowhere")}, stage()))


def test_the_command_scores_both_decoders(tmp_path, saved, capsys):
    from typer.testing import CliRunner

    from mllm.cli.main import app

    final = run_recipe(recipe(tmp_path, {"weights": str(saved)}, stage(decoder=DECODERS["large"], steps=1)))
    encoder = tmp_path / "encoder.json"
    settings = {"type": "small_vit", "image_size": 16, "patch_size": 8, "width": 8, "depth": 1, "heads": 2}
    from safetensors.torch import save_file

    from mllm.visual_tokenizers.teacher import EncoderTeacher

    save_file(EncoderTeacher(settings).encoder.encoder.state_dict(), str(tmp_path / "vit.safetensors"))
    encoder.write_text(json.dumps({**settings, "weights": str(tmp_path / "vit.safetensors")}))
    call = [
        "tokenizer",
        "eval",
        str(final),
        "--recipe",
        str(final / "recipe.yaml"),
        "--limit",
        "6",
        "--no-probe",
        "--device",
        "cpu",
    ]
    call += ["--features", str(encoder)]
    ran = CliRunner().invoke(app, [*call, "--decoder", "diffusion", "--steps", "3", "--guidance", "2", "--seed", "4"])
    assert ran.exit_code == 0, ran.output
    result = json.loads(ran.stdout)
    scores = result["decoders"]["diffusion"]
    assert {"psnr", "ssim", "feature_distance", "frechet_distance"} <= set(scores) and result["feature_distance"] >= 0
    assert (scores["steps"], scores["guidance"], scores["seed"]) == (3, 2.0, 4)
    plain = json.loads(CliRunner().invoke(app, call).stdout)
    assert (
        "decoders" not in plain
        and plain["psnr"] == result["psnr"]
        and plain["feature_distance"] == result["feature_distance"]
    )
    for wrong, message in ((["--steps", "3"], "go with --decoder"), (["--decoder", "diffusio"], "did you mean")):
        refused = CliRunner().invoke(app, [*call, *wrong])
        assert refused.exit_code != 0 and message in f"{refused.output}{refused.exception}"


def test_a_patch_wider_than_its_vector_is_told_and_loses_noise(saved, tmp_path):
    def told(patch: int) -> list[str]:
        made = recipe(
            tmp_path,
            {"weights": str(saved)},
            stage(decoder={"network": "dit", "settings": {**DIT, "patch_size": patch}}),
        )
        training = diffusion_training(made, made.stages[0])
        decoder = DiffusionDecoder(training.options.decoder, build_tokenizer(EMA_VQ))
        return odd_diffusion_settings(training, 4, decoder)

    assert told(2) == [], "12 values through 16"
    (line,) = told(4)
    assert "holds 48 values and passes through a vector of 16" in line and "67% of its noise" in line
    assert "patch_size of at most 2" in line
    # Not a guess: whatever the weights are, what a network tells of one patch spans no more directions than its vector has.
    network = diffusers_class("DiTTransformer2DModel")(
        **DIT, in_channels=3, out_channels=3, sample_size=4, num_embeds_ada_norm=1
    ).eval()
    torch.manual_seed(0)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    with torch.no_grad():
        out = network(
            torch.randn(200, 3, 4, 4), timestep=torch.ones(200), class_labels=torch.ones(200, dtype=torch.long)
        ).sample
    assert torch.linalg.matrix_rank(out.flatten(1) - out.flatten(1).mean(0), rtol=1e-4) <= 16
    plan = plan_tokenizer(recipe(tmp_path, {"weights": str(saved)}, stage(decoder={"network": "dit", "settings": DIT})))
    assert any("noise can never be told" in line for line in plan.stages[0].hazards)
