"""Compare EVRNet with its baselines on people and images that no network was trained on.

The command is ``python -m finetune.dm_re2i.classification.compare SETTINGS --output DIR``, where SETTINGS is a config
of ``dreamscale ddpm``. Every network is trained with the same settings, and again with shuffled categories as a
control. For each network, the weights with the best result on the val split are used. The split on which the networks
are compared is used only once, at the end.

Array shapes: n trials.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from data_sharding.common.config import command, parse_config
from data_sharding.common.errors import EXIT_DONE, RequestError
from data_sharding.common.files import atomic_write_text, write_json
from finetune.dm_re2i.classification.measure import evaluate_classifier, save_results
from finetune.dm_re2i.config import DMRE2IConfig
from finetune.dm_re2i.networks import NAMES, load_classifier
from finetune.dm_re2i.train import train
from finetune.images import ImageTable, open_paired
from finetune.training.accelerate import quiet_libraries
from pretrain.evidence.statistics import accuracy_interval, difference_interval, flip_test
from pretrain.runs.checkpoint import read_values
from pretrain.runs.distributed import choose_device

Network = Literal["evrnet", "eegnet", "tsconv", "frozen", "trained"]
RESAMPLES = 10_000
"""Number of resamples of the bootstrap and of the permutation test."""


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """Train EVRNet and its baselines, and compare them on held-out people and images."""

    settings: str
    """YAML file of `dreamscale ddpm`, whose sections `eeg` and `evrnet` are the settings of every network."""
    output: str
    """Output folder for the training runs, `comparison.json`, the table `comparison.md` and the figure
    `comparison.png`."""
    dataset: str | None = None
    """Path of the EEG-image dataset; by default the dataset of the YAML file."""
    networks: tuple[Network, ...] = ("evrnet", "eegnet", "tsconv")
    """Networks to compare. frozen: the pretrained encoder `encoder`, frozen, with a linear head. trained: the encoder
    trained together with a linear head. The dropout rate of the YAML file is used only for EVRNet."""
    encoder: str | None = None
    """Encoder package for the networks frozen and trained."""
    split: Literal["val", "test"] = "test"
    """Split on which the networks are compared. Results on the val split are too good, because the val split was used
    to choose the weights."""
    control: bool = True
    """True: also train every network with shuffled categories, which doubles the computing time."""
    seeds: tuple[int, ...] = (0,)
    """Seeds with which every network is trained."""
    steps: int | None = None
    """Number of training steps; by default the number in the YAML file."""
    device: str = "auto"
    """Device of the computation: auto, cpu or cuda."""

    def __post_init__(self) -> None:
        if not self.networks or not self.seeds:
            raise ValueError("the keys 'networks' and 'seeds' must not be empty")
        if self.encoder is None and {"frozen", "trained"} & set(self.networks):
            raise ValueError("the networks 'frozen' and 'trained' need an encoder package; set the key 'encoder'")


def _make_words(config: CompareConfig, network: str, shuffled: bool, seed: int, output: Path) -> list[str]:
    """Return the command-line arguments for the training of one network."""
    keys: dict[str, Any] = {
        "output": output,
        "stages": "evrnet",
        "seed": seed,
        "device": config.device,
        "num_processes": 1,
        "tracker.kind": "none",
        "evrnet.network": network,
        "evrnet.permute_labels": shuffled,
    }
    if config.dataset is not None:
        keys["dataset"] = config.dataset
    if config.steps is not None:
        keys["evrnet.training.steps"] = config.steps
    if network != "evrnet":
        keys["evrnet.dropout"] = "null"
    if network in ("frozen", "trained"):
        keys |= {"evrnet.network": "encoder", "evrnet.encoder": config.encoder, "evrnet.whiten": 0}
        keys["evrnet.train_encoder"] = network == "trained"
    if network == "frozen":
        keys["evrnet.image_weight"] = 0
    return [config.settings, *(word for key, value in keys.items() for word in (f"--{key}", str(value)))]


def _name(network: str) -> str:
    if network in ("frozen", "trained"):
        return f"{NAMES['encoder']}, {'frozen' if network == 'frozen' else 'trained along'}"
    return NAMES[network]


def _compare_pair(more_n: NDArray[Any], people_n: NDArray[Any], images_n: NDArray[Any]) -> dict[str, Any]:
    """Summarise the difference in accuracy between two networks on the same trials: mean, intervals and p-values.

    There are two intervals and two p-values. The interval and the p-value over people are valid even if trials of one
    person depend on each other. The interval and the p-value over images are valid even if trials of one image depend
    on each other.
    """
    found: dict[str, Any] = {"mean": float(more_n.mean())}
    for unit, clusters in (("people", people_n), ("images", images_n)):
        found[f"interval_{unit}"] = difference_interval(more_n, clusters, RESAMPLES, 0)
        found[f"p_{unit}"] = flip_test(more_n, clusters, RESAMPLES, 0)
    return found


def summarise_runs(
    hits: dict[tuple[str, bool], NDArray[Any]], people: Sequence[str], images: Sequence[str], networks: Sequence[str]
) -> dict[str, Any]:
    """Compute the accuracy of each network, and its differences from the network's control and from the first network.

    Parameters
    ----------
    hits : dict
        Maps the pair (network, whether its categories were shuffled in training) to an array of shape (n,) with one
        value for each trial: the share of training seeds for which the network predicts the right category.
    people, images : sequence of str
        Person and image of each trial.
    networks : sequence of str
        Names of the networks. The second network and all further networks are compared with the first network.

    Returns
    -------
    dict
        For each network: ``accuracy``, its 95 % intervals ``interval_people`` and ``interval_images`` (valid even if
        trials of one person, or of one image, depend on each other), and ``people`` (accuracy of each person).
        ``shuffled`` holds the same values for the control: the same network, trained with shuffled categories. The
        differences are ``minus_shuffled`` (from the control) and ``minus_first`` (from the first network).
    """
    people_n, images_n = np.asarray(people), np.asarray(images)

    def describe(own_n: NDArray[Any]) -> dict[str, Any]:
        return {
            "accuracy": float(own_n.mean()),
            "interval_people": accuracy_interval(own_n, people_n),
            "interval_images": accuracy_interval(own_n, images_n),
            "people": {name: float(own_n[people_n == name].mean()) for name in sorted(set(people))},
        }

    result: dict[str, Any] = {}
    for network in networks:
        own_n = hits[network, False]
        result[network] = describe(own_n)
        if (network, True) in hits:
            result[network]["shuffled"] = describe(hits[network, True])
            result[network]["minus_shuffled"] = _compare_pair(own_n - hits[network, True], people_n, images_n)
        if network != networks[0]:
            result[network]["minus_first"] = _compare_pair(own_n - hits[networks[0], False], people_n, images_n)
    return result


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def _make_table(result: dict[str, Any]) -> str:
    """Return the results as a table in Markdown."""
    lines = [
        "| network | parameters | right, % | over people | over images | with shuffled categories, % | minus EVRNet |",
        "|---|---|---|---|---|---|---|",
    ]
    for network, found in result["networks"].items():
        ranges = ["{} to {}".format(*map(_percent, found[f"interval_{unit}"])) for unit in ("people", "images")]
        shuffled = _percent(found["shuffled"]["accuracy"]) if "shuffled" in found else "-"
        difference = "-"
        if "minus_first" in found:
            low, high = found["minus_first"]["interval_people"]
            difference = f"{100 * found['minus_first']['mean']:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"
        cells = [_name(network), f"{found['parameters']:,}", _percent(found["accuracy"]), *ranges, shuffled, difference]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _draw(result: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    networks = result["networks"]
    figure, axes = plt.subplots(figsize=(2 + 1.6 * len(networks), 4.2), constrained_layout=True)
    for place, found in enumerate(networks.values()):
        for offset, kind, colour in ((-0.2, found, "tab:blue"), (0.2, found.get("shuffled"), "tab:grey")):
            if kind is None:
                continue
            low, high = kind["interval_people"]
            label = ("own categories" if offset < 0 else "shuffled categories") if place == 0 else None
            axes.bar(place + offset, kind["accuracy"], 0.36, color=colour, label=label)
            ends = [[max(0.0, kind["accuracy"] - low)], [max(0.0, high - kind["accuracy"])]]
            axes.errorbar(place + offset, kind["accuracy"], ends, color="black", capsize=3)
            values = list(kind["people"].values())
            axes.plot(np.full(len(values), place + offset), values, "o", color="white", mec="black", ms=4)
    axes.axhline(result["chance"], color="tab:red", linestyle="--", label="chance")
    axes.set_xticks(range(len(networks)), [_name(name).replace(" with ", "\nwith ") for name in networks])
    title = f"{result['split']}: {result['trials']} trials of {result['people']} people"
    axes.set(ylabel="share of right answers", ylim=(0, 1), title=title)
    axes.legend(loc="upper right")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def compare(config: CompareConfig) -> int:
    """Train and compare the networks.

    Parameters
    ----------
    config : CompareConfig
        Config of the command.

    Returns
    -------
    int
        Exit code of the command.
    """
    quiet_libraries()
    output, device = Path(config.output), choose_device(config.device)
    parsed: dict[tuple[str, bool, int], DMRE2IConfig] = {}
    for network in config.networks:
        for shuffled in (False, True) if config.control else (False,):
            for seed in config.seeds:
                folder = output / f"{network}{'_shuffled' if shuffled else ''}_seed{seed}"
                words = _make_words(config, network, shuffled, seed, folder)
                # Read all configs before the first training, so that a wrong key is refused at once.
                parsed[network, shuffled, seed] = parse_config(
                    DMRE2IConfig, words, prog="dreamscale ddpm", positionals=("config",)
                )
    first = next(iter(parsed.values()))
    data = open_paired(first.dataset, config.split, tmin=first.eeg.tmin, tmax=first.eeg.tmax)
    for own in parsed.values():
        loader = read_values(Path(own.output) / "evrnet" / "checkpoints").get("loader") or {}
        if loader.get("dataset_id", data.manifest.dataset_id) != data.manifest.dataset_id:
            raise RequestError(
                f"{own.output}: this network was trained on another version of {first.dataset}; choose another output, "
                "so that all networks are trained on the same version"
            )
    table = ImageTable(data)
    hits: dict[tuple[str, bool], list[NDArray[Any]]] = {}
    parameters: dict[str, int] = {}
    people: list[str] = []
    images: list[str] = []
    for (network, shuffled, seed), own in parsed.items():
        print(f"{_name(network)}, {'shuffled categories' if shuffled else 'own categories'}, seed {seed}", flush=True)
        train(own)
        net = load_classifier(Path(own.output) / "evrnet" / "package").to(device)
        parameters[network] = sum(p.numel() for p in net.parameters())
        found = evaluate_classifier(net, data, table, device, own.eeg.average_repeats)
        save_results(found.summary, Path(own.output) / config.split)
        hits.setdefault((network, shuffled), []).append(found.right_B.astype(float))
        people, images = found.subjects, found.images
    means = {key: np.mean(values, axis=0) for key, values in hits.items()}
    networks = summarise_runs(means, people, images, config.networks)
    for name in networks:
        networks[name]["parameters"] = parameters[name]
    result = {
        "dataset_id": data.manifest.dataset_id,
        "split": config.split,
        "trials": len(people),
        "people": len(set(people)),
        "images": len(set(images)),
        "chance": 1 / len(data.labels),
        "seeds": list(config.seeds),
        "networks": networks,
    }
    write_json(output / "comparison.json", result)
    atomic_write_text(output / "comparison.md", _make_table(result))
    _draw(result, output / "comparison.png")
    print(f"{_make_table(result)}chance: {_percent(result['chance'])} % -> {output / 'comparison.json'}")
    return EXIT_DONE


main = command(
    CompareConfig, compare, prog="python -m finetune.dm_re2i.classification.compare", positionals=("settings",)
)

if __name__ == "__main__":
    sys.exit(main())
