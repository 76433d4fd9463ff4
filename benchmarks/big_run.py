"""What do the benchmarks of whole trainings share? A recipe with real pictures, `mllm train` watched from outside, and their command."""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

LLAMAS = {
    "tiny": {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2},
    "0.5b": {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
    },
    "1b": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32},
    "3b": {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24},
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
}
CLIP_L = {
    "model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
    "num_attention_heads": 16, "image_size": 336, "patch_size": 14, "projection_dim": 768,
}  # fmt: skip
DINO_L = {
    "model_type": "dinov2", "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "image_size": 518,
    "patch_size": 14, "mlp_ratio": 4,
}  # fmt: skip
WORDS = ["the", "picture", "shows", "a", "number", "of", "coloured", "stripes", "that", "cross", "each", "other", "and"]


def text_config(size: str) -> dict:
    return {"model_type": "llama", "vocab_size": 32064, **LLAMAS[size], "max_position_embeddings": 4096}


def write_stripes(folder: Path, count: int, size: tuple[int, int]) -> None:
    """``0.jpg`` … of coloured stripes, each another. size: (width, height)."""
    import numpy as np
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    y, x = np.mgrid[0 : size[1], 0 : size[0]]
    for number in range(count):
        waves = [np.sin(x / (7 + number % 11 + k) + y / (13 + number % 7 - k)) for k in range(3)]
        pixels = np.stack([(127 * (wave + 1)).astype(np.uint8) for wave in waves], axis=-1)
        Image.fromarray(pixels).save(folder / f"{number}.jpg", quality=90)


