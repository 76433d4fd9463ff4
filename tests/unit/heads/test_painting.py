"""Does a checkpoint carry the diffusion decoder of its visual tokenizer, and is it what draws?"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from mllm.errors import CheckpointError, ConfigError
from mllm.models.modeling_mllm import MllmForConditionalGeneration
from mllm.visual_tokenizers.base import VisualTokenizer, as_unit_range
from mllm.visual_tokenizers.diffusion.carried import attach
from mllm.visual_tokenizers.diffusion.decoder import DiffusionDecoder
from mllm.visual_tokenizers.painting import Painting
from mllm.visual_tokenizers.sequence import decode_packed, unpack_codes
from tests.unit.heads.drawing_models import PROMPTS, drawing_model
from tests.unit.visual_tokenizers.diffusion_configs import DECODERS

pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Any]:
    """The folder of a tokenizer with a decoder of pictures twice as large, that of a model on it, and the model's processor."""
    folder = tmp_path_factory.mktemp("painting")
    model, processor = drawing_model(folder / "start", "separate", "vq")
    model.image_tokenizer.save_pretrained(folder / "tokenizer")
    torch.manual_seed(0)
    tokenizer = VisualTokenizer.from_pretrained(folder / "tokenizer")
    DiffusionDecoder({**DECODERS["large"], "steps": 2}, tokenizer).save_files(folder / "tokenizer")
    attach(model.image_tokenizer, folder / "tokenizer")
    model.eval().save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    return folder / "tokenizer", folder / "model", processor


def test_a_checkpoint_carries_the_decoder_and_draws_with_it(made, tmp_path):
    _, folder, processor = made
    assert {p.name for p in (folder / "diffusion_decoder").iterdir()} == {
        "diffusion_decoder.json",
        "diffusion_decoder.safetensors",
    }
    model = MllmForConditionalGeneration.from_pretrained(folder).eval()
    tokenizer = model.image_tokenizer
    assert tokenizer.has_diffusion and not tokenizer._diffusion, "nothing is read before it is used"
    drawn = model.generate_images(PROMPTS, processor=processor, seed=5)
    assert drawn.pixels.shape == (3, 3, 32, 32)
    codes = unpack_codes(tokenizer, drawn.packed)
    torch.testing.assert_close(drawn.pixels, as_unit_range(tokenizer.diffusion.decode(codes, seed=[5, 6, 7])))
    one_by_one = model.generate_images(PROMPTS, processor=processor, seed=5, batch_size=1)
    torch.testing.assert_close(one_by_one.pixels, drawn.pixels, atol=1e-5, rtol=1e-4)
    plain = model.generate_images(PROMPTS, processor=processor, seed=5, painting=Painting("plain"))
    assert torch.equal(plain.packed, drawn.packed)
    with torch.no_grad():
        torch.testing.assert_close(plain.pixels, decode_packed(tokenizer, plain.packed))
    other = decode_packed(tokenizer, drawn.packed, Painting("diffusion", steps=1), [5, 6, 7])
    assert not torch.allclose(other, drawn.pixels, atol=1e-3)
    model.save_pretrained(tmp_path / "again")
    again = MllmForConditionalGeneration.from_pretrained(tmp_path / "again", dtype=torch.bfloat16)
    again.image_tokenizer.diffusion.decode(unpack_codes(again.image_tokenizer, drawn.packed))
    again.save_pretrained(tmp_path / "third")
    third = MllmForConditionalGeneration.from_pretrained(tmp_path / "third")
    assert third.image_tokenizer.has_diffusion, "a tokenizer in bfloat16 is the one of its decoder"


def test_a_tokenizer_that_learned_since_loses_its_decoder_with_a_warning(made, tmp_path):
    _, folder, processor = made
    model = MllmForConditionalGeneration.from_pretrained(folder).eval()
    with torch.no_grad():
        model.image_tokenizer.last_layer().mul_(1.1)
    with pytest.warns(UserWarning, match="has learned since its diffusion decoder"):
        model.save_pretrained(tmp_path / "learned")
    assert not (tmp_path / "learned" / "diffusion_decoder").exists()
    with pytest.raises(CheckpointError, match="another visual tokenizer"):
        _ = model.image_tokenizer.diffusion
    plain = MllmForConditionalGeneration.from_pretrained(tmp_path / "learned").eval()
    assert plain.generate_images(PROMPTS[:1], processor=processor, seed=1).pixels.shape[-1] == 16
    for painting, words in ((Painting("diffusion"), "has none"), (Painting(steps=3), "steps and guidance")):
        with pytest.raises(ConfigError, match=words):
            plain.generate_images(PROMPTS[:1], processor=processor, painting=painting)


