# %% [markdown]
# # Read an evaluation
#
# Two models answered the same 60 questions. Which is better, and is the difference more than chance? Answers are made up here, so that this
# runs in seconds without a model; with your own, the two lists are the `<task>.jsonl` of two runs of `mllm eval run`.

# %%
import random

from mllm.eval.metrics import build_metric
from mllm.eval.report.statistics import mcnemar_exact, wilson_interval

random.seed(0)
truth = [str(random.randint(1, 9)) for _ in range(60)]


def answers(right):
    """Replies of a model that knows this share, in the dress that models put numbers into."""
    dress = ["{}", "{}.", "The answer is {}.", "There are {} bars.", "I cannot tell."]
    return [random.choice(dress).format(t if random.random() < right else "0") for t in truth]


small, large = answers(0.5), answers(0.75)

# %% [markdown]
# A rule reads each reply, or says that it cannot. What it read stands beside the verdict.

# %%
rule = build_metric("exact_match")
for reply, target in list(zip(large, truth))[:5]:
    score = rule.score(reply, target, {})
    print(f"{reply!r:25} target {target}: {score.value} (read as {score.extracted!r})")

# %% [markdown]
# The same replies under another rule give another number: that is why a score carries its rule.

# %%
values = {}
for name in ("exact_match", "relaxed_stripped", "count"):
    metric = build_metric(name)
    for which, replies in (("small", small), ("large", large)):
        scored = [metric.score(reply, target, {}).value or 0.0 for reply, target in zip(replies, truth)]
        values[name, which] = sum(scored) / len(scored)
        low, high = wilson_interval(sum(scored), len(scored))
        print(f"{name:17} {which}: {values[name, which]:.1%}, 95 % interval {low:.1%} to {high:.1%}")

# %% [markdown]
# Is the difference more than chance? Both answered the same questions, so it is paired: only questions on which they differ say anything.

# %%
count = build_metric("count")
right = {
    which: [count.score(reply, target, {}).value == 1 for reply, target in zip(replies, truth)]
    for which, replies in (("small", small), ("large", large))
}
only_small = sum(a and not b for a, b in zip(right["small"], right["large"]))
only_large = sum(b and not a for a, b in zip(right["small"], right["large"]))
p = mcnemar_exact(only_small, only_large)
print(f"right only with the small one: {only_small}, only with the large one: {only_large}, p = {p:.3f}")
