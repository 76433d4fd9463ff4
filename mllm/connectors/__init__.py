"""Where do connectors live? CONNECTORS lists them; one file per idea."""

from mllm.registry import Registry

CONNECTORS: Registry = Registry(
    "connector",
    {
        "linear": "mllm.connectors.mlp:LinearConnector",
        "mlp": "mllm.connectors.mlp:MlpConnector",
        "branch_fusion": "mllm.connectors.branch_fusion:BranchFusionConnector",
        "channel_concat": "mllm.connectors.channel_concat:ChannelConcatConnector",
        "come_vl": "mllm.connectors.come_vl:ComeVlConnector",
        "sequence_concat": "mllm.connectors.sequence_concat:SequenceConcatConnector",
        "interleave": "mllm.connectors.sequence_concat:InterleaveConnector",
        "pixel_shuffle": "mllm.connectors.pixel_shuffle:PixelShuffleConnector",
        "average_pool": "mllm.connectors.pooling:AveragePoolConnector",
        "resampler": "mllm.connectors.resampler:ResamplerConnector",
        "spatial_aggregator": "mllm.connectors.spatial_aggregator:SpatialAggregatorConnector",
        "mova": "mllm.connectors.mova:MovaConnector",
        "merv": "mllm.connectors.merv:MervConnector",
        "deepstack": "mllm.connectors.deepstack:DeepStackConnector",
        "multi_scale": "mllm.connectors.multi_scale:MultiScaleConnector",
        "pvc": "mllm.connectors.pvc:PvcConnector",
        "slow_fast": "mllm.connectors.slow_fast:SlowFastConnector",
        "spatial_mllm": "mllm.connectors.spatial_mllm:SpatialMllmConnector",
        "dual_perspective": "mllm.connectors.dual_perspective:DualPerspectiveConnector",
        "gated_fusion": "mllm.connectors.gated_fusion:GatedFusionConnector",
        "geometry_exchange": "mllm.connectors.geometry_exchange:GeometryExchangeConnector",
        "gated_cross": "mllm.connectors.gated_cross:GatedCrossConnector",
        "attention_bias": "mllm.connectors.attention_bias:AttentionBiasConnector",
    },
)
