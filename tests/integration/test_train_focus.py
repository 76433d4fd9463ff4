"""Does one recipe train a tokenizer, a decoder beside it and a model that segments and edits with both, and resume in every part?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoModelForImageTextToText, AutoProcessor
from typer.testing import CliRunner

from mllm.cli.main import app
from mllm.demo.edits import prepare_edits, read_edits, train_edit_tokenizer
from mllm.demo.scenes import COLOURS
from mllm.errors import CheckpointError, ConfigError, DataError
from mllm.eval.generators.hf import HFGenerator
from mllm.eval.metrics.editing import EditRule, png_text
from mllm.eval.run import evaluate
from mllm.eval.task import expand_tasks
from mllm.heads.editing import _painted, edit_pictures, touched_codes
from mllm.recipe import Recipe
from mllm.recipe_of_stage import parts_of_run
from mllm.train.preflight.plan import plan_recipe
from mllm.train.preflight.plan_report import size
from mllm.train.preflight.tokenizer_plan import decoder_bytes_of, plan_tokenizer
from mllm.train.run import run_recipe
from mllm.visual_tokenizers.sequence import pack_codes
from tests.helpers import TINY_CLIP, TINY_LLM, picture
from tests.unit.visual_tokenizers.diffusion_configs import DECODERS
from tests.unit.visual_tokenizers.tokenizer_configs import TINY

pytest.importorskip("diffusers")


def recipe(root: Path, steps: int = 3) -> Recipe:
    bare = {"type": "folder", "options": {"path": str(root / "data" / "pictures")}}
    common = {"steps": 2, "batch_size": 2, "dtype": "float32"}
    model = {
        "language_model": {"config": {**TINY_LLM, "vocab_size": 384}, "tokenizer": str(root / "text")},
        "encoders": {"eye": dict(TINY_CLIP)},
        "connector": {"type": "mlp"},
        "visual_tokenizer": TINY["vq"],  # its config has a key "encoder" of its own
        "heads": {
            "marks": {
                "type": "segmentation",
                "encoder": "eye",
                "decoder": {"type": "query", "width": 32, "depth": 1, "heads": 2},
            },
            "draw": {"type": "separate", "code_noise": 0.5, "changed_weight": 5.0, "told_changes": True},
        },
        "chat_template": "vicuna",
    }
    stages = [
        {"name": "tokenizer", "kind": "tokenizer", "learn": {"visual_tokenizer": 1e-3}, "data": bare, **common},
        {
            "name": "decoder",
            "kind": "diffusion",
            "learn": {"diffusion_decoder": 1e-3},
            "data": bare,
            "options": {"decoder": {**DECODERS["edit"], "steps": 2}, "masks": {}, "evaluate_images": 2},
            **common,
        },
        {
            "name": "joint",
            "learn": {"encoders": 1e-3, "connector": 1e-3, "language_model": 1e-3, "heads": 1e-3},
            "data": {"format": "messages", "path": str(root / "data" / "train.jsonl")},
            "max_length": 256,
            **common,
            "steps": steps,
        },
    ]
    return Recipe.model_validate({"name": "focus", "model": model, "stages": stages})


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The root of data, and a run's ``final``."""
    root = tmp_path_factory.mktemp("focus")
    prepare_edits(root / "data", train=8, test=3)
    train_edit_tokenizer(root / "text")
    return root, run_recipe(recipe(root), output=root / "whole")


