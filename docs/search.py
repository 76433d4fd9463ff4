"""Does one search of the built site lead to the page that somebody looks for? `make docs` runs it after the build.

The same index as the site's own search (lunr) over the same pieces of text; a guess counts as found when a piece of its page is among
the first five.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from lunr import lunr

GUESSES = {
    "freeze encoder": "how-to/freeze/",
    "own images": "how-to/own-data/",
    "resume": "how-to/resume/",
    "several GPUs": "how-to/several-gpus/",
    "several machines": "how-to/several-gpus/",
    "own benchmark": "how-to/own-benchmark/",
    "add an encoder": "how-to/own-encoder/",
    "vLLM": "how-to/serve/",
    "push to hub": "how-to/push/",
    "quantise": "how-to/quantise/",
    "wandb": "how-to/track/",
    "loss does not fall": "how-to/loss/",
    "lora": "how-to/lora/",
}
"""What somebody types → the page that answers."""
FIRST = 5


def main(site: Path) -> int:
    """Print every guess with the place of its page; 1 when one is not found."""
    pieces = json.loads((site / "search/search_index.json").read_text(encoding="utf-8"))["docs"]
    fields = [{"field_name": "title", "boost": 1000}, {"field_name": "text", "boost": 1}]
    index = lunr(ref="location", fields=fields, documents=pieces)
    lost = 0
    for guess, page in GUESSES.items():
        pages = list(dict.fromkeys(hit["ref"].partition("#")[0] for hit in index.search(guess)))
        place = pages.index(page) + 1 if page in pages else 0
        lost += not 0 < place <= FIRST
        print(f"{guess:20} {page:24} {place or 'not found'}{'' if 0 < place <= FIRST else f'   first: {pages[:3]}'}")
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else "site")))
