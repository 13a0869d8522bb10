"""Estimates of the memory and the communication that pretraining needs, computed from the architecture of the model."""

from __future__ import annotations

import dataclasses
import math

from pretrain.model.config import DecoderConfig, EncoderConfig, MaskedAutoencoderConfig
from pretrain.model.masking import visible_tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class StateBytes:
    """Memory on one GPU, in bytes, for everything whose size does not depend on the batch."""

    weights: float
    """Bytes of the weights in the number format of the computation."""
    gradients: float
    """Bytes of the accumulated gradients."""
    optimizer: float
    """Bytes of Adam's two moments, and of the float32 master weights if ZeRO keeps them."""
    buffers: float
    """Bytes of the communication buckets. At ZeRO stage 3, the weights gathered for a computation are included."""

    @property
    def total(self) -> float:
        """Sum of weights, gradients, optimiser state and buffers in bytes."""
        return self.weights + self.gradients + self.optimizer + self.buffers


def state_bytes(parameters: int, *, zero_stage: int, gpus: int, precision: str, offload: str = "none") -> StateBytes:
    """Compute how many bytes of weights, gradients and optimiser state ZeRO keeps on each GPU.

    Parameters
    ----------
    parameters : int
        Number of trainable parameters of the model.
    zero_stage : int
        Stage of ZeRO: what is divided among the GPUs. 0: nothing; 1: the optimiser state; 2: also the gradients; 3:
        also the weights.
    gpus : int
        Number of GPUs.
    precision : str
        Number format of the computation: fp32 or bf16. Gradients are accumulated in float32 in both formats.
    offload : str
        What is kept in the CPU's memory: none, optimizer or all. Gradients are counted as GPU memory in all three
        cases.

    Returns
    -------
    StateBytes
        The memory on one GPU.

    References
    ----------
    .. [1] Rajbhandari et al., "ZeRO: memory optimizations toward training trillion parameter models", SC 2020.
    """
    value = 2 if precision == "bf16" else 4
    weights = parameters * value / (gpus if zero_stage == 3 else 1)
    gradients = parameters * 4 / (gpus if zero_stage >= 2 else 1)
    moments = parameters * 8 / (gpus if zero_stage else 1)
    # At ZeRO stage 0, Adam updates the weights themselves, so there are no master weights. At stages 1 to 3, each GPU
    # keeps a float32 copy of its part of the weights, even if the weights are float32 already.
    master = parameters * 4 / gpus if zero_stage else 0
    # A communication bucket has the size that `pretrain.training.deepspeed_engine` sets. If communication overlaps with
    # the backward pass, DeepSpeed needs two buckets.
    bucket = min(5e8, max(parameters, 2**16)) * value
    gathered = min(parameters, 10**9) * value if zero_stage == 3 else 0
    # With bf16, ZeRO stage 1 sums the float32 gradients over the GPUs in place, so it needs no bucket.
    in_place = precision == "bf16" and zero_stage == 1
    buckets = 2 if zero_stage >= 2 else 1 if gpus > 1 and not in_place else 0
    buffers = gathered + buckets * bucket
    optimizer = 0.0 if offload != "none" and zero_stage else moments + master
    weights = 0.0 if offload == "all" and zero_stage == 3 else weights
    return StateBytes(weights=weights, gradients=gradients, optimizer=optimizer, buffers=buffers)


def tokens_of(model: MaskedAutoencoderConfig, channels: int | None = None) -> tuple[int, int]:
    """Count how many tokens of one window go through the encoder, and how many through the decoder.

    Parameters
    ----------
    model : MaskedAutoencoderConfig
        The model.
    channels : int, optional
        Number of recorded channels, for the montage tokenizer; by default the largest number that this tokenizer
        allows.

    Returns
    -------
    encoder, decoder : int
        Number of visible tokens, for the encoder, and of all tokens, for the decoder. Both numbers include the class
        token.
    """
    shape = model.encoder
    rows = shape.token_rows(channels)
    return rows * visible_tokens(shape.tokens, model.mask_ratio) + 1, rows * shape.tokens + 1