def test_its_parts_resume_and_are_one_checkpoint(trained: tuple[Path, Path]) -> None:
    root, whole = trained
    for stop in (1, 2, 1):  # within the tokenizer's stage, the decoder's, the model's
        run_recipe(recipe(root), output=root / "parts", resume=stop != 1 or (root / "parts").exists(), stop_after=stop)
    parts = run_recipe(recipe(root), output=root / "parts", resume=True)
    first, second = (load_file(str(folder / "model.safetensors")) for folder in (whole, parts))
    assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)
    decoders = [load_file(str(f / "diffusion_decoder/diffusion_decoder.safetensors")) for f in (whole, parts)]
    assert all(torch.equal(decoders[0][k], decoders[1][k]) for k in decoders[0])
    before = load_file(str(root / "whole" / "tokenizer" / "model.safetensors"))
    for name, tensor in before.items():
        assert torch.equal(first[f"model.visual_tokenizer.{name}"], tensor), (
            "the model is built on this run's tokenizer"
        )
    with pytest.raises(CheckpointError, match="with other settings"):
        run_recipe(recipe(root, steps=4), output=root / "whole", resume=True)


def test_an_edit_changes_what_is_marked_and_nothing_else(
    trained: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    root, folder = trained
    model: Any = AutoModelForImageTextToText.from_pretrained(str(folder)).eval()
    processor, rows = AutoProcessor.from_pretrained(str(folder)), read_edits(root / "data")
    images, asked = [row["image"] for row in rows], ["Make the thing blue."] * len(rows)
    side = model.image_tokenizer.image.height
    masks = torch.zeros(len(rows), side, side, dtype=torch.bool)
    masks[:, 2:9, 3:8] = True
    found = edit_pictures(model, images, asked, processor=processor, masks=masks)
    again = edit_pictures(model, images[1:2], asked[:1], processor=processor, masks=masks[:1], seed=1)
    for number, one in enumerate(found):
        source = np.asarray(processor_picture(images[number], side)).astype(np.float32) / 255
        made = one.pixels.permute(1, 2, 0).numpy()
        assert np.abs(made - source)[~masks[number].numpy()].max() < 1e-5
        assert np.abs(made - source)[masks[number].numpy()].max() > 1e-3
        assert torch.equal(one.mask, masks[number]) and one.pil().size == (side, side)
    torch.testing.assert_close(again[0].packed, found[1].packed)
    tokenizer, pixels = model.image_tokenizer, torch.rand(1, 3, side, side) * 2 - 1
    own = pack_codes(tokenizer, tokenizer.encode(pixels))
    cells = F.adaptive_max_pool2d(masks[:1].float(), tokenizer.grid).flatten(1) > 0
    assert torch.equal(touched_codes(tokenizer, masks[:1]), cells) and not cells.all()
    drawn, seen = (own + 1) % 4, []
    monkeypatch.setattr(
        "mllm.heads.editing.edit", lambda *given, **_: seen.append(pack_codes(tokenizer, given[3])) or given[1]
    )
    _painted(model, pixels, masks[:1], drawn, cells, None, None, 0, 0)
    assert torch.equal(seen[0], torch.where(cells, drawn, own)), "where no mark touches, the source's own"
    monkeypatch.undo()
    unmarked = edit_pictures(model, images[:1], asked[:1], processor=processor)[0]
    assert unmarked.mask.shape == (side, side)
    wide = picture(0, size=(40, 30))
    with pytest.raises(ConfigError, match="picture 0 is 40 × 30, and this model draws squares"):
        edit_pictures(model, [wide], asked[:1], processor=processor)
    with pytest.raises(ConfigError, match="2 instructions for 1 pictures"):
        edit_pictures(model, images[:1], asked[:2], processor=processor)


def processor_picture(path: str, side: int) -> Any:
    from PIL import Image

    with Image.open(path) as opened:
        return opened.convert("RGB").resize((side, side))


def test_edits_are_a_task_judged_by_an_exact_rule(trained: tuple[Path, Path], tmp_path: Path) -> None:
    root, folder = trained
    model: Any = AutoModelForImageTextToText.from_pretrained(str(folder)).eval()
    generator = HFGenerator(model, AutoProcessor.from_pretrained(str(folder)), batch_size=2)
    assert generator.gives_edits
    places = {"editbench_demo": root / "data"}
    result = evaluate(generator, ["editbench_demo"], tmp_path, data=places)["editbench_demo"]
    assert result.num_samples == 3 and result.metrics[0].label.startswith("edit_rule")
    assert "editbench_demo" not in expand_tasks(["all"])
    row = read_edits(root / "data")[0]
    with Image.open(row["image"]) as opened:
        source = np.asarray(opened.convert("RGB")).copy()
    wanted = source.copy()
    wanted[row["mask"]] = COLOURS[row["colour"]]
    leaking = wanted.copy()
    leaking[~row["mask"]] = np.clip(leaking[~row["mask"]].astype(int) + 40, 0, 255)
    untouched, right, spoiled = (
        EditRule().score(json.dumps({"picture": png_text(one)}), row["edit"], {}) for one in (source, wanted, leaking)
    )
    assert (untouched.value, right.value, spoiled.value) == (0.0, 1.0, 0.0)
    assert right.parts == {"coloured": 1.0, "outside_db": 99.0}
    assert spoiled.parts["coloured"] == 1.0 and 10 < spoiled.parts["outside_db"] < 30
    for reply in ("{}", "I cannot", json.dumps({"picture": png_text(wanted[:16])})):
        assert EditRule().score(reply, row["edit"], {}).value is None


def test_a_plan_counts_the_decoder_that_is_saved_with_the_model(trained: tuple[Path, Path]) -> None:
    root, folder = trained
    first, second = parts_of_run(recipe(root), root / "whole")
    planned = plan_tokenizer(first, with_data=False)
    decoder = 4 * sum(number for name, number in planned.parameters.items() if name.startswith("diffusion_decoder"))
    written = (folder / "diffusion_decoder/diffusion_decoder.safetensors").stat().st_size
    assert 0 < written - decoder < 15_000 and decoder_bytes_of(second) == written  # a header beside the numbers
    final = plan_recipe(second, with_data=False, decoder_bytes=written).final_bytes
    saved = sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
    assert 0 < saved - final < 40_000 and final > 3 * written
    result = CliRunner().invoke(app, ["plan", str(folder / "recipe.yaml"), "--no-data"])
    assert result.exit_code == 0, result.output
    assert f"final checkpoint: {size(final)}" in result.output


def test_an_edit_from_the_command_line(trained: tuple[Path, Path], tmp_path: Path) -> None:
    root, folder = trained
    source = read_edits(root / "data")[0]["image"]
    marked = np.zeros((32, 32), np.uint8)
    marked[4:18, 6:16] = 255
    Image.fromarray(marked).save(tmp_path / "mask.png")
    words = ["edit", str(folder), source, "Make the thing blue.", "-o", str(tmp_path / "a" / "edited.png")]
    runner = CliRunner()
    given = runner.invoke(app, [*words, "--mask", str(tmp_path / "mask.png"), "--save-mask", str(tmp_path / "b.png")])
    assert given.exit_code == 0, given.output
    assert "drawn at the model's own 16 × 16 pixels; the picture has 32 × 32" in given.output
    assert "painted anew: x 3, y 2, 5 × 7 pixels, of 16 × 16" in given.output, "the mask at the size that is drawn"
    made, painted = (np.asarray(Image.open(tmp_path / name)) for name in ("a/edited.png", "b.png"))
    before = np.asarray(processor_picture(source, 16)).astype(int)
    assert painted.sum() == 35 and np.abs(made.astype(int) - before)[~painted].max() <= 1
    assert np.abs(made.astype(int) - before)[painted].max() > 1

    nothing = runner.invoke(app, [*words, "--threshold", "1"])  # no pixel is surer than sure
    assert nothing.exit_code == 0 and "painted anew: nothing" in nothing.output
    assert np.abs(np.asarray(Image.open(tmp_path / "a/edited.png")).astype(int) - before).max() <= 1
    Image.fromarray(0 * marked).save(tmp_path / "mask.png")
    black = runner.invoke(app, [*words, "--mask", str(tmp_path / "mask.png")])
    assert isinstance(black.exception, DataError) and "no pixel is brighter than half" in str(black.exception)
