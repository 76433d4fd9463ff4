"""How soon do visual tokens say the words of charts they never saw, when a projector alone learns by `word_contrast`?

    python benchmarks/real_words.py CHARTS [--charts 360] [--steps 60] [--features FILE]

CHARTS: a folder of `mllm data build charts` with captions.jsonl. The text encoder of the recipe real_charts is frozen and its maps are
computed once (kept in FILE); a projector of the recipe's form learns, 16 rows a step. A sixth of the tables is held out. Beside it the
same with every caption on another chart: what the loss falls to when there is nothing to find. CPU.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

BATCH, HELD_OUT = 16, 32


def features(folder: Path, rows: list[dict[str, Any]]) -> Tensor:
    """``(charts, 28 · 112, 384)``, each position normed as the recipe's feature_norm does at its start."""
    import numpy as np
    from PIL import Image

    from mllm.encoders.catalogue import build_encoder, encoder_config

    encoder = build_encoder(encoder_config("ppocr-rec-448", where="text"))
    encoder.load_pretrained()
    encoder.eval()
    found = []
    for row in rows:
        picture = (
            Image.open(folder / row["messages"][0]["content"][0]["image"])
            .convert("RGB")
            .resize((448, 448), Image.Resampling.BICUBIC)
        )
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 127.5 - 1
        with torch.inference_mode():
            found.append(nn.functional.layer_norm(encoder(pixels).tokens[0], (384,)).half())
    return torch.stack(found)


def learn(maps: Tensor, words: list[Tensor], table: Tensor, train: list[int], test: list[int], steps: int) -> None:
    """Train a projector and print the loss on both sides every 20 steps."""
    from mllm.connectors.layers import resample
    from mllm.train.word_contrast import word_contrast

    torch.manual_seed(0)
    rng = random.Random(0)
    projector = nn.Sequential(nn.Linear(6144, 576), nn.GELU(), nn.Linear(576, 576))
    optimizer = torch.optim.AdamW(projector.parameters(), lr=1e-3, betas=(0.9, 0.98), weight_decay=0.02)

    def loss(rows: list[int]) -> Tensor:
        cells = resample(maps[rows].float(), (28, 112), (14, 14), "pixel_unshuffle")
        return word_contrast(list(projector(cells)), [words[row] for row in rows], table)

    def held_out() -> float:
        with torch.no_grad():
            return float(loss(test))

    started, seen = time.time(), []
    print(f"   0 steps: held out {held_out():.3f}", flush=True)
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1.0, step / 20)
        optimizer.zero_grad()
        value = loss(rng.sample(train, BATCH))
        value.backward()
        optimizer.step()
        seen.append(float(value.detach()))
        if step % 20 == 0:
            print(
                f"{step:4} steps: held out {held_out():.3f}, learned from {sum(seen[-20:]) / 20:.3f}, {time.time() - started:.0f} s",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--charts", type=int, default=360)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--features", type=Path)
    arguments = parser.parse_args()
    from safetensors import safe_open
    from transformers import AutoTokenizer

    from mllm.parts.get import part_folder

    torch.set_num_threads(1)
    rows = [json.loads(line) for line in (arguments.folder / "captions.jsonl").read_text(encoding="utf-8").splitlines()]
    rows = rows[:: max(1, len(rows) // arguments.charts)][: arguments.charts]
    if arguments.features is not None and arguments.features.is_file():
        maps = torch.load(arguments.features)
    else:
        maps = features(arguments.folder, rows)
        if arguments.features is not None:
            torch.save(maps, arguments.features)
    folder = part_folder("smollm2-135m-instruct")
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    with safe_open(str(folder / "model.safetensors"), "pt") as file:
        table = file.get_tensor("model.embed_tokens.weight").float()
    words = [torch.tensor(tokenizer(row["messages"][-1]["content"]).input_ids) for row in rows]
    tables = sorted({row["table"] for row in rows})
    random.Random(0).shuffle(tables)
    kept = set(tables[: len(tables) // 6])
    train = [k for k, row in enumerate(rows) if row["table"] not in kept]
    test = [k for k, row in enumerate(rows) if row["table"] in kept][:HELD_OUT]
    print(f"{len(train)} charts to learn from, {len(test)} of other tables; torch {torch.__version__}")
    learn(maps, words, table, train, test, arguments.steps)
    print("every caption on another chart:")
    shift = list(range(len(words)))
    random.Random(1).shuffle(shift)
    learn(maps, [words[k] for k in shift], table, train, test, arguments.steps)


if __name__ == "__main__":
    main()
