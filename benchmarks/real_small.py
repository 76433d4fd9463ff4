"""What of real charts stands in a frozen objects encoder, how soon do visual tokens say it, and how soon does SmolLM2 use it?

    python benchmarks/real_small.py CHARTS [--charts 1200] [--steps 60] [--features FILE]

CHARTS: a folder of `mllm data build charts` with train.jsonl. The encoder of the recipe real_charts_small is frozen; its maps, normed as
feature_norm does at its start and averaged onto 4 × 4 cells, are computed once (kept in FILE). Tables are held out, not charts.
1 linear probes (ridge) on three splits, beside shuffled labels and the commonest answer; 2 a projector alone by `word_contrast`, 16 rows a
step, then the colour whose embedding lies nearest to a visual token; 3 LoRA on the language model, 4 questions about the colour a step,
steps as given (0: leave this part out), choice among the eight colours. CPU: 0.15 s a chart once, seconds, seconds, 2.2 s a step.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

COLOURS = ("red", "blue", "green", "orange", "purple", "brown", "pink", "gray")
OF_ONE = {"What colour are the points?", "What colour are the bars?", "What colour is the line?"}
ASKED = {
    "colour of the only series": OF_ONE,
    "points rise or fall": {"Do the points rise or fall from left to right?"},
    "line rises or falls": {"Does the line rise or fall from its first to its last point?"},
    "number of bars": {"How many bars are there?"},
}


def pairs(row: dict[str, Any]) -> list[tuple[str, str]]:
    """(question, answer) of a conversation."""
    turns = row["messages"]
    texts = [t["content"] if isinstance(t["content"], str) else t["content"][-1]["text"].strip() for t in turns]
    return list(zip(texts[::2], texts[1::2]))


def answer_to(row: dict[str, Any], wanted: set[str]) -> tuple[str, str] | None:
    """The first question of these that is asked, with its answer."""
    return next(((q, a) for q, a in pairs(row) if q in wanted), None)


def place(row: dict[str, Any]) -> float:
    """0 to 1 by the table's name: what splits are cut from."""
    return int(hashlib.sha256(row["table"].encode()).hexdigest()[:8], 16) / 2**32


def features(folder: Path, rows: list[dict[str, Any]]) -> Tensor:
    """``(charts, 16, D)``."""
    import numpy as np
    from PIL import Image

    from mllm.encoders.catalogue import build_encoder, encoder_config
    from mllm.processing.images import to_pixels

    config = encoder_config({"preset": "efficientnet-lite0-448", "layers": [-1, -2]}, where="objects")
    encoder = build_encoder(config)
    encoder.load_pretrained()
    encoder.eval()
    info, found = encoder.config.resolved_info, []
    for row in rows:
        picture = Image.open(folder / row["messages"][0]["content"][0]["image"]).convert("RGB")
        with torch.inference_mode():
            tokens = encoder(torch.as_tensor(np.asarray(to_pixels(picture, info.image)))[None]).tokens
        grid = F.layer_norm(tokens, (info.width,)).view(1, *info.grid, -1).permute(0, 3, 1, 2)
        found.append(F.adaptive_avg_pool2d(grid, 4)[0].flatten(1).T)
    return torch.stack(found)


def probe(maps: Tensor, rows: list[dict[str, Any]]) -> None:
    """Part 1."""
    flat, where = maps.flatten(1), [place(row) for row in rows]
    labels = {name: [(found := answer_to(row, asked)) and found[1] for row in rows] for name, asked in ASKED.items()}
    labels["kind of chart"] = [row["chart"] for row in rows]
    for name, own in labels.items():
        results, sizes = [], []
        known = [k for k, label in enumerate(own) if label is not None]
        for split in range(3):
            test = [k for k in known if (where[k] + split / 3) % 1 < 0.25]
            train = sorted(set(known) - set(test))
            names = sorted({str(own[k]) for k in known})
            target = F.one_hot(torch.tensor([names.index(str(own[k])) for k in train]), len(names)).float()
            mean, spread = flat[train].mean(0), flat[train].std(0) + 1e-3
            a, b = (flat[train] - mean) / spread, (flat[test] - mean) / spread
            kernel = a @ a.T
            kernel += 0.03 * kernel.diagonal().mean() * torch.eye(len(train))

            def right(wanted: Tensor) -> float:
                told = (b @ a.T) @ torch.linalg.solve(kernel, wanted - wanted.mean(0)) + wanted.mean(0)  # noqa: B023
                return sum(names[c] == own[k] for c, k in zip(told.argmax(1).tolist(), test)) / len(test)  # noqa: B023

            mixed = torch.randperm(len(train), generator=torch.Generator().manual_seed(split))
            commonest = names[int(target.sum(0).argmax())]
            results.append((right(target), right(target[mixed]), sum(own[k] == commonest for k in test) / len(test)))
            sizes.append(f"{len(train)}+{len(test)}")
        told = (" ".join(f"{100 * part:5.1f}" for part in column) for column in zip(*results))
        print(f"{name:26} | {' | '.join(told)} | {', '.join(sizes)}", flush=True)


