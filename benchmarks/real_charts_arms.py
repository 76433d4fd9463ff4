"""What does each arm of a study score, kind by kind, and how far is it from another on the same questions?

    python benchmarks/real_charts_arms.py runs/studies/real_charts [--study real_charts] [--against A]
    python benchmarks/real_charts_arms.py runs/studies/real_charts_scaling --study real_charts_scaling --against all

`mllm study --report` says what was expected and what came out; this adds, for every finished arm against one of them, differences over
all questions, over the renderers that were never trained on, and by kind: paired by question, bootstrap by tables, over the seeds that
both have. CPU, seconds.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from mllm.eval.report.statistics import mean_estimate
from mllm.eval.studies.arms import Answers, compare_arms, finished, load_arms


def mean(seeds: Mapping[int, Answers]) -> np.ndarray:
    """``(n,)`` right in percent, mean over seeds."""
    return 100 * np.mean([answers.values for answers in seeds.values()], axis=0)


def difference(first: Mapping[int, Answers], second: Mapping[int, Answers], keep: np.ndarray) -> str:
    """First minus second on some questions, with its interval."""
    found = compare_arms(first, second, keep)
    return f"{found.difference:+.1f} ({found.low:+.1f} to {found.high:+.1f})"


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--study", default="real_charts")
    parser.add_argument("--against", default="A")
    options = parser.parse_args()
    spec = load_arms(options.study)
    arms = finished(spec, options.folder)
    if options.against not in arms:
        parser.error(
            f"--against {options.against}: not finished in {options.folder}; there are {', '.join(arms) or 'none'}"
        )
    base = arms[options.against]
    sample = next(iter(base.values()))
    everything = np.ones(len(sample.ids), bool)
    unseen = ~np.any([sample.kinds.are(kind) for kind in spec.seen], axis=0)
    renderers = {
        name: sample.kinds.are(name) for name in [*spec.seen, *sorted(set(sample.kinds.names) - set(spec.seen))]
    }
    kinds = {name: sample.categories.are(name) for name in sorted(sample.categories.names)}

    print(f"{len(sample.ids)} questions, {len(sample.clusters.names)} clusters; percent, 95 % by tables")
    print(" | ".join(["arm", "seeds", "all", *renderers, "unseen", "all, 95 %"]))
    for name, seeds in arms.items():
        values = mean(seeds)
        sure = mean_estimate(values, clusters=sample.clusters.codes)
        cells = [f"{values[keep].mean():.1f}" for keep in (everything, *renderers.values(), unseen)]
        print(
            " | ".join(
                [f"{name}, {spec.arms[name].what}", str(len(seeds)), *cells, f"{sure.low:.1f} - {sure.high:.1f}"]
            )
        )

    print(f"\n{options.against} less the arm, on the seeds that both have: all | unseen renderers")
    others = {name: seeds for name, seeds in arms.items() if name != options.against and set(seeds) & set(base)}
    for name, seeds in others.items():
        shared = ", ".join(map(str, sorted(set(seeds) & set(base))))
        print(
            " | ".join(
                [f"{name} (seed {shared})", difference(base, seeds, everything), difference(base, seeds, unseen)]
            )
        )

    print("\nBy kind, all renderers: questions, " + ", ".join(arms))
    for kind, keep in kinds.items():
        print(
            f"{kind} | {int(keep.sum())} | " + ", ".join(f"{mean(seeds)[keep].mean():.1f}" for seeds in arms.values())
        )
    print(f"\nBy kind, all renderers: {options.against} less the arm")
    for name, seeds in others.items():
        print(f"{name}: " + "; ".join(f"{kind} {difference(base, seeds, keep)}" for kind, keep in kinds.items()))


if __name__ == "__main__":
    main()
