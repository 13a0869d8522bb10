"""Convert a checkpoint of DreamDiffusion's released code: ``dreamscale convert CHECKPOINT OUT``.

The checkpoints are pickle files with weights and an object of DreamDiffusion's config class. PyTorch's restricted
unpickler reads only tensors and plain values from a checkpoint. While a checkpoint is read, an empty class replaces
DreamDiffusion's config class. If the checkpoint contains an object of any other class, an error is raised. Code in a
checkpoint is never run.

In this file, "foreign" names are the names of weights in DreamDiffusion's code, and "own" names are the names of the
same weights in `pretrain.model`. Tensor names end with the shape, such as BCT in `x_BCT`; the docstring of
`pretrain.model` explains these letters.
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

from data_sharding.common.config import command
from data_sharding.common.errors import EXIT_DONE, RequestError, one_line
from data_sharding.processing.preprocess import PreprocessSpec
from pretrain.model.autoencoder import SignalDecoder, SignalEncoder
from pretrain.model.build import count_parameters
from pretrain.model.config import DecoderConfig, EncoderConfig
from pretrain.model.transformer import sincos_positions

DECODER = "decoder.safetensors"
"""Additional file of the encoder package for the decoder's weights, if the checkpoint has a decoder."""
# Prefix of the encoder's weights in the checkpoint of a fine-tuned Stable Diffusion.
_FINE_TUNED = "cond_stage_model.mae."
# Keys under which DreamDiffusion's scripts store the weights.
_WEIGHTS = ("model", "model_state_dict", "state_dict")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """Write an encoder package from a checkpoint of DreamDiffusion's released code.

    There are two kinds of checkpoints: of pretraining (with the weights under the key ``model``), and of a fine-tuned
    Stable Diffusion (with the weights under the key ``model_state_dict``). The names of the weights show which kind a
    checkpoint is. From a fine-tuned Stable Diffusion, only the encoder is converted.
    """

    checkpoint: str
    """Checkpoint of DreamDiffusion, a .pth file. No code in the file is run."""
    output: str
    """Directory for the encoder package; an existing package is replaced."""
    heads: int | None = None
    """Number of the encoder's attention heads, needed if the checkpoint does not contain it. DreamDiffusion's
    encoders have 16 heads."""
    decoder_heads: int | None = None
    """Number of the decoder's attention heads, needed if the checkpoint does not contain it. DreamDiffusion's
    decoders have 16 heads."""
    sfreq: float = 256.0
    """Sampling rate in Hz of the signals that the encoder will get. DreamDiffusion's code has no fixed sampling rate:
    its pretraining does not resample the files, and its fine-tuning stretches the 440 ms of a trial to 512
    samples."""
    highpass: float = 5.0
    """Lower edge of the frequency band in Hz; the default is the value in DreamDiffusion's paper."""
    lowpass: float = 95.0
    """Upper edge of the frequency band in Hz; the default is the value in DreamDiffusion's paper."""
    notch: str = "auto"
    """Notch filter of the signals that the encoder will get, as `preprocess.notch` of dreamscale shard: auto, off, or a
    frequency in Hz. DreamDiffusion's code has no notch filter."""
    reference: str = "average"
    """Reference of the signals that the encoder will get, as `preprocess.reference` of dreamscale shard: average, keep,
    or the name of a channel. DreamDiffusion's code keeps the reference of the recording."""
    scale_uv: float = 10.0
    """Number by which the signal in microvolts is divided. DreamDiffusion's pretraining divides by 10, and its
    fine-tuning by 1."""
    program: bool = True
    """Also write encoder.pt2, a program that needs only PyTorch to run."""


class _ForeignConfig:
    """Empty class that replaces DreamDiffusion's config class while a checkpoint is read."""


