"""Save and load a trained DM-RE2I model, and generate images with this model: EVRNet's feature guides a DDPM.

Tensor shapes: B trials, C channels, T samples, D feature width, K classes, H rows, W columns.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_sharding.common.errors import RequestError, one_line
from data_sharding.common.files import atomic_directory, read_json, write_json
from data_sharding.common.untrusted import check_group, check_preprocess
from data_sharding.processing.preprocess import PreprocessSpec
from finetune.diffusion import draw_noise, sample
from finetune.dm_re2i.eg_ddpm import EGDDPM
from finetune.dm_re2i.evrnet import EVRNet
from finetune.eeg import scale_eeg
from finetune.generators import read_part
from finetune.images import to_pixels

KIND = "eg_ddpm"
SCHEMA = 1


def count_true_channels(eeg_CT: Tensor) -> int:
    """Return the number of channels that a window had before padding, which repeats channels.

    Parameters
    ----------
    eeg_CT : Tensor, shape (C, T)
        A padded window.

    Returns
    -------
    int
        The smallest n for which every row i is equal to row i mod n.
    """
    rows = len(eeg_CT)
    return next((n for n in range(1, rows) if torch.equal(eeg_CT[n:], eeg_CT[: rows - n])), rows)


@torch.no_grad()
def compute_features(
    evrnet: EVRNet, x_BCT: Tensor, batch: int = 128, pulse: Callable[[], None] = lambda: None
) -> tuple[Tensor, Tensor]:
    """Compute features and class scores of trials with EVRNet.

    Parameters
    ----------
    evrnet : EVRNet
        The network in evaluation mode.
    x_BCT : Tensor, shape (B, C, T)
        Scaled trials, padded by repeating channels. The network uses only the first rows, as many as its config says;
        the other rows are copies.
    batch : int
        Number of trials in one forward pass.
    pulse : callable
        Function that is called before each forward pass. The function interrupts the evaluation if a
        stop was requested.

    Returns
    -------
    e_BD, logits_BK : Tensor
        Features and class scores.
    """
    assert not evrnet.training
    rows = evrnet.config.n_channels
    features, logits = [], []
    for part in x_BCT.split(batch):
        pulse()
        e_BD, logits_BK = evrnet(part[:, None, :rows])
        features.append(e_BD)
        logits.append(logits_BK)
    return torch.cat(features), torch.cat(logits)


@torch.no_grad()
def sample_images(
    unet: EGDDPM, noising_config: Any, e_BD: Tensor, *, steps: int, guidance_scale: float, seeds: list[int]
) -> Tensor:
    """Generate images from EEG features with the DDIM sampler.

    Parameters
    ----------
    unet : EGDDPM
        The network in evaluation mode.
    noising_config : dict
        Config of the noise scheduler that was used in training.
    e_BD : Tensor, shape (B, D)
        EEG features, on the network's device.
    steps : int
        Number of denoising steps.
    guidance_scale : float
        1: use only the prediction with the EEG condition. Above 1: use classifier-free guidance.
    seeds : list of int
        One seed for each trial. A trial's noise depends only on the trial's seed.

    Returns
    -------
    Tensor, shape (B, 3, H, W)
        Images with values from about -1 to 1.

    Raises
    ------
    RequestError
        If guidance is used but the network has no null vector, or `steps` is larger than the number of steps in
        training.
    """
    from diffusers import DDIMScheduler

    if guidance_scale != 1 and unet.null is None:
        raise RequestError(
            "this model was trained with ddpm.drop 0, so it cannot use guidance; give --guidance_scale 1"
        )
    # "trailing" starts sampling at the last, noisiest step of training. This fits, because x starts as pure noise.
    scheduler = DDIMScheduler.from_config(noising_config, timestep_spacing="trailing")
    if steps > scheduler.config.num_train_timesteps:
        raise RequestError(
            f"--steps is {steps}; it must not be above {scheduler.config.num_train_timesteps}, the number of "
            f"steps in the model's training"
        )
    size, device = unet.config.sample_size, e_BD.device
    noise = draw_noise((unet.config.in_channels, size, size), seeds, device).to(e_BD.dtype)
    kept_B = torch.ones(len(seeds), dtype=torch.bool, device=device)
    return sample(
        lambda x, time, condition: unet(x, time, *condition),
        scheduler,
        noise,
        (e_BD, kept_B) if guidance_scale != 1 else (e_BD, None),
        (e_BD, ~kept_B),
        steps=steps,
        guidance_scale=guidance_scale,
    )


def save_model(
    folder: Path, evrnet: EVRNet, unet: EGDDPM, noising: Any, spec: PreprocessSpec, extra: dict[str, Any]
) -> None:
    """Write the package of a trained DM-RE2I model. The folder appears only when the package is complete.

    Parameters
    ----------
    folder : Path
        The package folder to write, ``<run>/model``.
    evrnet : EVRNet
        Network that computes the features from EEG.
    unet : EGDDPM
        The trained U-Net.
    noising : DDPMScheduler
        The noise scheduler that was used in training.
    spec : PreprocessSpec
        Preprocessing of the EEG.
    extra : dict
        Information on the origin of the model, to be stored in dreamscale.json.
    """
    with atomic_directory(folder) as root:
        evrnet.save_pretrained(root / "evrnet")
        unet.save_pretrained(root / "unet")
        noising.save_pretrained(root / "scheduler")
        write_json(root / "preprocess.json", spec.to_dict())
        write_json(root / "dreamscale.json", {"kind": KIND, "schema": SCHEMA, **extra})


class DMRE2IGenerator:
    """Generate images from EEG trials with EVRNet and EG-DDPM.

    Parameters
    ----------
    folder : str or Path
        Package folder of the model, ``<run>/model``.
    device : str
        Device of the computation: cpu or cuda.

    Attributes
    ----------
    spec : PreprocessSpec
        Preprocessing that the EEG must have.
    part : dict
        Part of each trial that the model reads: `tmin` and `tmax` in seconds from the onset of the image.
    kind : str
        Kind of the model: ``eg_ddpm``.

    Raises
    ------
    RequestError
        If a file of the package is missing or damaged.
    """

    kind = KIND

    def __init__(self, folder: str | Path, device: str = "cpu") -> None:
        from diffusers import DDPMScheduler

        folder = Path(folder)
        values = check_group(read_json(folder / "dreamscale.json"), str(folder / "dreamscale.json"))
        if values.get("kind") != KIND or values.get("schema") != SCHEMA:
            raise RequestError(
                f"{folder}: not a '{KIND}' model of this version; train it again with 'dreamscale ddpm CONFIG'"
            )
        self.folder, self.device = folder, torch.device(device)
        self.part = read_part(values)
        try:
            about = folder / "preprocess.json"
            self.spec = PreprocessSpec.from_dict(check_preprocess(read_json(about), str(about)))
        except (TypeError, ValueError) as error:
            raise RequestError(
                f"{folder / 'preprocess.json'}: not a preprocessing spec ({one_line(error)}); train the model again"
            ) from None
        self.evrnet = EVRNet.from_pretrained(folder / "evrnet").requires_grad_(False).to(self.device)
        try:
            loaded: Any = EGDDPM.from_pretrained(str(folder / "unet"), local_files_only=True, output_loading_info=True)
            unet, report = loaded
            self.noising = DDPMScheduler.from_pretrained(str(folder / "scheduler"), local_files_only=True)
        except (OSError, ValueError, RuntimeError, TypeError, KeyError) as error:
            raise RequestError(
                f"{folder}: U-Net or scheduler cannot be loaded ({one_line(error)[:200]}); train the model again"
            ) from None
        odd = [*report["missing_keys"], *report["unexpected_keys"]]
        if odd:
            raise RequestError(
                f"{folder / 'unet'}: {len(odd)} parameters do not fit, e.g. {odd[0]}; train the model again"
            )
        self.unet = unet.eval().requires_grad_(False).to(self.device)

    @torch.no_grad()
    def generate(
        self, eeg_B128T: Tensor, *, steps: int = 50, guidance_scale: float = 1.0, seeds: list[int]
    ) -> np.ndarray:
        """Generate one image for each trial.

        Parameters
        ----------
        eeg_B128T : Tensor, shape (B, 128, T)
            EEG in microvolts, preprocessed by `spec`. Channels are repeated until there are 128.
        steps : int
            Number of denoising steps; 25 to 50 are enough.
        guidance_scale : float
            1, as in the paper: use only the prediction with the EEG condition. Above 1: use classifier-free guidance.
        seeds : list of int
            One seed for each trial. A trial's noise depends only on the trial's seed.

        Returns
        -------
        ndarray of uint8, shape (B, H, W, 3)
            Generated images in RGB.

        Raises
        ------
        RequestError
            If a trial has more channels than the network was made for, or the settings do not fit the model.
        """
        assert len(eeg_B128T) == len(seeds)
        rows = self.evrnet.config.n_channels
        if rows < eeg_B128T.shape[1] and (most := max(count_true_channels(eeg_CT) for eeg_CT in eeg_B128T)) > rows:
            raise RequestError(
                f"{self.folder}: this model takes up to {rows} channels, but a trial has {most}; train a model with "
                f"evrnet.channels {most} or more"
            )
        e_BD, _ = compute_features(self.evrnet, scale_eeg(eeg_B128T, self.spec, self.device))
        images = sample_images(
            self.unet, self.noising.config, e_BD, steps=steps, guidance_scale=guidance_scale, seeds=seeds
        )
        return to_pixels(images)
