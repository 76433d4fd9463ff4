"""Which Triton kernel updates one tensor with AdamW? (Imported on CUDA only, see `mllm.train.engine.fused_adamw`.)"""

# Triton compiles this function's source and knows plain names only, no postponed annotations.

import triton
import triton.language as tl


@triton.jit
def update_kernel(
    parameter,
    gradient,
    master,
    mean,
    square,
    scale,
    size,
    decay,
    step_size,
    root_correction,
    beta1,
    rest1,
    beta2,
    rest2,
    eps,
    BLOCK: tl.constexpr,
):
    """fp32 arithmetic in torch's order; the fp32 weight is rounded to the low precision once, to nearest."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    g = tl.load(gradient + place, mask=inside, other=0.0).to(tl.float32) * tl.load(scale)
    w = tl.load(master + place, mask=inside, other=0.0)
    m = tl.load(mean + place, mask=inside, other=0.0)
    v = tl.load(square + place, mask=inside, other=0.0)
    w = w - decay * w
    m = beta1 * m + rest1 * g
    v = beta2 * v + rest2 * g * g
    w = w - step_size * m / (tl.sqrt_rn(v) * root_correction + eps)
    tl.store(master + place, w, mask=inside)
    tl.store(mean + place, m, mask=inside)
    tl.store(square + place, v, mask=inside)
    tl.store(parameter + place, w.to(parameter.dtype.element_ty), mask=inside)
