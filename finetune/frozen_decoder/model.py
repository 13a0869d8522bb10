"""The package of a frozen decoder, and the generation of images with it.

Tensor shapes: B trials, C channels, T time points, P width of the embeddings, h rows and w columns of a latent.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_sharding.common.errors import RequestError
from data_sharding.common.files import atomic_directory, write_json
from data_sharding.common.typed_values import check_fields
from data_sharding.common.untrusted import check_group
from data_sharding.processing.preprocess import PreprocessSpec
from finetune.diffusion import SamplerName, Sampling, count_steps, draw_noise, make_generators
from finetune.frozen_decoder.config import DecoderConfig, LowLevelConfig, PriorConfig
from finetune.frozen_decoder.decoders import Decoder, load_decoder
from finetune.frozen_decoder.embeddings import EmbeddingScale
from finetune.frozen_decoder.predictors import Predictor, RidgePredictor, load_predictor
from finetune.frozen_decoder.prior import EmbeddingPrior, sample_embeddings
from finetune.generators import SCHEMA, Source, read_part, read_spec
from finetune.images import check_finite, read_caption, to_pixels
from finetune.linear.model import Floats
from finetune.linear.ridge import RidgeMap

KIND = "frozen_decoder"


@dataclass(frozen=True, kw_only=True)
class FrozenDecoderModel:
    """Everything that is learned for a frozen decoder."""

    predictor: Predictor | None
    """Predictor of image embeddings; None for the kind vae."""
    scale: EmbeddingScale | None
    """Scale of the embeddings; None for the kind vae."""
    prior: EmbeddingPrior | None = None
    """Diffusion prior."""
    latent: RidgePredictor | None = None
    """Predictor of the latents of coarse images, for the low-level path."""

    @property
    def readers(self) -> list[Predictor]:
        """All models that read EEG."""
        return [reader for reader in (self.predictor, self.latent) if reader is not None]

    def save_pretrained(self, folder: Path) -> None:
        """Write all parts to a package folder."""
        for reader in self.readers:
            reader.save_pretrained(folder)
        if self.scale is not None:
            self.scale.save(folder)
        if self.prior is not None:
            self.prior.save_pretrained(folder / "prior")

    @classmethod
    def from_pretrained(cls, folder: Path, spec: PreprocessSpec, kind: str, device: Any) -> FrozenDecoderModel:
        """Read the parts that `save_pretrained` wrote; `kind` is the kind of the decoder."""
        latent, prior = None, None
        if (folder / "latent").is_dir():
            latent = RidgePredictor(RidgeMap.from_pretrained(folder / "latent"), spec, "latent")
        if (folder / "prior").is_dir():
            prior = EmbeddingPrior.from_pretrained(folder / "prior").requires_grad_(False).to(device)
        if kind == "vae":
            return cls(predictor=None, scale=None, latent=latent)
        predictor, scale = load_predictor(folder, spec, device), EmbeddingScale.load(folder)
        widths = {predictor.width, len(scale.mean_P), *([] if prior is None else [prior.config.embedding])}
        if len(widths) != 1:
            raise RequestError(f"{folder}: the parts of the model have different widths; train the model again")
        return cls(predictor=predictor, scale=scale, prior=prior, latent=latent)


def save_model(
    folder: Path, model: FrozenDecoderModel, decoder: Decoder, spec: PreprocessSpec, values: dict[str, Any]
) -> None:
    """Write all files of a model to its package folder, which appears only when it is complete.

    The package does not contain the base model, but its name and digests of its weights.

    Parameters
    ----------
    folder : Path
        The package folder to write, ``<run>/model``.
    model : FrozenDecoderModel
        The model.
    decoder : Decoder
        The frozen image generator.
    spec : PreprocessSpec
        Preprocessing of the EEG.
    values : dict
        Further entries of dreamscale.json: `low_level`, `prior`, `eeg`, and the origin of the model.
    """
    with atomic_directory(folder) as root:
        model.save_pretrained(root)
        write_json(root / "preprocess.json", spec.to_dict())
        about = {"decoder": dataclasses.asdict(decoder.config), "digests": decoder.digest()}
        write_json(root / "dreamscale.json", {"kind": KIND, "schema": SCHEMA, **about, **values})


class FrozenDecoderGenerator:
    """Generate images from EEG trials with a frozen image generator.

    Parameters
    ----------
    folder : str or Path
        Package folder of the model, ``<run>/model``.
    values : dict
        Content of dreamscale.json, whose kind and schema `finetune.generators.load_generator` has checked.
    device : str
        Device of the computation: cpu or cuda.

    Attributes
    ----------
    spec : PreprocessSpec
        Preprocessing that the EEG must have.
    part : dict
        Part of each trial that the model reads: `tmin` and `tmax` in seconds from the onset of the image.
    kind : str
        Kind of the model: ``frozen_decoder``.

    Raises
    ------
    RequestError
        If a file of the package is missing or damaged, or if the base model is missing or has other weights than in
        the training.
    """

    kind = KIND

    def __init__(self, folder: str | Path, values: dict[str, Any], device: str = "cpu") -> None:
        self.folder, where = Path(folder), str(Path(folder) / "dreamscale.json")
        self.part = read_part(values, where)
        self.spec = read_spec(self.folder)
        self.low_level: LowLevelConfig = _read(LowLevelConfig, values, "low_level", where)
        self.prior: PriorConfig = _read(PriorConfig, values, "prior", where)
        config: DecoderConfig = _read(DecoderConfig, values, "decoder", where)
        self.model = FrozenDecoderModel.from_pretrained(self.folder, self.spec, config.kind, device)
        self.decoder = load_decoder(config)
        if self.decoder.digest() != values.get("digests"):
            raise RequestError(
                f"{where}: the base model {config.base} or the adapter has other weights than in the training of this "
                "model; get the same base again, or run 'dreamscale decode' again"
            )
        self.decoder.to(device)
        width = 0 if self.model.predictor is None else self.model.predictor.width
        latent = None if self.model.latent is None else self.model.latent.width
        expected = self.decoder.count_latent(self.low_level.size) if self.uses_latent else None
        if width != self.decoder.width or latent != expected:
            raise RequestError(f"{self.folder}: the parts of the model do not fit the decoder; train the model again")

    @property
    def uses_latent(self) -> bool:
        """Whether the model predicts the latents of coarse images."""
        return self.decoder.config.kind == "vae" or self.low_level.strength < 1

    @property
    def image_size(self) -> int:
        """Width and height of the generated images in pixels."""
        return self.low_level.size if self.decoder.config.kind == "vae" else self.decoder.image_size

    def choose_sampling(
        self, *, sampler: SamplerName | None = None, steps: int | None = None, guidance_scale: float | None = None
    ) -> Sampling:
        """Fill in the sampling settings that are None (see `finetune.generators.Generator`).

        The defaults are those of the config with which the model was made. The kind vae uses no sampler; its settings
        are recorded but not used.
        """
        if self.decoder.config.kind == "vae":
            return Sampling(sampler=sampler or "ddim", steps=steps or 1, guidance_scale=guidance_scale or 1.0)
        try:
            found = self.decoder.choose_sampling(sampler=sampler, steps=steps, guidance_scale=guidance_scale)
        except ValueError as error:
            raise RequestError(f"{self.folder}: {error}") from None
        if self.model.latent is not None and not count_steps(found.steps, self.low_level.strength):
            raise RequestError(
                f"{self.folder}: with low_level.strength {self.low_level.strength:g}, no step of {found.steps} steps "
                f"is left; use at least {int(np.ceil(1 / self.low_level.strength))} steps"
            )
        return found

    def use_bf16(self) -> None:
        """Store the weights of the U-Net in bf16, and compute with them."""
        self.decoder.unet.to(torch.bfloat16)

    def find_obstacle(self, source: Source, metas: Sequence[dict[str, Any]]) -> str:
        """Return why the model cannot generate images from a source (see `finetune.generators.Source`).

        Raises
        ------
        RequestError
            If a trial does not have all channels of a ridge regression, or its person has no regression.
        """
        if source != "eeg":
            if self.decoder.config.kind == "vae":
                return (
                    f"{self.folder}: the decoder kind vae needs EEG, so it has no control '{source}'; use 'none' or "
                    "'shuffle'"
                )
            return ""
        for reader in self.model.readers:
            reader.check(metas, self.folder)
        return ""

    @torch.no_grad()
    def generate(
        self,
        eeg_B128T: Tensor,
        *,
        seeds: list[int],
        steps: int | None = None,
        guidance_scale: float | None = None,
        sampler: SamplerName | None = None,
        source: Source = "eeg",
        metas: Sequence[dict[str, Any]] | None = None,
    ) -> np.ndarray:
        """Generate one image for each trial (see `finetune.generators.Generator`).

        For the source ``class``, the base model gets the caption of the image, or the name of the category, and no
        image embedding. For the source ``no_eeg``, it gets neither text nor embedding. Both start from noise alone.
        `metas` is needed for the names of the channels, and for the captions.

        Raises
        ------
        RequestError
            If the settings or the source do not fit the model.
        """
        if metas is None:
            raise RequestError(f"{self.folder}: give the trials' metadata, with the names of the channels")
        if obstacle := self.find_obstacle(source, metas):
            raise RequestError(obstacle)
        chosen = self.choose_sampling(sampler=sampler, steps=steps, guidance_scale=guidance_scale)
        coarse = self._predict_coarse(eeg_B128T, metas) if source == "eeg" and self.model.latent is not None else None
        if self.decoder.config.kind == "vae":
            assert coarse is not None
            return to_pixels(check_finite(coarse, self.folder))
        generators = make_generators(seeds)
        noise_B4hw = draw_noise(self.decoder.latent_shape, generators, self.decoder.device)
        if source == "eeg":
            embeds_BP = torch.from_numpy(self._predict_embeddings(eeg_B128T, metas, generators))
            condition = self.decoder.embed(embeds_BP, draw_noise((self.decoder.width,), generators, "cpu"))
        elif source == "class":
            condition = self.decoder.embed_captions([read_caption(meta) for meta in metas])
        else:
            condition = self.decoder.embed_nothing(len(seeds))
            chosen = dataclasses.replace(chosen, guidance_scale=1.0)
        images = self.decoder.sample(
            condition, noise_B4hw, chosen, generators, start_B3HW=coarse, strength=self.low_level.strength
        )
        return to_pixels(check_finite(images, self.folder))

    def _predict_embeddings(
        self, eeg_BCT: Tensor, metas: Sequence[dict[str, Any]], generators: list[torch.Generator]
    ) -> Floats:
        """Return embeddings [B, P] for the decoder."""
        assert self.model.predictor is not None and self.model.scale is not None
        predicted_BP = self.model.predictor.predict(eeg_BCT, metas)
        if self.model.prior is None:
            return self.model.scale.restore(predicted_BP)
        return sample_embeddings(self.model.prior, self.model.scale, predicted_BP, generators, self.prior)

    def _predict_coarse(self, eeg_BCT: Tensor, metas: Sequence[dict[str, Any]]) -> Tensor:
        """Return coarse images [B, 3, H, W] with values from -1 to 1."""
        assert self.model.latent is not None
        z_BX = torch.from_numpy(self.model.latent.predict(eeg_BCT, metas))
        side = self.low_level.size // self.decoder.pipeline.vae_scale_factor
        z_B4hw = z_BX.reshape(len(z_BX), -1, side, side).to(self.decoder.device)
        return self.decoder.decode(z_B4hw).clamp(-1, 1)


def _read(config_class: type, values: dict[str, Any], name: str, where: str) -> Any:
    """Read a group of settings from dreamscale.json."""
    group = check_fields(config_class, check_group(values.get(name), where, name), where)
    try:
        return config_class(**group)
    except ValueError as error:
        raise RequestError(f"{where}: {error}; train the model again") from None