def test_another_decoder_is_another_checkpoint(made, tmp_path):
    from mllm.eval.generators.base import checkpoint_hash

    shutil.copytree(made[1], tmp_path / "copy")
    before = checkpoint_hash(str(tmp_path / "copy"))
    (tmp_path / "copy" / "step-3").mkdir()
    (tmp_path / "copy" / "step-3" / "state.json").write_text("{}")  # what lies beside a model is no part of it
    assert checkpoint_hash(str(tmp_path / "copy")) == before == checkpoint_hash(str(made[1]))
    weights = tmp_path / "copy" / "diffusion_decoder" / "diffusion_decoder.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(bytes(content))
    assert checkpoint_hash(str(tmp_path / "copy")) != before


def test_a_stage_draws_with_it_unless_the_tokenizer_learns(made, tmp_path):
    from mllm.recipe import StageSpec
    from mllm.train.observe.drawings import Drawings

    _, folder, processor = made

    def drawn_by(changes: dict[str, Any]) -> tuple[int, int]:
        draw = {"prompts": [PROMPTS[0]], "seed": 5, **changes}
        stage = StageSpec.model_validate({"name": "s", "learn": {"heads": 1e-3}, "data": "x", "steps": 1, "draw": draw})
        path = Drawings(tmp_path, stage, model, processor, None)(1, last=True)
        with Image.open(str(path)) as picture:
            return picture.size

    model = MllmForConditionalGeneration.from_pretrained(folder).eval()
    with pytest.raises(ConfigError, match="steps and guidance are the diffusion decoder's"):
        drawn_by({"decoder": "plain", "steps": 2})
    model.image_tokenizer.requires_grad_(True)
    assert drawn_by({}) == (16, 16), "its codes move away from those that the decoder was trained beside"
    model.image_tokenizer.requires_grad_(False)
    assert drawn_by({}) == (32, 32) and drawn_by({"decoder": "plain"}) == (16, 16)
    random = torch.get_rng_state()
    assert drawn_by({"decoder": "diffusion", "steps": 1, "guidance": 1.0}) == (32, 32)
    assert torch.equal(random, torch.get_rng_state())


def test_the_servers_draw_with_it(made, monkeypatch):
    from transformers import AutoConfig

    from mllm.serve.http.fields import DRAW, ROUTES
    from mllm.serve.images.api import ImagesRequest, _load_tokenizer
    from mllm.serve.images.beside import ModelGenerator

    _, folder, processor = made
    generator = ModelGenerator(str(folder))
    ask = lambda **more: ImagesRequest(prompt=PROMPTS[0], seed=5, **more)  # noqa: E731
    body = asyncio.run(generator.draw(None, ask()))
    picture = Image.open(io.BytesIO(base64.b64decode(body["data"][0]["b64_json"])))
    assert body["size"] == "32x32" and picture.size == (32, 32)
    wanted = generator.model.generate_images(PROMPTS[0], processor=processor, seed=5).pil()[0]
    assert list(picture.getdata()) == list(wanted.getdata())
    assert asyncio.run(generator.draw(None, ask(decoder="plain", size="16x16")))["size"] == "16x16"
    with pytest.raises(ConfigError, match="size 16x16: this model draws 32x32"):
        asyncio.run(generator.draw(None, ask(size="16x16")))
    known = ROUTES[DRAW]
    assert set(ImagesRequest.model_fields) <= {*known.passed, *known.dropped}, "the server lets all of them through"
    assert _load_tokenizer(AutoConfig.from_pretrained(folder), str(folder)).has_diffusion


def test_a_run_builds_on_a_tokenizer_with_a_decoder(made, tmp_path):
    """The way of a recipe, ``model.visual_tokenizer: {weights: FOLDER}``."""
    from mllm.visual_tokenizers.base import build_tokenizer
    from mllm.visual_tokenizers.reader import load_tokenizer_weights

    folder = made[0]
    tokenizer = build_tokenizer(VisualTokenizer.from_pretrained(folder).config)
    load_tokenizer_weights(tokenizer, folder)
    assert tokenizer.has_diffusion and tokenizer.decoder_of is not None
    stored = json.loads((made[1] / "diffusion_decoder" / "diffusion_decoder.json").read_text())
    assert stored["tokenizer_rounded"] == tokenizer.decoder_of
