"""What are encoders worth on the demo's digits and charts, frozen: trained ones from Python packages, and untrained architectures?

    OMP_NUM_THREADS=1 python benchmarks/encoders_probe.py --pictures 100 --seconds 540

Digits are labelled by the digit; half as many charts by their type (bar, line, pie, scatter). Encoders with weights from packages
are trained; all others have random weights, which the table says. Encoders that cost more than --gflops a picture are left out,
and those that the time does not reach; both are named. CPU or GPU; one thread a process on the CPU.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from datetime import date
from pathlib import Path

import torch

from mllm.demo.charts_and_digits import prepare_demo
from mllm.encoders.catalogue import build_encoder, catalogue, encoder_config
from mllm.errors import MllmError
from mllm.eval.studies.probe import Labelled, cost_of, features_of, halves, judge, labelled_pictures, probe_study

SIZE = 224


def chart_types(folder: Path, limit: int) -> Labelled:
    """Charts labelled by their type."""
    rows = []
    for line in (folder / "captions.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        rows.append({"image": row["messages"][0]["content"][0]["image"], "label": row["chart"]})
    target = folder / "types.jsonl"
    target.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return labelled_pictures(target, limit=limit)


def spec_of(name: str) -> dict[str, object]:
    """A catalogue entry at the size that all share where it may have another; small pictures need no larger ones."""
    entry, spec = catalogue()[name], {"preset": name}
    if entry["type"] in ("biformer", "crossformer", "vssd", "duoformer", "dynperceiver", "dualtokenvit"):
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("runs/encoders_probe"))
    parser.add_argument("--pictures", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=540)
    parser.add_argument("--gflops", type=float, default=5)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/encoders_probe_cpu.txt"))
    options = parser.parse_args()
    began = time.monotonic()
    prepare_demo(options.data, num_charts=max(options.pictures, 60), num_test_charts=20, processes=1)
    sets = {
        "digits": labelled_pictures(options.data / "digits" / "test.jsonl", label="answer", limit=options.pictures),
        "charts": chart_types(options.data / "charts", options.pictures // 2),
    }
    sets = {name: Labelled(data.files, data.labels, f"the demo's {name}") for name, data in sets.items()}
    found: dict[str, list] = {name: [] for name in sets}
    left_out: dict[str, str] = {}
    # The trained ones first, then small before large.
    order = sorted(
        catalogue().items(), key=lambda e: ("package:" not in e[1]["weights"]["source"], e[1]["about"]["millions"])
    )
    for name, _ in order:
        if time.monotonic() - began > options.seconds:
            left_out[name] = "the time was up"
            continue
        try:
            entry = opened(name, options.gflops)
        except MllmError as error:
            entry = str(error).splitlines()[0]
        if isinstance(entry, str):
            left_out[name] = entry
            continue
        for what, data in sets.items():
            probed = features_of(name, entry[0], entry[1], data.files, batch_size=8, progress=False)
            judge(probed, data.labels, halves(data.labels))
            found[what].append(probed)
        print(f"{time.monotonic() - began:5.0f} s  {name}", flush=True)
    lines = [
        f"{date.today()} · OMP_NUM_THREADS={torch.get_num_threads()} python benchmarks/encoders_probe.py --pictures "
        f"{options.pictures} --seconds {options.seconds:g} --gflops {options.gflops:g} · {platform.machine()}, torch "
        f"{torch.__version__}, shared with other work"
    ]
    for what, data in sets.items():
        study = probe_study(found[what], data, halves(data.labels), "cpu", {})
        for table in study.tables:
            rows = table.rows if table is study.tables[0] else table.rows[:8]
            shown = [table.headings, *rows]
            sizes = [max(len(row[k]) for row in shown) for k in range(len(table.headings))]
            lines += [
                "",
                f"{what}: {table.caption}"
                + ("" if rows is table.rows else f" (the 8 most alike of {len(table.rows)} pairs)"),
            ]
            lines += ["  ".join(cell.ljust(size) for cell, size in zip(row, sizes)).rstrip() for row in shown]
        lines += ["", *study.notes]
    lines += ["", "left out: " + "; ".join(f"{name} ({why})" for name, why in left_out.items())]
    options.output.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
