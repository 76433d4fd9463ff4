"""Do the documentation's links, commands, settings, code and figures hold? The strict build of the site itself is `make docs`."""

from __future__ import annotations

import copy
import importlib.util
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from mllm.config import field_sentences, nested_models, parse_yaml, validate
from mllm.data.spec import DatasetSpec
from mllm.errors import MllmError
from mllm.eval.task import load_task
from mllm.plugins import load_plugins
from mllm.recipe import Recipe, load_recipe
from mllm.testing import find_check
from tests.test_readme import block

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(path for path in DOCS.rglob("*.md") if "generated" not in path.parts)
OUTSIDE = [
    ROOT / name for name in ("README.md", "CONTRIBUTING.md", "recipes/README.md", "data/README.md", "eval/README.md")
]
OUTSIDE += [ROOT / "AGENTS.md", ROOT / "llms.txt"]
BLOCK = re.compile(
    r"^(?P<mark><!-- test: [\w-]+ -->\n)?(?P<indent> *)```(?P<kind>\w+)\n(?P<text>.*?)^(?P=indent)```", re.M | re.S
)


def blocks(kind: str, pages: list[Path]) -> Iterator[tuple[str, str, str]]:
    """(where, mark, text) of every fenced block of a kind."""
    for page in pages:
        text = page.read_text(encoding="utf-8")
        for found in BLOCK.finditer(text):
            if found["kind"] == kind:
                line = text[: found.start()].count("\n") + 1
                inner = re.sub(rf"^{found['indent']}", "", found["text"], flags=re.M)
                yield f"{page.relative_to(ROOT)}:{line}", found["mark"] or "", inner


def script(name: str) -> Any:
    """A module of docs/, with those beside it."""
    sys.path.insert(0, str(DOCS))
    try:
        spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(DOCS))
    return module


@pytest.fixture(scope="module")
def made() -> dict[str, str]:
    """The pages that docs/generate.py writes, without the sizes that it asks other libraries for."""
    return script("generate").pages(sizes=False)


def test_a_page_says_what_its_recipe_or_encoder_takes_and_reached(made: dict[str, str]) -> None:
    costs = script("costs")
    for name, file in costs.SCORES.items():
        page = made[f"recipes/{name}.md"]
        assert "## Score" in page and f'--8<-- "benchmarks/results/{file}.txt"' in page, name
    pages = {name: page for name, page in made.items() if re.match(r"(recipes|encoders)/(?!index)", name)}
    assert len(pages) > 120
    for name, page in pages.items():
        wanted = ("hardware, hours", "score") if name.startswith("recipes/") else ("hours", "score, speed")
        assert all(f"| {row} |" in page for row in wanted), name
    assert "not measured" in made["recipes/llava_1_5.md"]


@pytest.mark.nightly
@pytest.mark.parametrize("name", [path.stem for path in sorted((ROOT / "recipes").glob("*.yaml"))])
def test_a_recipe_fits_the_gpus_that_it_names(name: str) -> None:
    costs, recipe = script("costs"), load_recipe(name)
    limit = costs.memory_of_one(recipe)
    stages = costs.memory_of_stages(recipe)
    assert stages, "every shipped recipe's memory can be computed"
    for stage, peak in stages:
        assert limit is None or peak < limit, f"{name}, {stage}: {peak / 1e9:.0f} GB of {limit / 1e9:.0f} GB"


def anchors(text: str) -> set[str]:
    """Of a page's headings, as Python-Markdown makes them."""
    plain = [re.sub(r"`|\\|\[([^\]]*)\]\([^)]*\)", r"\1", title) for title in re.findall(r"^#+ +(.+)$", text, re.M)]
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", title).strip().lower()) for title in plain}


