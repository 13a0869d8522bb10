"""Check a request for fine-tuning Stable Diffusion as a whole, before the first image is encoded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from finetune.base_models.load import find_networks
from finetune.stable_diffusion.model import check_time_path, find_cross_attention
from finetune.training.config import TrainingConfig
from finetune.training.disk import check_disk


def check_request(
    pipeline: Any, encoder: Any, *, output: str | Path, time_path: bool, tune: str, training: TrainingConfig
) -> None:
    """Check that a base model can be conditioned as the config says, and that the results fit on the disk.

    The files of the base model and of the encoder have been checked when they were loaded.

    Parameters
    ----------
    pipeline : StableDiffusionPipeline or StableDiffusionXLPipeline
        The base model.
    encoder : EEGEncoder
        The EEG encoder.
    output, time_path, training
        Keys of the command's config.
    tune : str
        Parts whose own weights are trained: E, A or E+A, as the key `tune`; without A for LoRA.

    Raises
    ------
    RequestError
        If something does not fit.
    """
    if time_path:
        check_time_path(pipeline.unet)
    if (Path(output) / "model").exists():
        return  # The run is finished, so it needs no more space.
    check_disk(output, estimate_bytes(pipeline, encoder, tune, training), "the checkpoints and the trained model")


def estimate_bytes(pipeline: Any, encoder: Any, tune: str, training: TrainingConfig) -> int:
    """Estimate how many bytes the checkpoints and the trained model of a run need.

    Parameters
    ----------
    pipeline, encoder, tune, training
        As in `check_request`.

    Returns
    -------
    int
        Number of bytes, without the small files of the run. A checkpoint has the trained weights, the two moments of
        AdamW, the weights with the best evaluation, and the moving average. One checkpoint more than
        ``checkpoint.keep`` exists while it is written.
    """
    sizes = {name: sum(p.numel() for p in part.parameters()) for name, part in find_networks(pipeline).items()}
    sizes["encoder"] = sum(p.numel() for p in encoder.parameters())
    trained = sizes["encoder"] if "E" in tune else 0
    if "A" in tune:
        trained += sum(p.numel() for p in find_cross_attention(pipeline.unet).values())
    copies = 5 if training.ema else 4
    return 4 * (sum(sizes.values()) + trained * copies * (training.checkpoint.keep + 1))
