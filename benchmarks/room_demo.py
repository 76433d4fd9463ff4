"""What do a geometry encoder, camera poses and depth teach that words do not? Draws rooms, trains the arms, asks with every control.

    python benchmarks/room_demo.py                              # two CPU cores, all arms, one seed
    python benchmarks/room_demo.py --arms words,pose --seeds 0,1,2 --minutes 5     # in pieces: what is done is kept
    python benchmarks/room_demo.py --arms tell --seeds 0,1,2    # only the table of what is done

Arms, all on the same rows, steps and tokens: `words` (one encoder, no head), `pose`, `depth`, `both` (heads beside the words),
`second` (a second encoder from scratch: the control of `geometry`), `geometry` (the same second encoder, first taught by poses and
depth alone in the run `room_geometry`), `all` (geometry and both heads), `blind` (trained on grey frames). Heads are not run when a
model answers. Beside each score stand its controls on the same model: frames shuffled, one frame in every place, blank frames. Nothing
is claimed in advance.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

POSE = {"type": "pose", "depth": 1, "num_heads": 4, "iterations": 2, "error": "squared", "rotation": 10.0}
DEPTH = {"type": "depth_map", "cells": 2}
ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "words": ("", {}),
    "pose": ("", {"pose": POSE}),
    "depth": ("", {"far": DEPTH}),
    "both": ("", {"pose": POSE, "far": DEPTH}),
    "second": ("scratch", {}),
    "geometry": ("taught", {}),
    "all": ("taught", {"pose": POSE, "far": DEPTH}),
    "blind": ("", {}),
}
RATE = 2.0e-3


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="recipe changes of the arms, key.sub=value")
    parser.add_argument("--output", type=Path, default=Path("runs/room_demo"))
    parser.add_argument("--rooms", type=int, default=2000)
    parser.add_argument("--tests", type=int, default=150)
    parser.add_argument(
        "--arms",
        default=",".join(ARMS),
        help="`data` draws only, `look` teaches the geometry encoders only, `tell` prints",
    )
    parser.add_argument("--seeds", default="0")
    parser.add_argument(
        "--look-steps", type=int, default=400, help="in which the geometry encoder learns poses and depth"
    )
    parser.add_argument("--minutes", type=float, default=600.0, help="begin no further arm after so many")
    parser.add_argument("--processes", type=int, default=1, help="that draw rooms")
    parser.add_argument("--device", default="cpu", help="where the finished models answer")
    parser.add_argument(
        "--workers", type=int, default=0, help="processes that load an arm's or a geometry encoder's rows"
    )
    options = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

    from mllm.demo.rooms import prepare_rooms, train_rooms_tokenizer

    started, root = time.perf_counter(), options.output
    data, seeds = root / "data", [int(seed) for seed in options.seeds.split(",")]
    if not (data / "blind.jsonl").is_file():
        prepare_rooms(data, num_train=options.rooms, num_test=options.tests, processes=options.processes)
        train_rooms_tokenizer(root / "tokenizer")
        blind_rows(data)
        print(f"{options.rooms} + {options.tests} rooms drawn in {time.perf_counter() - started:.0f} s", flush=True)
    for seed in seeds:
        for arm in options.arms.split(","):
            if arm in ("data", "tell") or time.perf_counter() - started > 60 * options.minutes:
                continue
            if arm == "look":
                look(root, seed, options.look_steps, options.workers)
                continue
            done = root / f"{arm}-{seed}.json"
            if not done.is_file():
                if ARMS[arm][0] == "taught":
                    look(root, seed, options.look_steps, options.workers)
                overrides = [f"stages.sft.num_workers={options.workers}", *options.overrides]
                found = run(root, arm, seed, overrides, options.device)
                done.write_text(json.dumps(found, indent=1), encoding="utf-8")
            tell(arm, seed, json.loads(done.read_text(encoding="utf-8")))
    table(root, seeds)
    return 0


def changes(output: Path, root: Path, seed: int) -> list[str]:
    """What every run says in place of its recipe."""
    return [f"output={output}", f"seed={seed}", f"model.language_model.tokenizer={root / 'tokenizer'}"]


def look(root: Path, seed: int, steps: int, workers: int = 0) -> Path:
    """The geometry encoder's run, taught by poses and depth alone, where it is not there yet. Returns its model's folder."""
    from mllm.recipe import load_recipe
    from mllm.train.run import run_recipe

    output = root / f"geometry-encoder-{seed}"
    told = output / "told.json"
    if not told.is_file():
        began = time.perf_counter()
        given = [
            *changes(output, root, seed),
            f"stages.look.data.path={root / 'data/seen.jsonl'}",
            f"stages.look.steps={steps}",
            f"stages.look.num_workers={workers}",
        ]
        final = run_recipe(load_recipe("room_geometry", given), resume=(output / "checkpoints").is_dir())
        heads = last_heads(output)
        found = {
            "model": str(final),
            "heads": heads,
            "first": last_heads(output, first=True),
            "seconds": time.perf_counter() - began,
        }
        told.write_text(json.dumps(found), encoding="utf-8")
        print(f"geometry encoder seed {seed}: {found['seconds']:.0f} s, {_line(heads)}", flush=True)
    return Path(json.loads(told.read_text(encoding="utf-8"))["model"])


def last_heads(output: Path, *, first: bool = False) -> dict[str, float]:
    """Mean of what the heads lost over the last tenth of the steps (or the first)."""
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    found = [record["head_loss"] for record in records if record.get("head_loss")]
    tenth = max(1, len(found) // 10)
    found = found[:tenth] if first else found[-tenth:]
    return {name: statistics.fmean(one[name] for one in found if name in one) for name in (found[-1] if found else {})}


def run(root: Path, arm: str, seed: int, overrides: list[str], device: str) -> dict[str, Any]:
    """Train and evaluate one arm. Returns its scores in %, those by kind of question, and the seconds it took."""
    from mllm.eval.checkpoint import load_model
    from mllm.eval.generators.hf import HFGenerator
    from mllm.eval.run import evaluate
    from mllm.recipe import load_recipe
    from mllm.train.run import run_recipe

    second, heads = ARMS[arm]
    output = root / f"{arm}-{seed}"
    given = [
        *changes(output, root, seed),
        f"stages.sft.data.path={root / 'data' / ('blind.jsonl' if arm == 'blind' else 'train.jsonl')}",
        f"model.heads={json.dumps(heads)}",
    ]
    learn = dict.fromkeys(["encoders", "connector", "language_model", *(["heads"] if heads else [])], RATE)
    given.append(f"stages.sft.learn={json.dumps(learn)}")
    if second:
        encoder: Any = load_recipe("room_geometry").model.encoders["geometry"]
        if second == "taught":
            encoder = {**encoder, "weights": {"source": str(look(root, seed, 0))}}  # it is there
        given.append(f"model.encoders.geometry={json.dumps(encoder)}")
    began = time.perf_counter()
    begun = (output / "checkpoints").is_dir()  # killed, and asked again
    final = run_recipe(load_recipe("room_demo", [*given, *overrides]), resume=begun)
    trained = time.perf_counter()
    model, processor = load_model(str(final), device=device)
    generator = HFGenerator(model, processor, batch_size=64)
    result = evaluate(generator, ["room_demo"], output / "eval", data={"room_demo": root / "data"}, blind=True)
    found = result["room_demo"]
    ways = {"as it is": found, "blank": found.blind, "another room": found.shuffled, **found.frames}
    return {
        "scores": {name: 100 * way.score for name, way in ways.items() if way is not None},
        "kinds": {one.name: one.value for one in sorted(found.categories, key=lambda one: one.name)},
        "heads": last_heads(output),
        "first": last_heads(output, first=True),
        "loss": last_loss(output),
        "seconds": {"training": trained - began, "evaluation": time.perf_counter() - trained},
    }


def last_loss(output: Path) -> list[float]:
    """Mean loss of the words over each tenth of the steps, in nats a learned token, heads' losses included where there are some."""
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in records if "loss" in record]
    step = max(1, len(losses) // 10)
    return [statistics.fmean(losses[k : k + step]) for k in range(0, len(losses), step)]


def blind_rows(data: Path) -> None:
    """Write the rows of training with grey clips in place of their own."""
    import numpy as np

    from mllm.demo.rooms import FRAMES, SIZE

    np.save(data / "clips/grey.npy", np.full((FRAMES, SIZE, SIZE, 3), 127, np.uint8))
    rows = [json.loads(line) for line in (data / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    for row in rows:
        row["messages"][0]["content"][0]["video"] = "clips/grey.npy"
    (data / "blind.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def tell(arm: str, seed: int, found: dict[str, Any]) -> None:
    """One arm's lines."""
    for what in ("scores", "kinds"):
        print(f"{arm:8s} seed {seed} {what}: {_line(found[what], 1)}")
    if found["heads"]:
        print(f"{arm:8s} seed {seed} heads: {_line(found['heads'])}")
    print(f"{arm:8s} seed {seed} loss by tenths: " + " ".join(f"{value:.3f}" for value in found["loss"]))
    print(
        f"{arm:8s} seed {seed} " + ", ".join(f"{k} {value:.0f} s" for k, value in found["seconds"].items()), flush=True
    )


def table(root: Path, seeds: list[int]) -> None:
    """Means over the seeds that are done, with the half-width of a 95 % interval of Student's t (none for one seed)."""
    rows = {}
    for arm in ARMS:
        files = [root / f"{arm}-{seed}.json" for seed in seeds]
        if found := [json.loads(file.read_text(encoding="utf-8")) for file in files if file.is_file()]:
            rows[arm] = found
    for what in ("scores", "kinds", "heads"):
        names = list(dict.fromkeys(name for found in rows.values() for one in found for name in one[what]))
        if names:
            print(f"\n{what:10s} seeds " + " ".join(f"{name:>13s}" for name in names))
        for arm, found in rows.items():
            cells = [_cell([one[what][name] for one in found if name in one[what]]) for name in names]
            print(f"{arm:10s} {len(found):5d} " + " ".join(f"{cell:>13s}" for cell in cells))
    looks = [root / f"geometry-encoder-{seed}/told.json" for seed in seeds]
    if found := [json.loads(file.read_text(encoding="utf-8")) for file in looks if file.is_file()]:
        rows["look"] = found
    if lines := [line for arm, found in rows.items() for line in lessons(arm, found)]:
        print("\nlearned? (last tenth of the steps; the arm of geometry takes the encoder of look)")
        print("\n".join(lines))


def lessons(arm: str, found: list[dict[str, Any]]) -> list[str]:
    """Whether an arm's seeds learned where cameras are: off by less than half of what they turned, which is how far off "not turned" is.

    Of depth only how far off it is: nothing here says what the mean depth alone would reach.
    """
    lines = []
    for what, is_now, was, unit in (
        ("cameras", "pose/degrees", "pose/turned", "°, turned"),
        ("depth", "far/log", None, " in its logarithm, at first"),
    ):
        pairs = []
        for one in found:
            before = one["heads"].get(was) if was else one.get("first", {}).get(is_now)
            if is_now in one["heads"] and before is not None:
                pairs.append((one["heads"][is_now], before))
        if pairs:
            learned = sum(now < before / 2 for now, before in pairs)
            told = "; ".join(f"off {now:.2f}{unit} {before:.2f}" for now, before in pairs)
            verdict = "learned" if learned == len(pairs) else "NOT learned" if not learned else "learned by some"
            verdict = f"{verdict}, {learned} of {len(pairs)} seeds" if was else f"{len(pairs)} seeds"
            lines.append(f"{arm:10s} {what:8s} {verdict}: {told}")
    return lines


_T95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57}
"""Student's t at 97.5 % by the number of seeds."""


def _cell(values: list[float]) -> str:
    if len(values) < 2:
        return "-" if not values else f"{values[0]:.1f}"
    half = _T95.get(len(values), 2.0) * statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.fmean(values):.1f} ± {half:.1f}"


def _line(values: dict[str, float], digits: int = 3) -> str:
    return ", ".join(f"{name} {value:.{digits}f}" for name, value in values.items())


if __name__ == "__main__":
    raise SystemExit(main())