def test_every_link_leads_somewhere(made: dict[str, str]) -> None:
    texts = {path: path.read_text(encoding="utf-8") for path in [*PAGES, *OUTSIDE]}
    texts |= {DOCS / "generated" / name: text for name, text in made.items()}
    broken, count = [], 0
    for page, text in texts.items():
        prose = re.sub(r"`[^`\n]*`", "", BLOCK.sub("", text))
        for target in re.findall(r"\]\(([^)\s]+)\)", prose):
            if "://" in target:
                continue
            name, _, anchor = target.partition("#")
            other = (page.parent / name).resolve() if name else page
            count += 1
            if other not in texts and not (other.exists() and DOCS not in page.parents):
                broken.append(f"{page.relative_to(ROOT)}: {target}: no such page")
            elif anchor and other in texts and anchor not in anchors(texts[other]):
                broken.append(f"{page.relative_to(ROOT)}: {target}: no such heading")
    assert not broken, "\n".join(broken)
    assert count > 150


def test_every_include_is_there_and_long_enough(made: dict[str, str]) -> None:
    texts = {str(page): page.read_text(encoding="utf-8") for page in PAGES} | made
    included = [(page, name) for page, text in texts.items() for name in re.findall(r'^--8<-- "(.+)"$', text, re.M)]
    assert len(included) > 60
    for page, name in included:
        file, *lines = name.split(":")
        assert (ROOT / file).is_file(), f"{page}: {file} is not there"
        length = len((ROOT / file).read_text(encoding="utf-8").splitlines())
        assert all(1 <= int(line) <= length for line in lines), f"{page}: {file} has {length} lines, not {lines}"


def commands() -> Iterator[tuple[str, list[str]]]:
    """Every command line of ours in the pages, with where it stands."""
    for where, _, text in blocks("bash", [*PAGES, *OUTSIDE]):
        for line in re.sub(r"\\\n\s*", " ", text).splitlines():
            words = shlex.split(line, comments=True)
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                words.pop(0)
            if words[:1] == ["mllm"]:
                yield f"{where}: {line.strip()}", words[1:]
            elif "mllm.cli.main" in words:
                yield f"{where}: {line.strip()}", words[words.index("mllm.cli.main") + 1 :]


def mentions() -> Iterator[tuple[str, list[str]]]:
    """Every ``mllm …`` in the prose; with NAME or CKPT it is a pattern, which is left out."""
    for where in [*PAGES, *OUTSIDE]:
        prose = BLOCK.sub("", where.read_text(encoding="utf-8"))
        for text in re.findall(r"(?<!`)`mllm ([^`…]+)`", prose):
            if not re.search(r"[A-Z]\b|,|--help", text):
                yield f"{where.name}: mllm {text}", shlex.split(text)


def parse(words: list[str]) -> tuple[str, dict[str, Any]]:
    """What the command line makes of it, without running: the command's name and its values. Raises what click raises."""
    import typer.main

    from mllm.cli.main import app

    context = typer.main.get_command(app).make_context("mllm", list(words))
    path = []
    while hasattr(context.command, "commands"):
        rest = [*getattr(context, "_protected_args", []), *context.args]
        if not rest:
            break
        name, command, rest = context.command.resolve_command(context, rest)
        path.append(name)
        context = command.make_context(name, list(rest), parent=context)
    return " ".join(path), context.params


def test_every_command_is_one_that_can_be_typed() -> None:
    found, wrong, seen = list(commands()), [], set()
    for where, words in [*found, *mentions()]:
        try:
            seen.add(parse(words)[0].partition(" ")[0])
        except Exception as error:
            named_alone = (
                type(error).__name__ in ("MissingParameter", "NoArgsIsHelpError") and (where, words) not in found
            )
            if not named_alone:
                wrong.append(f"{where}: {getattr(error, 'message', error)!s}")
    assert not wrong, "\n".join(wrong)
    assert len(found) > 80 and len(seen) > 20


