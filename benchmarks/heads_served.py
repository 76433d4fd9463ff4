"""Do the masks and probabilities that a served demo sends equal those of the model in process?

Serves a checkpoint that `segmentation_demo.py` or `forgery_demo.py` trained through vLLM on this machine's CPU and asks over HTTP about
pictures of its test split, alone and eight at a time. Compared with `model.segment` and `model.probability` of the same checkpoint, which
generate their answers themselves: words equal, masks by the pixel, probabilities to 1e-4.

    python benchmarks/heads_served.py runs/forgery_demo/model/final --data runs/forgery_demo/data
    python benchmarks/heads_served.py runs/segmentation_demo/marks/final --data runs/segmentation_demo/data

Exit code 1 when an answer differs. Of a segmentation model half of the requests ask for what no scene can show (``unknown_test.jsonl``).
"""

from __future__ import annotations

import argparse
import base64
import json
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.servers import heading, question, running
from mllm.demo.forgery import QUESTION

Cases = list[tuple[Path, str]]


def cases_of(data: Path, number: int) -> Cases:
    """Pictures of the test split and what they are asked."""
    read = lambda name: [json.loads(line) for line in (data / name).read_text(encoding="utf-8").splitlines()]  # noqa: E731
    if (data / "test.jsonl").exists():
        return [(data / row["image"], QUESTION) for row in read("test.jsonl")[:number]]
    rows = read("marks_test.jsonl")[: number - number // 2] + read("unknown_test.jsonl")[-(number // 2) :]
    return [(data / row["image"], f"Please segment {row['phrase']}.") for row in rows]


def own_answers(checkpoint: str, cases: Cases) -> list[dict[str, Any]]:
    """What the model itself says: text, and ``masks`` or ``probability`` as a server writes them."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    import mllm.models.registration  # noqa: F401  (transformers' classes know the checkpoint then)
    from mllm.heads.segmentation.build import segmentation_heads

    model = AutoModelForImageTextToText.from_pretrained(checkpoint).eval()
    processor: Any = AutoProcessor.from_pretrained(checkpoint)
    found = []
    for picture, asked in cases:
        if segmentation_heads(model.config.heads):
            one = model.segment(str(picture), questions=asked, processor=processor, max_new_tokens=48)
            found.append({"text": one.text.strip(), "mllm_masks": one.records(processor.segments, asked)})
        else:
            one = model.probability(str(picture), asked, processor=processor, max_new_tokens=48)
            found.append({"text": one.text.strip(), "mllm_probability": one.probabilities})
    return found


def served(address: str, case: tuple[Path, str]) -> dict[str, Any]:
    """One answer over HTTP, in the same form."""
    picture, asked = case
    url = f"data:image/png;base64,{base64.b64encode(picture.read_bytes()).decode()}"
    body = question(f"\n{asked}", url, max_tokens=48, ignore_eos=False, temperature=0)
    answer = httpx.post(f"{address}/v1/chat/completions", json=body, timeout=120).raise_for_status().json()
    text = answer["choices"][0]["message"]["content"].strip()
    return {"text": text, **{key: answer[key] for key in ("mllm_masks", "mllm_probability") if key in answer}}


def compared(own: list[dict[str, Any]], other: list[dict[str, Any]]) -> dict[str, Any]:
    """How many words and masks are the same, and the largest difference of a probability or a mask's score."""
    counts = {
        "answers": len(own),
        "words the same": 0,
        "masks": 0,
        "masks the same": 0,
        "empty masks": 0,
        "probabilities": 0,
    }
    farthest = 0.0
    for one, two in zip(own, other, strict=True):
        counts["words the same"] += one["text"] == two["text"]
        for first, second in zip(one.get("mllm_masks") or [], two.get("mllm_masks") or []):
            counts["masks"] += 1
            counts["masks the same"] += first["rle"] == second["rle"]
            counts["empty masks"] += second["box"] is None
            farthest = max(farthest, abs(first["score"] - second["score"]))
        first, second = one.get("mllm_probability"), two.get("mllm_probability")
        if first is not None and second is not None:
            counts["probabilities"] += 1
            farthest = max(farthest, *(abs(first[name] - second[name]) for name in first))
    told = [next(iter(one["mllm_probability"].values())) for one in own if one.get("mllm_probability")]
    between = {"probabilities between": [round(min(told), 4), round(max(told), 4)]} if told else {}
    return {name: value for name, value in counts.items() if value} | between | {"largest difference": farthest}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--data", type=Path, required=True, help="folder of the demo's pictures and test split")
    parser.add_argument("--requests", type=int, default=60)
    options = parser.parse_args()
    cases = cases_of(options.data, options.requests)
    own = own_answers(options.checkpoint, cases)
    print(heading("benchmarks/heads_served.py"), flush=True)
    with tempfile.TemporaryDirectory() as folder, running(options.checkpoint, Path(folder) / "log") as server:
        ask = lambda case: served(server.address, case)  # noqa: E731
        alone = compared(own, [ask(case) for case in cases])
        print("one at a time  ", json.dumps(alone), flush=True)
        with ThreadPoolExecutor(8) as pool:
            together = compared(own, list(pool.map(ask, cases)))
        print("eight at a time", json.dumps(together), flush=True)
    same = all(
        found["words the same"] == len(cases)
        and found.get("masks") == found.get("masks the same")
        and found["largest difference"] <= 1e-4
        for found in (alone, together)
    )
    known = sum(bool(one.get("mllm_masks") or one.get("mllm_probability")) for one in own)
    print(
        f"{'passed' if same and known else 'FAILED'}  the same within 1e-4; {known} of {len(cases)} answers carry a mask or a probability"
    )
    return 0 if same and known else 1


if __name__ == "__main__":
    raise SystemExit(main())
