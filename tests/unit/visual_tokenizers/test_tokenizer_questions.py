"""Are questions read from the codes, and are bad question files named?"""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image

from mllm.errors import DataError
from mllm.visual_tokenizers.base import build_tokenizer
from mllm.visual_tokenizers.questions import answer_questions, read_questions
from tests.unit.visual_tokenizers.tokenizer_configs import TINY


def test_pixels_answer_a_colour_question_that_the_blank_cannot(tmp_path):
    rows = []
    for index in range(60):
        red = index * 7 % 11 < 5
        Image.new("RGB", (40, 40), (200 + index % 50, 0, 0) if red else (0, 0, 200 + index % 50)).save(
            tmp_path / f"{index}.png"
        )
        rows.append({"image": f"{index}.png", "question": "Which colour?", "answer": "red" if red else "blue"})
    file = tmp_path / "questions.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    tokenizer = build_tokenizer(next(iter(TINY.values()))).eval()
    train, held_out = read_questions(file, tokenizer.image.height)
    assert (len(train.images), len(held_out.images)) == (48, 12)
    scores = answer_questions(tokenizer, train, held_out)
    assert scores["pixels"]["total"] == {"correct": 12, "n": 12}
    assert scores["blank"]["total"]["correct"] < 12
    assert scores == answer_questions(tokenizer, train, held_out)


def test_a_missing_image_is_named_by_its_line(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    file = tmp_path / "questions.jsonl"
    file.write_text(
        "\n".join(json.dumps({"image": name, "question": "?", "answer": "x"}) for name in ("a.png", "b.png"))
    )
    with pytest.raises(DataError, match=r"line 2: image .*b\.png"):
        read_questions(file, 16)


def test_the_command_line_says_which_network_gave_a_frechet_distance(tmp_path):
    import timm
    from safetensors.torch import save_file
    from typer.testing import CliRunner

    from mllm.cli.main import app

    build_tokenizer(TINY["vq"]).save_pretrained(tmp_path / "tokenizer")
    net = {"channels": [4, 4, 4, 8]}
    torch.manual_seed(0)  # some random networks of this size are dead: they give every picture the same features
    save_file(timm.create_model("resnet10t", **net).state_dict(), tmp_path / "net.safetensors")
    encoder = {"type": "timm", "architecture": "resnet10t", "options": net, "image_size": 32, "layers": [-1]}
    weights = {"weights": {"source": str(tmp_path / "net.safetensors")}}
    (tmp_path / "net.json").write_text(json.dumps({**encoder, **weights}))
    command = ["tokenizer", "eval", str(tmp_path / "tokenizer"), "--recipe", "tokenizer_demo_single", "--limit", "24"]
    done = CliRunner().invoke(app, [*command, "--no-probe", "--features", str(tmp_path / "net.json")])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout[done.stdout.index("{") :])["frechet_distance"]
    assert found["value"] > 0 and found["images"] == 24 and len(found["network"]["sha256"]) == 64
    (tmp_path / "random.json").write_text(json.dumps(encoder))
    for name, said in (("teacher", "no teacher"), (str(tmp_path / "random.json"), "random network")):
        refused = CliRunner().invoke(app, [*command, "--features", name])
        assert refused.exit_code != 0 and said in str(refused.exception) + refused.output
