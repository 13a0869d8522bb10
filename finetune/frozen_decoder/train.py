"""Fit what a frozen image generator needs to decode EEG: predictions of image embeddings, and of coarse images.

The command is ``dreamscale decode CONFIG``.

Tensor shapes: B trials, M different images, P width of the embeddings, h rows and w columns of a latent.
"""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from data_sharding.common.config import command
from data_sharding.common.errors import EXIT_DONE, RequestError
from data_sharding.dataset.batch import Batch
from data_sharding.dataset.dataset import EEGDataset
from finetune.eeg import choose_evenly, group_repeats
from finetune.frozen_decoder.config import FrozenDecoderConfig
from finetune.frozen_decoder.decoders import Decoder, load_decoder
from finetune.frozen_decoder.embeddings import EmbeddingScale, measure_norm, normalise
from finetune.frozen_decoder.model import FrozenDecoderModel, save_model
from finetune.frozen_decoder.predictors import EncoderPredictor, Predictor, RidgePredictor, predict_groups
from finetune.frozen_decoder.prior import EmbeddingPrior, PriorNetworkConfig, scale_predicted, scale_target
from finetune.images import ImageTable, open_train_val
from finetune.linear.model import Floats
from finetune.linear.ridge import fit_ridge, predict_out_of_fold
from finetune.objective import DenoisingWatcher
from finetune.retrieval.maps import RIDGE, AlignmentRun
from finetune.targets.images import embed_images
from finetune.targets.latents import encode_images
from finetune.targets.models import load_clip
from finetune.training.accelerate import (
    get_world,
    make_accelerator,
    make_loader,
    quiet_libraries,
    report_finished,
    use_run,
)
from finetune.training.config import free_keys
from finetune.training.fit import fit
from finetune.training.step_random import StepRandom
from pretrain.runs.directory import RunDirectory
from pretrain.runs.distributed import World

if TYPE_CHECKING:
    from accelerate import Accelerator

MEASURED = 2048
"""Largest number of train trials from which the mean prediction of an encoder is computed."""


@dataclass(frozen=True, kw_only=True)
class _Data:
    """The splits, their images, and the val trials on which the predictions are measured."""

    train: EEGDataset
    val: EEGDataset
    table: ImageTable
    val_table: ImageTable
    groups: list[list[int]]
    """Presentations of each val trial."""
    part: dict[str, float | None]
    """Part of each trial that is read."""

    @property
    def rows_B(self) -> np.ndarray:
        """Row of the image of each val trial in `val_table`."""
        return self.val_table.row_of[[group[0] for group in self.groups]]


def _open(config: FrozenDecoderConfig, run: AlignmentRun | None) -> _Data:
    part = dict(config.eeg.part)
    if run is not None:
        if any(value is not None for value in part.values()) and part != run.part:
            raise RequestError(
                f"the alignment run {config.predictor} was trained with eeg.tmin {run.part['tmin']} and eeg.tmax "
                f"{run.part['tmax']}; remove the keys eeg.tmin and eeg.tmax, or set the same values"
            )
        part = dict(run.part)
    train, val = open_train_val(config.dataset, part, "decode", [config.output])
    if run is not None:
        train.require_preprocess(run.encoder.spec, "encoder of the alignment run")
    groups = group_repeats(val, config.eeg.average_repeats)
    return _Data(train=train, val=val, table=ImageTable(train), val_table=ImageTable(val), groups=groups, part=part)


def _score(predicted_BP: Floats, target_MP: Floats, rows_B: np.ndarray) -> dict[str, float]:
    """Measure predictions of val trials: their similarity to the own image, and the identification of this image."""
    similarity_BM = normalise(predicted_BP) @ normalise(target_MP).T
    own_B = similarity_BM[np.arange(len(rows_B)), rows_B]
    if similarity_BM.shape[1] < 2:
        return {"similarity": float(own_B.mean())}
    less_B = (similarity_BM < own_B[:, None]).sum(axis=1) + ((similarity_BM == own_B[:, None]).sum(axis=1) - 1) / 2
    return {"similarity": float(own_B.mean()), "identification": float(less_B.mean() / (similarity_BM.shape[1] - 1))}


def _fit_predictor(
    config: FrozenDecoderConfig, run: AlignmentRun | None, data: _Data, target_MP: Floats, device: Any
) -> Predictor:
    if run is not None:
        return EncoderPredictor(run.encoder, run.head, device, run.people)
    ridge = config.ridge
    model = fit_ridge(
        data.train, target_MP, data.val, bins=ridge.bins, fit=ridge.fit, people=_choose_people(config, data)
    )
    return RidgePredictor(model, data.train.spec)


