"""Which Triton kernel updates one tensor with AdamW? (Imported on CUDA only, see `mllm.train.engine.fused_adamw`.)"""

# Triton compiles this function's source and knows plain names only, no postponed annotations.

import triton
import triton.language as tl


@triton.jit
def _adamw(w, m, v, g, decay, step_size, root_correction, beta1, rest1, beta2, rest2, eps):
    """Weights and moments after a gradient, in float32 and torch's order."""
    w = w - decay * w
    m = beta1 * m + rest1 * g
    v = beta2 * v + rest2 * g * g
    return w - step_size * m / (tl.sqrt_rn(v) * root_correction + eps), m, v


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
    """The float32 weight is rounded to the low precision once, to nearest."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    g = tl.load(gradient + place, mask=inside, other=0.0).to(tl.float32) * tl.load(scale)
    w = tl.load(master + place, mask=inside, other=0.0)
    m = tl.load(mean + place, mask=inside, other=0.0)
    v = tl.load(square + place, mask=inside, other=0.0)
    w, m, v = _adamw(w, m, v, g, decay, step_size, root_correction, beta1, rest1, beta2, rest2, eps)  # pyright: ignore[reportGeneralTypeIssues]
    tl.store(master + place, w, mask=inside)
    tl.store(mean + place, m, mask=inside)
    tl.store(square + place, v, mask=inside)
    tl.store(parameter + place, w.to(parameter.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["key", "turn", "first"])
def compact_kernel(
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
    key,
    turn,
    first,
    LOW_BITS: tl.constexpr,
    NARROW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`update_kernel` with the state of `mllm.train.engine.compact_adamw`: parameter is int16 (bf16's bits); master is float32, or with
    LOW_BITS int16; mean and square are float32, or with NARROW int16 (bf16's bits). first: place in the weight of its run that
    is updated."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    g = tl.load(gradient + place, mask=inside, other=0.0).to(tl.float32) * tl.load(scale)
    if LOW_BITS:
        high = tl.load(parameter + place, mask=inside, other=0).to(tl.int32)
        low = tl.load(master + place, mask=inside, other=0).to(tl.int32)
        w = ((high << 16) + low).to(tl.float32, bitcast=True)
    else:
        w = tl.load(master + place, mask=inside, other=0.0)
    if NARROW:
        m = (tl.load(mean + place, mask=inside, other=0).to(tl.int32) << 16).to(tl.float32, bitcast=True)
        v = (tl.load(square + place, mask=inside, other=0).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        m = tl.load(mean + place, mask=inside, other=0.0)
        v = tl.load(square + place, mask=inside, other=0.0)
    w, m, v = _adamw(w, m, v, g, decay, step_size, root_correction, beta1, rest1, beta2, rest2, eps)  # pyright: ignore[reportGeneralTypeIssues]
    bits = w.to(tl.int32, bitcast=True)
    if LOW_BITS:
        high = (bits + 0x8000) >> 16
        tl.store(master + place, (bits - (high << 16)).to(tl.int16), mask=inside)
    else:
        high = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        tl.store(master + place, w, mask=inside)
    tl.store(parameter + place, high.to(tl.int16), mask=inside)
    if NARROW:
        h = (place + first).to(tl.uint32) ^ key.to(tl.uint32)
        h = (h ^ (h >> 16)) * 0x85EBCA6B
        h = (h ^ (h >> 13)) * 0xC2B2AE35
        h = (h ^ (h >> 16)) ^ turn.to(tl.uint32)
        h = (h ^ (h >> 16)) * 0x85EBCA6B
        h = (h ^ (h >> 13)) * 0xC2B2AE35
        h = h ^ (h >> 16)
        m_bits = m.to(tl.int32, bitcast=True) + (h & 0xFFFF).to(tl.int32)
        v_bits = v.to(tl.int32, bitcast=True) + (h >> 16).to(tl.int32)
        tl.store(mean + place, (m_bits >> 16).to(tl.int16), mask=inside)
        tl.store(square + place, (v_bits >> 16).to(tl.int16), mask=inside)
    else:
        tl.store(mean + place, m, mask=inside)
        tl.store(square + place, v, mask=inside)
