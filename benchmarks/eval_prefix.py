"""What could a cache of the text that all prompts begin with save at most, in the generator `hf`?

Answers the same questions with their prompts whole and with that text cut off, which is less work than any cache could make of it,
in turns. CPU seconds of this process; the visual tokens are kept in both (`--picture-cache`), so that they do not count.

    python benchmarks/eval_prefix.py runs/demo/final --data runs/demo/data/charts
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from mllm.eval.asking import load_items  # noqa: E402
from mllm.eval.data.loading import load_data  # noqa: E402
from mllm.eval.generators.base import GeneratorSettings  # noqa: E402
from mllm.eval.generators.hf import HFGenerator  # noqa: E402
from mllm.eval.task import load_task  # noqa: E402
from mllm.types import Request  # noqa: E402


class Cut(HFGenerator):
    """Prompts without their first ``cut`` characters."""

    cut = 0

    def render(self, request: Request) -> str:
        return super().render(request)[self.cut :]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--task", default="demo_charts")
    parser.add_argument("--data", required=True, help="the task's folder")
    parser.add_argument("--limit", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    chosen = parser.parse_args()
    settings = GeneratorSettings(device="cpu", dtype="float32")
    generator = Cut.open(chosen.checkpoint, settings)
    assert isinstance(generator, Cut)
    spec = load_task(chosen.task)
    items = load_data(spec, data={chosen.task: chosen.data}, limit=chosen.limit).items

    def requests() -> list[Request]:
        options = dict(spec.generation.options())
        return [Request(one.item.id, one.item.turns, one.images, dict(options)) for one in load_items(items, None)]

    prompts = [generator.render(request) for request in requests()]
    mark = generator.processor.image_token
    heads = [prompt.split(mark)[0] for prompt in prompts]
    alike = itertools.takewhile(lambda letters: len(set(letters)) == 1, zip(*heads))
    shared = "".join(letters[0] for letters in alike)
    before = len(generator._tokenizer(shared, add_special_tokens=False)["input_ids"])
    seconds: dict[str, list[float]] = {"whole": [], "cut": []}
    counts: dict[str, list[int]] = {}
    for _ in range(chosen.rounds + 1):  # the first fills the caches
        for name in seconds:
            generator.cut = len(shared) if name == "cut" else 0
            asked = requests()
            started = time.process_time()
            counts[name] = [response.num_prompt_tokens for response in generator.generate(asked)]
            seconds[name].append(time.process_time() - started)
    whole, cut = (statistics.median(seconds[name][1:]) for name in ("whole", "cut"))
    each = statistics.mean(counts["whole"])
    print(
        f"{datetime.date.today()} · {chosen.task}, {len(items)} questions, {chosen.rounds} rounds · benchmarks/eval_prefix.py\n"
        f"{before} tokens before the first picture are the same in every prompt, of {each:.0f}: {100 * before / each:.1f} %\n"
        f"{whole:.2f} CPU seconds whole, {cut:.2f} without that text: a cache saves {100 * (1 - cut / whole):.1f} % at most"
    )


if __name__ == "__main__":
    main()
