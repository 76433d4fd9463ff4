"""Does a model that takes video answer the three video benchmarks alike through every door: in this process, in vLLM, from a server?

Writes clips of noise and questions in the official layouts of VSI-Bench, Video-MME and MVBench (files, a folder of frames at 3 a second,
parts of a clip), asks a checkpoint all of them with ``mllm eval run --blind`` in each way, and compares every answer, number of tokens,
score and probability. A control's answers (another's clip, frames shuffled, reversed, frozen, gray) are compared as well.

    python benchmarks/eval_doors.py runs/video_demo/final --output runs/eval_doors
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import av
import httpx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from mllm.eval.task import load_task  # noqa: E402

TASKS = ("vsibench", "videomme", "mvbench")
PORT = 8917


def frames(seed: int, count: int = 50) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (count, 64, 64, 3), dtype=np.uint8)


def clip(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10, options={"qp": "0"})
        stream.width = stream.height = 64
        for frame in frames(seed):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def write_vsibench(folder: Path) -> None:
    rows = []
    for k in range(12):
        row = {
            "id": k,
            "dataset": "scannet",
            "scene_name": f"s{k % 4}",
            "question": f"How many chairs are in room {k}?",
        }
        choice = {"question_type": "route_planning", "options": ["A. left", "B. right", "C. straight", "D. back"]}
        count = {"question_type": "object_counting", "options": None, "ground_truth": str(2 + k % 5)}
        rows.append(row | (count if k % 2 else choice | {"ground_truth": "ABCD"[k % 4]}))
    folder.mkdir(parents=True)
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for k in range(4):
        clip(folder / f"scannet/s{k}.mp4", k)


def write_videomme(folder: Path) -> None:
    columns = {"domain": "d", "sub_category": "s", "task_type": "t", "video_id": "001"}
    rows = [
        columns
        | {"question_id": f"{k:03}-1", "videoID": f"v{k % 4}", "duration": ("short", "medium", "long")[k % 3]}
        | {"question": f"What happens, {k}?", "options": ["A. x", "B. y", "C. z", "D. w"], "answer": "ABCD"[k % 4]}
        for k in range(8)
    ]
    (folder / "videomme").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / "videomme/test-00000.parquet")
    for k in range(4):
        clip(folder / f"data/v{k}.mp4", 10 + k)


def write_mvbench(folder: Path) -> None:
    (official,) = (source for source in load_task("mvbench").sources if source.name == "official")
    for number, file in enumerate(official.files):
        kind, place, row = Path(file.path).stem, folder / file.fields["place"], {"video": "v.mp4"}
        if file.fields["fps"]:
            row = {"video": "v", "start": 0.0, "end": 10.0, "fps": file.fields["fps"]}
            (place / "v").mkdir(parents=True, exist_ok=True)
            for k, frame in enumerate(frames(20, 40)):
                Image.fromarray(frame).save(place / f"v/{k + 1:05}.jpg")
        elif kind == "action_sequence":
            row |= {"start": 1.0, "end": 3.0}
        if not file.fields["fps"] and not (place / "v.mp4").exists():
            clip(place / "v.mp4", 30 + number)
        row |= {"question": f"What is {kind}?", "candidates": ["x", "y", "z"], "answer": "y"}
        target = folder / file.path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps([row]))


def mllm(*arguments: str, log: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "mllm.cli.main", *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(command, env=environment, stdout=log.open("w"), stderr=subprocess.STDOUT)


def answers(folder: Path) -> dict[tuple[str, str], dict]:
    found = {}
    for path in sorted(folder.glob("*.jsonl")):
        if "prior" not in path.name:  # asks no model
            found |= {(path.stem, row["id"]): row for row in map(json.loads, path.read_text().splitlines())}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--output", type=Path, default=Path("runs/eval_doors"))
    parser.add_argument("--tell", action="store_true", help="compare what is answered already")
    options = parser.parse_args()
    if not options.tell:
        ask_everywhere(options.checkpoint, options.output)
    known = answers(options.output / "hf")
    names = ("torch", "transformers", "av")
    print(f"{datetime.date.today()}, CPU, float32, greedy; " + ", ".join(f"{name} {version(name)}" for name in names))
    print(
        f"{len(known)} answers of {', '.join(TASKS)}, their controls among them: another clip, frames shuffled, reversed, frozen, gray;"
    )
    print(
        f"{len({row['output'] for row in known.values()})} different ones, {sum('error' in row for row in known.values())} failed\n"
    )
    print(
        f"{'beside hf':<10}{'answers':>9}{'same':>6}{'same tokens':>13}{'same score':>12}{'log probability apart, most':>29}"
    )
    for door in ("vllm", "openai"):
        found = answers(options.output / door)
        assert found.keys() == known.keys()
        pairs = [(known[key], found[key]) for key in known]
        text = sum(a["output"].rstrip("\ufffd") == b["output"].rstrip("\ufffd") for a, b in pairs)
        tokens, scores = (sum(a.get(key) == b.get(key) for a, b in pairs) for key in ("num_prompt_tokens", "scores"))
        apart = [abs(a["logprob"] - b["logprob"]) for a, b in pairs if "logprob" in a and "logprob" in b]
        most = f"{max(apart):.1e}" if apart else "not told"
        print(f"{door:<10}{len(pairs):>9}{text:>6}{tokens:>13}{scores:>12}{most:>29}")


def ask_everywhere(checkpoint: Path, output: Path) -> None:
    """``mllm eval run`` in this process, in vLLM's and of a server."""
    data = output / "data"
    if not data.exists():
        for name, write in zip(TASKS, (write_vsibench, write_videomme, write_mvbench)):
            write(data / name)
    places = [part for name in TASKS for part in ("--data", f"{name}={data / name}")]

    def ask(door: str, name: str, *more: str) -> None:
        arguments = ("eval", "run", name, "--tasks", ",".join(TASKS), *places, "--blind", "--generator", door, *more)
        log = output / f"{door}.log"
        status = mllm(*arguments, "--no-resume", "--output", str(output / door), log=log).wait()
        assert status == 0, f"{door}: status {status}; {log}"

    for door in ("hf", "vllm"):
        ask(door, str(checkpoint))
    log = output / "serve.log"
    server = mllm("serve", str(checkpoint), "--port", str(PORT), "--dtype", "float32", "--eager", log=log)
    try:
        for _ in range(300):
            assert server.poll() is None, f"the server ended; {log}"
            try:
                if httpx.get(f"http://127.0.0.1:{PORT}/health").status_code == 200:
                    break
            except httpx.TransportError:
                pass
            time.sleep(1)
        ask("openai", checkpoint.name, "--base-url", f"http://127.0.0.1:{PORT}/v1")
    finally:
        server.terminate()
        server.wait(60)


if __name__ == "__main__":
    main()
