"""Memory and communication of pretraining, counted from the shape of the model."""

from __future__ import annotations

import dataclasses

from pretrain.model.config import DecoderConfig, EncoderConfig, MaskedAutoencoderConfig
from pretrain.model.masking import visible_tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class StateBytes:
    """Memory of one GPU that does not depend on the batch, in bytes."""

    weights: float
    """Weights in the number format of the computation."""
    gradients: float
    """Accumulated gradients."""
    optimizer: float
    """Adam's two moments, and float32 master weights if ZeRO keeps such a copy."""
    buffers: float
    """Gathered weights of stage 3, and communication buckets."""

    @property
    def total(self) -> float:
        """Sum in bytes."""
        return self.weights + self.gradients + self.optimizer + self.buffers


def state_bytes(parameters: int, *, zero_stage: int, gpus: int, precision: str, offload: str = "none") -> StateBytes:
    """Count the bytes that ZeRO leaves on each GPU.

    Parameters
    ----------
    parameters : int
        Number of trainable parameters of the model.
    zero_stage : int
        ZeRO's stage; it divides among the GPUs: 0 nothing, 1 the optimiser state, 2 the gradients too, 3 the weights
        too.
    gpus : int
        Number of GPUs.
    precision : str
        fp32 or bf16; gradients are accumulated in float32 in both cases.
    offload : str
        What is kept in the CPU's memory: none, optimizer or all. Gradients are counted on the GPU even then.

    Returns
    -------
    StateBytes
        Bytes on one GPU.

    References
    ----------
    .. [1] Rajbhandari et al., "ZeRO: memory optimizations toward training trillion parameter models", SC 2020.
    """
    value = 2 if precision == "bf16" else 4
    weights = parameters * value / (gpus if zero_stage == 3 else 1)
    gradients = parameters * 4 / (gpus if zero_stage >= 2 else 1)
    moments = parameters * 8 / (gpus if zero_stage else 1)
    # At stage 0 Adam updates the weights themselves. At the other stages each GPU keeps a float32 copy of its part of
    # the weights, even if the weights are float32 already.
    master = parameters * 4 / gpus if zero_stage else 0
    # Bucket size as in `pretrain.training.deepspeed_engine`. Overlap with the backward pass takes two buckets.
    bucket = min(5e8, max(parameters, 2**16)) * value
    gathered = min(parameters, 10**9) * value if zero_stage == 3 else 0
    # With bf16, stage 1 reduces the accumulated float32 gradients in place, without a bucket.
    in_place = precision == "bf16" and zero_stage == 1
    buckets = 2 if zero_stage >= 2 else 1 if gpus > 1 and not in_place else 0
    buffers = gathered + buckets * bucket
    optimizer = 0.0 if offload != "none" and zero_stage else moments + master
    weights = 0.0 if offload == "all" and zero_stage == 3 else weights
    return StateBytes(weights=weights, gradients=gradients, optimizer=optimizer, buffers=buffers)


def tokens_of(model: MaskedAutoencoderConfig, channels: int | None = None) -> tuple[int, int]:
    """Count the tokens of one window in encoder and decoder.

    Parameters
    ----------
    model : MaskedAutoencoderConfig
        The model.
    channels : int, optional
        Number of true channels, for the montage tokenizer; by default the largest number it allows.

    Returns
    -------
    encoder, decoder : int
        Numbers of tokens, class token included.
    """
    shape = model.encoder
    rows = shape.token_rows(channels)
    return rows * visible_tokens(shape.tokens, model.mask_ratio) + 1, rows * shape.tokens + 1


def activation_bytes(
    model: MaskedAutoencoderConfig, *, precision: str, checkpointing: bool, channels: int | None = None
) -> float:
    """Count the bytes of one window that autograd keeps for the backward pass.

    Parameters
    ----------
    model : MaskedAutoencoderConfig
        The model.
    precision : str
        fp32 or bf16.
    checkpointing : bool
        Whether each block is recomputed in the backward pass.
    channels : int, optional
        Number of true channels, for the montage tokenizer.

    Returns
    -------
    float
        Bytes, for fused attention.
    """
    value = 2 if precision == "bf16" else 4
    seen, every = tokens_of(model, channels)

    def block(shape: EncoderConfig | DecoderConfig, tokens: int) -> float:
        # Per token: input, norm, q, k, v, attention's output, sum and norm have 8 widths; the values before and after
        # the GELU have 2 hidden widths. In float32: two statistics for each norm, and one for each head.
        wide = tokens * (8 * shape.dim + 2 * int(shape.dim * shape.mlp_ratio)) * value
        return wide + tokens * 4 * (4 + shape.heads)

    stacks = [(model.encoder, seen), (model.decoder, every)]
    if checkpointing:
        kept = sum(shape.depth * tokens * shape.dim * value for shape, tokens in stacks)
        kept += max(block(shape, tokens) for shape, tokens in stacks)
    else:
        kept = sum(shape.depth * block(shape, tokens) for shape, tokens in stacks)
    # The last norms and their outputs; the window in float32 and in the model's format; the errors in float32.
    ends = sum(2 * tokens * shape.dim * value for shape, tokens in stacks)
    rows = model.encoder.signal_rows(channels)
    return kept + ends + rows * model.encoder.samples * (8 + value % 4)


def exchanged_bytes(parameters: int, *, zero_stage: int, gpus: int, precision: str, micro_batches: int) -> float:
    """Count the bytes that one GPU sends in one optimiser step.

    Parameters
    ----------
    parameters : int
        Number of trainable parameters of the model.
    zero_stage, gpus, precision
        As for `state_bytes`.
    micro_batches : int
        Forward passes of one step.

    Returns
    -------
    float
        Bytes, for ring algorithms. Gradients are sent in float32, weights at the run's precision. Stages 2 and 3 reduce
        gradients for every micro batch; stage 3 gathers the weights for every micro batch too.
    """
    value = 2 if precision == "bf16" else 4
    reduced = 4 * (micro_batches if zero_stage >= 2 else 1)
    gathered = {0: 4, 1: value, 2: value, 3: 2 * value * micro_batches}[zero_stage]
    return parameters * (reduced + gathered) * (gpus - 1) / gpus
