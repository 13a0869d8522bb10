"""Reads the released files of THINGS-EEG2: ten subjects saw 16,740 images of 1,854 concepts in random order.

Letters in array shapes: I is the number of images, R the number of repetitions, C the number of channels, T the number
of time points in an epoch, S the number of time points in a recording.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from data_sharding.common.errors import RequestError, one_line
from data_sharding.common.reason import Reason
from data_sharding.common.storage import AnyPath
from data_sharding.corpora.array_signal import NOMINAL_V, STANDARDISED, ArraySignal
from data_sharding.corpora.base import Adapter, CorpusConfig, register
from data_sharding.corpora.folder import TRIAL_KEYS, is_excluded, trial_values
from data_sharding.corpora.item import Item, Trial
from data_sharding.corpora.paths import check_folder, check_images, check_local_folder, recording_key, root_name
from data_sharding.corpora.safe_pickle import RefusedPickle, load_npy
from data_sharding.dataset.splits import TRAIN_OR_VAL
from data_sharding.formats.signal import Signal
from data_sharding.formats.sniffing import Recording

TARGET = 99999
"""Event code of target trials, in which subjects had to press a key. The images of target trials are not in the image
sets."""
METADATA = "image_metadata.npy"
SCALES = {"whitened": NOMINAL_V, "uV": 1e-6, "V": 1.0}


@dataclass(frozen=True, kw_only=True)
class ThingsEEG2Options:
    """Options for THINGS-EEG2: which released files and which trials to use."""

    RENAMED: ClassVar[dict[str, str]] = dict.fromkeys(
        ("repetitions", "test_repetitions"),
        "every presentation of an image is stored as a trial, and 'average_repeats' of 'dreamscale generate' and of "
        "fine-tuning averages them when they are read",
    )

    source: Literal["preprocessed", "raw"] = "preprocessed"
    """preprocessed: use the released epochs (preprocessed_eeg_training.npy). raw: use the continuous recordings
    (raw_eeg_training.npy)."""
    partitions: list[Literal["training", "test"]] = field(default_factory=lambda: ["training", "test"])
    """Image sets to use: training, test, or both."""
    unit: Literal["whitened", "uV", "V"] = "whitened"
    """Unit of the preprocessed values. The released files are whitened (multivariate noise normalisation) and have no
    unit. Raw recordings are always in volts."""
    metadata: str = ""
    """Path of image_metadata.npy. If empty, the file must be in root or in the folder of the images."""

    def __post_init__(self) -> None:
        if not self.partitions:
            raise ValueError("the option 'partitions' is empty; write training, test, or both")


@dataclass(frozen=True)
class _Image:
    path: str
    image_id: str
    concept: str


@register("things_eeg2")
class ThingsEEG2Corpus(Adapter):
    """Corpus of THINGS-EEG2. Each released file is one recording.

    References
    ----------
    Gifford et al., A large and rich EEG dataset for modeling human visual object recognition, NeuroImage 264 (2022).
    """

    keys = TRIAL_KEYS | {"exclude"}
    needs_images = True
    options = ThingsEEG2Options

    def items(self, config: CorpusConfig) -> list[Item]:
        """List all recordings below the root folder; see `Adapter.items`."""
        options: ThingsEEG2Options = self.read_options(config)
        root, images = check_local_folder(config), check_folder(config.images, "corpora: images")
        shown = _images(options, root, images)
        stem = "preprocessed_eeg" if options.source == "preprocessed" else "raw_eeg"
        corpus, out = config.name or root_name(root), []
        for path in sorted(root.rglob(f"{stem}_*.npy")):
            relative = path.relative_to(root).as_posix()
            partition = path.stem.removeprefix(f"{stem}_")
            if partition not in options.partitions or is_excluded(config, relative):
                continue
            subject = re.search(r"(?:^|/)(sub-[A-Za-z0-9]+)/", relative)
            session = re.search(r"(?:^|/)(ses-[A-Za-z0-9]+)/", relative)
            own = {"source": options.source, "unit": options.unit if options.source == "preprocessed" else "V"}
            problem, trials, left_out = None, (), {}
            try:
                trials, left_out = _trials(_content(path, own["source"]), own, shown[partition], partition)
            except (ValueError, TypeError, OSError) as error:
                # In a damaged file, numbers and names can have wrong types, which causes a TypeError.
                problem = Reason("unreadable", one_line(error)[:200])
            out.append(
                Item(
                    key=recording_key(corpus, relative),
                    corpus=corpus,
                    path=relative,
                    recording=Recording(path=path, format=self.kind, files=(path,), problem=problem),
                    subject=subject.group(1) if subject else recording_key(corpus, relative),
                    session=session.group(1) if session else "",
                    line_freq=config.line_freq,
                    trials=trials,
                    options=own,
                    left_out=left_out,
                    **trial_values(config),
                )
            )
        if not out:
            raise RequestError(
                f"corpora: root '{root}': no sub-XX/{'ses-XX/' * (options.source == 'raw')}{stem}_training.npy or "
                "_test.npy below it; check the path and the option 'source'"
            )
        check_images(out, images)
        return out

    def open(self, item: Item) -> Signal:
        """Open a file of epochs or a continuous recording, memory-mapped; see `Adapter.open`."""
        from data_sharding.formats.open_signal import ReadError

        own = item.options
        try:
            content = _content(Path(str(item.recording.path)), own["source"])
        except (ValueError, TypeError, OSError) as error:
            raise ReadError(Reason("unreadable", one_line(error)[:200])) from None
        notes = []
        if item.left_out:
            notes.append("trials left out: " + ", ".join(f"{n} {why}" for why, n in sorted(item.left_out.items())))
        if own["source"] == "raw":
            x_CS = content["x"]
            return ArraySignal(
                lambda _: x_CS,
                [x_CS.shape[1]],
                content["sfreq"],
                content["ch_names"],
                ch_types=content["ch_types"],
                epoched=False,
                notes=[*notes, "the file does not mark the boundaries between the parts of the session"],
            )
        x_IRCT = content["x"]
        images, reps, _, length = x_IRCT.shape
        if own["unit"] == "whitened":
            notes.append(STANDARDISED)
        return ArraySignal(
            lambda i: x_IRCT[i // reps, i % reps],
            [length] * (images * reps),
            content["sfreq"],
            content["ch_names"],
            epoched=True,
            tmin=content["tmin"],
            scale=SCALES[own["unit"]],
            unit_known=own["unit"] == "whitened",
            notes=notes,
        )

    def design(self, config: CorpusConfig, measured: tuple[str, str]) -> tuple[str, str]:
        """Return the known design: the experiment showed images in random order; see `Adapter.design`."""
        if self.read_options(config).source == "preprocessed":
            evidence = "not measured, because the epochs in the files are sorted by image"
            return "random", f"images were shown in random order (Gifford et al. 2022); {evidence}"
        design, evidence = measured
        return design, f"images were shown in random order (Gifford et al. 2022); measured: {evidence}"


class _Unusable(ValueError):
    """Error: the content of a file is not what the file's name says."""


