"""Where do vision encoders live? ENCODERS lists them; one adapter per library."""

from mllm.registry import Registry

ENCODERS: Registry = Registry(
    "encoder",
    {
        "open_clip": "mllm.encoders.open_clip:OpenClipEncoder",
        "timm": "mllm.encoders.timm:TimmEncoder",
        "hf": "mllm.encoders.hf:HfEncoder",
        "raw_patches": "mllm.encoders.raw_patches:RawPatches",
        "eve": "mllm.encoders.eve:EveEncoder",
        "patch_conv": "mllm.encoders.eve:PatchConvEncoder",
        "vary": "mllm.encoders.vary:VaryEncoder",
        "ppocr": "mllm.encoders.ppocr:PPOcrEncoder",
        "vggt": "mllm.encoders.vggt:VggtEncoder",
        "biformer": "mllm.encoders.backbones.biformer:BiFormerEncoder",
        "crossformer": "mllm.encoders.backbones.crossformer:CrossFormerEncoder",
        "channelvit": "mllm.encoders.backbones.channelvit:ChannelVitEncoder",
        "duoformer": "mllm.encoders.backbones.duoformer:DuoFormerEncoder",
        "crossvit": "mllm.encoders.backbones.crossvit:CrossVitEncoder",
        "ddrnet": "mllm.encoders.backbones.ddrnet:DdrNetEncoder",
        "vssd": "mllm.encoders.backbones.vssd:VssdEncoder",
        "falcon": "mllm.encoders.backbones.falcon:FalconEncoder",
        "lookupvit": "mllm.encoders.backbones.lookupvit:LookupVitEncoder",
        "unit": "mllm.encoders.backbones.unit:UnitEncoder",
        "dynperceiver": "mllm.encoders.backbones.dynperceiver:DynPerceiverEncoder",
        "snnet": "mllm.encoders.backbones.snnet:SnNetEncoder",
        "s4d": "mllm.encoders.backbones.s4d:S4dEncoder",
        "paratranscnn": "mllm.encoders.backbones.paratranscnn:ParaTransCnnEncoder",
        "dependencyvit": "mllm.encoders.backbones.dependencyvit:DependencyVitEncoder",
        "vir": "mllm.encoders.backbones.vir:VirEncoder",
        "dualtokenvit": "mllm.encoders.backbones.dualtokenvit:DualTokenVitEncoder",
        "samunet": "mllm.encoders.backbones.samunet:SamUnetEncoder",
        "dbsam": "mllm.encoders.backbones.dbsam:DbSamEncoder",
        "visual_tokenizer": "mllm.visual_tokenizers.reader:TokenizerEncoder",
    },
)
