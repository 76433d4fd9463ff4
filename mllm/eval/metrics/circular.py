"""When does a question count that is asked once per order of its options (MMBench)?"""

from __future__ import annotations

from collections.abc import Sequence

from mllm.eval.metrics.base import Scored, group_means, mean
from mllm.eval.metrics.letters import Letter


class MmBenchCircular(Letter):
    """Rows of one question share ``meta.group`` (the index modulo a million) and differ in ``meta.pass`` (0 = original
    order).

    Headline: percent of questions right in every pass. ``vanilla`` is the accuracy of the first pass alone, which is
    not comparable with published MMBench numbers. ``incomplete_groups``: questions with fewer passes than options.
    """

    name = "mmbench_circular"
    version = "2"
    group_key = "group"
    protocol = (
        "MMBench circular: a question is right only if every order of its options is answered right (our letter rule)"
    )
    is_mean = False

    def aggregate(self, items: Sequence[Scored]) -> dict[str, float]:  # type: ignore[override]
        groups: dict[str, list[Scored]] = {}
        for item in items:
            groups.setdefault(str(item.meta.get("group", item.id)), []).append(item)
        first = [item.value for item in items if not int(item.meta.get("pass") or 0)]
        whole = [float(all(item.value == 1 for item in group)) for group in groups.values()]
        short = sum(len(group) < len(group[0].meta.get("options") or ()) for group in groups.values())
        result = {"score": self.scale * mean(whole), "vanilla": self.scale * mean(first), "groups": float(len(groups))}
        result["incomplete_groups"] = float(short)
        by_group = [
            Scored(name, group[0].score.__class__(value), None, group[0].meta)
            for (name, group), value in zip(groups.items(), whole)
        ]
        return result | group_means(by_group, "l2_category", self.scale) | group_means(by_group, "category", self.scale)
