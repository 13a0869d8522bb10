"""Reads the released files of EEG-ImageNet. Six subjects saw images of 40 ImageNet categories, in blocks.

A recording has 128 channels. A trial has about 500 time points, and 440 of them are used.
"""

from __future__ import annotations

import operator
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from data_sharding.common.errors import RequestError
from data_sharding.common.reason import Reason
from data_sharding.corpora.array_signal import NOMINAL_V, STANDARDISED, ArraySignal
from data_sharding.corpora.base import Adapter, CorpusConfig, register
from data_sharding.corpora.item import Item, Trial
from data_sharding.corpora.paths import check_folder, check_images, check_local_folder, recording_key, root_name
from data_sharding.corpora.safe_pickle import RefusedPickle, load_torch
from data_sharding.dataset.splits import SPLITS
from data_sharding.formats.signal import Signal
from data_sharding.formats.sniffing import Recording

SFREQ = 1000.0
N_CHANNELS = 128
LENGTHS = (450, 600)
"""Smallest and largest number of samples in a trial. Trials of other lengths are left out, as in the published work."""
USED = slice(20, 460)
"""Range of samples of a trial that are used. The first 20 ms are left out, because they contain the response to the
previous image."""


@dataclass(frozen=True, kw_only=True)
class EEGImageNetOptions:
    """Options for EEG-ImageNet: which released files to use."""

    file: str = "eeg_5_95_std.pth"
    """File in root with the recordings: eeg_5_95_std.pth, eeg_14_70_std.pth or eeg_55_95_std.pth. The numbers in the
    name are the frequency band in Hz."""
    splits: str = "block_splits_by_image_all.pth"
    """File in root with the released split by image: block_splits_by_image_all.pth, or
    block_splits_by_image_single.pth for subject 4. If empty, a hash of the image name decides the split."""
    fold: int = 0
    """Index of the split to use, from 0, because the file in the option 'splits' contains several splits."""
    unit: Literal["standardised", "uV"] = "standardised"
    """Unit of the values. The released *_std files are standardised and have no unit."""


@register("eeg_imagenet")
class EEGImageNetCorpus(Adapter):
    """Corpus of EEG-ImageNet: one recording for each subject, with one segment for each trial.

    References
    ----------
    Spampinato et al., Deep learning human mind for automated visual classification, CVPR 2017.
    Li et al., The perils and pitfalls of block design for EEG classification experiments, TPAMI 43 (2021).
    """

    keys = frozenset({"images"})
    needs_images = True
    options = EEGImageNetOptions

    def items(self, config: CorpusConfig) -> list[Item]:
        """List one recording for each subject; see `Adapter.items`."""
        options: EEGImageNetOptions = self.read_options(config)
        root, images = check_local_folder(config), check_folder(config.images, "corpora: images")
        path = root / options.file
        content = _load(path)
        entries, labels, names = _tables(path, content)
        split_of = _splits(root / options.splits, options.fold, len(entries)) if options.splits else None
        subjects: dict[int, list[Trial]] = defaultdict(list)
        kept: dict[int, list[int]] = defaultdict(list)
        left_out: dict[int, Counter[str]] = defaultdict(Counter)
        block_number: Counter[int] = Counter()
        for index, entry in enumerate(entries):
            subject = int(entry["subject"])
            if reason := _fault(entry, split_of is not None and index not in split_of):
                left_out[subject][reason] += 1
                continue
            label, image = labels[int(entry["label"])], names[int(entry["image"])]
            synset = image.split("_")[0]
            trials = subjects[subject]
            if trials and trials[-1].label_name != label:
                block_number[subject] += 1
            trials.append(
                Trial(
                    onset=len(trials) * (USED.stop - USED.start) / SFREQ,
                    image=str(images / synset / f"{image}.JPEG"),
                    image_id=image,
                    label_name=label,
                    caption=label,
                    split=split_of[index] if split_of is not None else "",
                    segment=len(trials),
                    block=f"sub-{subject}-block-{block_number[subject]}",
                    concept=label,
                )
            )
            kept[subject].append(index)
        _check_crossings(root / options.splits, subjects)
        corpus = config.name or root_name(root)
        out = []
        for subject in sorted(set(subjects) | set(left_out)):
            relative = f"{options.file}/sub-{subject}"
            out.append(
                Item(
                    key=recording_key(corpus, relative),
                    corpus=corpus,
                    path=relative,
                    recording=Recording(path=path, format=self.kind, files=(path,)),
                    subject=f"sub-{subject}",
                    session="",
                    line_freq=config.line_freq,
                    trials=tuple(subjects[subject]),
                    reason=None if subjects[subject] else Reason("no trial is left", _words(left_out[subject])),
                    options={"trials": kept[subject], "unit": options.unit},
                    left_out=dict(sorted(left_out[subject].items())),
                )
            )
        check_images(out, images)
        return out

    def open(self, item: Item) -> Signal:
        """Open the trials of one subject, memory-mapped; see `Adapter.open`."""
        from data_sharding.formats.open_signal import NotContinuous, ReadError

        trials: list[int] = item.options["trials"]
        if not trials:
            raise NotContinuous(item.reason or Reason("no trial"))
        try:
            entries = load_torch(Path(str(item.recording.path)))["dataset"]
        except (RefusedPickle, OSError, KeyError, TypeError) as error:
            raise ReadError(Reason("unreadable", str(error))) from None
        standardised = item.options["unit"] == "standardised"
        # A short trial can end before the last time point of the range `USED`.
        ends = [min(USED.stop, int(np.asarray(entries[trial]["eeg"]).shape[1])) for trial in trials]
        notes = ["the released file contains no channel names", *([STANDARDISED] if standardised else [])]
        if item.left_out:
            notes.append("trials left out: " + _words(item.left_out))
        return ArraySignal(
            lambda i: np.asarray(entries[trials[i]]["eeg"])[:, USED],
            [end - USED.start for end in ends],
            SFREQ,
            [f"ch{i + 1:03d}" for i in range(N_CHANNELS)],
            epoched=True,
            tmin=USED.start / SFREQ,
            scale=NOMINAL_V if standardised else 1e-6,
            unit_known=True,
            notes=notes,
        )

    def design(self, config: CorpusConfig, measured: tuple[str, str]) -> tuple[str, str]:
        """Return the published design, which is a block design, whatever the order of the trials in the file."""
        return "block", f"each category was shown as one block (Li et al., TPAMI 2021); in this file {measured[1]}"