def test_overrides_on_the_pages_are_keys_of_recipes() -> None:
    names = {path.stem for path in (ROOT / "recipes").glob("*.yaml")}
    tried = 0
    for where, words in commands():
        recipe = next((word for word in words[1:] if not word.startswith("-")), "")
        overrides = [word for word in words if re.match(r"(?:stages|model|track|output)[.\w]*=", word)]
        if overrides and words[0] in ("train", "plan", "inspect", "demo"):
            chosen = recipe if recipe in names else "demo"
            try:
                load_recipe(str(ROOT / "recipes" / f"{chosen}.yaml"), overrides)
            except MllmError as error:
                pytest.fail(f"{where}: {error}")
            tried += 1
    assert tried >= 10


def test_every_yaml_on_the_pages_is_one_that_is_read(tmp_path: Path) -> None:
    demo = yaml.safe_load((ROOT / "recipes/demo.yaml").read_text(encoding="utf-8")) | {"name": "demo"}
    kinds = {"recipe": 0, "dataset": 0, "task": 0}
    for where, _, text in blocks("yaml", [*PAGES, *OUTSIDE]):
        if "--8<--" in text:
            continue
        data = parse_yaml(text, where=where)
        if "sources" in data:
            (tmp_path / "mine.yaml").write_text(text, encoding="utf-8")
            load_task(str(tmp_path / "mine.yaml"))
            kinds["task"] += 1
        elif "format" in data:
            validate(DatasetSpec, data, where=where)
            kinds["dataset"] += 1
        elif all(isinstance(value, dict) and "key" in value for value in data.values()):
            from mllm.serve.http.keys import read_clients

            (tmp_path / "keys.yaml").write_text(text, encoding="utf-8")
            assert read_clients(tmp_path / "keys.yaml")
        else:
            whole = copy.deepcopy(demo)
            of_pictures = {stage.get("kind") for stage in data.get("stages", ())} & {"tokenizer", "diffusion"}
            whole["model"] = ({} if of_pictures else whole["model"]) | data.pop("model", {})
            validate(Recipe, whole | data, where=where)
            kinds["recipe"] += 1
    assert kinds["recipe"] >= 12 and kinds["dataset"] >= 2 and kinds["task"] >= 1


def test_every_python_block_compiles_and_the_marked_ones_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = list(blocks("python", [*PAGES, *OUTSIDE]))
    for where, mark, text in found:
        code = compile(text, where, "exec")
        if "test: run" in mark:
            exec(code, {"__name__": "page"})
    assert len(found) >= 9
    assert parse(["data", "check", "mine/rows.jsonl"])[1]["source"] == "mine/rows.jsonl"
    from mllm.data.check import check_source

    assert check_source("mine/rows.jsonl").num_bad == 0, "the first hour's own pictures are good data"


def test_the_notebooks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ended: dict[str, dict[str, Any]] = {}
    for path in sorted((DOCS / "notebooks").glob("*.py")):
        ended[path.stem] = {"__name__": "notebook"}
        exec(compile(path.read_text(encoding="utf-8"), str(path), "exec"), ended[path.stem])
    joined = ended["join_two_encoders"]
    assert tuple(joined["visual"].shape)[-2:] == (joined["tokens"]["channel_concat"], 64)
    assert (
        joined["tokens"]["sequence_concat"] > joined["tokens"]["channel_concat"] > 16
        and min(joined["moved"].values()) > 0.001
    )
    routed = ended["train_routing"]
    assert routed["right"] > 0.8 and 0 < routed["summary"]["saved"] < 1, "chance is a third"
    read = ended["read_an_evaluation"]
    assert read["values"]["count", "large"] > read["values"]["exact_match", "large"] and 0 < read["p"] < 0.05


@pytest.mark.parametrize(
    ("name", "components"),
    [
        ("plugin", ["mean-colour"]),
        ("plugin-routing", ["sum", "linear"]),
        ("plugin-head", ["digit_value"]),
        ("plugin-rules", ["first_word", "always_yes", "pairs"]),
    ],
)
def test_the_parts_of_your_own_keep_the_contract(tmp_path: Path, name: str, components: list[str]) -> None:
    """In this process: `mllm check` as a command is run by tests/integration/test_plugins.py."""
    (tmp_path / "example.py").write_text(block(name), encoding="utf-8")
    load_plugins([str(tmp_path / "example.py")])
    for component in components:
        find_check(component)[1]()


