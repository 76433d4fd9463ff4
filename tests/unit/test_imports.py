"""Do imports flow down without circles, those inside functions and those hidden in strings included?"""

from __future__ import annotations

import ast
import configparser
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "mllm").rglob("*.py"))
}
CLIMBS = {
    # An encoder that reads with a visual tokenizer: by name like any other, and built on tokenizers.
    ("mllm.encoders", "mllm.visual_tokenizers.reader"),
    # What vLLM is told to load by name; nothing of it is imported here.
    ("mllm.heads.codes.settings", "mllm.serve.vllm.logits_processor"),
    ("mllm.heads.codes.settings", "mllm.serve.vllm.placeholder"),
}
"""Strings that name a module of a higher layer, and may."""
_TARGET = re.compile(r"^(mllm(?:\.\w+)+):\w+$")


def _known(name: str) -> str:
    while name and name not in MODULES:
        name = name.rpartition(".")[0]
    return name


def _imports(tree: ast.AST) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {_known(name) for name in found if name.startswith("mllm")} - {""}


def test_no_module_imports_itself_over_others():
    trees = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}
    edges = {name: _imports(tree) - {name} for name, tree in trees.items()}
    left = dict(edges)
    while free := [name for name, targets in left.items() if not targets & left.keys()]:
        for name in free:
            del left[name]
    # What imports a circle without being in one goes too.
    while free := [name for name in left if not any(name in targets for targets in left.values())]:
        for name in free:
            del left[name]
    assert not left, {name: sorted(targets & left.keys()) for name, targets in left.items()}


def test_no_string_names_a_module_of_a_higher_layer():
    settings = configparser.ConfigParser()
    settings.read(ROOT / ".importlinter")
    lines = settings["importlinter:contract:layers"]["layers"].strip().splitlines()
    order = {name.strip(): depth for depth, line in enumerate(lines) for name in line.split("|")}

    def layer(module: str) -> int | None:
        return order.get(".".join(module.split(".")[:2]))

    climbs = set()
    for name, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and (hit := _TARGET.match(node.value)):
                own, other = layer(name), layer(hit[1])
                if own is not None and other is not None and other < own:
                    climbs.add((name, hit[1]))
    assert climbs == CLIMBS
