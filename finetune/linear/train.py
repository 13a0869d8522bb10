"""Train the linear baseline: ridge regression from the time courses of a trial to its image.

The command is ``dreamscale linear CONFIG``.

Array shapes: B trials, F features, K categories, P image components, M images.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from data_sharding.common.config import command
from data_sharding.common.errors import EXIT_DONE, RequestError
from data_sharding.dataset.dataset import EEGDataset
from finetune.eeg import EEGConfig, group_repeats
from finetune.images import ImageTable, find_components, open_train_val
from finetune.linear.model import Floats, LinearModel, save_model
from finetune.linear.time_courses import read_time_courses
from finetune.training.accelerate import quiet_libraries, report_finished, use_run
from pretrain.evidence.channels import find_common_channels
from pretrain.evidence.ridge import STRENGTHS, ridge_scores
from pretrain.runs.tracking import TrackerConfig

BATCH = 256
"""Number of trials that are read at once."""


@dataclass(frozen=True, kw_only=True)
class LinearConfig:
    """Train the linear baseline on an EEG-image dataset."""

    dataset: str
    """Path of the EEG-image dataset, which must have train and val splits."""
    output: str
    """Run directory, with the trained model in the subdirectory `model/`."""
    eeg: EEGConfig = field(default_factory=EEGConfig)
    """Part of each trial that the model reads, and how repeated presentations are averaged in val trials."""
    channels: int = 128
    """Largest number of channels that the model reads, from 1 to 128. The model reads channels that all trials of the
    splits train and val have in common, in the order of the first trial. Channels are compared by name."""
    bins: int = 25
    """Number of time bins. The EEG of a channel is averaged over each time bin."""
    image_size: int = 32
    """Width and height in pixels of the images that the model shows."""
    components: int = 16
    """Number of principal components of the images that the model predicts."""
    tracker: TrackerConfig = field(default_factory=TrackerConfig)
    """Experiment tracker to which metrics are sent, in addition to the file metrics.jsonl."""

    def __post_init__(self) -> None:
        if not 1 <= self.channels <= 128 or self.image_size < 1:
            raise ValueError(
                "'channels' must be from 1 to 128 and 'image_size' at least 1, got "
                f"{self.channels} and {self.image_size}"
            )
        if self.bins < 1 or self.components < 1:
            raise ValueError(f"'bins' and 'components' must be at least 1, got {self.bins} and {self.components}")


def _read_features(data: EEGDataset, groups: list[list[int]], channels: Sequence[str], bins: int) -> Floats:
    parts = [groups[start : start + BATCH] for start in range(0, len(groups), BATCH)]
    return np.concatenate([read_time_courses(data, part, channels, bins) for part in parts])


def _choose_channels(config: LinearConfig, data: EEGDataset, val: EEGDataset) -> list[str]:
    found = find_common_channels([(split, range(len(split))) for split in (data, val)])
    if not found:
        raise RequestError(
            f"{config.dataset}: the trials of the splits train and val have no channel in common, so no map can be "
            "fitted; make a dataset from recordings with common channels"
        )
    return found[: config.channels]


def fit_linear_model(config: LinearConfig, data: EEGDataset, val: EEGDataset) -> tuple[LinearModel, dict[str, float]]:
    """Fit the linear map, and choose the ridge penalty on the val split.

    Parameters
    ----------
    config : LinearConfig
        Config of the command.
    data, val : EEGDataset
        Trials of the train split and of the val split.

    Returns
    -------
    model : LinearModel
        The model.
    scores : dict
        Results on the val split. ``accuracy``: accuracy of the category. ``similarity``: mean cosine similarity of the
        predicted and the true components. ``penalty``: the ridge penalty for which the sum of accuracy and similarity
        is largest.

    Raises
    ------
    RequestError
        If a time bin would be shorter than one sample, or if the trials have no channel in common.
    """
    if config.bins > data.n_times:
        raise RequestError(
            f"'bins' is {config.bins}, but a trial has {data.n_times} samples; set 'bins' to at most {data.n_times}"
        )
    tables = ImageTable(data), ImageTable(val)
    images, held = (table.pixels(size=config.image_size) for table in tables)
    components_MP, held_MP = find_components(images, held, config.components)
    one_hot_MK = np.eye(len(data.labels), dtype=np.float32)[tables[0].labels]

    channels = _choose_channels(config, data, val)
    groups = group_repeats(data, 1)
    x_BF = _read_features(data, groups, channels, config.bins)
    val_groups = group_repeats(val, config.eeg.average_repeats)
    val_BF = _read_features(val, val_groups, channels, config.bins)
    targets_ML = np.concatenate([one_hot_MK, components_MP], axis=1)
    y_BL = targets_ML[tables[0].row_of]
    rows = tables[1].row_of[[group[0] for group in val_groups]]
    labels_B, true_BP = tables[1].labels[rows], held_MP[rows]

    def score(out_BL: np.ndarray) -> tuple[float, float]:
        k = one_hot_MK.shape[1]
        predicted_BP = out_BL[:, k:]
        norms = np.linalg.norm(predicted_BP, axis=1) * np.linalg.norm(true_BP, axis=1)
        similarity = float(((predicted_BP * true_BP).sum(axis=1) / np.maximum(norms, 1e-12)).mean())
        return float((out_BL[:, :k].argmax(axis=1) == labels_B).mean()), similarity

    # The map is linear, so the weights of one feature are the outputs for (mean + the feature's unit vector) minus the
    # outputs for the mean.
    mean_F = x_BF.mean(axis=0)
    units_UF = np.concatenate([mean_F[None], mean_F + np.eye(len(mean_F), dtype=np.float32)])
    maps = [(out_UL[1:] - out_UL[0], out_UL[0]) for out_UL in ridge_scores(x_BF, y_BL, units_UF)]
    found = [score((val_BF - mean_F) @ weight_FL + bias_L) for weight_FL, bias_L in maps]
    # If several penalties are equally good, use the strongest penalty.
    best = max(range(len(found)), key=lambda i: (sum(found[i]), i))
    model = LinearModel(
        channels=tuple(channels),
        bins=config.bins,
        mean_F=mean_F.astype(np.float32),
        weight_FL=maps[best][0].astype(np.float32),
        bias_L=maps[best][1].astype(np.float32),
        labels_M=tables[0].labels.astype(np.int64),
        components_MP=components_MP.astype(np.float32),
        images_MHW3=images,
    )
    accuracy, similarity = found[best]
    return model, {"accuracy": accuracy, "similarity": similarity, "penalty": float(STRENGTHS[best])}


def train(config: LinearConfig) -> int:
    """Train the linear baseline.

    Parameters
    ----------
    config : LinearConfig
        Config of the command.

    Returns
    -------
    int
        Exit code of the command.
    """
    quiet_libraries()
    data, val = open_train_val(config.dataset, config.eeg.part, "linear", [config.output])
    with use_run(config, None) as run:
        if report_finished(run):
            return EXIT_DONE
        model, scores = fit_linear_model(config, data, val)
        origin = {"dataset_id": data.manifest.dataset_id, "dataset_version": data.manifest.version}
        extra = {**origin, "labels": data.labels, "eeg": config.eeg.part, "val": scores}
        save_model(run.path / "model", model, data.spec, extra)
        run.log(0, **{f"val/{name}": value for name, value in scores.items()})
        run.status("done", val=scores)
        print(
            f"linear baseline: val accuracy {scores['accuracy']:.3f} (chance {1 / len(data.labels):.3f}), similarity "
            f"{scores['similarity']:.3f} -> {run.path / 'model'}; next: dreamscale generate {run.path / 'model'} "
            f"{config.dataset} -o OUT"
        )
    return EXIT_DONE


main = command(LinearConfig, train, prog="dreamscale linear")

if __name__ == "__main__":
    sys.exit(main())