def _content(path: Path, source: str) -> dict[str, Any]:
    """Read the array, sampling rate and channels of a released file, and the start time of its epochs."""
    content = load_npy(path)
    key, ndim = ("preprocessed_eeg_data", 4) if source == "preprocessed" else ("raw_eeg_data", 2)
    if not isinstance(content, dict) or key not in content or "ch_names" not in content:
        raise _Unusable(f"not a released file of THINGS-EEG2, which has the entries '{key}' and 'ch_names'")
    x, names = content[key], [str(name) for name in content["ch_names"]]
    if not isinstance(x, np.ndarray) or x.ndim != ndim or x.dtype.kind not in "fiu":
        raise _Unusable(f"the entry '{key}' is not an array of numbers in {ndim} dimensions")
    if x.shape[-2] != len(names):
        raise _Unusable(f"the array has {x.shape[-2]} channels, but the entry 'ch_names' has {len(names)} names")
    if source == "raw":
        sfreq = float(content.get("sfreq", 0))
        types = [str(kind) for kind in content.get("ch_types", [])]
        if not sfreq > 0 or len(types) != len(names) or "stim" not in types:
            raise _Unusable(
                "the entries 'sfreq' and 'ch_types' are missing or invalid; one channel must have the type stim"
            )
        return {"x": x, "ch_names": names, "ch_types": types, "sfreq": sfreq}
    times = np.asarray(content.get("times", []), float)
    if times.ndim != 1 or len(times) < 2 or not np.median(np.diff(times)) > 0:
        raise _Unusable("the entry 'times' (the time of each sample of an epoch, in seconds) is missing or invalid")
    if len(times) != x.shape[-1]:
        raise _Unusable(f"an epoch has {x.shape[-1]} samples, but the entry 'times' has {len(times)} times")
    # Round the sampling rate, because the times in the file have only a few digits.
    sfreq = float(np.round((len(times) - 1) / (times[-1] - times[0]), 2))
    return {"x": x, "ch_names": names, "sfreq": sfreq, "tmin": float(times[0])}


