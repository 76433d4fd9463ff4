"""Does one small model read digits and draw them with one discrete visual tokenizer?

Trains a teacher, the tokenizer of ``recipes/tokenizer_unified_demo.yaml`` on digits and charts, and the model of
``recipes/unified_demo.yaml`` on digits; then 200 drawings are judged by a classifier that saw only real training digits, and the
same weights read held-out digits from their codes alone. Writes ``report.json`` and ``unified_demo.html``.

    python benchmarks/unified_demo.py                     # runs/unified_demo, two CPU cores
    python benchmarks/unified_demo.py --larger --output runs/unified_larger     # one H200, about 330 s

``--larger``: networks of twice the width, a language model of 6 layers of 256, 3000 steps of 64 samples, 1000 drawings. That is enough
to know the 1438 training digits by heart, and the report says how many drawings are copies: benchmarks/results/unified_h200.txt.
"""

from __future__ import annotations

import argparse
import base64
import html
import io
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from processes import choose_device
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mllm.demo.drawing import REQUESTS, drawing_request, prepare_drawing, train_text_tokenizer
from mllm.heads.codes.generate import GeneratedImages
from mllm.models.modeling_mllm import MllmForConditionalGeneration
from mllm.processing.chat import render_prompt
from mllm.processing.processor import MllmProcessor
from mllm.recipe import load_recipe
from mllm.train.run import run_recipe
from mllm.types import IMAGE_MARK, Turn
from mllm.visual_tokenizers.base import VisualTokenizer
from mllm.visual_tokenizers.evaluate import evaluate_tokenizer, probe_tokenizer
from mllm.visual_tokenizers.images import ImageSource, load_images, to_pixels
from mllm.visual_tokenizers.recipe import ImagesSpec, SupervisedTeacherSpec, load_training
from mllm.visual_tokenizers.sequence import pack_codes
from mllm.visual_tokenizers.teacher import EncoderTeacher, train_classifier

SIZE = 64
DEFAULT_OUTPUT = Path("runs/unified_demo")
_CONVOLUTION = "{channels: 16, multipliers: [1, 2, 4, 8], num_res_blocks: 1, groups: 8}"
_NETWORKS = [
    f"model.visual_tokenizer.pixel_encoder={_CONVOLUTION}",
    f"model.visual_tokenizer.decoder={_CONVOLUTION}",
    "model.visual_tokenizer.z_channels=128",
]
LARGER_TOKENIZER = [
    *_NETWORKS,
    "stages.tokenizer.steps=1500",
    "stages.tokenizer.batch_size=64",
    "stages.tokenizer.optimizer.ema=0.99",
]
"""Changes of recipes/tokenizer_unified_demo.yaml."""
LARGER_MODEL = [
    *(f"model.encoders.codes.{change}" for change in _NETWORKS),
    "model.language_model.config.hidden_size=256",
    "model.language_model.config.intermediate_size=704",
    "model.language_model.config.num_hidden_layers=6",
    "model.language_model.config.num_attention_heads=8",
    "model.language_model.config.num_key_value_heads=8",
    "model.language_model.config.attention_dropout=0.1",
    "stages.unified.learn={connector: 1.0e-3, language_model: 1.0e-3, heads: 1.0e-3}",
    "stages.unified.steps=3000",
    "stages.unified.batch_size=64",
    "stages.unified.optimizer.weight_decay=0.1",
    "stages.unified.draw=null",
    "stages.unified.num_workers=8",
]
"""Changes of recipes/unified_demo.yaml."""


def model_overrides(output: Path, *, larger: bool = False) -> list[str]:
    """The overrides that make recipes/unified_demo.yaml read data, text tokenizer and tokenizer from ``output``."""
    if output == DEFAULT_OUTPUT:  # what the recipe names
        return [f"output={output / 'model'}", *(LARGER_MODEL if larger else [])]
    datasets = [
        {
            "dataset": {"name": name, "format": "messages", "path": str(output / "data" / f"{part}_train.jsonl")},
            "repeat": n,
        }
        for name, part, n in (("unified_read", "read", 1), ("unified_draw", "draw", 2))
    ]
    return [
        f"output={output / 'model'}",
        f"model.language_model.tokenizer={output / 'text_tokenizer'}",
        f"model.encoders.codes.weights.source={output / 'tokenizer' / 'final'}",
        f"stages.unified.data={json.dumps({'datasets': datasets})}",
        *(LARGER_MODEL if larger else []),
    ]


