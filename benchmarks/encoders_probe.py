"""What are encoders worth on pictures of three kinds, frozen: trained ones from Python packages, and untrained architectures?

    apt-get download tuxpaint-stamps-default && dpkg-deb -x tuxpaint-stamps-default*.deb stamps    # GPL-2, not shipped here
    OMP_NUM_THREADS=1 python benchmarks/encoders_probe.py --stamps stamps/usr/share/tuxpaint/stamps --seconds 280

Digits are labelled by the digit, charts by their type (bar, line, pie, scatter), photographs and drawings of things by their kind (bird,
fruit, vehicle …; from the stamps of a drawing program, only where --stamps is given). Encoders with weights from packages are trained;
all others have random weights, which the table says. Encoders that cost more than --gflops a picture are left out, and those that the
time does not reach; both are named. What an encoder gave is kept beside the data: a second call goes on where the time was up.
CPU or GPU; one thread a process on the CPU.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import time
from datetime import date
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from mllm.demo.charts_and_digits import prepare_demo
from mllm.encoders.catalogue import build_encoder, catalogue, encoder_config
from mllm.errors import MllmError
from mllm.eval.studies.probe import (
    Labelled,
    Probed,
    cost_of,
    features_of,
    halves,
    judge,
    labelled_pictures,
    probe_study,
)

SIZE = 224
ALIKE = 8
_ANY_SIZE = ("ppocr", "biformer", "crossformer", "vssd", "duoformer", "dynperceiver", "dualtokenvit")
_STAMPS = {
    "bird": "animals/birds", "fruit": "food/fruit", "flower": "plants/flowers", "mammal": "animals/mammals", "vehicle": "vehicles",
    "clothes": "clothes", "house": "town/houses", "insect": "animals/insects", "sign": "town/roadsigns", "vegetable": "food/vegetables",
    "fish": "animals/fish",
}  # fmt: skip


def chart_types(folder: Path, limit: int) -> Labelled:
    """Charts labelled by their type."""
    rows = []
    for line in (folder / "captions.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        rows.append({"image": row["messages"][0]["content"][0]["image"], "label": row["chart"]})
    target = folder / "types.jsonl"
    target.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return labelled_pictures(target, limit=limit)


def kinds_of_things(stamps: Path, folder: Path, limit: int) -> Labelled:
    """Stamps on a white square, labelled by the folder that they come from."""
    for kind, place in _STAMPS.items():
        target = folder / kind
        target.mkdir(parents=True, exist_ok=True)
        for file in sorted((stamps / place).rglob("*.png")):
            written = target / f"{file.parent.name}-{file.name}"
            if written.exists() or "_mirror" in file.stem or "_flip" in file.stem:
                continue
            stamp = Image.open(file).convert("RGBA")
            stamp.thumbnail((SIZE, SIZE), Image.Resampling.BICUBIC)
            square = Image.new("RGBA", (SIZE, SIZE), "white")
            square.alpha_composite(stamp, ((SIZE - stamp.width) // 2, (SIZE - stamp.height) // 2))
            square.convert("RGB").save(written)
    return labelled_pictures(folder, limit=limit)


def spec_of(name: str) -> dict[str, object]:
    """A catalogue entry at the size that all share where it may have another; small pictures need no larger ones."""
    spec: dict[str, object] = {"preset": name}
    if catalogue()[name]["type"] in _ANY_SIZE:
        spec["image_size"] = SIZE
    return spec


def opened(name: str, most: float) -> tuple[object, str] | str:
    """An encoder with a word on its weights, or why it is left out."""
    config = encoder_config(spec_of(name), where=name)
    packaged = config.weights is not None and config.weights.source.startswith("package:")
    with torch.device("meta"):
        gflops = cost_of(build_encoder(config).eval())
    if not gflops <= most:
        return f"{gflops:.0f} GFLOPs a picture"
    torch.manual_seed(0)
    encoder = build_encoder(config).eval()
    if packaged:
        encoder.load_pretrained()
    return encoder, config.weights.source if packaged else "random"


class Kept:
    """What encoders gave, by name and pictures."""

    def __init__(self, folder: Path, sets: dict[str, Labelled]):
        folder.mkdir(parents=True, exist_ok=True)
        keys = {
            what: hashlib.sha256("\n".join(map(str, data.files)).encode()).hexdigest() for what, data in sets.items()
        }
        self.place = {what: folder / f"{what}-{key[:12]}" for what, key in keys.items()}

    def read(self, name: str, what: str) -> Probed | None:
        file = self.place[what] / f"{name}.npz"
        if not file.is_file():
            return None
        with np.load(file) as stored:
            return Probed(**json.loads(str(stored["facts"])), features=stored["features"])

    def write(self, probed: Probed, what: str) -> None:
        self.place[what].mkdir(exist_ok=True)
        facts = {key: value for key, value in vars(probed).items() if key != "features"}
        np.savez(self.place[what] / f"{probed.name}.npz", features=probed.features, facts=json.dumps(facts))


def probe_one(name: str, sets: dict[str, Labelled], kept: Kept, most: float) -> dict[str, Probed] | str:
    """What an encoder gives for each set of pictures, or why it is left out."""
    found = {what: probed for what in sets if (probed := kept.read(name, what)) is not None}
    missing = [what for what in sets if what not in found]
    if not missing:
        return found
    try:
        entry = opened(name, most)
    except MllmError as error:
        return str(error).splitlines()[0]
    if isinstance(entry, str):
        return entry
    for what in missing:
        data = sets[what]
        probed = features_of(name, entry[0], entry[1], data.files, batch_size=8, progress=False)
        judge(probed, data.labels, halves(data.labels))
        kept.write(probed, what)
        found[what] = probed
    return found


def report(found: dict[str, list[Probed]], sets: dict[str, Labelled], left_out: dict[str, str]) -> list[str]:
    """The tables as lines of text."""
    lines: list[str] = []
    for what, data in sets.items():
        study = probe_study(found[what], data, halves(data.labels), "cpu", {})
        for table in study.tables:
            rows = table.rows if table is study.tables[0] else table.rows[:ALIKE]
            shown = [table.headings, *rows]
            sizes = [max(len(row[k]) for row in shown) for k in range(len(table.headings))]
            few = "" if rows is table.rows else f" (the {ALIKE} most alike of {len(table.rows)} pairs)"
            lines += ["", f"{what}: {table.caption}{few}"]
            lines += ["  ".join(cell.ljust(size) for cell, size in zip(row, sizes)).rstrip() for row in shown]
        lines += ["", *study.notes]
    return [*lines, "", "left out: " + "; ".join(f"{name} ({why})" for name, why in left_out.items())]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("runs/encoders_probe"))
    parser.add_argument("--stamps", type=Path, help="folder of the package's stamps")
    parser.add_argument("--pictures", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=540)
    parser.add_argument("--gflops", type=float, default=5)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/encoders_probe_cpu.txt"))
    options = parser.parse_args()
    began = time.monotonic()
    prepare_demo(options.data, num_charts=max(options.pictures, 60), num_test_charts=20, processes=1)
    digits = labelled_pictures(options.data / "digits" / "test.jsonl", label="answer", limit=options.pictures)
    sets = {"digits": digits, "charts": chart_types(options.data / "charts", options.pictures)}
    if options.stamps is not None:
        sets["things"] = kinds_of_things(options.stamps, options.data / "things", options.pictures)
    sources = {"things": "the stamps of Debian's tuxpaint-stamps-default"}
    sets = {
        what: Labelled(data.files, data.labels, sources.get(what, f"the demo's {what}")) for what, data in sets.items()
    }
    kept = Kept(options.data / "probed", sets)
    found: dict[str, list[Probed]] = {what: [] for what in sets}
    left_out: dict[str, str] = {}
    # The trained ones first, then small before large.
    order = sorted(
        catalogue().items(), key=lambda e: ("package:" not in e[1]["weights"]["source"], e[1]["about"]["millions"])
    )
    for name, _ in order:
        up = time.monotonic() - began > options.seconds and any(kept.read(name, what) is None for what in sets)
        entry = "the time was up" if up else probe_one(name, sets, kept, options.gflops)
        if isinstance(entry, str):
            left_out[name] = entry
            continue
        for what, probed in entry.items():
            found[what].append(probed)
        print(f"{time.monotonic() - began:5.0f} s  {name}", flush=True)
    stamps = " --stamps …" if options.stamps is not None else ""
    head = (
        f"{date.today()} · OMP_NUM_THREADS={torch.get_num_threads()} python benchmarks/encoders_probe.py{stamps} --pictures "
        f"{options.pictures} --gflops {options.gflops:g} · {platform.machine()}, torch {torch.__version__}, shared with other work, "
        "so the times are only a hint"
    )
    lines = [head, *report(found, sets, left_out)]
    options.output.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