def _choose_people(config: FrozenDecoderConfig, data: _Data) -> EEGDataset | None:
    return data.train if config.ridge.fit == "each" else None


def _embed(
    config: FrozenDecoderConfig, clip: str, decoder: Decoder, data: _Data, world: World
) -> tuple[Floats, Floats]:
    """Compute the embeddings of the images of both splits."""
    found = [embed_images(table, clip, world=world).numpy() for table in (data.table, data.val_table)]
    if found[0].shape[1] != decoder.width:
        raise RequestError(
            f"{clip}: the image embeddings have width {found[0].shape[1]}, but the decoder ({config.decoder.base}, "
            f"{config.decoder.kind}) reads embeddings of width {decoder.width}; give the CLIP model with which the "
            "decoder was trained"
        )
    return found[0], found[1]


def _fit_latent(
    config: FrozenDecoderConfig, decoder: Decoder, data: _Data, world: World
) -> tuple[RidgePredictor | None, dict[str, float]]:
    """Fit the ridge regression to the latents of coarse images."""
    if config.decoder.kind != "vae" and config.low_level.strength == 1:
        return None, {}
    size, ridge = config.low_level.size, config.ridge
    target_MX, val_MX = (
        encode_images(table, decoder.vae, size, world=world)[:, 0].flatten(1).numpy()
        for table in (data.table, data.val_table)
    )
    model = fit_ridge(
        data.train, target_MX, data.val, bins=ridge.bins, fit=ridge.fit, people=_choose_people(config, data)
    )
    latent = RidgePredictor(model, data.train.spec, "latent")
    mean_X = target_MX.mean(axis=0)
    predicted_BX = _predict_val(latent, data)
    if predicted_BX is None:
        return latent, {}
    scores = _score(predicted_BX - mean_X, val_MX - mean_X, data.rows_B)
    return latent, {f"latent_{name}": value for name, value in scores.items()}


def _predict_val(predictor: Predictor, data: _Data) -> Floats | None:
    """Predict the vectors of the val trials; None if a person of val has no regression."""
    if isinstance(predictor, RidgePredictor) and predictor.model.fit == "each":
        try:
            predictor.model.check_people(data.val.meta(group[0]) for group in data.groups)
        except RequestError as error:
            print(f"the predictions are not measured on the val split: {error}")
            return None
    return predict_groups(predictor, data.val, data.groups)


def _fit_prior(
    config: FrozenDecoderConfig,
    data: _Data,
    predictor: Predictor,
    scale: EmbeddingScale,
    targets: tuple[Floats, Floats],
    accelerator: Accelerator,
    run: RunDirectory,
) -> tuple[EmbeddingPrior, dict[str, float]]:
    """Train the diffusion prior."""
    everyone = [[number] for number in range(len(data.train))]
    if isinstance(predictor, RidgePredictor):
        predicted_BP = predict_out_of_fold(data.train, targets[0], predictor.model)
    else:
        predicted_BP = predict_groups(predictor, data.train, everyone)
    given_BP, clean_MP = scale_predicted(scale, predicted_BP), scale_target(scale, targets[0])
    torch.manual_seed(config.seed)
    prior = EmbeddingPrior(
        PriorNetworkConfig(embedding=clean_MP.shape[1], width=config.prior.width, depth=config.prior.depth)
    )

    def inputs(batch: Batch, random: StepRandom) -> dict[str, Tensor]:
        b, clean = len(batch.numbers), clean_MP[data.table.row_of[batch.numbers]]
        return {
            "given": given_BP[batch.numbers],
            "clean": clean,
            "noise": random.normal(*clean.shape),
            "time": random.integers(prior.noise_steps, b),
            "keep": random.uniform(b) >= config.prior.drop,
        }

    val_BP = _predict_val(predictor, data)
    watcher = None
    if val_BP is not None:
        watcher = DenoisingWatcher(
            scale_predicted(scale, val_BP).to(accelerator.device),
            scale_target(scale, targets[1])[data.rows_B],
            prior.noise_steps,
        )
    result = fit(
        prior,
        config=config.prior.training,
        seed=config.seed,
        accelerator=accelerator,
        run=run,
        loader=make_loader(data.train, config.prior.training, config.seed, accelerator),
        inputs=inputs,
        evaluate=watcher,
        description="prior",
    )
    return prior.eval(), {f"prior_{name}": value for name, value in result.best.items()}