def make_tokenizer(
    output: Path, teacher_steps: int, steps: int | None, device: str = "cpu", *, larger: bool = False
) -> dict[str, Any]:
    """Teacher and tokenizer, trained unless they are there; returns the tokenizer's held-out scores."""
    changes = [*(LARGER_TOKENIZER if larger else []), *([f"stages.tokenizer.steps={steps}"] if steps else [])]
    recipe = load_training("tokenizer_unified_demo", changes)
    images, held_out = (load_images(recipe.images, SIZE, split) for split in ("train", "held_out"))
    settings = {**recipe.tokenizer["semantic_encoder"], "weights": None}
    weights, folder = output / "stages.tokenizer.options.teacher.safetensors", output / "tokenizer"
    if not (folder / "final" / "model.safetensors").is_file():
        teacher = EncoderTeacher(settings).to(device)
        sizes = {key: settings[key] for key in ("width", "depth", "heads", "patch_size")}
        spec = SupervisedTeacherSpec(steps=teacher_steps, batch_size=48, lr=2e-3, **sizes)
        train_classifier(teacher, images, spec, seed=0)
        weights.parent.mkdir(parents=True, exist_ok=True)
        save_file({k: v.cpu().contiguous() for k, v in teacher.encoder.encoder.state_dict().items()}, str(weights))
        overrides = [f"output={folder}", f"model.visual_tokenizer.semantic_encoder.weights={weights}"]
        run_recipe(load_training("tokenizer_unified_demo", [*overrides, *changes]).recipe)
    tokenizer = VisualTokenizer.from_pretrained(folder / "final").to(device)
    return {
        **evaluate_tokenizer(tokenizer, held_out),
        "codebook_entries": sum(size for size, _ in tokenizer.codebooks.values()),
        "linear_probe": probe_tokenizer(tokenizer, images, held_out),
    }


class DigitClassifier:
    """A support vector machine on 8 × 8 block means, fitted to real training digits only."""

    def __init__(self, images: ImageSource):
        from sklearn.svm import SVC

        assert images.labels is not None
        self.known = self.blocks(pixels_of(images))
        self.machine = SVC(gamma="scale", C=10).fit(self.known, images.labels.numpy())

    @staticmethod
    def blocks(pixels: Tensor) -> np.ndarray:
        """``(B, 3, H, W)`` in [0, 1] → ``(B, 64)``."""
        return F.adaptive_avg_pool2d(pixels.mean(1, keepdim=True), 8).flatten(1).cpu().numpy()

    def __call__(self, pixels: Tensor) -> np.ndarray:
        """The digit of each image."""
        return self.machine.predict(self.blocks(pixels))

    def nearest(self, pixels: Tensor) -> np.ndarray:
        """Root mean square distance (grey levels in [0, 1]) of each image to the nearest training digit."""
        own = torch.from_numpy(self.blocks(pixels))
        return (torch.cdist(own, torch.from_numpy(self.known)).amin(1) / 8).numpy()


def pixels_of(images: ImageSource) -> Tensor:
    """All images ``(B, 3, H, W)`` in [0, 1]."""
    return images.batch(range(len(images))).float() / 255


