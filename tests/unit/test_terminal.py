"""What does the terminal say: names that can be copied, one line on Ctrl-C, questions that write a recipe, parts that become a
checkpoint?"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer.main
import yaml
from typer.testing import CliRunner

from mllm.cli.main import app, main
from mllm.cli.stopped import KEPT
from mllm.cli.tables import show, table
from mllm.config import described_schema
from mllm.errors import ConfigError, Interrupted
from mllm.odd_settings import odd_settings
from mllm.recipe import ModelSpec, Recipe, StageSpec, load_recipe
from mllm.train import run as training
from tests.helpers import TINY_CLIP, TINY_LLM, picture, tiny_tokenizer


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a language model of its own and five rows with pictures."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("parts")
    torch.manual_seed(3)
    settings = {key: value for key, value in TINY_LLM.items() if key != "model_type"}
    LlamaForCausalLM(LlamaConfig(**settings)).save_pretrained(folder / "llm")
    tiny_tokenizer(image_token=None).save_pretrained(folder / "llm")
    rows = [{"question": "What?", "answer": "This.", "image": f"{k}.png"} for k in range(5)]
    for k in range(5):
        picture(k).save(folder / f"{k}.png")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def run(*words: str, status: int = 0) -> str:
    result = CliRunner().invoke(app, list(words))
    if status == 0 and result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == status, result.output
    return result.output


def test_an_interview_writes_a_recipe_that_plans(parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    given = ["new", "mine", "--data", str(parts / "rows.jsonl"), "--language-model", str(parts / "llm"), "--gpus", "0"]
    out = run(*given, "--encoder", "clip-vit-l-14-336", "--learn", "adapter", "--yes")
    assert "next:" in out and "mllm train mine.yaml" in out and "samples of one epoch" in out
    recipe = load_recipe("mine.yaml")
    assert recipe.model.encoders == {"vision": "clip-vit-l-14-336"} and recipe.stages[0].data == "mine_data.yaml"
    lora = recipe.stages[0].learning()["language_model"].lora
    assert lora is not None and lora.r == 64 and recipe.stages[0].dtype == "float32"
    assert yaml.safe_load(Path("mine_data.yaml").read_text())["path"] == str(parts / "rows.jsonl")
    with pytest.raises(ConfigError, match=r"mine.yaml exists; choose another name"):
        run(*given, "--yes")
    with pytest.raises(ConfigError, match="--data: where are your pictures"):
        run("new", "other", "--yes")
    with pytest.raises(ConfigError, match=r"--learn adaptor: expected one of .*did you mean 'adapter'"):
        run("new", "other", *given[2:], "--learn", "adaptor", "--yes")


def test_parts_become_a_checkpoint_in_one_line(parts: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

    target, encoder = tmp_path / "composed", json.dumps(TINY_CLIP)
    words = ["compose", str(target), "-e", f"vision={encoder}", "--connector", "{type: mlp, depth: 1}"]
    words += ["--language-model", str(parts / "llm")]
    assert "untrained" in run(*words)
    model = AutoModelForImageTextToText.from_pretrained(target)
    source = AutoModelForCausalLM.from_pretrained(parts / "llm").state_dict()
    assert torch.equal(
        model.model.language_model.layers[0].mlp.up_proj.weight, source["model.layers.0.mlp.up_proj.weight"]
    )
    content = [{"type": "image", "image": picture(1)}, {"type": "text", "text": "What?"}]
    inputs = AutoProcessor.from_pretrained(target).apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    assert torch.isfinite(model(**inputs).logits).all()
    run("compose", str(tmp_path / "fresh"), *words[2:], "--fresh")
    fresh = (
        AutoModelForImageTextToText.from_pretrained(tmp_path / "fresh")
        .model.language_model.layers[0]
        .mlp.up_proj.weight
    )
    assert not torch.equal(fresh, source["model.layers.0.mlp.up_proj.weight"])
    with pytest.raises(ConfigError, match="holds a checkpoint already"):
        run(*words)
    with pytest.raises(ConfigError, match="what is the model made of"):
        run("compose", str(tmp_path / "no"), "-e", "vision=clip-vit-b-32")
    with pytest.raises(ConfigError, match="--encoder clip-vit-b-32: expected NAME=ENTRY"):
        run("compose", str(tmp_path / "no"), "-e", "clip-vit-b-32", "--language-model", "x/y")


def test_ctrl_c_says_what_is_saved_and_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = load_recipe("demo", [f"output={tmp_path}"])
    assert training.saved_so_far(recipe, tmp_path).startswith("nothing is saved yet")
    (tmp_path / "checkpoints/pretrain/step-00000120").mkdir(parents=True)
    told = training.saved_so_far(recipe, tmp_path)
    assert "stage pretrain is saved up to step 120" in told and told.endswith(
        "--resume goes on from the last checkpoint."
    )

    def stopped(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "_check_run", lambda *_: None)
    monkeypatch.setattr(training, "launch", stopped)
    with pytest.raises(Interrupted, match="step 120"):
        training.run_recipe(recipe)
    monkeypatch.setattr("sys.argv", ["mllm", "train", "demo", f"output={tmp_path}", "--resume"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 130
    assert capsys.readouterr().err.splitlines()[-1].startswith("stopped: stage pretrain is saved up to step 120")


def test_every_command_says_what_is_kept_when_it_is_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def names(command: Any, words: list[str]) -> Iterator[str]:
        for name, each in getattr(command, "commands", {}).items():
            yield from names(each, [*words, name])
        if not hasattr(command, "commands"):
            yield " ".join(words)

    assert set(names(typer.main.get_command(app), [])) == set(KEPT)

    def stopped(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mllm.plugins.use_plugins", stopped)
    monkeypatch.setattr("sys.argv", ["mllm", "eval", "leaderboard", "a", "b"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 130
    told = capsys.readouterr().err.strip().splitlines()
    assert told == ["stopped: its result is not written; the same command begins again"]


@pytest.mark.parametrize("width", ["40", "80"])
def test_tables_never_cut_a_name(
    width: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", width)
    monkeypatch.setenv("FORCE_COLOR", "1")
    name, source = "a-name-of-an-encoder-so400m-patch14-384", "owner-of-weights/vit_large_patch14_reg4_dinov2.lvd142m"
    made = table("encoder", "what", "weights", names=("encoder", "weights"))
    made.add_row(name, "words that may be broken over as many lines as are needed to show all of them", source)
    show(made)
    out = capsys.readouterr().out
    assert name in out and source in out and "needed" in out and "…" not in out


def test_a_part_is_its_type_alone() -> None:
    short = ModelSpec.model_validate(
        {
            "language_model": {"source": "a/b"},
            "encoders": {"vision": "clip-vit-b-32"},
            "connector": "mlp",
            "views": "tiles",
        }
    )
    assert short.connector == {"type": "mlp"} and short.views == {"type": "tiles"}
    schema = described_schema(Recipe)["$defs"]["ModelSpec"]["properties"]["connector"]
    assert {"type": "string"} in schema["anyOf"] and schema["description"].startswith("How features become")


def test_more_samples_a_step_than_there_are_is_told() -> None:
    stage = StageSpec(name="sft", learn={"connector": 1e-3}, data="x", steps=5, batch_size=32)
    (line,) = odd_settings(stage, steps=5, samples=10, rows=32)
    assert "32 samples of one step (batch_size 32" in line and "more than the 10 there are" in line
    assert not odd_settings(stage, steps=5, samples=32, rows=32)


def test_other_libraries_are_quiet_unless_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A parent's level holds for bitsandbytes' own loggers, set before it is imported; a worker inherits the wish."""
    import logging

    from mllm import noise

    logger = logging.getLogger("bitsandbytes")
    below = logging.getLogger("bitsandbytes.backends.cpu.ops")
    monkeypatch.delenv(noise.VERBOSE, raising=False)
    monkeypatch.setattr(logger, "level", logging.NOTSET)
    assert "recipe" in run("recipes", "ls")
    assert not below.isEnabledFor(logging.WARNING) and below.isEnabledFor(logging.ERROR)
    logger.setLevel(logging.NOTSET)
    monkeypatch.setenv(noise.VERBOSE, "0")  # so that what the command sets is taken back
    run("recipes", "ls", "--verbose")
    assert below.isEnabledFor(logging.WARNING) and noise.is_verbose()
    assert "--verbose" in run("train", "--help")

    def level() -> str | None:
        return os.environ.get("VLLM_LOGGING_LEVEL")

    monkeypatch.delenv("VLLM_LOGGING_LEVEL", raising=False)
    loud = noise.quiet_vllm()(level)()
    monkeypatch.setenv(noise.VERBOSE, "0")
    assert (loud, noise.quiet_vllm()(level)(), level()) == (None, "ERROR", None)
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "DEBUG")
    assert noise.quiet_vllm()(level)() == "DEBUG", "what a user says himself stands"
