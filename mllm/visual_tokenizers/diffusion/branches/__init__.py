"""Which branches can tell a diffusion decoder of a condition? CONDITIONING_BRANCHES lists them."""

from mllm.registry import Registry

CONDITIONING_BRANCHES: Registry = Registry(
    "conditioning branch",
    {
        "context": "mllm.visual_tokenizers.diffusion.branches.context:ContextBranch",
        "control": "mllm.visual_tokenizers.diffusion.branches.control:ControlBranch",
    },
)