def _fit_all(
    config: FrozenDecoderConfig,
    alignment: AlignmentRun | None,
    clip: str,
    decoder: Decoder,
    data: _Data,
    accelerator: Accelerator,
    run: RunDirectory,
) -> tuple[FrozenDecoderModel, dict[str, float]]:
    """Fit all parts of the model, and measure them on the val split."""
    latent, scores = _fit_latent(config, decoder, data, get_world(accelerator))
    if not decoder.width:
        return FrozenDecoderModel(predictor=None, scale=None, latent=latent), scores
    device = accelerator.device
    targets = _embed(config, clip, decoder, data, get_world(accelerator))
    predictor = _fit_predictor(config, alignment, data, targets[0], device)
    chosen = [[number] for number in choose_evenly(len(data.train), MEASURED)]
    model, processor = load_clip(clip)
    norm = measure_norm(data.table, model, processor, device)
    scale = EmbeddingScale.measure(targets[0], predict_groups(predictor, data.train, chosen), norm)
    predicted_BP = _predict_val(predictor, data)
    if predicted_BP is not None:
        scores |= _score(scale.restore(predicted_BP) / norm - scale.mean_P, targets[1] - scale.mean_P, data.rows_B)
    prior = None
    if config.prior.enabled:
        prior, found = _fit_prior(config, data, predictor, scale, targets, accelerator, run)
        scores |= found
    return FrozenDecoderModel(predictor=predictor, scale=scale, prior=prior, latent=latent), scores


def train(config: FrozenDecoderConfig) -> int:
    """Fit the predictions that a frozen image generator needs.

    Parameters
    ----------
    config : FrozenDecoderConfig
        Config of the command.

    Returns
    -------
    int
        Exit code of the command.
    """
    quiet_libraries()
    alignment = None if config.predictor == RIDGE else AlignmentRun.load(config.predictor)
    clip = config.clip or ""
    if alignment is not None and alignment.layer is not None:
        raise RequestError(
            f"{config.predictor}: this encoder was aligned with the hidden layer {alignment.layer}, but decoders read "
            "the final embedding; align without target.layer"
        )
    data = _open(config, alignment)
    decoder = load_decoder(config.decoder)
    if config.low_level.size % decoder.pipeline.vae_scale_factor:
        raise RequestError(
            f"low_level.size is {config.low_level.size}, but must be a multiple of {decoder.pipeline.vae_scale_factor} "
            f"for {config.decoder.base}"
        )
    if decoder.width and alignment is not None and alignment.head.config.projection != decoder.width:
        raise RequestError(
            f"{config.predictor}: the alignment run predicts embeddings of width {alignment.head.config.projection}, "
            f"but the decoder reads embeddings of width {decoder.width}; align with the CLIP model of the decoder"
        )
    accelerator = make_accelerator(num_processes=1, device=config.device, precision=config.prior.training.precision)
    free = free_keys("prior.training", independent_samples=True)
    with use_run(config, accelerator, free=free) as run:
        if report_finished(run):
            return EXIT_DONE
        model, scores = _fit_all(config, alignment, clip, decoder, data, accelerator, run)
        manifest = data.train.manifest
        prior = {name: value for name, value in dataclasses.asdict(config.prior).items() if name != "training"}
        values: dict[str, Any] = {
            "low_level": dataclasses.asdict(config.low_level),
            "prior": prior,
            "predictor": config.predictor,
            "clip": clip,
            "labels": data.train.labels,
            "eeg": data.part,
            "dataset_id": manifest.dataset_id,
            "dataset_version": manifest.version,
            "val": scores,
        }
        save_model(run.path / "model", model, decoder, data.train.spec, values)
        run.log(0, **{f"val/{name}": value for name, value in scores.items()})
        run.status("done", val=scores)
        shown = ", ".join(f"{name} {value:.3f}" for name, value in scores.items())
        print(
            f"frozen decoder: on the val split, {shown or 'nothing was measured'} -> {run.path / 'model'}; next: "
            f"dreamscale generate {run.path / 'model'} {config.dataset} -o OUT"
        )
    accelerator.end_training()
    return EXIT_DONE


main = command(FrozenDecoderConfig, train, prog="dreamscale decode")

if __name__ == "__main__":
    sys.exit(main())