def activation_bytes(
    model: MaskedAutoencoderConfig, *, precision: str, checkpointing: bool, channels: int | None = None
) -> float:
    """Compute how many bytes of activations autograd keeps for the backward pass of one window.

    Parameters
    ----------
    model : MaskedAutoencoderConfig
        The model.
    precision : str
        Number format of the computation: fp32 or bf16.
    checkpointing : bool
        Whether each block's activations are computed again in the backward pass and therefore not kept.
    channels : int, optional
        Number of recorded channels, for the montage tokenizer.

    Returns
    -------
    float
        Number of bytes, for fused attention, which does not keep the attention matrix.
    """
    value = 2 if precision == "bf16" else 4
    seen, every = tokens_of(model, channels)

    def block(shape: EncoderConfig | DecoderConfig, tokens: int) -> float:
        # For each token, autograd keeps eight vectors of the model's width: the block's input, the first norm's output,
        # q, k, v, the attention's output, the sum of this output and the input, and the second norm's output. Autograd
        # also keeps two vectors of the hidden width (before and after the GELU), and, in float32, two statistics for
        # each norm and one statistic for each head.
        wide = tokens * (8 * shape.dim + 2 * int(shape.dim * shape.mlp_ratio)) * value
        return wide + tokens * 4 * (4 + shape.heads)

    stacks = [(model.encoder, seen), (model.decoder, every)]
    if checkpointing:
        kept = sum(shape.depth * tokens * shape.dim * value for shape, tokens in stacks)
        kept += max(block(shape, tokens) for shape, tokens in stacks)
    else:
        kept = sum(shape.depth * block(shape, tokens) for shape, tokens in stacks)
    # Autograd also keeps the inputs and outputs of the last norms, the window in float32 and in the model's number
    # format, and the prediction errors in float32.
    ends = sum(2 * tokens * shape.dim * value for shape, tokens in stacks)
    rows = model.encoder.signal_rows(channels)
    return kept + ends + rows * model.encoder.samples * (8 + value % 4)


def exchanged_bytes(parameters: int, *, zero_stage: int, gpus: int, precision: str, micro_batches: int) -> float:
    """Compute how many bytes one GPU sends in one optimiser step.

    Parameters
    ----------
    parameters : int
        Number of trainable parameters of the model.
    zero_stage, gpus, precision
        See `state_bytes`.
    micro_batches : int
        Number of forward passes in one step.

    Returns
    -------
    float
        Number of bytes, if the GPUs communicate with ring algorithms. Gradients are sent in float32, and weights in the
        run's number format. At ZeRO stage 0, no weights are sent. Stages 2 and 3 sum the gradients over the GPUs once
        for every micro batch; stages 0 and 1 do it once for every step. Stage 3 also gathers the weights twice for
        every micro batch.
    """
    value = 2 if precision == "bf16" else 4
    reduced = 4 * (micro_batches if zero_stage >= 2 else 1)
    gathered = {0: 4, 1: value, 2: value, 3: 2 * value * micro_batches}[zero_stage]
    return parameters * (reduced + gathered) * (gpus - 1) / gpus


def collective_operations(parameters: int, *, zero_stage: int, micro_batches: int) -> int:
    """Count the collective operations of one optimiser step, for communication buckets of at most 5e8 values.

    Parameters
    ----------
    parameters : int
        Number of trainable parameters of the model.
    zero_stage : int
        Stage of ZeRO.
    micro_batches : int
        Number of forward passes in one step.

    Returns
    -------
    int
        Number of reductions and gathers. An all-reduce is a reduction and a gather.
    """
    buckets = max(1, math.ceil(parameters / 5e8))
    reductions = buckets * (micro_batches if zero_stage >= 2 else 1)
    gathers = buckets * (2 * micro_batches if zero_stage == 3 else 1)
    return reductions + gathers
