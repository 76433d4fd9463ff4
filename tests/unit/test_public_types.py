"""Does a public signature say what it takes for a model, a processor, a tokenizer, an encoder, a config?"""

from __future__ import annotations

import ast
from pathlib import Path

import mllm

PARTS = {"config", "model", "processor", "tokenizer", "encoder", "connector", "language_model"}
KNOWN = {"MllmProcessor.__init__", "MllmConfig.__init__"}
"""transformers calls these two with what it read from files."""


def test_no_public_function_takes_any_for_a_part_that_has_a_type():
    root = Path(mllm.__file__).parent
    untyped = []
    for path in sorted(root.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for holder in ast.walk(tree):
            body = getattr(holder, "body", ())
            for function in body if isinstance(body, list) else ():
                if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
                    continue
                name = f"{holder.name}.{function.name}" if isinstance(holder, ast.ClassDef) else function.name
                if name in KNOWN or (function.name.startswith("_") and function.name != "__init__"):
                    continue
                for argument in (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs):
                    if argument.arg in PARTS and argument.annotation and ast.unparse(argument.annotation) == "Any":
                        untyped.append(f"{path.relative_to(root)}:{function.lineno} {name}({argument.arg})")
    assert untyped == []
