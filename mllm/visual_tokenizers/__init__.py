"""Where do visual tokenizers live, and other decoders of their codes? VISUAL_TOKENIZERS and CODE_DECODERS list them."""

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

CODE_DECODERS: Registry = Registry(
    "decoder of codes", {"diffusion": "mllm.visual_tokenizers.diffusion.decoder:DiffusionDecoder"}
)
