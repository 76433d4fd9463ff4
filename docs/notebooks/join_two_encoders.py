# %% [markdown]
# # Join two encoders
#
# Two small encoders of different kinds and sizes, one language model, all from scratch: how many tokens a picture becomes, and what a
# connector makes of two grids. Runs on a CPU in seconds. Open it as a notebook with `jupytext --to ipynb join_two_encoders.py`.

# %%
import torch

from mllm.models.build import build_config
from mllm.models.modeling_mllm import MllmForConditionalGeneration
from mllm.recipe import ModelSpec

text = {
    "model_type": "llama", "vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1,
}  # fmt: skip
vit = {
    "model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "image_size": 56, "patch_size": 7,
}  # fmt: skip
convnet = {
    "type": "timm",
    "architecture": "resnet10t",
    "options": {"channels": [8, 16, 24, 32]},
    "image_size": 112,
    "layers": [-2],
}


def spec(connector):
    encoders = {"glyphs": {"type": "hf", "architecture": vit}, "charts": convnet}
    return ModelSpec.model_validate({"language_model": {"config": text}, "encoders": encoders, "connector": connector})


# %% [markdown]
# The same encoders under three connectors. The layout is arithmetic: nothing is built.

# %%
tokens = {}
for connector in ("channel_concat", "sequence_concat", {"type": "channel_concat", "grid": [4, 4]}):
    config = build_config(spec(connector))
    tokens[str(connector)] = config.layout((480, 640)).num_tokens
    grids = {name: info.grid for name, info in config.encoder_infos().items()}
    print(f"{connector!s:50} {grids} → {tokens[str(connector)]} tokens")

# %% [markdown]
# Channels side by side keep the first encoder's grid; one sequence after another adds up; a `grid` says how many.
# Now the model, and one picture through it.

# %%
torch.manual_seed(0)
config = build_config(spec("channel_concat"))
model = MllmForConditionalGeneration(config).eval()
pixels = {name: torch.rand(1, 3, info.image.height, info.image.width) for name, info in config.encoder_infos().items()}
with torch.no_grad():
    visual, _ = model.model.encode_images(pixels)
print(tuple(visual.shape), "= tokens × width of the language model")

# %% [markdown]
# What does each encoder contribute? Put another picture's pixels in its place, and see how far the tokens move.

# %%
moved = {}
with torch.no_grad():
    for name in pixels:
        other = {**pixels, name: torch.rand_like(pixels[name])}
        moved[name] = float((model.model.encode_images(other)[0] - visual).norm() / visual.norm())
        print(f"another picture for {name:7} moves the tokens by {moved[name]:.1%}")