def _words(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in sorted(counts.items()))


def _load(path: Path) -> Any:
    try:
        return load_torch(path)
    except FileNotFoundError:
        raise RequestError(f"corpora: '{path}': no such file; correct the option 'file' or 'splits'") from None
    except (RefusedPickle, OSError) as error:
        raise RequestError(f"{path}: {error}") from None


def _tables(path: Path, content: Any) -> tuple[list[dict[str, Any]], list[str], list[str]]:
    """Check a released file, and return three lists: the trials, the categories and the image names."""
    wanted = {"dataset", "labels", "images"}
    if not isinstance(content, dict) or not wanted <= set(content):
        raise RequestError(
            f"{path}: not a released file of EEG-ImageNet, which has the entries {', '.join(sorted(wanted))}; correct "
            "the option 'file'"
        )
    entries, labels, names = content["dataset"], content["labels"], content["images"]
    for key, value in (("dataset", entries), ("labels", labels), ("images", names)):
        if not isinstance(value, list | tuple):
            raise RequestError(f"{path}: entry '{key}' is not a list")
    for index, entry in enumerate(entries):
        if not isinstance(entry, dict) or not {"eeg", "image", "label", "subject"} <= set(entry):
            raise RequestError(f"{path}: trial {index} lacks one of the entries eeg, image, label, subject")
        if not isinstance(entry["eeg"], np.ndarray) or entry["eeg"].dtype.kind not in "fiu":
            raise RequestError(f"{path}: the eeg of trial {index} is not an array of numbers")
        if not all(isinstance(entry[key], int | np.integer) for key in ("image", "label", "subject")):
            raise RequestError(f"{path}: image, label or subject of trial {index} is not a whole number")
        if not (0 <= int(entry["label"]) < len(labels) and 0 <= int(entry["image"]) < len(names)):
            raise RequestError(f"{path}: the category or the image of trial {index} is not in the file's list")
    return list(entries), [str(label) for label in labels], [str(name) for name in names]


def _fault(entry: dict[str, Any], not_split: bool) -> str | None:
    shape = tuple(entry["eeg"].shape)
    if len(shape) != 2 or shape[0] != N_CHANNELS:
        return f"not of {N_CHANNELS} channels"
    if shape[1] < LENGTHS[0]:
        return f"shorter than {LENGTHS[0]} samples"
    if shape[1] > LENGTHS[1]:
        return f"longer than {LENGTHS[1]} samples"
    return "in none of the split's lists" if not_split else None


def _splits(path: Path, fold: int, n: int) -> dict[int, str]:
    """Read the split file. Return the split of each trial, by the index of the trial in the released file."""
    content = _load(path)
    folds = content.get("splits") if isinstance(content, dict) else None
    if not isinstance(folds, list | tuple) or not folds:
        raise RequestError(f"{path}: not a split file of EEG-ImageNet, because the entry 'splits' is missing")
    if not 0 <= fold < len(folds):
        raise RequestError(
            f"{path}: has {len(folds)} splits; the option 'fold' must be from 0 to {len(folds) - 1}, not {fold}"
        )
    chosen = folds[fold]
    if not isinstance(chosen, dict) or not set(SPLITS) <= set(chosen):
        raise RequestError(f"{path}: split {fold} lacks one of the entries {', '.join(SPLITS)}")
    out: dict[int, str] = {}
    for split in SPLITS:
        try:
            indices = [operator.index(index) for index in chosen[split]]
        except TypeError:
            raise RequestError(f"{path}: '{split}' of split {fold} is not a list of whole numbers") from None
        for index in indices:
            if not 0 <= index < n:
                raise RequestError(
                    f"{path}: lists trial {index}, but the recordings have only {n} trials (0 to {n - 1}); "
                    "these splits belong to other recordings"
                )
            if out.setdefault(index, split) != split:
                raise RequestError(f"{path}: trial {index} is in {out[index]} and in {split}")
    return out


def _check_crossings(path: Path, subjects: dict[int, list[Trial]]) -> None:
    """Raise an error if the split file puts trials of one image into two splits."""
    found: dict[str, str] = {}
    for trials in subjects.values():
        for trial in trials:
            if found.setdefault(trial.image_id, trial.split) != trial.split:
                raise RequestError(
                    f"{path}: image '{trial.image_id}' is in {found[trial.image_id]} and in {trial.split}; "
                    "leave the option 'splits' empty for a split by hash"
                )
