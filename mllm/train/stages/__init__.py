"""Which kinds of stages are there? One room for each, by the name that ``kind:`` of a recipe gives it."""

from mllm.registry import Registry

_HERE = "mllm.train.stages"

STAGE_KINDS: Registry = Registry(
    "stage kind",
    {
        "sft": f"{_HERE}.sft:SftStage",
        "routing": f"{_HERE}.routing.stage:RoutingStage",
        "tokenizer": f"{_HERE}.tokenizer.stage:TokenizerStage",
        "diffusion": f"{_HERE}.diffusion.stage:DiffusionStage",
        "contrastive": f"{_HERE}.contrastive.stage:ContrastiveStage",
        "masked": f"{_HERE}.masked.stage:MaskedStage",
        "exits": f"{_HERE}.exits.stage:ExitsStage",
        "recognition": f"{_HERE}.recognition.stage:RecognitionStage",
        "agglomeration": f"{_HERE}.agglomeration.stage:AgglomerationStage",
        "dpo": f"{_HERE}.preference.stage:PreferenceStage",
        "grpo": f"{_HERE}.preference.stage:PreferenceStage",
    },
)