def test_the_front_page_is_one_click_from_everything() -> None:
    front = (DOCS / "index.md").read_text(encoding="utf-8")
    site = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for page in PAGES:
        name = str(page.relative_to(DOCS))
        assert name == "index.md" or f"]({name})" in front, f"docs/index.md does not link {name}"
        assert f": {name}" in site, f"mkdocs.yml's nav leaves out {name}"
    asked = {  # the guess of somebody who looks for it → the page
        "freeze": "freeze", "my own images": "own-data", "go on after": "resume", "several GPUs": "several-gpus",
        "several machines": "several-gpus", "own benchmark": "own-benchmark", "add an encoder": "own-encoder", "vLLM": "serve",
        "hub": "push", "smaller": "quantise", "wandb": "track",
    }  # fmt: skip
    for guess, page in asked.items():
        assert re.search(rf"^\|.*{guess}.*\]\(how-to/{page}\.md\)", front, re.M), guess


def test_every_key_of_a_recipe_has_its_sentence() -> None:
    for model in nested_models(Recipe):
        missing = set(model.model_fields) - set(field_sentences(model))
        assert not missing, f"{model.__name__}: write a sentence under {', '.join(sorted(missing))}"


def test_the_readmes_figures_are_those_of_the_results() -> None:
    """Rows of the table of what is proven: every number of the figure's cell stands in the file that the row links."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (.+?) \| (.+?) \| \[\S+\]\((benchmarks/results/\S+?)\) \|$", readme, re.M)
    assert len(rows) >= 6
    for what, figures, file in rows:
        text = re.sub(r"(?<=\d),(?=\d{3}\b)", "", (ROOT / file).read_text(encoding="utf-8"))
        known = set(re.findall(r"\d+(?:\.\d+)?", text))
        for number in re.findall(r"\d+(?:\.\d+)?", figures.replace(",", "")):
            assert number in known, f"README.md, {what}: {number} is not in {file}"


def test_figures_in_prose_are_those_of_the_results() -> None:
    """A paragraph that links a file of results takes its decimal figures from it, as they stand there."""
    checked = 0
    for page in sorted(
        [*DOCS.glob("*.md"), *DOCS.glob("how-to/*.md"), *DOCS.glob("concepts/*.md"), ROOT / "eval/README.md"]
    ):
        for paragraph in page.read_text(encoding="utf-8").split("\n\n"):
            files = re.findall(r"measured\.md#(\w+)\)|benchmarks/results/(\w+)\.txt\)", paragraph)
            known: set[str] = set()
            for names in files:
                known |= set(re.findall(r"\d+\.\d+", (ROOT / f"benchmarks/results/{''.join(names)}.txt").read_text()))
            plain = re.sub(r"\]\([^)]*\)", "]", paragraph)
            for figure in re.findall(r"(?<![\w.-])\d+\.\d+(?![\w.])", plain) if files else ():
                assert figure in known, (
                    f"{page.relative_to(ROOT)}: {figure} is in none of the results that its paragraph links"
                )
                checked += 1
    assert checked >= 5


def test_what_is_searched_for_is_a_page() -> None:
    """`make docs` types these guesses into the built site's search."""
    found = (DOCS / "search.py").read_text(encoding="utf-8")
    pages = re.findall(r'": "(how-to/[\w-]+)/"', found)
    assert len(pages) >= 11 and all((DOCS / f"{page}.md").is_file() for page in pages)


@pytest.mark.nightly
def test_the_site_is_built_strictly_and_its_search_finds() -> None:
    done = subprocess.run(["make", "docs"], cwd=ROOT, capture_output=True, text=True, timeout=1200, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
