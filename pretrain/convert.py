"""Checkpoints of DreamDiffusion's released code to encoder packages: ``dreamscale convert CHECKPOINT OUT``.

Their files are pickles that hold an object of their own class beside the weights. Only tensors and plain values are
read, by PyTorch's restricted unpickler; in place of their config class stands an empty one, and any other class is
refused. No code of a checkpoint is ever run.

Letters in names: C channels, D width, P time samples of a token, N tokens.
"""

from __future__ import annotations

import dataclasses
import math
import re
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data_sharding.common.config import parse_config
from data_sharding.common.errors import EXIT_DONE, RequestError, one_line, run_main
from data_sharding.processing.preprocess import PreprocessSpec
from pretrain.model.autoencoder import SignalDecoder, SignalEncoder
from pretrain.model.build import count_parameters
from pretrain.model.config import DecoderConfig, EncoderConfig
from pretrain.model.transformer import sincos_positions

DECODER = "decoder.safetensors"
"""Beside the package's own files, where the checkpoint has a decoder."""
# The encoder inside the checkpoint of a fine-tuned Stable Diffusion.
_FINE_TUNED = "cond_stage_model.mae."
# Where their several scripts put the weights.
_WEIGHTS = ("model", "model_state_dict", "state_dict")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """Write an encoder package from a checkpoint of DreamDiffusion's released code.

    Pretraining checkpoints (their ``model``) and fine-tuned ones (``model_state_dict`` of the whole Stable Diffusion,
    of which the encoder is taken) are told apart by their names.
    """

    checkpoint: str
    """Their file, .pth; read without running any code in it."""
    output: str
    """Directory to write; a package that is there is replaced."""
    heads: int | None = None
    """Attention heads of the encoder, where the checkpoint does not say; theirs have 16."""
    decoder_heads: int | None = None
    """Attention heads of the decoder, likewise."""
    sfreq: float = 256.0
    """Sampling rate of the signal in Hz. Their code does not fix one: it takes what a file has, and stretches the
    440 ms of a trial to 512 samples when it fine-tunes."""
    highpass: float = 5.0
    """Lower edge of the band in Hz (the paper's)."""
    lowpass: float = 95.0
    """Upper edge of the band in Hz (the paper's)."""
    scale_uv: float = 10.0
    """Constant divisor of the signal: 10 when they pretrain; they say 1 when they fine-tune."""
    program: bool = True
    """Also write encoder.pt2, which runs with PyTorch alone."""


class _Theirs:
    """Stands for their config class: takes its attributes and does nothing."""


