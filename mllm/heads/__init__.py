"""Where do heads, what a model answers besides text, live? HEADS lists them."""

from mllm.registry import Registry

HEADS: Registry = Registry(
    "head",
    {
        "vocabulary": "mllm.heads.codes.heads:VocabularyHead",
        "separate": "mllm.heads.codes.heads:SeparateHead",
        "depth": "mllm.heads.codes.heads:DepthHead",
        "next_scale": "mllm.heads.codes.heads:NextScaleHead",
        "probability": "mllm.heads.probability:ProbabilityHead",
        "segmentation": "mllm.heads.segmentation.head:SegmentationHead",
        "alignment": "mllm.heads.alignment:AlignmentHead",
        "pose": "mllm.heads.geometry.pose:PoseHead",
        "depth_map": "mllm.heads.geometry.depth_map:DepthMapHead",
    },
)
