"""``mllm demo``: draw data, train a dual-encoder model, evaluate it, show two answers; no download."""

from __future__ import annotations

import html
import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from mllm.cli import arguments

NEXT = """next:
  mllm chat {run}/final --image {image}
  mllm eval run {run}/final --tasks demo_charts --blind
  mllm recipes cp demo my_recipe.yaml     # change an encoder, a connector, a rate: one line each
  mllm recipes ls                         # the published models' recipes
"""


def demo(
    output: Annotated[Path, typer.Option(help="Folder for data, checkpoints and the report.")] = Path("runs/demo"),
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Recipe changes, key.sub=value.", show_default=False)
    ] = None,
    charts: Annotated[int, typer.Option(help="Training charts to draw.")] = 4000,
    processes: Annotated[int, typer.Option(help="Training processes.")] = 1,
    limit: Annotated[int | None, typer.Option(help="Evaluate only N samples of each test set.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted demo.")] = False,
) -> None:
    """Train, evaluate and question a small dual-encoder model on charts and digits, on this machine's CPU, in minutes."""
    started = time.perf_counter()
    from rich.console import Console

    from mllm.recipe import load_recipe

    changes = [f"output={output}", f"model.language_model.tokenizer={output / 'tokenizer'}", *(overrides or [])]
    recipe = load_recipe("demo", changes)
    for value, option in ((charts, "--charts"), (processes, "--processes"), (limit, "--limit")):
        arguments.at_least(value, 1, option)
    from mllm.demo.charts_and_digits import prepare_demo, train_tokenizer
    from mllm.train.run import run_recipe

    console = Console()
    console.rule("1  data: charts from real and random tables, handwritten digits")
    prepare_demo(output / "data", num_charts=charts, seed=0)
    train_tokenizer(output / "data", output / "tokenizer")

    console.rule("2  training: two stages, two encoders, a language model from scratch")
    final = run_recipe(recipe, processes=processes, resume=resume)

    console.rule("3  evaluation on held-out charts and digits, with and without the picture")
    from mllm.eval.run import run_eval

    results = run_eval(
        str(final),
        ["demo_charts", "demo_digits"],
        output_dir=output / "eval",
        batch_size=64,
        blind=True,
        limit=limit,
        resume=False,
        data_dirs={"demo_charts": str(output / "data" / "charts"), "demo_digits": str(output / "data" / "digits")},
    )
    scores = {
        name.removeprefix("demo_"): {"score": round(100 * r.score, 2), "blank": round(100 * r.blind_score, 2)}
        for name, r in results.items()
    }
    report = {
        "charts": {k: scores["charts"][k] for k in ("score", "blank")},
        "digits": {k: scores["digits"][k] for k in ("score", "blank")},
        "seconds": round(time.perf_counter() - started, 1),
    }
    path = output / "report.json"
    path.write_text(json.dumps(report, indent=2) + "\n")

    console.rule("4  two questions")
    page, shown = answer_two(final, output)
    for row in shown:
        console.print(
            f"[bold]{row['image']}[/]\n  {row['question']}\n  → {row['answer']}   [dim](target: {row['target']})[/]"
        )
    console.rule("result")
    for name, values in (("charts", report["charts"]), ("digits", report["digits"])):
        console.print(f"{name}: {values['score']:.1f} %   images blanked: {values['blank']:.1f} %")
    console.print(f"{report['seconds']:.0f} s · {path} · {page}")
    console.print(NEXT.format(run=output, image=shown[0]["image"]), highlight=False)


def answer_two(checkpoint: Any, output: Path) -> tuple[Path, list[dict[str, Any]]]:
    """Ask the model about one held-out chart and one digit; an HTML page with both. Returns the page and the rows."""
    import base64

    from mllm.models.chat import ChatSession

    session = ChatSession.load(str(checkpoint), dtype="float32")
    rows = []
    for kind, index in (("charts", 3), ("digits", 7)):
        lines = (output / "data" / kind / "test.jsonl").read_text().splitlines()
        row = json.loads(lines[index])
        image = output / "data" / kind / row["image"]
        session.reset()
        session.add_image(image)
        rows.append(
            {
                "image": image,
                "question": row["question"],
                "answer": session.ask(row["question"], max_new_tokens=16),
                "target": row["answer"],
            }
        )
    figures = "".join(
        f'<figure><img src="data:image/png;base64,{base64.b64encode(r["image"].read_bytes()).decode()}" alt="">'
        f"<figcaption><p><b>{html.escape(r['question'])}</b></p><p>{html.escape(r['answer'])}</p>"
        f"<p class=t>target: {html.escape(str(r['target']))}</p></figcaption></figure>"
        for r in rows
    )
    page = output / "demo.html"
    page.write_text(
        "<!doctype html><meta charset=utf-8><title>mllm demo</title><style>body{font:16px/1.5 system-ui;max-width:50rem;margin:2rem auto;"
        "padding:0 1rem}figure{display:flex;gap:1.5rem;align-items:center;margin:2rem 0}img{width:16rem;image-rendering:pixelated;"
        "border:1px solid #ccc}.t{color:#777}</style><h1>Two questions to the demo model</h1>" + figures,
        encoding="utf-8",
    )
    return page, rows


def add_to(app: typer.Typer) -> None:
    """Register the verb."""
    app.command()(demo)