def read_checkpoint(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the weights and plain settings of a DreamDiffusion checkpoint, without running any code in it.

    Parameters
    ----------
    path : str or Path
        Path of the checkpoint.

    Returns
    -------
    weights : dict of str to Tensor
        The weights; the keys are their names in DreamDiffusion's code. For a fine-tuned model, only the encoder's
        weights are returned.
    settings : dict
        Those entries of the checkpoint's config that are numbers or strings; empty if the checkpoint has no config.

    Raises
    ------
    RequestError
        If the file is missing, is damaged, or was written by PyTorch before version 1.6. If the file holds objects
        other than tensors, plain values and the config, or has no encoder of DreamDiffusion.
    """
    path = Path(path)
    if not path.is_file():
        raise RequestError(f"{path}: no such checkpoint; give the path of a checkpoint of DreamDiffusion")
    try:
        foreign = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
    except Exception as error:
        raise RequestError(
            f"{path}: damaged, or not a checkpoint of PyTorch 1.6 or later ({one_line(error)[:120]}); download it again"
        ) from None
    refused = [name for name in foreign if not re.fullmatch(r"[\w.]*\bConfig_\w+", name)]
    if refused:
        raise RequestError(
            f"{path}: the checkpoint asks to load {', '.join(sorted(refused)[:3])}; only tensors, plain values and a "
            "config of DreamDiffusion are read from a checkpoint, because anything else could run code"
        )
    try:
        with torch.serialization.safe_globals([(_ForeignConfig, name) for name in foreign]):
            # Memory-map the file, so that only the needed parts are read. The encoder is only a tenth of the 5 GB of a
            # fine-tuned Stable Diffusion.
            saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise RequestError(f"{path}: damaged ({one_line(error)[:200]}); download it again") from None
    if not isinstance(saved, dict):
        raise RequestError(
            f"{path}: the file holds a {type(saved).__name__}, not a dictionary of weights; give a checkpoint of "
            "DreamDiffusion"
        )
    found = next((saved[name] for name in _WEIGHTS if isinstance(saved.get(name), dict)), saved)
    weights = {str(k).removeprefix("module."): v for k, v in found.items() if isinstance(v, Tensor)}
    if any(name.startswith(_FINE_TUNED) for name in weights):
        weights = {k.removeprefix(_FINE_TUNED): v for k, v in weights.items() if k.startswith(_FINE_TUNED)}
    if "patch_embed.proj.weight" not in weights:
        raise RequestError(
            f"{path}: the checkpoint has no encoder of DreamDiffusion (patch_embed.proj.weight is missing); give a "
            "checkpoint of DreamDiffusion's pretraining or fine-tuning"
        )
    config = saved.get("config")
    settings = config if isinstance(config, dict) else getattr(config, "__dict__", {})
    # The checkpoint's settings are written to the package's config.json, so keep only values that JSON can store.
    plain = {str(k): v for k, v in settings.items() if isinstance(v, int | float | str)}
    return weights, {k: v for k, v in plain.items() if not isinstance(v, float) or math.isfinite(v)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Converted:
    """A checkpoint of DreamDiffusion, converted to the configs and weights of this project."""

    encoder: EncoderConfig
    """Architecture of the encoder."""
    encoder_weights: dict[str, Tensor]
    """float32 weights of `pretrain.model.autoencoder.SignalEncoder`."""
    decoder: DecoderConfig | None
    """Architecture of the decoder; None for a fine-tuned checkpoint, because it has no decoder."""
    decoder_weights: dict[str, Tensor]
    """float32 weights of `pretrain.model.autoencoder.SignalDecoder`; empty if there is no decoder."""


def convert_weights(
    weights: dict[str, Tensor], *, heads: int | None, decoder_heads: int | None, class_token: bool | None = None
) -> Converted:
    """Convert the names and the layout of DreamDiffusion's weights to those of `pretrain.model`.

    Parameters
    ----------
    weights : dict of str to Tensor
        The weights; the keys are their names in DreamDiffusion's code.
    heads, decoder_heads : int, optional
        Number of attention heads of the encoder, and of the decoder. The shapes of the weights do not show these
        numbers.
    class_token : bool, optional
        Whether the encoder uses its class token. By default, the class token is used exactly if the checkpoint has a
        decoder: DreamDiffusion's code uses it in pretraining, but not in fine-tuning.

    Returns
    -------
    Converted
        Configs and weights of the converted model.

    Raises
    ------
    RequestError
        If weights are missing, unknown, of a wrong shape or not finite. If the decoder's position embeddings are not
        the fixed sines and cosines. If `heads` or `decoder_heads` is needed but None, or does not divide the width of a
        token.
    """
    # Ignore the weights with the prefix "nature_img_": they belong to an image encoder that some checkpoints also hold.
    weights = {name: _to_float32(name, value) for name, value in weights.items() if not name.startswith("nature_img_")}
    with_decoder = "decoder_pred.weight" in weights
    # A fine-tuned checkpoint has a mask token that DreamDiffusion's code never uses.
    unused = () if with_decoder else ("mask_token",)
    class_token = with_decoder if class_token is None else class_token
    width, channels, patch = _get_weight(weights, "patch_embed.proj.weight", 3).shape
    shape = _find_shape(weights, "blocks", width, heads, "heads")
    table = _get_positions(weights, "pos_embed", width)
    tokens = table.shape[0] - 1
    # In pretraining, the position embeddings are fixed sines and cosines; in DreamDiffusion's fine-tuning, they are
    # trained.
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
    names = {
        "patch_embed.weight": "patch_embed.proj.weight",
        "patch_embed.bias": "patch_embed.proj.bias",
        "norm.weight": "norm.weight",
        "norm.bias": "norm.bias",
        **_block_names("blocks", encoder.depth),
    }
    if class_token:
        names["cls_token"] = "cls_token"
    else:
        unused += ("cls_token",)
    taken = {"pos_embed", *unused}
    decoder, decoder_weights = None, {}
    if with_decoder:
        narrow = _get_weight(weights, "decoder_pred.weight", 2).shape[1]
        shape = _find_shape(weights, "decoder_blocks", narrow, decoder_heads, "decoder_heads")
        fixed = _get_positions(weights, "decoder_pos_embed", narrow)
        if len(fixed) != len(table) or _distance(fixed) > 1e-4:
            raise RequestError(
                "decoder_pos_embed is not the table of sines and cosines for the encoder's tokens, so this is not the "
                "decoder of DreamDiffusion's released code"
            )
        decoder = DecoderConfig(dim=narrow, **shape)
        decoder_names = {
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
            decoder_weights = _take(weights, decoder_names, taken, SignalDecoder(decoder, encoder))
        # For each token, DreamDiffusion's decoder returns all channels of the first time step, then of the second, and
        # so on. Our decoder returns all time steps of the first channel, then of the second, and so on.
        order = torch.arange(channels * patch).view(patch, channels).T.flatten()
        for name in ("predict.weight", "predict.bias"):
            decoder_weights[name] = decoder_weights[name][order].contiguous()
        taken.add("decoder_pos_embed")
    with torch.device("meta"):
        encoder_weights = _take(weights, names, taken, SignalEncoder(encoder))
    if learned:
        encoder_weights["positions_ND"] = table[1:]
    if class_token:
        # DreamDiffusion adds a position embedding to the class token; this position embedding is zero unless it was
        # trained. Our class token has no position embedding, so store the sum of DreamDiffusion's class token and its
        # position embedding.
        encoder_weights["cls_token"] = encoder_weights["cls_token"] + table[0]
    left = sorted(weights.keys() - taken)
    if left:
        raise RequestError(
            f"the checkpoint has weights that no part of the model takes: {', '.join(left[:3])}"
            f"{' ...' * (len(left) > 3)}, so it does not come from DreamDiffusion's released code"
        )
    return Converted(encoder=encoder, encoder_weights=encoder_weights, decoder=decoder, decoder_weights=decoder_weights)


def _block_names(foreign: str, depth: int) -> dict[str, str]:
    """Map names of transformer weights in `pretrain.model` to names in the checkpoint, which begin with `foreign`."""
    parts = {"norm1": "norm1", "attn.qkv": "attn.qkv", "attn.proj": "attn.proj", "norm2": "norm2"}
    parts |= {"fc1": "mlp.fc1", "fc2": "mlp.fc2"}
    return {
        f"blocks.{i}.{own}.{kind}": f"{foreign}.{i}.{name}.{kind}"
        for i in range(depth)
        for own, name in parts.items()
        for kind in ("weight", "bias")
    }


def _to_float32(name: str, value: Tensor) -> Tensor:
    """Convert a weight to float32; raise an error if the tensor does not hold plain real numbers."""
    if value.layout != torch.strided or value.is_nested or value.is_meta or not value.is_floating_point():
        kind = f"{value.dtype}, {value.layout}, {value.device}"
        raise RequestError(f"{name} is not a plain tensor of real numbers ({kind}); save it as float32")
    # A tensor with stride 0 repeats one stored number. Such a tensor in a small file can claim any size, and its copy
    # would need a huge amount of memory.
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise RequestError(
            f"{name} claims {value.numel()} numbers, which are not in the file; save it as a plain tensor"
        )
    value = value.float()
    if not value.isfinite().all():
        raise RequestError(f"{name} holds NaN or infinite values: the training failed; take an earlier checkpoint")
    return value


def _get_weight(weights: dict[str, Tensor], name: str, rank: int) -> Tensor:
    """Return the weight `name`; raise an error if it is missing or does not have `rank` dimensions."""
    if name not in weights:
        raise RequestError(f"weights are missing: {name}; give a complete checkpoint of DreamDiffusion")
    value = weights[name]
    if value.ndim != rank or 0 in value.shape:
        raise RequestError(f"{name} has the shape {list(value.shape)}; it must have {rank} dimensions, none of them 0")
    return value


def _take(weights: dict[str, Tensor], names: dict[str, str], taken: set[str], model: nn.Module) -> dict[str, Tensor]:
    """Return some of the checkpoint's weights, under the names that they have in `model`.

    `names` maps names in `model` to names in the checkpoint; the names in the checkpoint are added to `taken`. `model`
    only gives the expected shapes, so it may be on the meta device.
    """
    missing = sorted(foreign for foreign in names.values() if foreign not in weights)
    if missing:
        raise RequestError(
            f"weights are missing: {', '.join(missing[:3])}{' ...' * (len(missing) > 3)}; give a complete checkpoint "
            "of DreamDiffusion"
        )
    shapes = {foreign: model.get_parameter(own).shape for own, foreign in names.items()}
    wrong = sorted(foreign for foreign, shape in shapes.items() if weights[foreign].shape != shape)
    if wrong:
        raise RequestError(
            f"{wrong[0]} has the shape {list(weights[wrong[0]].shape)}, but the other weights need "
            f"{list(shapes[wrong[0]])}"
        )
    taken.update(names.values())
    return {own: weights[foreign] for own, foreign in names.items()}


def _find_shape(weights: dict[str, Tensor], blocks: str, width: int, heads: int | None, key: str) -> dict[str, Any]:
    """Find depth and hidden width of transformer blocks from the weights, and check the given number of heads."""
    numbers = {int(m[1]) for name in weights if (m := re.match(rf"{blocks}\.(\d+)\.", name))}
    first = _get_weight(weights, f"{blocks}.0.mlp.fc1.weight", 2)
    if heads is None:
        raise RequestError(
            f"the checkpoint does not say how many attention heads it has; give --{key} (16 in DreamDiffusion's models)"
        )
    if width % 2:
        raise RequestError(f"the width of {blocks} is {width}; it must be even, since sines and cosines come in pairs")
    # Check the type too, because a value from the checkpoint's config may have any type.
    if type(heads) is not int or heads < 1 or width % heads:
        raise RequestError(f"{key} is {heads!r}; give --{key}, a whole number that divides the width {width}")
    ratio = first.shape[0] / width
    # The model computes its hidden width as int(width * ratio), which rounds down. If rounding would give one less than
    # the hidden width of the weights, make the ratio slightly larger.
    ratio = ratio if int(width * ratio) == first.shape[0] else math.nextafter(ratio, math.inf)
    return {"depth": len(numbers), "heads": heads, "mlp_ratio": ratio}


def _get_positions(weights: dict[str, Tensor], name: str, width: int) -> Tensor:
    """Return the position embeddings [1 + N, D]; the first row belongs to the class token."""
    table = _get_weight(weights, name, 3)
    if table.shape[0] != 1 or table.shape[1] < 2 or table.shape[2] != width:
        raise RequestError(f"{name} has the shape {list(table.shape)}; it must be [1, 1 + tokens, {width}]")
    return table[0]


def _distance(table: Tensor) -> float:
    """Return the largest difference between the values of `table` and those of the fixed position embeddings."""
    tokens, width = table.shape[0] - 1, table.shape[1]
    expected = torch.cat([torch.zeros(1, width), sincos_positions(tokens, width)])
    return float((table - expected).abs().max())


def _read_notch(text: str) -> Any:
    """Return the frequency in a text as a number, and any other text as it is."""
    try:
        return float(text)
    except ValueError:
        return text


def convert(config: ConvertConfig) -> int:
    """Convert a checkpoint and write the encoder package.

    Parameters
    ----------
    config : ConvertConfig
        Config of the command.

    Returns
    -------
    int
        Exit code 0.

    Raises
    ------
    RequestError
        If the checkpoint cannot be used.
    """
    from pretrain.encoder.encoder import EEGEncoder
    from pretrain.encoder.package import check_output
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
            notch=_read_notch(config.notch),
            reference=config.reference,
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
        f"2306.16934); {count_parameters(encoder) / 1e6:.1f}M parameters. The licence of the released weights applies.",
        "",
        "DreamDiffusion's code has no fixed sampling rate, reference or notch filter: `preprocess.json` holds the "
        f"band, notch and reference given to dreamscale convert, and the divisor {config.scale_uv:g}. Check "
        "`preprocess.json` against your data.",
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
        f"{', with its decoder,' if decoder else ''} in {output}; next: dreamscale encode {output} RECORDING -o OUT.npz"
    )
    return EXIT_DONE


main = command(ConvertConfig, convert, prog="dreamscale convert", positionals=("checkpoint", "output"))

if __name__ == "__main__":
    sys.exit(main())
