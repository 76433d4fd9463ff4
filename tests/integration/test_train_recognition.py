"""Does a stage of kind recognition teach an encoder to read, at sizes of each dataset's own, and hand it on without its decoders?"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import load_file, save_file

from mllm.data.collate import collate
from mllm.encoders.catalogue import build_encoder, encoder_config
from mllm.errors import ConfigError
from mllm.models.modeling_mllm import MllmForConditionalGeneration
from mllm.train import run_recipe
from mllm.train.stages.kind import kind_of
from mllm.train.stages.recognition.stage import RecognitionModel, RecognitionOptions, TextReader, build_recognition
from mllm.types import IMAGE_MARK, Sample, Turn
from tests.helpers import TINY_CLIP, tiny_model
from tests.integration.train_helpers import make_recipe, metrics

UNIT = {"type": "unit", "width": 48, "depth": 2, "num_heads": 4, "patch_size": 8, "cpe_max_size": 64, "image_size": 16}
OPTIONS = {"size": [16, 32], "decoder_width": 48, "decoder_depth": 1, "decoder_heads": 4, "vision_depth": 1}
LETTERS = "AEHKMOTX"
STEPS = 240


def word_picture(word: str, rng: random.Random) -> Image.Image:
    """A word of two letters, each in its own place or a pixel beside it, in some gray."""
    image = Image.new("RGB", (32, 16), (255,) * 3)
    draw = ImageDraw.Draw(image)
    for place, letter in enumerate(word):
        corner = (place * 16 + 2 + rng.randint(-1, 1), rng.randint(-1, 1))
        draw.text(corner, letter, fill=(rng.randint(0, 90),) * 3, font=ImageFont.load_default(size=14))
    return image


def word_sample(word: str, rng: random.Random) -> Sample:
    return Sample(word, [Turn("user", IMAGE_MARK), Turn("assistant", word)], [word_picture(word, rng)])


def test_an_encoder_learns_to_read_words_that_it_has_not_seen(tmp_path: Path) -> None:
    _, processor = tiny_model(tmp_path, encoders={"eye": UNIT}, connector={"type": "mlp"})
    options = RecognitionOptions.model_validate({**OPTIONS, "vision_weight": 0.1})
    torch.manual_seed(0)
    encoder = build_encoder(encoder_config(UNIT, where="eye"))
    with torch.no_grad():  # first weights of a width of 1280 are too small for one of 48
        for parameter in encoder.parameters():
            if parameter.dim() == 2:
                parameter.mul_(5.0)
    reader = TextReader(processor, "eye", options, 16)
    model = RecognitionModel("eye", encoder, options, reader.pixel_key, len(processor.tokenizer)).train()
    rng = random.Random(0)
    words = [a + b for a in LETTERS for b in LETTERS] * 4
    rng.shuffle(words)
    held = sorted(set(words[:12]))
    words = [word for word in words if word not in held]
    pool = [reader.encode_sample(word_sample(word, rng)) for word in words]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(STEPS):
        optimizer.zero_grad()
        model(24.0, **collate(rng.sample(pool, 24), pad_token_id=0).inputs).loss.backward()
        optimizer.step()
    model.eval()
    assert read_share(model, reader, held, rng) > 0.5
    with torch.no_grad():  # what is read comes from the encoder: without what it learned the decoder reads nothing
        for own, first in zip(encoder.parameters(), model._teacher[0].parameters(), strict=True):
            own.copy_(first)
    assert read_share(model, reader, held, rng) < 0.2


def read_share(model: RecognitionModel, reader: TextReader, words: list[str], rng: random.Random) -> float:
    inputs = collate([reader.encode_sample(word_sample(word, rng)) for word in words], pad_token_id=0).inputs
    grids = [tuple(grid) for grid in inputs["recognised_grid"].tolist()]
    with torch.no_grad():
        tokens = model.encoder(inputs[reader.pixel_key], grids=grids).tokens[0]
    pages = tokens.split([rows * columns for rows, columns in grids])
    end = reader.tokenizer.eos_token_id
    said = [reader.tokenizer.decode(model.language.write(page, end=end, most=6)) for page in pages]
    return sum(found == word for found, word in zip(said, words, strict=True)) / len(words)


def recipe(folder: Path, *, encoder: dict[str, Any] | None = None, **changes: Any) -> Any:
    """Pictures small and words large, then swapped, then a stage of sft with the encoder frozen."""
    rng, data = random.Random(1), []
    for kind in ("pictures", "pages"):
        rows = []
        (folder / kind).mkdir(parents=True, exist_ok=True)
        for number in range(8):
            word = "".join(rng.choices(LETTERS, k=2))
            word_picture(word, rng).save(folder / kind / f"{number}.png")
            said = [{"from": "human", "value": "<image>\nread"}, {"from": "gpt", "value": word}]
            rows.append({"id": f"{kind}{number}", "image": f"{number}.png", "conversations": said})
        (folder / kind / "rows.json").write_text(json.dumps(rows))
        data.append({"dataset": {"format": "llava", "path": str(folder / kind / "rows.json"), "name": kind}})
    mixed = {"datasets": data}
    shared = {"kind": "recognition", "steps": 3, "batch_size": 4, "data": mixed, "learn": {"encoders.eye": 1e-3}}
    stages = [
        {"name": name, **shared, "options": {**OPTIONS, "size": [16, 32], "sizes": {"pages": large}}}
        for name, large in (("intra", [32, 64]), ("inter", [8, 16]))
    ]
    stages[0] |= {key: value for key, value in changes.items() if key != "options"}
    stages[0]["options"] |= changes.get("options", {})  # pyright: ignore[reportCallIssue, reportArgumentType]
    stages.append({"name": "words", "steps": 2, "data": data[1]["dataset"], "learn": {"connector": 1e-3}})
    model = {"encoders": {"eye": encoder or UNIT}, "connector": {"type": "mlp", "norm_before": "layer_norm"}}
    return make_recipe(folder, stages=stages, model=model)


def test_two_stages_of_sizes_hand_the_bare_encoder_on(tmp_path: Path) -> None:
    run_recipe(recipe(tmp_path, options={"downsample": 2}))
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    told = [set(row["head_loss"]) for row in rows if row.get("stage") in ("intra", "inter") and "head_loss" in row]
    assert len(told) == 6 and all(one == {"recognition/text", "recognition/vision"} for one in told)
    states = [load_file(tmp_path / "run" / name / "model.safetensors") for name in ("intra", "inter", "words")]
    assert len({tuple(state) for state in states}) == 1, "the decoders are not part of the model"
    eye = [{key: value for key, value in state.items() if "encoders.eye" in key} for state in states]
    assert any(not torch.equal(eye[0][key], eye[1][key]) for key in eye[0])
    assert all(torch.equal(eye[1][key], eye[2][key]) for key in eye[1])
    model = MllmForConditionalGeneration.from_pretrained(tmp_path / "run" / "final")
    assert sorted(model.model.vision_tower.encoders) == ["eye"]


CLIP = {**TINY_CLIP, "layers": [-1]}


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"learn": {"connector": 1e-3}}, "trains one encoder"),
        ({"packing": True}, "has a decoder of its own"),
        ({"options": {"decoder_heads": 5}}, "5 heads of even width do not divide 48"),
        ({"options": {"sizes": {"pages": 20}}}, "pages: 20 is not whole patches of 8 pixels"),
        ({"options": {"sizes": {"page": 16}}}, "no dataset 'page', did you mean 'pages'"),
        ({"encoder": CLIP}, "takes pictures of one size"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes: dict[str, Any], word: str, tmp_path: Path) -> None:
    wrong = recipe(tmp_path, **changes)
    stage = wrong.stages[0]
    with pytest.raises(ConfigError, match=word):
        kind_of(stage).check(stage, wrong)  # type: ignore[attr-defined]
        _, processor = tiny_model(tmp_path / "t", encoders=wrong.model.encoders, connector={"type": "mlp"})
        encoders = {"eye": build_encoder(encoder_config(wrong.model.encoders["eye"], where="eye"))}
        build_recognition(stage, RecognitionOptions.model_validate(stage.options), encoders, processor)


def test_the_teacher_of_a_second_stage_may_be_the_published_encoder(tmp_path: Path) -> None:
    """Not the one that the first stage left, which is what a copy of the encoder would be."""
    first, trained = (build_encoder(encoder_config(UNIT, where="eye")) for _ in range(2))
    save_file(dict(first.model.state_dict()), tmp_path / "eye.safetensors")  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
    weights = {"source": str(tmp_path / "eye.safetensors"), "licence": "Apache-2.0"}
    config = encoder_config({**UNIT, "weights": weights}, where="eye")
    trained.config = config
    options = RecognitionOptions.model_validate({**OPTIONS, "teacher": "published"})
    model = RecognitionModel("eye", trained, options, "pixel_values", 300)
    teacher = model._teacher[0].state_dict()
    assert all(torch.equal(value, first.state_dict()[key]) for key, value in teacher.items())
    assert any(not torch.equal(value, trained.state_dict()[key]) for key, value in teacher.items())
    assert not any(parameter.requires_grad for parameter in model._teacher[0].parameters())
    wrong = recipe(tmp_path / "r", options={"teacher": "published"})
    _, processor = tiny_model(tmp_path / "t", encoders=wrong.model.encoders, connector={"type": "mlp"})
    with pytest.raises(ConfigError, match=r"published needs model\.encoders\.eye\.weights"):
        stage = wrong.stages[0]
        build_recognition(stage, RecognitionOptions.model_validate(stage.options), {"eye": first}, processor)


@pytest.mark.nightly
def test_a_run_that_is_stopped_in_either_stage_goes_on_bit_equal(tmp_path: Path) -> None:
    spec = recipe(tmp_path, save_every=1)
    spec.stages[1].save_every = 1
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run_recipe(spec, output=whole)
    run_recipe(spec, output=parts, stop_after=2)
    run_recipe(spec, output=parts, resume=True, stop_after=2)
    assert not (parts / "final").exists() and (parts / "intra").exists()
    run_recipe(spec, output=parts, resume=True)
    assert metrics(parts) == metrics(whole)
    for name in ("intra", "inter", "final"):
        assert (parts / name / "model.safetensors").read_bytes() == (whole / name / "model.safetensors").read_bytes()


@pytest.mark.nightly
def test_two_processes_learn_what_one_does(tmp_path: Path) -> None:
    """Unlike sizes on each: the same losses within rounding."""
    spec = recipe(tmp_path)
    run_recipe(spec, output=tmp_path / "one")
    for stage in spec.stages:
        stage.batch_size //= 2
    run_recipe(spec, output=tmp_path / "two", processes=2)
    one, two = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    )
    assert len(one) == len(two) == 8
    for alone, shared in zip(one[:6], two[:6], strict=True):
        assert alone["samples"] == shared["samples"]
        assert alone["loss"] == pytest.approx(shared["loss"], rel=1e-3)