def read_checkpoint(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the weights and plain settings of one of their checkpoints; runs no code in it.

    Parameters
    ----------
    path : str or Path
        The file.

    Returns
    -------
    weights : dict of str to Tensor
        By their names; the encoder's part of a fine-tuned model alone.
    settings : dict
        Numbers and texts of their config; empty where there is none.

    Raises
    ------
    RequestError
        If there is no such file, it is damaged or in a format from before PyTorch 1.6, holds objects other than
        tensors, plain values and their config, or none of the weights looked for.
    """
    path = Path(path)
    if not path.is_file():
        raise RequestError(f"{path}: no such checkpoint")
    try:
        foreign = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
    except Exception as error:
        raise RequestError(
            f"{path}: no checkpoint of PyTorch 1.6 or later, or damaged ({one_line(error)[:120]}); download it again"
        ) from None
    refused = [name for name in foreign if not re.fullmatch(r"[\w.]*\bConfig_\w+", name)]
    if refused:
        raise RequestError(
            f"{path}: asks to load {', '.join(sorted(refused)[:3])}; only tensors, plain values and a config of "
            "DreamDiffusion are read from a checkpoint, since anything else could run code"
        )
    try:
        with torch.serialization.safe_globals([(_Theirs, name) for name in foreign]):
            # Mapped, not read: of a fine-tuned model's five gigabytes the encoder is a tenth.
            saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise RequestError(f"{path}: damaged ({one_line(error)[:200]}); download it again") from None
    if not isinstance(saved, dict):
        raise RequestError(f"{path}: holds a {type(saved).__name__}, not a dictionary of weights")
    found = next((saved[name] for name in _WEIGHTS if isinstance(saved.get(name), dict)), saved)
    weights = {str(k).removeprefix("module."): v for k, v in found.items() if isinstance(v, Tensor)}
    if any(name.startswith(_FINE_TUNED) for name in weights):
        weights = {k.removeprefix(_FINE_TUNED): v for k, v in weights.items() if k.startswith(_FINE_TUNED)}
    if "patch_embed.proj.weight" not in weights:
        raise RequestError(f"{path}: no encoder of DreamDiffusion in it (patch_embed.proj.weight is missing)")
    config = saved.get("config")
    settings = config if isinstance(config, dict) else getattr(config, "__dict__", {})
    # What JSON can hold: the package's config.json will have them.
    plain = {str(k): v for k, v in settings.items() if isinstance(v, int | float | str)}
    return weights, {k: v for k, v in plain.items() if not isinstance(v, float) or math.isfinite(v)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Converted:
    """One of their checkpoints in our names."""

    encoder: EncoderConfig
    """Shape of the encoder."""
    encoder_weights: dict[str, Tensor]
    """float32, for `pretrain.model.autoencoder.SignalEncoder`."""
    decoder: DecoderConfig | None
    """Shape of the decoder; None in a fine-tuned checkpoint, which has none."""
    decoder_weights: dict[str, Tensor]
    """float32, for `pretrain.model.autoencoder.SignalDecoder`."""


def convert_weights(
    weights: dict[str, Tensor], *, heads: int | None, decoder_heads: int | None, class_token: bool | None = None
) -> Converted:
    """Translate names and layout.

    Parameters
    ----------
    weights : dict of str to Tensor
        By their names.
    heads, decoder_heads : int, optional
        Attention heads, which weights do not tell.
    class_token : bool, optional
        Whether the encoder runs with its class token; by default where there is a decoder, as in their code.

    Returns
    -------
    Converted
        The same model in ours.

    Raises
    ------
    RequestError
        If weights are missing, left over, of another shape or no finite numbers, the decoder's fixed positions are not
        the usual ones, or heads are not known.
    """
    # Of an image encoder that some of their checkpoints hold as well.
    weights = {name: _real(name, value) for name, value in weights.items() if not name.startswith("nature_img_")}
    with_decoder = "decoder_pred.weight" in weights
    # Their encoder for fine-tuning has these two among its weights and never uses them.
    unused = () if with_decoder else ("mask_token",)
    class_token = with_decoder if class_token is None else class_token
    width, channels, patch = _telling(weights, "patch_embed.proj.weight", 3).shape
    shape = _shape_of(weights, "blocks", width, heads, "heads")
    table = _positions(weights, "pos_embed", width)
    tokens = table.shape[0] - 1
    # Fine-tuning trains everything in the encoder, its fixed positions too.
    learned = _distance(table) > 1e-4
    encoder = EncoderConfig(
        channels=channels,
        samples=tokens * patch,
        patch=patch,
        dim=width,
        class_token=class_token,
        learned_positions=learned,
        **shape,
    )
    ours = {
        "patch_embed.weight": "patch_embed.proj.weight",
        "patch_embed.bias": "patch_embed.proj.bias",
        "norm.weight": "norm.weight",
        "norm.bias": "norm.bias",
        **_block_names("blocks", encoder.depth),
    }
    if class_token:
        ours["cls_token"] = "cls_token"
    else:
        unused += ("cls_token",)
    taken = {"pos_embed", *unused}
    decoder, decoder_weights = None, {}
    if with_decoder:
        narrow = _telling(weights, "decoder_pred.weight", 2).shape[1]
        shape = _shape_of(weights, "decoder_blocks", narrow, decoder_heads, "decoder_heads")
        fixed = _positions(weights, "decoder_pos_embed", narrow)
        if len(fixed) != len(table) or _distance(fixed) > 1e-4:
            raise RequestError(
                "decoder_pos_embed is not the fixed sine and cosine code of as many tokens as the encoder's"
            )
        decoder = DecoderConfig(dim=narrow, **shape)
        names = {
            "embed.weight": "decoder_embed.weight",
            "embed.bias": "decoder_embed.bias",
            "mask_token": "mask_token",
            "norm.weight": "decoder_norm.weight",
            "norm.bias": "decoder_norm.bias",
            "predict.weight": "decoder_pred.weight",
            "predict.bias": "decoder_pred.bias",
            **_block_names("decoder_blocks", decoder.depth),
        }
        with torch.device("meta"):
            decoder_weights = _take(weights, names, taken, SignalDecoder(decoder, encoder))
        # They lay a token's values out time by time, we channel by channel.
        order = torch.arange(channels * patch).view(patch, channels).T.flatten()
        for name in ("predict.weight", "predict.bias"):
            decoder_weights[name] = decoder_weights[name][order].contiguous()
        taken.add("decoder_pos_embed")
    with torch.device("meta"):
        encoder_weights = _take(weights, ours, taken, SignalEncoder(encoder))
    if learned:
        encoder_weights["positions_ND"] = table[1:]
    if class_token:
        # Ours has no position; theirs is zero, unless it was trained.
        encoder_weights["cls_token"] = encoder_weights["cls_token"] + table[0]
    left = sorted(weights.keys() - taken)
    if left:
        raise RequestError(f"weights that no part of the model takes: {', '.join(left[:3])}{' ...' * (len(left) > 3)}")
    return Converted(encoder=encoder, encoder_weights=encoder_weights, decoder=decoder, decoder_weights=decoder_weights)


def _block_names(theirs: str, depth: int) -> dict[str, str]:
    """Our names of the blocks' weights to theirs."""
    parts = {"norm1": "norm1", "attn.qkv": "attn.qkv", "attn.proj": "attn.proj", "norm2": "norm2"}
    parts |= {"fc1": "mlp.fc1", "fc2": "mlp.fc2"}
    return {
        f"blocks.{i}.{ours}.{kind}": f"{theirs}.{i}.{name}.{kind}"
        for i in range(depth)
        for ours, name in parts.items()
        for kind in ("weight", "bias")
    }


def _real(name: str, value: Tensor) -> Tensor:
    """float32, where nothing but precision is lost by that."""
    if value.layout != torch.strided or value.is_nested or value.is_meta or not value.is_floating_point():
        kind = f"{value.dtype}, {value.layout}, {value.device}"
        raise RequestError(f"{name} is no plain tensor of real numbers ({kind}); save it as float32")
    value = value.float()
    if not value.isfinite().all():
        raise RequestError(f"{name} holds NaN or infinite values: the training had failed; take an earlier checkpoint")
    return value


def _telling(weights: dict[str, Tensor], name: str, rank: int) -> Tensor:
    """Give a weight whose shape tells the model's."""
    if name not in weights:
        raise RequestError(f"weights are missing: {name}")
    value = weights[name]
    if value.ndim != rank or 0 in value.shape:
        raise RequestError(f"{name} has the shape {list(value.shape)}; it must have {rank} dimensions, none of them 0")
    return value


def _take(weights: dict[str, Tensor], names: dict[str, str], taken: set[str], model: nn.Module) -> dict[str, Tensor]:
    """Rename the weights that a model of ours, which may be on the meta device, is to be loaded with."""
    missing = sorted(theirs for theirs in names.values() if theirs not in weights)
    if missing:
        raise RequestError(f"weights are missing: {', '.join(missing[:3])}{' ...' * (len(missing) > 3)}")
    shapes = {theirs: model.get_parameter(ours).shape for ours, theirs in names.items()}
    wrong = sorted(theirs for theirs, shape in shapes.items() if weights[theirs].shape != shape)
    if wrong:
        raise RequestError(
            f"{wrong[0]} has the shape {list(weights[wrong[0]].shape)}; {list(shapes[wrong[0]])} goes with the other "
            "weights"
        )
    taken.update(names.values())
    return {ours: weights[theirs] for ours, theirs in names.items()}


def _shape_of(weights: dict[str, Tensor], blocks: str, width: int, heads: int | None, key: str) -> dict[str, Any]:
    numbers = {int(m[1]) for name in weights if (m := re.match(rf"{blocks}\.(\d+)\.", name))}
    first = _telling(weights, f"{blocks}.0.mlp.fc1.weight", 2)
    if heads is None:
        raise RequestError(
            f"the checkpoint does not say how many attention heads there are; give --{key} (16 in theirs)"
        )
    if width % 2:
        raise RequestError(f"the width of {blocks} is {width}; only even ones have their fixed positions")
    # Out of a checkpoint it may be anything.
    if type(heads) is not int or heads < 1 or width % heads:
        raise RequestError(f"{key} is {heads!r}; give --{key}, a whole number that divides the width {width}")
    ratio = first.shape[0] / width
    # Rounded down when the shape is built again.
    ratio = ratio if int(width * ratio) == first.shape[0] else math.nextafter(ratio, math.inf)
    return {"depth": len(numbers), "heads": heads, "mlp_ratio": ratio}


def _positions(weights: dict[str, Tensor], name: str, width: int) -> Tensor:
    """Positions [1 + N, D], that of the class token first."""
    table = _telling(weights, name, 3)
    if table.shape[0] != 1 or table.shape[1] < 2 or table.shape[2] != width:
        raise RequestError(f"{name} has the shape {list(table.shape)}; it must be [1, 1 + tokens, {width}]")
    return table[0]


def _distance(table: Tensor) -> float:
    """How far positions are from the fixed code."""
    tokens, width = table.shape[0] - 1, table.shape[1]
    expected = torch.cat([torch.zeros(1, width), sincos_positions(tokens, width)])
    return float((table - expected).abs().max())


def convert(config: ConvertConfig) -> int:
    """Write an encoder package.

    Parameters
    ----------
    config : ConvertConfig
        The request.

    Returns
    -------
    int
        0.

    Raises
    ------
    RequestError
        If the checkpoint cannot be used.
    """
    from pretrain.encoder.encoder import EEGEncoder
    from pretrain.export import check_output
    from pretrain.model.weights import save_weights

    output = check_output(config.output)
    weights, settings = read_checkpoint(config.checkpoint)
    try:
        model = convert_weights(
            weights,
            heads=settings.get("num_heads") if config.heads is None else config.heads,
            decoder_heads=settings.get("decoder_num_heads") if config.decoder_heads is None else config.decoder_heads,
        )
    except RequestError as error:
        raise RequestError(f"{config.checkpoint}: {error}") from None
    shape = model.encoder
    try:
        spec = PreprocessSpec(
            sfreq=config.sfreq,
            highpass=config.highpass,
            lowpass=config.lowpass,
            window=shape.samples,
            stride=shape.samples,
            scaling="constant",
            scale_uv=config.scale_uv,
            clip=0.0,
        )
    except ValueError as error:
        raise RequestError(str(error)) from None
    encoder = EEGEncoder(shape, spec)
    encoder.backbone.load_state_dict(model.encoder_weights)
    decoder = SignalDecoder(model.decoder, shape) if model.decoder else None
    if decoder:
        decoder.load_state_dict(model.decoder_weights)
    kind = "pretrained" if model.decoder else "fine-tuned with Stable Diffusion"
    card = [
        "# EEG encoder of DreamDiffusion",
        "",
        f"Converted from `{Path(config.checkpoint).name}`, {kind} with the released code of Bai et al. (arXiv "
        f"2306.16934); {count_parameters(encoder) / 1e6:.1f}M parameters. Weights and licence are theirs.",
        "",
        "The code fixes no sampling rate, reference or notch: `preprocess.json` holds the paper's band, the divisor "
        f"{config.scale_uv:g} and otherwise this project's usual values. Check them against your data.",
        "",
    ]
    encoder.save_pretrained(
        output,
        card="\n".join(card),
        program=config.program,
        extra={
            "source": Path(config.checkpoint).name,
            "settings": settings,
            "decoder": dataclasses.asdict(model.decoder) if model.decoder else None,
        },
    )
    if decoder:
        save_weights(decoder.state_dict(), output / DECODER)
    EEGEncoder.from_pretrained(output)
    print(
        f"dreamscale convert: {kind} encoder, {shape.depth} layers x {shape.dim}"
        f"{', and its decoder' if decoder else ''} in {output}"
    )
    return EXIT_DONE


def main(argv: list[str] | None = None) -> int:
    """Convert from the command line.

    Parameters
    ----------
    argv : list of str, optional
        ``CHECKPOINT OUT [--key value ...]``.

    Returns
    -------
    int
        Exit code.
    """
    return run_main(
        lambda words: convert(
            parse_config(ConvertConfig, words, prog="dreamscale convert", positionals=("checkpoint", "output"))
        ),
        argv,
    )


if __name__ == "__main__":
    sys.exit(main())