def projector_of(maps: Tensor, words: list[Tensor], table: Tensor, train: list[int], shown: Any) -> nn.Module:
    """Part 2: the projector after 300 steps."""
    from mllm.train.word_contrast import word_contrast

    torch.manual_seed(0)
    rng, began = random.Random(0), time.process_time()
    projector = nn.Sequential(nn.Linear(maps.shape[-1], 576), nn.GELU(), nn.Linear(576, 576))
    optimizer = torch.optim.AdamW(projector.parameters(), lr=1e-3, betas=(0.9, 0.98), weight_decay=0.0)
    for step in range(301):
        if step in (0, 25, 50, 100, 200, 300):
            print(f"{step:4} steps: {shown(projector):5.1f}, {time.process_time() - began:.1f} s of CPU", flush=True)
        rows = rng.sample(train, 16)
        optimizer.param_groups[0]["lr"] = 1e-3 * min(1, (step + 1) / 6)
        optimizer.zero_grad()
        word_contrast(list(projector(maps[rows])), [words[k] for k in rows], table).backward()
        optimizer.step()
    return projector


def adapt(
    model: Any,
    tokenizer: Any,
    projector: nn.Module,
    maps: Tensor,
    asked: list[Any],
    train: list[int],
    test: list[int],
    steps: int,
) -> None:
    """Part 3."""
    from peft import LoraConfig, get_peft_model

    table, rng, began = model.get_input_embeddings().weight.detach().float(), random.Random(0), time.process_time()
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model.requires_grad_(False)
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=targets))
    learned = [p for p in model.parameters() if p.requires_grad]
    for p in learned:
        p.data = p.data.float()
    rates = [{"params": learned, "lr": 1e-3}, {"params": list(projector.parameters()), "lr": 3e-4}]
    optimizer = torch.optim.AdamW(rates, betas=(0.9, 0.98), weight_decay=0.0)
    ids = {c: tokenizer(c, add_special_tokens=False).input_ids[0] for c in COLOURS}
    before = tokenizer("<|im_start|>user\n", return_tensors="pt").input_ids[0]

    def told(k: int) -> Tensor:
        after = f"\n{asked[k][0]}<|im_end|>\n<|im_start|>assistant\n"
        after = tokenizer(after, return_tensors="pt").input_ids[0]
        row = torch.cat([table[before], projector(maps[k]), table[after]])
        with torch.autocast("cpu", torch.bfloat16):
            return model(inputs_embeds=row[None].bfloat16()).logits[0, -1].float()

    def held_out() -> float:
        with torch.inference_mode():
            best = [max(COLOURS, key=lambda c: float(logits[ids[c]])) for logits in map(told, test)]
        return 100 * sum(colour == asked[k][1] for colour, k in zip(best, test)) / len(test)

    for step in range(steps + 1):
        if step % 20 == 0:
            print(f"{step:4} steps: {held_out():5.1f}, {time.process_time() - began:.0f} s of CPU", flush=True)
        rows = rng.sample(train, 4)
        loss = sum(F.cross_entropy(told(k)[None], torch.tensor([ids[asked[k][1]]])) for k in rows) / 4
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--charts", type=int, default=1200)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--features", type=Path)
    arguments = parser.parse_args()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from mllm.parts.get import part_folder

    torch.set_num_threads(1)
    if arguments.features is not None and arguments.features.is_file():
        maps, rows = torch.load(arguments.features)
        rows = [json.loads(row) for row in rows]
    else:
        lines = (arguments.folder / "train.jsonl").read_text(encoding="utf-8").splitlines()[: arguments.charts]
        rows = [json.loads(line) for line in lines]
        maps = features(arguments.folder, rows)
        if arguments.features is not None:
            torch.save((maps, [json.dumps(row) for row in rows]), arguments.features)
    print(f"{len(rows)} charts of {len({row['table'] for row in rows})} tables; torch {torch.__version__}")
    print("probe, three splits by table | shuffled labels | commonest answer | learned from + held out")
    probe(maps, rows)
    folder = str(part_folder("smollm2-135m-instruct"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    table = model.get_input_embeddings().weight.detach().float()
    words = [
        torch.tensor([t for _, a in pairs(row) for t in tokenizer(a, add_special_tokens=False).input_ids])
        for row in rows
    ]
    asked = [answer_to(row, OF_ONE) for row in rows]
    train = [k for k, row in enumerate(rows) if place(row) >= 0.2]
    test = [k for k, row in enumerate(rows) if place(row) < 0.2 and asked[k] and asked[k][1] in COLOURS]
    of_colours = F.normalize(table[[tokenizer(c, add_special_tokens=False).input_ids[0] for c in COLOURS]], dim=-1)

    def nearest(projector: nn.Module) -> float:
        with torch.no_grad():
            best = (F.normalize(projector(maps[test]), dim=-1) @ of_colours.T).amax(1).argmax(1).tolist()
        return 100 * sum(COLOURS[c] == asked[k][1] for c, k in zip(best, test)) / len(test)

    print(f"projector alone: {len(test)} held-out colours, by the nearest word")
    projector = projector_of(maps, words, table, train, nearest)
    if arguments.steps:
        print("and LoRA on the language model: the same, by its answer (50 of them)")
        train = [k for k in train if asked[k] and asked[k][1] in COLOURS]
        adapt(model, tokenizer, projector, maps, asked, train, test[:50], arguments.steps)


if __name__ == "__main__":
    main()
