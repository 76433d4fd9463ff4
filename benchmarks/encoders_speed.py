"""How many images a second does every research backbone see, beside the authors' own module on the same inputs?

    python -m benchmarks.encoders_speed --authors DIR --output benchmarks/results/encoders_speed_h200   # a GPU: batch 32, bf16, all
    python -m benchmarks.encoders_speed --device cpu --batch 1 --dtype float32 --names biformer-t,crossvit-9-dagger-240

DIR holds the authors' files, which are no part of this project; `encoders_authors.py` says how they lie there. Beside ours stand also
timm's CrossViT of the same architecture, timm's models by name alone, and vit-pytorch's LookupViT where that package is installed.
Weights are random, images are noise: times depend on neither. Where parameter counts differ the table says by what.

torch and the encoders are imported once; every family is then a fork of its own with a time limit (--limit), ours in one and the
authors' in another, since their imports change timm and torchvision. None starts once --seconds are over. Results are written after
each, so that a run that is cut off leaves what it has. With --compile our encoders are measured again at the end, blocks compiled.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # asking for a GPU must not open it before forks

import torch

from benchmarks import encoders_authors as authors

OURS, COMPILED, AUTHORS = "ours", "compiled", "authors"
Job = tuple[str, str]
_TIMM = {  # of the catalogue's entries: the same architecture in timm
    "crossvit-9-dagger-240": "crossvit_9_dagger_240",
    "crossvit-15-dagger-408": "crossvit_15_dagger_408",
    "crossvit-18-dagger-408": "crossvit_18_dagger_408",
    "crossvit-base-240": "crossvit_base_240",
}
_BESIDE = {"davit-b": "davit_base", "swin-b-384": "swin_base_patch4_window12_384", "hiera-b-mae": "hiera_base_224"}
"""Entries that timm computes itself: our adapter beside the bare model, so that the adapter's cost is seen."""
_VIT_PYTORCH = {"lookupvit-b-5x5": "look_vit"}
_SIDES = {"lookupvit-b-5x5": 240}
"""Pixels in place of the entry's own, where a rival takes only those: whole patches of both sizes."""
_LONGEST = 4.0
"""Seconds after which a module's measured batches are enough, once there are five."""


def import_once(names: list[str]) -> None:
    """What every fork would import: torch, timm, transformers and the encoders, by building one of each type on no device."""
    from mllm.encoders.catalogue import build_encoder, encoder_config

    for name in {_type_of(name): name for name in names}.values():
        with torch.device("meta"):
            build_encoder(encoder_config({"preset": name, "weights": None}, where=name))


def names_of_catalogue() -> list[str]:
    from mllm.config import read_yaml

    file = Path(__file__).parents[1] / "mllm" / "encoders" / "backbones" / "catalogue.yaml"
    return [*read_yaml(file), *_BESIDE]


def other_modules(name: str) -> list[str]:
    """Beside ours and the authors', which need a folder."""
    found = ["timm"] if name in _TIMM or name in _BESIDE else []
    if name in _VIT_PYTORCH and importlib.util.find_spec("vit_pytorch") is not None:
        found.append("vit_pytorch")
    return found