def write_data(folder: Path, *, rows: int, pictures: int) -> Path:
    """LLaVA-format rows with one JPEG (640 × 480) each, one in eight without; answers of 40 to 900 characters."""
    write_stripes(folder, pictures, (640, 480))
    data = []
    for row in range(rows):
        length = 40 + (row * 7919) % 860
        answer = " ".join(WORDS[(row + k) % len(WORDS)] for k in range(length // 5))
        image = {} if row % 8 == 7 else {"image": f"{row % pictures}.jpg"}
        question = ("<image>\n" if image else "") + "What can be seen, and what is it made of?"
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        data.append({"id": str(row), **image, "conversations": turns})
    path = folder / "rows.json"
    path.write_text(json.dumps(data), encoding="utf-8")
    return path


def write_recipe(folder: Path, size: str, *, name: str, source: Path | None = None, **stage) -> Path:
    """A recipe file: a Llama of the size, CLIP-L/336 and DINOv2-L/336 live and frozen, joined on channels."""
    from tests.helpers import TINY_CLIP, TINY_TIMM, tiny_tokenizer

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer, data = folder / "tokenizer", folder / "data" / "rows.json"
    if not tokenizer.is_dir():
        tiny_tokenizer().save_pretrained(str(tokenizer))
    if not data.is_file():
        write_data(folder / "data", rows=64 if size == "tiny" else 1024, pictures=8 if size == "tiny" else 128)
    encoders: dict = {"semantic": TINY_CLIP, "spatial": TINY_TIMM}
    if size != "tiny":
        clip = {"type": "hf", "architecture": CLIP_L, "layers": [-2], "final_norm": False}
        encoders = {"semantic": clip, "spatial": {"type": "hf", "architecture": DINO_L, "image_size": 336}}
    llm = {"source": str(source)} if source is not None else {"config": text_config(size)}
    recipe = {
        "name": name,
        "seed": 1,
        "output": str(folder / name),
        "model": {
            "language_model": {**llm, "tokenizer": str(tokenizer)},
            "encoders": encoders,
            "connector": {"type": "channel_concat", "projector": {"depth": 2}},
            "chat_template": "chatml",
        },
        "stages": [
            {
                "name": "sft",
                "learn": {"language_model": 2e-5, "connector": 2e-5},
                "data": {"format": "llava", "path": str(data)},
                "batch_size": 2,
                "max_length": 4096 if size != "tiny" else 1200,
                "packing": True,
                "dtype": "bfloat16",
                "optimizer": {"betas": [0.9, 0.95]},
                "schedule": {"type": "cosine", "warmup": 0.03},
                **stage,
            }
        ],
    }
    path = folder / f"{name}.json"  # JSON is YAML
    path.write_text(json.dumps(recipe, indent=1), encoding="utf-8")
    return path


@dataclass
class Watched:
    """What was seen of one `mllm train`: lines with the second they came at, and the logged steps."""

    lines: list[tuple[float, str]] = field(default_factory=list)
    steps: list[dict] = field(default_factory=list)
    first_step: float | None = None
    peak_own_gb: float = 0.0
    """Memory of the command and all its processes that no file backs, at its largest."""
    peak_gb: float = 0.0
    """The same with the pages of mapped files, each counted once however many processes share it."""
    code: int | None = None
    """None: ended by us, once the steps were there."""

    def second_of(self, pattern: str) -> float | None:
        return next((second for second, line in self.lines if re.search(pattern, line)), None)

    def line_of(self, pattern: str) -> str | None:
        return next((line for _, line in self.lines if re.search(pattern, line)), None)

    def middle(self, key: str, skip: int) -> float | None:
        """Median of a logged number over the steps after the first ``skip``."""
        values = [step[key] for step in self.steps[skip:] if step.get(key) is not None]
        return median(values) if values else None


def watch(recipe: Path, *, steps: int, limit: float, arguments: tuple[str, ...] = (), **environment: str) -> Watched:
    """Run `mllm train` until so many steps are logged, then end it; its lines are echoed."""
    output = recipe.with_suffix("")
    if "--profile" not in arguments:
        arguments = ("--profile", "0", *arguments)  # no step is to be slower than the others
    command = [sys.executable, "-m", "mllm.cli.main", "train", str(recipe), "--no-evaluate", *arguments]
    path = os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH", "")) if p)
    seen, began, metrics = Watched(), time.monotonic(), output / "metrics.jsonl"
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **environment},
    ) as process:

        def read() -> None:
            assert process.stdout is not None
            for line in process.stdout:
                seen.lines.append((round(time.monotonic() - began, 2), line.rstrip()))
                print(f"    {time.monotonic() - began:7.2f} | {line.rstrip()[:200]}", flush=True)

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        try:
            while time.monotonic() - began < limit:
                seen.code = process.poll()
                text = metrics.read_text(encoding="utf-8") if metrics.is_file() else ""
                complete = text[: text.rfind("\n") + 1].splitlines()
                seen.steps = [json.loads(line) for line in complete]
                if seen.steps and seen.first_step is None:
                    seen.first_step = round(time.monotonic() - began, 2)
                seen.peak_own_gb = max(seen.peak_own_gb, _memory(process.pid, "status", r"RssAnon:"))
                seen.peak_gb = max(seen.peak_gb, _memory(process.pid, "smaps_rollup", r"Pss:"))
                if seen.code is not None or len(seen.steps) >= steps:
                    break
                time.sleep(0.1)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        reader.join(5)
    return seen


def _memory(session: int, file: str, what: str) -> float:
    """GB of memory by a line of the system's, of all processes of a session."""
    total = 0
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            # The command's name is in brackets and may hold anything; the session is the 4th field after it.
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            if int(fields[3]) == session:
                found = re.search(rf"{what}\s+(\d+) kB", (folder / file).read_text())
                total += int(found.group(1)) if found else 0
        except (OSError, IndexError):  # it has just ended
            continue
    return round(total * 1024 / 1e9, 2)


def versions() -> dict:
    import torch
    import transformers

    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    found = {"device": name, "gpus": torch.cuda.device_count(), "torch": torch.__version__}
    return {**found, "transformers": transformers.__version__, "date": time.strftime("%Y-%m-%d")}