def _trials(
    content: dict[str, Any], own: Mapping[str, str], images: list[_Image], partition: str
) -> tuple[tuple[Trial, ...], dict[str, int]]:
    """Return the trials of a file, and the number of trials that were left out for each reason."""
    split = "test" if partition == "test" else TRAIN_OR_VAL

    def trial(number: int, onset: float, segment: int | None) -> Trial:
        image = images[number]
        name = image.concept.replace("_", " ")
        return Trial(
            onset=onset,
            image=image.path,
            image_id=image.image_id,
            label_name=image.concept,
            caption=name,
            split=split,
            segment=segment,
            concept=image.concept,
        )

    if own["source"] == "preprocessed":
        count, reps, _, length = content["x"].shape
        if count != len(images):
            raise _Unusable(f"the file has epochs of {count} images, but {METADATA} lists {len(images)} images")
        epoch = length / content["sfreq"]
        return tuple(trial(i // reps, i * epoch, i) for i in range(count * reps)), {}
    stim = np.asarray(content["x"][content["ch_types"].index("stim")])
    if not np.isfinite(stim).all():
        raise _Unusable("the stim channel has NaN or infinite values")
    # If an event code lasts for several time points, it is one event.
    at = np.flatnonzero((stim != 0) & (np.diff(stim, prepend=0) != 0))
    codes = np.round(stim[at]).astype(np.int64)
    left_out: Counter[str] = Counter()
    trials = []
    for sample, code in zip(at.tolist(), codes.tolist(), strict=True):
        if code == TARGET:
            left_out["target trials"] += 1
        elif not 1 <= code <= len(images):
            raise _Unusable(f"the file has an event with the code {code}, but {METADATA} lists {len(images)} images")
        else:
            trials.append(trial(code - 1, sample / content["sfreq"], None))
    return tuple(trials), dict(left_out)


def _images(options: ThingsEEG2Options, root: Path, images: AnyPath) -> dict[str, list[_Image]]:
    """Return the training images and the test images, in the order of their numbers."""
    places = [Path(options.metadata)] if options.metadata else [root / METADATA, Path(str(images)) / METADATA]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        raise RequestError(f"corpora: '{places[0]}': no such file; set the option 'metadata' to the path of {METADATA}")
    try:
        table = load_npy(path)
    except (RefusedPickle, OSError) as error:
        raise RequestError(f"{path}: {error}") from None
    out = {}
    for partition, word in (("training", "train"), ("test", "test")):
        keys = (f"{word}_img_concepts", f"{word}_img_files")
        lists = [table.get(key) for key in keys] if isinstance(table, dict) else []
        sized = [len(v) for v in lists if isinstance(v, list | tuple) or (isinstance(v, np.ndarray) and v.ndim == 1)]
        if len(sized) != 2 or sized[0] != sized[1]:
            raise RequestError(
                f"{path}: not the table of images of THINGS-EEG2, which has the entries '{keys[0]}' and '{keys[1]}'; "
                "correct the option 'metadata'"
            )
        out[partition] = [
            _Image(
                path=str(images / f"{partition}_images" / str(concept) / str(file)),
                image_id=f"{concept}/{Path(str(file)).stem}",
                concept=re.sub(r"^\d+_", "", str(concept)),
            )
            for concept, file in zip(*lists, strict=True)
        ]
    shared = {image.concept for image in out["training"]} & {image.concept for image in out["test"]}
    if shared:
        raise RequestError(f"{path}: concept '{min(shared)}' has images in both training and test")
    return out
