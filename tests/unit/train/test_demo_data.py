"""Does the demo read what it has drawn, wherever that is?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mllm.data.lookup import load_mixture
from mllm.demo.charts_and_digits import DATA, read_from
from mllm.recipe import load_recipe


def datasets(stage) -> list[tuple[Any, Any]]:
    return [(item.repeat, item.dataset) for item in load_mixture(stage.data).datasets]


def paths(stage):
    return [str(dataset.path) for _, dataset in datasets(stage)]


def test_every_stage_reads_the_demos_data_from_the_folder_that_was_asked_for(tmp_path: Path):
    recipe = load_recipe("demo", [])
    assert read_from(recipe, DATA) is recipe
    moved = read_from(recipe, tmp_path / "data")
    for before, after in zip(recipe.stages, moved.stages):
        wanted = [path.replace("runs/demo/data", str(tmp_path / "data")) for path in paths(before)]
        assert paths(after) == wanted != paths(before)
        left = [[(repeat, dataset.name) for repeat, dataset in datasets(s)] for s in (before, after)]
        assert left[0] == left[1]
    own = load_recipe("demo", ['stages.sft.data={"format": "llava", "path": "mine.json"}'])
    assert read_from(own, tmp_path / "data").stages[1] == own.stages[1]


def test_the_real_form_draws_and_reads_charts_in_its_own_folder(tmp_path: Path):
    import json
    import random

    from mllm.cli.demo import REAL
    from mllm.demo.real_tables import DECLARED, KINDS, TEST_SOURCES, prepare_real
    from mllm.eval.task import load_task

    text = (Path(__file__).parents[3] / "recipes" / "real_charts.yaml").read_text(encoding="utf-8")
    assert f"T={','.join(TEST_SOURCES)} " in text  # one benchmark, whoever draws it
    rng = random.Random(0)
    for source in ("learned", "kept"):
        (tmp_path / "tables" / source).mkdir(parents=True)
        for k in range(4):
            rows = [f"{name},{rng.randint(10, 90)}" for name in ("Chile", "Peru", "Cuba", "Kenya")]
            path = tmp_path / "tables" / source / f"t{k}.csv"
            path.write_text("\n".join([f"country,{source}{k}", *rows]) + "\n")
    data = tmp_path / "data"
    prepare_real(data, charts=4, test_charts=2, source=str(tmp_path / "tables"), test_sources=("kept",))
    recipe = read_from(load_recipe(REAL.recipe), data, declared=DECLARED)
    for stage in recipe.stages:
        (path,) = paths(stage)
        rows = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
        assert Path(path).parent == data / "charts" and {row["table"].split("/")[0] for row in rows} == {"learned"}
    ((task, folder),) = REAL.tasks.items()
    assert (data / folder / str(load_task(task).train)).resolve() == (data / "charts" / "train.jsonl").resolve()
    rows = [json.loads(line) for line in (data / folder / "test.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 2 and {row["table"].split("/")[0] for row in rows} == {"kept"}
    assert {row["kind"] for row in rows} <= set(KINDS)