def _vit_pytorch(side: int) -> Any:
    from vit_pytorch.look_vit import LookViT

    sizes = {"dim": 768, "depth": 12, "heads": 12, "dim_head": 64, "cross_attn_heads": 12, "cross_attn_dim_head": 64}
    grid = {"patch_size": side // 5, "highres_patch_size": 16, "patch_conv_kernel_size": 1, "image_size": side}
    return LookViT(**sizes, **grid, mlp_factor=4, highres_mlp_factor=0.5, num_classes=1)


def _timm(name: str) -> Any:
    import timm

    return timm.create_model(
        {**_TIMM, **_BESIDE}[name], pretrained=False, **({} if name in _TIMM else {"num_classes": 0})
    )


def build(
    name: str, who: str, options: argparse.Namespace
) -> tuple[Callable[[torch.Tensor], Any], Any, dict[str, Any]]:
    """A module on the device, what it does with pixels, and what the table tells of it: size, millions, differs."""
    from mllm.encoders.catalogue import build_encoder, encoder_config

    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    image_size = {"image_size": _SIDES[name]} if name in _SIDES else {}
    config = encoder_config({"preset": name, "weights": None, **image_size}, where=name)
    image = config.info.image
    size, run, told = (image.height, image.width), None, {}
    torch.manual_seed(0)
    with torch.device(device):
        if who in (OURS, COMPILED):
            module: Any = build_encoder(config)
        elif who == AUTHORS:
            theirs = authors.build(options.authors, config)
            module, run = theirs.module, theirs.run
            told = {"millions": theirs.millions(), "differs": theirs.differs}
        elif who == "timm":
            if name in _BESIDE and name != "davit-b":
                import timm

                size = tuple(timm.models.get_pretrained_cfg(_BESIDE[name]).input_size[1:])
            module = _timm(name)
        else:
            module = _vit_pytorch(size[0])
    told = {"size": list(size), "millions": sum(p.numel() for p in module.parameters()) / 1e6, **told}
    module = module.to(device=device, dtype=dtype).eval().requires_grad_(False)
    if who in (OURS, COMPILED):
        module.restore_buffers()
        return lambda pixels: module(pixels).tokens, module, told
    if who == "vit_pytorch" and dtype != torch.float32:  # its positions are fp32: it runs under autocast alone
        return torch.autocast(device.type, dtype)(module), module, told
    return run or getattr(module, "forward_features", module), module, told


def measure(name: str, who: str, options: argparse.Namespace) -> dict[str, Any]:
    """Images a second by the median batch."""
    run, module, told = build(name, who, options)
    if who == COMPILED:
        from mllm.models.compilation import repeated_layers

        for layer in repeated_layers(module):
            layer.compile()
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    pixels = torch.randn(options.batch, 3, *told["size"], device=device, dtype=dtype)
    on_gpu = device.type == "cuda"
    wait = torch.cuda.synchronize if on_gpu else lambda: None
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    times: list[float] = []
    with torch.inference_mode():
        for number in range(options.warm + options.repeats):
            wait()
            start = time.perf_counter()
            run(pixels)
            wait()
            if number >= options.warm:
                times.append(time.perf_counter() - start)
            if len(times) >= 5 and sum(times) > _LONGEST:
                break
    memory = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else 0.0
    seconds = sorted(times)[len(times) // 2]
    return {**told, "images_per_second": options.batch / seconds, "batches": len(times), "gib": memory}


def _work(jobs: list[Job], options: argparse.Namespace, answers: Connection) -> None:
    """In a fork: measure one after the other; one that fails does not end the others. Authors print and write files: nobody
    listens, and what they write is thrown away."""
    sys.stdout = sys.stderr = nowhere = Path(os.devnull).open("w")  # noqa: SIM115 (until the fork ends)
    for stream in (1, 2):
        os.dup2(nowhere.fileno(), stream)
    os.chdir(options.elsewhere)
    if options.device == "cuda":
        answers.send({"device": torch.cuda.get_device_name()})
    for name, who in jobs:
        try:
            found = measure(name, who, options)
        except Exception as error:
            words = " ".join(str(error).split())
            found = {"error": words[:90] if isinstance(error, LookupError) else f"{type(error).__name__}: {words}"[:90]}
        answers.send({"name": name, "who": who, **found})
        if options.device == "cuda":
            torch.cuda.empty_cache()


def section(jobs: list[Job], options: argparse.Namespace, seconds: float) -> list[dict[str, Any]]:
    """The jobs in a fork; what it had told when its time was up counts."""
    # A GPU that something imported has opened is lost in forks: then every section imports for itself.
    context = multiprocessing.get_context("spawn" if torch.cuda.is_initialized() else "fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(jobs, options, sender))
    process.start()
    sender.close()
    found, end, reason = [], time.monotonic() + seconds, f"longer than {seconds:.0f} s"
    try:
        while receiver.poll(max(0.0, end - time.monotonic())):
            found.append(receiver.recv())
    except EOFError:
        process.join()
        reason = f"the process ended with code {process.exitcode}"
    process.kill()
    process.join()
    reached = {(entry.get("name"), entry.get("who")) for entry in found}
    return found + [{"name": n, "who": w, "error": reason} for n, w in jobs if (n, w) not in reached]


def sections(names: list[str], options: argparse.Namespace) -> list[list[Job]]:
    """Jobs of one fork each, by the catalogue's types; families with a rival first, whose ratio is the figure that is asked for."""
    from mllm.encoders.catalogue import catalogue

    entries = catalogue()
    families: dict[str, list[str]] = {}
    for name in names:
        families.setdefault(entries[name]["type"], []).append(name)
    rivals = set(authors.BUILDERS) if options.authors else set()
    order = sorted(
        families, key=lambda family: family not in rivals and not any(other_modules(n) for n in families[family])
    )
    found: list[list[Job]] = []
    for family in order:
        members = families[family]
        found.append([(name, who) for name in members for who in (OURS, *other_modules(name))])
        if family in rivals:
            found.append([(name, AUTHORS) for name in members])
    return found + ([[(name, COMPILED) for name in families[family]] for family in order] if options.compile else [])


def rows(found: list[dict[str, Any]], compiled: bool) -> list[tuple[str, ...]]:
    def figure(entry: dict[str, Any] | None) -> str:
        speed = (entry or {}).get("images_per_second")
        return f"{speed:.1f}" if speed else (entry or {}).get("error", "")

    by = {(entry["name"], entry["who"]): entry for entry in found if "name" in entry}
    table = [
        ("encoder", "px", "M", "GiB", "ours", *(["compiled"] if compiled else []), "beside", "", "ratio", "counts")
    ]
    for name in dict.fromkeys(name for name, _ in by):
        own = by.get((name, OURS), {})
        rivals = [who for entry, who in by if entry == name and who not in (OURS, COMPILED)] or [""]
        for number, who in enumerate(rivals):
            rival = by.get((name, who))
            speed, other = own.get("images_per_second"), (rival or {}).get("images_per_second")
            size = own.get("size", [])
            first = (
                name,
                "x".join(map(str, size[:1] if len(set(size)) == 1 else size)),
                f"{own['millions']:.1f}" if "millions" in own else "",
                f"{own['gib']:.1f}" if speed else "",
                figure(own),
                *([figure(by.get((name, COMPILED)))] if compiled else []),
            )
            more = (rival or {}).get("millions", 0.0) - own.get("millions", 0.0)
            counts = "" if not (speed and other) or who != AUTHORS else "=" if abs(more) < 5e-7 else f"{more:+.2f} M"
            differs = (rival or {}).get("differs", "") if counts not in ("", "=") else ""
            ratio = f"{speed / other:.2f}" if speed and other else ""
            no_code = authors.WITHOUT_CODE.get(_type_of(name), "") if not who else ""
            beside = figure(rival) if who else no_code
            table.append(
                (
                    *(first if not number else ("",) * len(first)),
                    who,
                    beside,
                    ratio,
                    f"{counts} {differs}".strip(),
                )
            )
    return table


def _type_of(name: str) -> str:
    from mllm.encoders.catalogue import catalogue

    return str(catalogue()[name]["type"])


def goals(found: list[dict[str, Any]]) -> list[str]:
    """What is asked for beside what was measured."""
    speeds = {(e["name"], e["who"]): e["images_per_second"] for e in found if "images_per_second" in e}
    ratios = {
        name: speeds[name, OURS] / speeds[name, AUTHORS]
        for name, who in speeds
        if who == AUTHORS and (name, OURS) in speeds
    }
    below = [f"{name} {ratio:.2f}" for name, ratio in ratios.items() if ratio < 1]
    loops = {name: ratio for name, ratio in ratios.items() if _type_of(name) in authors.LOOPS}
    short = [f"{name} {ratio:.2f}" for name, ratio in loops.items() if ratio < 1.3]
    return [
        f"goal >= 1.0x the authors' module: {len(ratios) - len(below)} of {len(ratios)}{': below ' + ', '.join(below) if below else ''}",
        f"goal >= 1.3x where their code loops: {len(loops) - len(short)} of {len(loops)}{': below ' + ', '.join(short) if short else ''}",
    ]


def report(found: list[dict[str, Any]], options: argparse.Namespace, seconds: float) -> list[str]:
    import timm
    import transformers

    device = next((entry["device"] for entry in found if "device" in entry), platform.machine())
    head = (
        f"{date.today()} · encoders_speed.py --batch {options.batch} --dtype {options.dtype}{' --compile' if options.compile else ''}"
        f" · {device} · torch {torch.__version__}, timm {timm.__version__}, transformers {transformers.__version__} · images/s"
    )
    table = rows(found, options.compile)
    sizes = [max(len(row[k]) for row in table) for k in range(len(table[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, sizes)).rstrip() for row in table]
    return [head, *lines, *goals(found), f"{seconds:.0f} s in all"]


def measure_all(names: list[str], options: argparse.Namespace, began: float) -> list[str]:
    """Every section in turn; the report is written after each and returned."""
    found: list[dict[str, Any]] = []
    lines: list[str] = []
    for jobs in sections(names, options):
        left = options.seconds - (time.monotonic() - began)
        if left < 5:
            found += [{"name": name, "who": who, "error": "the time was up"} for name, who in jobs]
        else:
            found += section(jobs, options, min(options.limit, left))
            print(f"{time.monotonic() - began:.0f} s {jobs[0][0]} {jobs[0][1]}", flush=True)
        lines = report(found, options, time.monotonic() - began)
        if options.output:
            text = json.dumps({"run": lines[0], "found": found}, indent=1)
            options.output.with_suffix(".json").write_text(text + "\n", encoding="utf-8")
            options.output.with_suffix(".txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--warm", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--limit", type=float, default=60, help="Seconds of one fork.")
    parser.add_argument(
        "--seconds", type=float, default=420, help="No fork starts after so many; the last ends by then."
    )
    parser.add_argument("--authors", type=Path, help="Folder of the authors' files: time their modules too.")
    parser.add_argument(
        "--compile", action="store_true", help="Our encoders once more at the end, their blocks compiled."
    )
    parser.add_argument("--names", default="", help="Comma separated; default: the whole catalogue of backbones.")
    parser.add_argument("--output", type=Path, help="Write NAME.json and NAME.txt, anew after every fork.")
    options = parser.parse_args()
    if options.authors and not options.authors.is_dir():
        parser.error(f"--authors: no folder {options.authors}")
    options.authors = options.authors and options.authors.resolve()
    began = time.monotonic()
    if options.authors and (options.authors / "vit_pytorch").is_dir():
        sys.path.append(str(options.authors / "vit_pytorch"))
        sys.path.append(str(options.authors / "shims"))
    names = [name for name in options.names.split(",") if name] or names_of_catalogue()
    import_once(names)
    print(f"{time.monotonic() - began:.0f} s imported", flush=True)
    with tempfile.TemporaryDirectory() as options.elsewhere:
        lines = measure_all(names, options, began)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
