"""Where do visual tokenizers live? VISUAL_TOKENIZERS lists them."""

from mllm.registry import Registry

VISUAL_TOKENIZERS: Registry = Registry(
    "visual tokenizer",
    {
        "vq": "mllm.visual_tokenizers.vq:VqTokenizer",
        "tokenflow": "mllm.visual_tokenizers.tokenflow:TokenFlow",
        "dualtoken": "mllm.visual_tokenizers.dualtoken:DualToken",
        "illume": "mllm.visual_tokenizers.illume:Illume",
    },
)