def run_sections(
    script: str, sections: dict[str, float], options: list[str], *, limit: float, results: Path
) -> list[dict]:
    """Every section (name → seconds it may take) in a process of its own; the JSON lines they print, collected and
    written to ``results``. A section that fails or takes too long loses only its own figures."""
    began, rows = time.monotonic(), []
    for name, seconds in sections.items():
        left = limit - (time.monotonic() - began)
        if left < min(seconds, 30):
            rows.append({"section": name, "error": "no time left"})
            print(json.dumps(rows[-1]), flush=True)
            continue
        print(f"== {name} (at {time.monotonic() - began:.0f} s)", flush=True)
        command = [sys.executable, script, "--section", name, *options]
        path = os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH", "")) if p)
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, start_new_session=True, env={**os.environ, "PYTHONPATH": path}
        )
        killer = threading.Timer(min(seconds, left), process.terminate)
        killer.start()
        assert process.stdout is not None
        found = []
        for line in process.stdout:
            if line.startswith("{"):
                found.append({"section": name, **json.loads(line)})
                print(json.dumps(found[-1]), flush=True)
            else:
                print(line, end="", flush=True)
        code = process.wait()
        killer.cancel()
        if code:
            found.append({"section": name, "error": f"exit code {code}"})
            print(json.dumps(found[-1]), flush=True)
        rows += found
        results.parent.mkdir(parents=True, exist_ok=True)
        results.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return rows


def measure(
    script: str,
    doc: str | None,
    sections: dict[str, float],
    work: Callable[[argparse.Namespace, Path, str], dict],
    *,
    limit: float,
    own: Mapping[str, dict] | None = None,
    left_out: Callable[[str], bool] = lambda name: False,
) -> list[dict]:
    """The command of a script of sections: all in turn, each in a process of its own, or with ``--section`` the one that this
    process is. sections: name → seconds it may take; work: of one section; limit: seconds of all; own: more options, by name, which
    every section gets; left_out: sections that run only where they are named. Returns the rows, [] for a single section.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="7b", choices=tuple(LLAMAS))
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    for name, settings in (own or {}).items():
        parser.add_argument(f"--{name}", **settings)
    parser.add_argument("--sections", nargs="+", help="Of: " + "; ".join(sections))
    parser.add_argument("--limit", type=float, default=limit, help="Seconds for all sections together.")
    parser.add_argument("--patience", type=float, default=1.0, help="Factor on every limit, for a slow machine.")
    parser.add_argument("--folder", type=Path, help="Where models and runs are written.")
    parser.add_argument("--section", help=argparse.SUPPRESS)
    options = parser.parse_args()
    title = Path(script).stem
    folder = options.folder or Path(tempfile.mkdtemp(prefix=title.replace("_", "-") + "-"))
    if options.section:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that what it started is ended too
        print(json.dumps(work(options, folder, options.section)), flush=True)
        return []
    names = options.sections or [name for name in sections if not left_out(name)]
    chosen = {name: sections[name] * options.patience for name in names}
    results = Path(os.environ.get("OUT", folder)) / f"{title}.txt"
    passed = ["--size", options.size, "--device", options.device, "--folder", str(folder)]
    passed += ["--patience", str(options.patience)]
    for name in own or {}:
        passed += [f"--{name}", str(getattr(options, name.replace("-", "_")))]
    write_recipe(folder, options.size, name="data", steps=1)
    try:
        rows = run_sections(script, chosen, passed, limit=options.limit * options.patience, results=results)
        rows.insert(0, {**versions(), "size": options.size})
        results.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    finally:
        if options.folder is None:
            shutil.rmtree(folder, ignore_errors=True)
    return rows


def compiled_in(folder: Path) -> dict[str, str]:
    """Environment by which the compilations of a training are kept in a folder."""
    cache = folder / "compiled"
    return {"TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"), "TRITON_CACHE_DIR": str(cache / "triton")}