@torch.no_grad()
def read_digits(model: Any, processor: Any, codes: Tensor, batch_size: int = 64) -> list[str]:
    """Answers to "Which digit is this?" for images that are given by their packed codes ``(B, S)`` alone."""
    prompt = render_prompt(processor, [Turn("user", IMAGE_MARK + "\nWhich digit is this?")])
    ids = processor.tokenizer(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"][0]
    ids = ids.repeat_interleave(torch.where(ids == processor.image_token_id, processor.rules.layout().num_tokens, 1))
    answers: list[str] = []
    for part in codes.split(batch_size):
        inputs = ids.to(part.device).expand(len(part), -1)
        out = model.generate(
            input_ids=inputs,
            attention_mask=torch.ones_like(inputs),
            pixel_values=part,
            max_new_tokens=4,
            do_sample=False,
        )
        answers += processor.tokenizer.batch_decode(out[:, inputs.shape[1] :], skip_special_tokens=True)
    return [answer.strip() for answer in answers]


def draw_digits(
    model: Any, processor: Any, number: int, cfg_scale: float, temperature: float
) -> tuple[list[int], GeneratedImages]:
    """``number`` drawings, the ten digits in turn, asked for in different words."""
    asked = [k % 10 for k in range(number)]
    prompts = [drawing_request(digit, (k // 10) % len(REQUESTS)) for k, digit in enumerate(asked)]
    return asked, model.generate_images(
        prompts, processor=processor, cfg_scale=cfg_scale, temperature=temperature, seed=0, batch_size=100
    )


def statistics(values: np.ndarray) -> dict[str, float]:
    """Smallest value and quartiles."""
    names = ("min", "p25", "median", "p75")
    return {n: round(float(v), 4) for n, v in zip(names, np.quantile(values, [0, 0.25, 0.5, 0.75]))}


def evaluate(
    checkpoint: Path, number: int, cfg_scale: float, temperature: float, device: str = "cpu"
) -> tuple[dict[str, Any], Any]:
    """Every figure of the model, and what the page shows."""
    model = MllmForConditionalGeneration.from_pretrained(str(checkpoint)).eval().to(device)
    processor = MllmProcessor.from_pretrained(str(checkpoint))
    spec = ImagesSpec(type="digits_and_charts", options={"charts": 0})
    real, held_out = (load_images(spec, SIZE, split) for split in ("train", "held_out"))
    assert held_out.labels is not None
    tokenizer, classifier = model.image_tokenizer, DigitClassifier(real)
    with torch.no_grad():
        parts = [to_pixels(source.batch(range(len(source))), device) for source in (real, held_out)]
        known, unseen = (torch.cat([pack_codes(tokenizer, tokenizer.encode(p)) for p in x.split(128)]) for x in parts)
    truth = held_out.labels.numpy()
    started = time.perf_counter()
    asked, drawn = draw_digits(model, processor, number, cfg_scale, temperature)
    seconds = time.perf_counter() - started
    seen = classifier(drawn.pixels)
    answers = read_digits(model, processor, unseen)
    copies = (drawn.packed[:, None] == known[None]).all(-1).any(1)
    again = len({tuple(row) for row in drawn.packed.tolist()})
    figures = {
        "classifier_on_real_held_out": float((classifier(pixels_of(held_out)) == truth).mean()),
        "drawings": number,
        "drawn_as_asked": float((seen == np.array(asked)).mean()),
        "drawn_as_asked_by_digit": {d: float((seen[np.array(asked) == d] == d).mean()) for d in range(10)},
        "distance_to_nearest_training_digit": {
            "drawings": statistics(classifier.nearest(drawn.pixels)),
            "real_held_out": statistics(classifier.nearest(pixels_of(held_out))),
        },
        "same_codes_as_a_training_digit": int(copies.sum()),
        "different_drawings": again,
        "seconds_per_drawing": round(seconds / number, 4),
        "guidance": cfg_scale,
        "temperature": temperature,
        "read_from_codes": float(np.mean([a == str(t) for a, t in zip(answers, truth)])),
        "read_held_out_digits": len(truth),
    }
    return figures, (asked, seen, drawn, classifier.nearest(drawn.pixels), (parts[0] / 2 + 0.5).cpu(), classifier)


def page(path: Path, report: dict[str, Any], shown: Any) -> None:
    """An HTML page: the drawings, ten of a row, beside the nearest training digits."""
    asked, seen, drawn, distances, real, classifier = shown
    blocks = torch.from_numpy(classifier.blocks(drawn.pixels))
    nearest = torch.cdist(blocks, torch.from_numpy(classifier.known)).argmin(1)
    figures = []
    for k, picture in enumerate(drawn.pil()[:100]):
        other = Image.fromarray((real[nearest[k]].permute(1, 2, 0).numpy() * 255).round().astype(np.uint8))
        mark = "" if seen[k] == asked[k] else " class=wrong"
        figures.append(
            f"<figure{mark}>{_img(picture)}{_img(other, 32)}<figcaption>{asked[k]} → {seen[k]} · {distances[k]:.2f}</figcaption></figure>"
        )
    model = report["model"]
    style = (
        "body{font:15px/1.5 system-ui;max-width:72rem;margin:2rem auto;padding:0 1rem}main{display:grid;"
        "grid-template-columns:repeat(10,1fr);gap:6px}figure{margin:0;text-align:center}figcaption{font-size:11px}"
        ".wrong figcaption{color:#b00;font-weight:bold}pre{background:#f6f6f6;padding:1rem;overflow:auto}"
    )
    path.write_text(
        f"<!doctype html><meta charset=utf-8><title>unified demo</title><style>{style}</style>"
        "<h1>One model reads and draws digits</h1>"
        f"<p>{model['drawn_as_asked']:.1%} of {model['drawings']} drawings are the digit asked for "
        f"(classifier on real held-out digits: {model['classifier_on_real_held_out']:.1%}); the same weights read "
        f"{model['read_from_codes']:.1%} of held-out digits from their codes. Large: drawn; small: the nearest training "
        "digit, with the distance of 8 × 8 block means.</p>"
        f"<main>{''.join(figures)}</main><pre>{html.escape(json.dumps(report, indent=2))}</pre>",
        encoding="utf-8",
    )


def _img(picture: Image.Image, width: int = 64) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "png")
    return f'<img width={width} alt="" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT)
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: CUDA where there is one")
    parser.add_argument("--larger", action="store_true", help="the proof that is sized for one H200")
    parser.add_argument("--teacher-steps", type=int, default=600)
    parser.add_argument("--tokenizer-steps", type=int, help="instead of the recipe's")
    parser.add_argument("--steps", type=int, help="training steps of the model instead of the recipe's")
    parser.add_argument("--drawings", type=int, help="default 200, with --larger 1000")
    parser.add_argument("--cfg-scale", type=float, default=2.0)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("overrides", nargs="*", help="changes of recipes/unified_demo.yaml, key.sub=value")
    arguments = parser.parse_args()
    device, larger, output = choose_device(arguments.device), arguments.larger, arguments.output
    started, cpu = time.perf_counter(), time.process_time()
    prepare_drawing(output / "data")
    train_text_tokenizer(output / "text_tokenizer")
    scores = make_tokenizer(output, arguments.teacher_steps, arguments.tokenizer_steps, device, larger=larger)
    report: dict[str, Any] = {"device": device, "tokenizer": scores}
    report["seconds"] = {"tokenizer": round(time.perf_counter() - started, 1)}
    print(json.dumps(report), flush=True)
    begun = time.perf_counter()
    steps = [f"stages.unified.steps={arguments.steps}"] if arguments.steps else []
    recipe = load_recipe("unified_demo", [*model_overrides(output, larger=larger), *steps, *arguments.overrides])
    final = run_recipe(recipe, resume=True)
    report["seconds"]["model"] = round(time.perf_counter() - begun, 1)
    begun = time.perf_counter()
    drawings = arguments.drawings or (1000 if larger else 200)
    report["model"], shown = evaluate(final, drawings, arguments.cfg_scale, arguments.temperature, device)
    report["seconds"] |= {
        "evaluation": round(time.perf_counter() - begun, 1),
        "all": round(time.perf_counter() - started, 1),
        "cpu": round(time.process_time() - cpu, 1),
    }
    (output / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    page(output / "unified_demo.html", report, shown)
    print(json.dumps(report, indent=2))
    print(f"{output / 'report.json'} · {output / 'unified_demo.html'}")


if __name__ == "__main__":
    main()
