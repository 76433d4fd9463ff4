"""Where do visual tokenizers live? VISUAL_TOKENIZERS lists them."""

from mllm.registry import Registry

VISUAL_TOKENIZERS: Registry = Registry("visual tokenizer", {})
