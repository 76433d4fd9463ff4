"""When does a question count that is asked once per order of its options (MMBench)?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mllm.eval.metrics.base import Scored, group_means, mean
from mllm.eval.metrics.groups import WholeGroups, all_right, as_samples, whole_groups


class MmBenchCircular(WholeGroups):
    """Rows of one question share ``meta.group`` (the index modulo a million) and differ in ``meta.pass`` (0 = original
    order).

    Headline: percent of questions right in every pass. ``vanilla`` is the accuracy of the first pass alone, which is
    not comparable with published MMBench numbers. ``incomplete_groups``: questions with fewer passes than options.
    """

    name = "mmbench_circular"
    version = "2"
    protocol = (
        "MMBench circular: a question is right only if every order of its options is answered right (our letter rule)"
    )

    def aggregate(self, items: Sequence[Scored]) -> dict[str, float]:  # type: ignore[override]
        groups = whole_groups(items, "group", noted=_noted, alone=True)
        first = (item.value for item in items if not int(item.meta.get("pass") or 0))
        short = sum(group.size < group.meta["passes"] for group in groups.values())
        result = {
            "score": self.scale * mean(all_right(groups)),
            "vanilla": self.scale * mean(first),
            "groups": float(len(groups)),
        }
        result["incomplete_groups"] = float(short)
        parts = (group_means(as_samples(groups), key, self.scale) for key in ("l2_category", "category"))
        return result | next(parts) | next(parts)


def _noted(meta: Mapping[str, Any]) -> dict[str, Any]:
    return {key: meta.get(key) for key in ("l2_category", "category")} | {"passes": len(meta.get("options") or ())}
