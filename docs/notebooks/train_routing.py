# %% [markdown]
# # Train routing and look at it
#
# Three experts, each blind to two of three kinds of pictures, and a gate that chooses one. The gate alone is trained here, in seconds on a
# CPU; the whole recipe `routed_demo`, where the experts learn too and labels are measured, takes a quarter of an hour.

# %%
import json
from collections import Counter
from pathlib import Path

from mllm.data.routing_labels import labels_path, open_sources
from mllm.demo.routing import EXPERT_OF, prepare_routing_demo, train_routing_tokenizer
from mllm.eval.checkpoint import load_model
from mllm.recipe import Recipe, load_recipe
from mllm.train.observe.tracking import read_metrics
from mllm.train.run import run_recipe
from mllm.train.stages.routing.report import routing_report

root = Path("runs/route_notebook")
data = prepare_routing_demo(root / "data", num_train=24, num_test=8)
tokenizer = train_routing_tokenizer(data, root / "tokenizer")
rows = [json.loads(line) for line in data.train.read_text().splitlines()]
print(Counter(row["kind"] for row in rows), "→", EXPERT_OF)

# %% [markdown]
# A label says which experts help on a row, and by how much each lowers the loss of the answer: `mllm route label` measures it with a
# trained model. Here we know it by construction, and write the same file.

# %%
source = {"name": "routed", "format": "messages", "path": str(data.train)}
((opened, _),) = open_sources(source)
experts = sorted(EXPERT_OF.values())
lines = [{"dataset": opened.spec.model_dump(mode="json"), "fingerprint": opened.fingerprint, "experts": experts}]
for number, row in enumerate(rows):
    helpful = EXPERT_OF[row["kind"]]
    losses = {"none": 2.0} | {name: 0.5 if name == helpful else 2.0 for name in experts}
    lines.append({"row": number, "losses": losses, "experts": [helpful]})
labels_path(opened).write_text("".join(json.dumps(line) + "\n" for line in lines))

# %% [markdown]
# The recipe that ships, with its last stage alone: the gate learns from what the base encoder sees of a picture.

# %%
places = [f"output={root / 'run'}", f"model.language_model.tokenizer={tokenizer}"]
whole = load_recipe("routed_demo", places).model_dump()
stage = whole["stages"][-1] | {"steps": 10, "epochs": None, "batch_size": 24, "data": source}
stage["options"] = {"labels": "data", "targets": "hard"}
final = run_recipe(Recipe.model_validate(whole | {"stages": [stage]}))

# %% [markdown]
# What does it choose on pictures it has not seen?

# %%
curve = [f"{row['loss']:.2f}" for row in read_metrics(root / "run") if "loss" in row]
print("loss:", " ".join(curve))
model, processor = load_model(str(final), device="cpu")
held_out = open_sources({"name": "held_out", "format": "messages", "path": str(data.test)})
report = routing_report(model, processor, held_out, batch_size=20)
for kind in EXPERT_OF:
    chosen = Counter(" + ".join(row.experts) or "none" for row in report.rows if row.kind == kind)
    print(f"{kind:7} → {dict(chosen)}")
right = sum(row.experts == (EXPERT_OF[row.kind],) for row in report.rows) / len(report.rows)
print(f"the expert that was made for the picture: {right:.0%} (chance: a third)")

# %% [markdown]
# And what does it save? Operations of a picture through the vision part, with the chosen expert and with all.

# %%
summary = report.summary(report.rows)
print({key: value for key, value in summary.items() if isinstance(value, int | float)})
