"""Does a branch of convolutions beside a ViT outline better than either alone with as many parameters?

Draws cells (discs and ellipses with a rim, some touching) and vessels (thin curves that fork) on noisy tissue, and trains three encoders
with the same query decoder (two learned prompts: cells, vessels) from scratch: DB-SAM's two branches with their exchange and gate
(`mllm.encoders.backbones.dbsam`), its ViT alone, and its pyramid of convolutions alone. The two alone are widened until their parameters
are those of both, within 4 %. Dice and IoU on pictures that were not trained, by seed of weights and training pictures; intervals are
Student's over seeds, of the differences too.

    python benchmarks/two_branches.py --output benchmarks/results/two_branches_cpu.txt      # about 7 minutes of a core of its own
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mllm.encoders.backbones.dbsam import DbSam, DbSamConfig, Pyramid
from mllm.encoders.backbones.samtrunk import enter, sam_trunk, see
from mllm.heads.segmentation.decoders import QueryDecoder, QueryDecoderConfig
from mllm.heads.segmentation.losses import mask_bce, mask_dice
from mllm.types import EncoderInfo, ImageSpec

SIDE, PATCH = 48, 4
KINDS = ("cells", "vessels")
T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
"""Student's factor of a two-sided interval of 95 %, by number of seeds."""


