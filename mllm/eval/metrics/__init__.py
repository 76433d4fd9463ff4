"""Which scoring rules exist, by name?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mllm.errors import ConfigError
from mllm.eval.metrics.base import Metric, Score, Scored
from mllm.registry import Registry

_ROOM = "mllm.eval.metrics"

METRICS: Registry[Metric] = Registry(
    "metric",
    {
        "vqa_official": f"{_ROOM}.vqa:VqaOfficial",
        "vqa_evalai": f"{_ROOM}.vqa:VqaEvalAi",
        "textvqa_m4c": f"{_ROOM}.vqa:TextVqaM4c",
        "stvqa_accuracy": f"{_ROOM}.vqa:StVqaAccuracy",
        "relaxed_pix2struct": f"{_ROOM}.relaxed:RelaxedPix2Struct",
        "relaxed_stripped": f"{_ROOM}.relaxed:RelaxedStripped",
        "relaxed_strict": f"{_ROOM}.relaxed:RelaxedStrict",
        "anls_rrc": f"{_ROOM}.anls:AnlsRrc",
        "anls_rrc_raw": f"{_ROOM}.anls:AnlsRrcRaw",
        "anls_strict": f"{_ROOM}.anls:AnlsStrict",
        "mmmu": f"{_ROOM}.mmmu:Mmmu",
        "mmmu_lmms_eval": f"{_ROOM}.mmmu:MmmuLmmsEval",
        "mmmu_pro": f"{_ROOM}.mmmu:MmmuPro",
        "letter": f"{_ROOM}.letters:Letter",
        "letter_ranked": f"{_ROOM}.letters:LetterRanked",
        "letter_scienceqa": f"{_ROOM}.letters:LetterScienceQa",
        "letter_first": f"{_ROOM}.letters:LetterFirst",
        "letter_ai2d": f"{_ROOM}.letters:LetterAi2d",
        "letter_videomme": f"{_ROOM}.letters:LetterVideoMme",
        "letter_mvbench": f"{_ROOM}.letters:LetterMvBench",
        "letter_cvbench": f"{_ROOM}.letters:LetterCvBench",
        "gqa_llava": f"{_ROOM}.closed:GqaLlava",
        "gqa_lmms_eval": f"{_ROOM}.closed:GqaLmmsEval",
        "exact_match": f"{_ROOM}.closed:ExactMatch",
        "pope_official": f"{_ROOM}.yes_no:PopeOfficial",
        "pope_strict": f"{_ROOM}.yes_no:PopeStrict",
        "mme": f"{_ROOM}.yes_no:Mme",
        "vsibench": f"{_ROOM}.vsibench:VsiBench",
        "vsibench_reward": f"{_ROOM}.vsibench:VsiBenchReward",
        "rms_f1": f"{_ROOM}.tables:RmsF1",
        "rnss": f"{_ROOM}.tables:Rnss",
        "chartqapro": f"{_ROOM}.chartqapro:ChartQaPro",
        "chartqapro_exact": f"{_ROOM}.chartqapro:ChartQaProExact",
        "mathvista": f"{_ROOM}.mathvista:MathVista",
        "ocrbench": f"{_ROOM}.ocrbench:OcrBench",
        "charxiv_proxy": f"{_ROOM}.charxiv:CharXivProxy",
        "box_iou": f"{_ROOM}.grounding:BoxIou",
        "j_and_f": f"{_ROOM}.clip_masks:JAndF",
        "mask_iou": f"{_ROOM}.segmentation:MaskIou",
        "edit_rule": f"{_ROOM}.editing:EditRule",
        "mmbench_circular": f"{_ROOM}.circular:MmBenchCircular",
        "letter_groups": f"{_ROOM}.groups:LetterGroups",
        "letter_mmerealworld": f"{_ROOM}.letters:LetterMmeRealWorld",
        "choice_or_exact": f"{_ROOM}.letters:ChoiceOrExact",
        "naturalbench": f"{_ROOM}.groups:NaturalBench",
        "wemath": f"{_ROOM}.groups:WeMath",
        "hallusionbench": f"{_ROOM}.hallusion:HallusionBench",
        "amber": f"{_ROOM}.hallusion:Amber",
        "count": f"{_ROOM}.counting:Count",
        "count_first": f"{_ROOM}.counting:CountFirst",
        "math_answer": f"{_ROOM}.math_answer:MathAnswer",
        "chartbench": f"{_ROOM}.chart_kinds:ChartBench",
        "evochart": f"{_ROOM}.chart_kinds:EvoChart",
        "dude": f"{_ROOM}.documents:Dude",
        "slidevqa": f"{_ROOM}.documents:SlideVqa",
        "sparbench": f"{_ROOM}.sparbench:SparBench",
        "mmfr": f"{_ROOM}.forgery:Mmfr",
        "ocrbench_v2": f"{_ROOM}.ocrbench_v2:OcrBenchV2",
        "rouge_l": f"{_ROOM}.closed:RougeL",
        "psnr": f"{_ROOM}.images:Psnr",
        "ssim": f"{_ROOM}.images:Ssim",
    },
)


def build_metric(spec: str | Mapping[str, Any] | Metric) -> Metric:
    """A metric from its name, or from ``{name: …, option: value}``. Raises `ConfigError` for an unknown name or
    option."""
    if isinstance(spec, Metric):
        return spec
    options = {} if isinstance(spec, str) else dict(spec)
    name = spec if isinstance(spec, str) else options.pop("name", None)
    if not isinstance(name, str):
        raise ConfigError(f"metric {spec!r}: expected a name, or a mapping with the key 'name'")
    cls = METRICS.get(name)
    try:
        metric = cls(**options)
    except TypeError as error:
        raise ConfigError(f"metric {name!r}: {error}; remove or correct the option") from None
    metric.options = options
    return metric


__all__ = ["METRICS", "Metric", "Score", "Scored", "build_metric"]