def draw(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """One picture ``(3, SIDE, SIDE)`` fp32 about 0, and its masks ``(2, SIDE, SIDE)`` bool: cells, vessels."""
    rows, columns = np.mgrid[:SIDE, :SIDE] + 0.5
    tissue = np.zeros((SIDE, SIDE))
    for _ in range(3):  # slow shades
        y, x, reach = *rng.uniform(0, SIDE, 2), rng.uniform(12, 30)
        tissue += rng.uniform(-0.25, 0.25) * np.exp(-((rows - y) ** 2 + (columns - x) ** 2) / (2 * reach**2))
    picture = np.stack([tissue + shade for shade in (0.3, 0.1, 0.25)])
    vessels = np.zeros((SIDE, SIDE), bool)
    paths = [(rng.uniform(0, SIDE), rng.uniform(0, SIDE), rng.uniform(0, 2 * np.pi), rng.uniform(1.0, 1.8), 60)]
    paths += (
        [(*rng.uniform(0, SIDE, 2), rng.uniform(0, 2 * np.pi), rng.uniform(0.8, 1.4), 45)] if rng.random() < 0.6 else []
    )
    while paths:
        y, x, angle, radius, length = paths.pop()
        for _ in range(length):
            y, x, angle = y + np.sin(angle), x + np.cos(angle), angle + rng.normal(0, 0.16)
            vessels |= (rows - y) ** 2 + (columns - x) ** 2 < radius**2
            if length > 20 and rng.random() < 0.02:
                paths.append((y, x, angle + rng.choice([-0.8, 0.8]), 0.8 * radius, length // 2))
    cells, rims = np.zeros((SIDE, SIDE), bool), np.zeros((SIDE, SIDE), bool)
    for _ in range(rng.integers(2, 6)):
        y, x, turn = *rng.uniform(4, SIDE - 4, 2), rng.uniform(0, np.pi)
        long, short = rng.uniform(3.5, 7.0), rng.uniform(2.8, 4.5)
        along = (rows - y) * np.sin(turn) + (columns - x) * np.cos(turn)
        across = (columns - x) * np.sin(turn) - (rows - y) * np.cos(turn)
        distance = np.sqrt((along / long) ** 2 + (across / short) ** 2)
        cells |= distance < 1
        rims |= (distance > 0.72) & (distance < 1)
    red = np.array([0.25, -0.15, -0.12])[:, None, None] * rng.uniform(0.5, 1.0)  # vessels: often faint
    violet = np.array([0.0, -0.25, 0.1])[:, None, None] * rng.uniform(0.5, 1.0)
    picture = picture + red * vessels + violet * cells - 0.12 * (rims & cells)
    picture = picture + rng.normal(0, 0.12, picture.shape)
    return picture.astype(np.float32), np.stack([cells, vessels & ~cells])


def drawn(number: int, seed: int) -> tuple[Tensor, Tensor]:
    """Pictures ``(N, 3, SIDE, SIDE)`` and masks ``(N, 2, SIDE, SIDE)``, the same for a seed."""
    rng = np.random.default_rng(seed)
    pictures, masks = zip(*(draw(rng) for _ in range(number)))
    return torch.from_numpy(np.stack(pictures)), torch.from_numpy(np.stack(masks))


def settings(width: int, *, stem: tuple[int, int, int] = (16, 32, 64)) -> DbSamConfig:
    """DB-SAM in small, with the paper's two branches."""
    return DbSamConfig(
        type="dbsam",
        width=width,
        depth=4,
        num_heads=4,
        mlp_ratio=2.0,
        patch_size=PATCH,
        window_size=6,
        global_blocks=[1, 3],
        trained_size=SIDE,
        branches=1,
        stem=stem,
        fusion="gate",
        reduction=4,
        expand=2.0,
        exchange_points=2,
        image_size=SIDE,
        final_norm=False,
    )


class Vit(nn.Module):
    """The ViT alone."""

    def __init__(self, width: int):
        super().__init__()
        config = settings(width)
        self.vit = sam_trunk(config, depth=config.depth, neck=False)

    def forward(self, pixels: Tensor) -> Tensor:
        x = enter(self.vit, pixels)
        for layer in self.vit.layers:
            x = see(layer, x)
        return x


class Convolutions(nn.Module):
    """The pyramid alone: its three convolutions, then blocks of the exchange's kind of MLP with a depthwise convolution between."""

    def __init__(self, width: int):
        super().__init__()
        self.pyramid = Pyramid(settings(width, stem=(width // 4, width // 2, width)), 1)
        self.blocks = nn.ModuleList(_Block(width) for _ in range(4))

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.pyramid(pixels)
        for block in self.blocks:
            x = x + block(x)
        return x.permute(0, 2, 3, 1)


class _Block(nn.Sequential):
    def __init__(self, width: int):
        super().__init__(
            nn.Conv2d(width, width, 5, padding=2, groups=width), nn.GroupNorm(1, width), nn.Conv2d(width, 2 * width, 1),
            nn.GELU(), nn.Conv2d(2 * width, width, 1),
        )  # fmt: skip


class Outliner(nn.Module):
    """An encoder and the query decoder with a prompt for each kind."""

    def __init__(self, encoder: nn.Module, width: int):
        super().__init__()
        side = SIDE // PATCH
        info = EncoderInfo(image=ImageSpec(height=SIDE, width=SIDE), grid=(side, side), width=width)
        self.encoder, self.decoder = encoder, QueryDecoder(QueryDecoderConfig(width=48, depth=1, heads=4), info)
        self.prompts = nn.Parameter(torch.randn(len(KINDS), 48))

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits ``(B, 2, SIDE, SIDE)``."""
        tokens, batch = self.encoder(pixels).flatten(1, 2), len(pixels)
        owners = torch.arange(batch, device=pixels.device).repeat_interleave(len(KINDS))
        return self.decoder(self.prompts.repeat(batch, 1), tokens, owners)[0].view(batch, len(KINDS), SIDE, SIDE)


def both(width: int) -> nn.Module:
    return DbSam(settings(width))


ARMS: dict[str, tuple[Callable[[int], nn.Module], str]] = {
    "two branches": (both, "ViT and convolutions, exchange and gate"),
    "ViT alone": (Vit, "one branch"),
    "convolutions alone": (Convolutions, "one branch"),
}


def size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def matched(make: Callable[[int], nn.Module], wanted: int) -> int:
    """The width, divisible by 4, whose parameters are nearest."""
    return min(range(32, 257, 4), key=lambda width: abs(size(make(width)) - wanted))


def trained(make: Callable[[int], nn.Module], width: int, seed: int, options: argparse.Namespace) -> Outliner:
    torch.manual_seed(seed)
    model = Outliner(make(width), width).to(options.device).train()
    pictures, masks = (part.to(options.device) for part in drawn(options.train, 1000 + seed))
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.rate, betas=(0.9, 0.98), weight_decay=0.02)
    order, batch = torch.Generator().manual_seed(seed), 16
    for step in range(options.steps):
        done = step / options.steps
        for group in optimizer.param_groups:
            group["lr"] = options.rate * min((step + 1) / 40, 0.5 * (1 + np.cos(np.pi * done)) + 0.02)
        chosen = torch.randint(len(pictures), (batch,), generator=order)
        turn = int(torch.randint(4, (1,), generator=order))
        seen, wanted = (part[chosen].rot90(turn, (-2, -1)) for part in (pictures, masks))
        logits = model(seen).flatten(0, 1)
        targets = wanted.flatten(0, 1).to(torch.uint8)
        loss = 2 * mask_bce(logits, targets).mean() + 0.5 * mask_dice(logits, targets).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.eval()


@torch.no_grad()
def scores(model: Outliner, pictures: Tensor, masks: Tensor) -> dict[str, float]:
    """Dice and IoU in percent: the mean over pictures that hold the kind."""
    found = torch.cat([model(part) for part in pictures.split(50)]) > 0
    result = {}
    for number, kind in enumerate(KINDS):
        mark, wanted = found[:, number], masks[:, number]
        there = wanted.flatten(1).any(1)
        both = (mark & wanted).flatten(1).sum(1)[there].float()
        each = (mark.flatten(1).sum(1) + wanted.flatten(1).sum(1))[there].float()
        result[f"{kind} Dice"] = 100 * float((2 * both / each).mean())
        result[f"{kind} IoU"] = 100 * float((both / (each - both)).mean())
    result["mean Dice"] = mean(result[f"{kind} Dice"] for kind in KINDS)
    return result


def interval(values: list[float]) -> str:
    if len(values) < 2:
        return f"{values[0]:6.2f}"
    return f"{mean(values):6.2f} ± {T_95[len(values)] * stdev(values) / len(values) ** 0.5:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--train", type=int, default=800, help="pictures (default: 800)")
    parser.add_argument("--tests", type=int, default=200, help="pictures (default: 200)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rate", type=float, default=1.5e-3)
    parser.add_argument("--width", type=int, default=64, help="of the two branches (default: 64)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    lines: list[str] = []

    def say(line: str) -> None:
        print(line, flush=True)
        lines.append(line)
        if options.output:
            options.output.write_text("\n".join(lines) + "\n", encoding="utf-8")

    where = torch.cuda.get_device_name() if options.device == "cuda" else f"CPU ({torch.get_num_threads()} thread(s))"
    say(
        "python benchmarks/two_branches.py: does a branch of convolutions beside a ViT outline better than either alone?"
    )
    say(
        f"{date.today()}, {where}, Python {platform.python_version()}, torch {torch.__version__}; {options.steps} steps of 16 of "
        f"{options.train} pictures,"
    )
    say(
        f"rate {options.rate:g}; {options.tests} test pictures, the same for all; means over seeds {options.seeds} ± Student's "
        "interval of 95 %"
    )
    wanted = size(both(options.width))
    tests = tuple(part.to(options.device) for part in drawn(options.tests, 7))
    widths = {name: options.width if make is both else matched(make, wanted) for name, (make, _) in ARMS.items()}
    results: dict[str, list[dict[str, float]]] = {name: [] for name in ARMS}
    seconds = dict.fromkeys(ARMS, 0.0)
    for seed in options.seeds:
        for name, (make, _) in ARMS.items():
            began = time.perf_counter()
            results[name].append(scores(trained(make, widths[name], seed, options), *tests))
            seconds[name] += (time.perf_counter() - began) / len(options.seeds)
            print(seed, name, {key: round(value, 2) for key, value in results[name][-1].items()}, flush=True)
    for name, (make, what) in ARMS.items():
        row = ", ".join(f"{key} {interval([one[key] for one in results[name]])}" for key in results[name][0])
        parameters = size(make(widths[name]))
        say(
            f"{name:<19} width {widths[name]:>3}, {parameters:,} parameters ({what}), {seconds[name]:.0f} s a seed: {row}"
        )
    for other in list(ARMS)[1:]:
        gains = {
            key: [a[key] - b[key] for a, b in zip(results["two branches"], results[other])] for key in results[other][0]
        }
        say(
            f"two branches less {other}: "
            + ", ".join(f"{key} {interval(values).strip()}" for key, values in gains.items())
        )


if __name__ == "__main__":
    main()
