"""Reads corpora of arrays. A JSON or YAML file next to each array, the *sidecar*, describes the array.

Letters in array shapes: C is the number of channels, S the number of time points in a recording, N the number of
epochs, T the number of time points in an epoch.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data_sharding.common.errors import RequestError, one_line
from data_sharding.common.matlab_files import check_matlab
from data_sharding.common.plain_yaml import parse_yaml
from data_sharding.common.reason import Reason
from data_sharding.common.storage import AnyPath, localised
from data_sharding.common.untrusted import check_hdf5, open_npz, open_regular, parse_json
from data_sharding.corpora.array_signal import NOMINAL_V, STANDARDISED, ArraySignal
from data_sharding.corpora.base import Adapter, CorpusConfig, register
from data_sharding.corpora.events import make_trials, read_trials
from data_sharding.corpora.folder import KEYS, TRIAL_KEYS, check_unit_factors, is_excluded, make_item
from data_sharding.corpora.item import Item, Trial
from data_sharding.corpora.patch import patch_signal
from data_sharding.corpora.paths import Folders, check_folder, check_images, read_text, relative_path
from data_sharding.corpora.subjects import SubjectFinder
from data_sharding.dataset.splits import SPLITS
from data_sharding.formats.signal import Signal
from data_sharding.formats.sniffing import Recording
from data_sharding.formats.units import to_volts
from data_sharding.processing.preprocess import check_line_freq

SUFFIXES = (".npy", ".npz", ".mat")
SIDECARS = (".json", ".yaml", ".yml")


@dataclass(frozen=True, kw_only=True)
class Sidecar:
    """Content of the sidecar, the file that describes an array."""

    sfreq: float
    """Sampling rate in Hz."""
    ch_names: list[str]
    """Names of the channels, in the order of the array."""
    unit: str
    """Unit of the values: V, mV, uV, nV, or standardised if the values have no unit."""
    data: str = ""
    """Name of the variable to use, if an .npz or .mat file contains several variables."""
    axes: str = ""
    """Order of the dimensions: C for channels, T for time, N for epochs. If empty, the order is CT, or NCT for an array
    of three dimensions."""
    ch_types: list[str] = field(default_factory=list)
    """Type of each channel, by its name in MNE. If empty, the types of the channels are guessed from their names."""
    subject: str = ""
    """Name of the subject. If empty, the name of the subject is taken from the path of the array."""
    session: str = ""
    """Name of the session; may be empty."""
    line_freq: float | None = None
    """Mains frequency in Hz."""
    reference: str = ""
    """Reference electrode or reference scheme of the recording, such as Cz or average."""
    bads: list[str] = field(default_factory=list)
    """Names of the channels that are known to be bad."""
    tmin: float = 0.0
    """For epochs: time of the first sample of each epoch, in seconds from the onset of its image; for example -0.2."""
    events: Any = None
    """For continuous recordings: name of an events table (.tsv) in the folder of the array, or a list of table rows."""
    images: list[str] = field(default_factory=list)
    """For epochs: image of each epoch, as a path relative to the folder in the key 'images' of the corpus."""
    labels: Any = field(default_factory=list)
    """For epochs: category of each epoch, or the name of the variable in the .npz file that contains the categories."""
    captions: list[str] = field(default_factory=list)
    """For epochs: description of the image of each epoch."""
    splits: list[str] = field(default_factory=list)
    """For epochs: split of each epoch (train, val or test)."""
    blocks: list[str] = field(default_factory=list)
    """For epochs: name of the block in which each image was shown."""


class _Fault(ValueError):
    """An array or its sidecar cannot be used. The arguments are the same as for `Reason`."""

    def __init__(self, category: str, detail: str = "", *, text: str = "") -> None:
        self.reason = Reason(category, detail, text=text)
        super().__init__(self.reason)


@register("arrays")
class ArraysCorpus(Adapter):
    """Corpus of arrays ``[C, S]`` or ``[N, C, T]`` in .npy, .npz and .mat files."""

    keys = KEYS | TRIAL_KEYS

    def items(self, config: CorpusConfig) -> list[Item]:
        """List all arrays below the root folder; see `Adapter.items`."""
        root = check_folder(config.root, "corpora: root")
        images = check_folder(config.images, "corpora: images") if config.images else None
        found = []
        for path in sorted((p for p in root.rglob("*") if p.suffix.lower() in SUFFIXES), key=lambda p: p.as_posix()):
            relative = relative_path(path, root)
            if not path.name.startswith(".") and not is_excluded(config, relative):
                found.append((relative, path))
        if not found:
            raise RequestError(
                f"corpora: root '{root}': no .npy, .npz or .mat file found there; check the path and the key 'exclude'"
            )
        people = SubjectFinder(config, [(relative, None) for relative, _ in found])
        folders = Folders()
        items = [self._item(config, root, relative, path, images, folders, people) for relative, path in found]
        check_unit_factors(config, [item.path for item in items])
        if images is not None:
            if not any(item.trials for item in items):
                raise RequestError(
                    f"corpora: root '{root}': no sidecar names an image, so no trial has an image; name the images in "
                    "the sidecars, or remove the key 'images'"
                )
            check_images(items, images)
        return items

    def _item(
        self,
        config: CorpusConfig,
        root: AnyPath,
        relative: str,
        path: AnyPath,
        images: AnyPath | None,
        folders: Folders,
        people: SubjectFinder,
    ) -> Item:
        near = folders(path.parent)
        sidecars = [near[path.stem + suffix] for suffix in SIDECARS if path.stem + suffix in near]
        recording = Recording(path=path, format=self.kind, files=tuple(sorted([path, *sidecars[:1]])))
        try:
            about = _sidecar(sidecars, path)
            trials = _trials(about, path, near, images)
        except (_Fault, RequestError, OSError) as error:
            reason = error.reason if isinstance(error, _Fault) else Reason("sidecar broken", text=one_line(error))
            return make_item(config, root, relative, dataclasses.replace(recording, problem=reason), people)
        more: dict[str, Any] = {}
        if about.subject:
            more = {"subject": about.subject, "session": about.session, "subject_from": "table"}
        own = {f.name: getattr(about, f.name) for f in dataclasses.fields(about)}
        if not about.tmin:
            # Older versions of Dreamscale did not have the key 'tmin'. The checksum of a recording is computed from
            # `own`, so leave out 'tmin' if it has its default value: then the checksum is the same as in older
            # versions.
            own.pop("tmin")
        for name in ("subject", "session", "events", "images", "labels", "captions", "splits", "blocks"):
            own.pop(name)
        count = None if trials is None or about.events is not None else len(trials)
        options = {**own, "epochs": count}
        return make_item(config, root, relative, recording, people, trials=trials, options=options, **more)

    def open(self, item: Item) -> Signal:
        """Open an array. Files in .npy format are memory-mapped; see `Adapter.open`."""
        from data_sharding.formats.open_signal import ReadError, unreadable

        path, own = Path(str(item.recording.path)), item.options
        try:
            x = _array(path, own["data"])
            x = _ordered(x, own["axes"], len(own["ch_names"]))
        except _Fault as error:
            raise ReadError(error.reason) from None
        except Exception as error:  # SciPy, h5py and NumPy raise different types of errors.
            raise ReadError(unreadable(error)) from None
        if own["epochs"] is not None and (x.ndim != 3 or own["epochs"] != len(x)):
            count = len(x) if x.ndim == 3 else 0
            text = f"the sidecar describes {own['epochs']} epochs, but the array has {count}"
            raise ReadError(Reason("array does not fit its sidecar", text=text))
        if own.get("tmin") and x.ndim != 3:
            text = "the sidecar has the key 'tmin', which is for epochs, but the array has no epochs; remove the key"
            raise ReadError(Reason("array does not fit its sidecar", text=text))
        part: Callable[[int], np.ndarray] = (lambda i: x[i]) if x.ndim == 3 else (lambda _: x)
        standardised = own["unit"] == "standardised"
        line_freq, notes = own["line_freq"], [STANDARDISED] if standardised else []
        try:
            line_freq = None if line_freq is None else check_line_freq(line_freq, "line_freq in the sidecar")
        except ValueError as error:
            line_freq, notes = None, [*notes, f"{error}; not used"]
        signal = ArraySignal(
            part,
            [x.shape[-1]] * (len(x) if x.ndim == 3 else 1),
            own["sfreq"],
            own["ch_names"],
            epoched=x.ndim == 3,
            tmin=float(own.get("tmin", 0.0)),
            scale=NOMINAL_V if standardised else to_volts(own["unit"]) or 1.0,
            unit_known=standardised,
            line_freq=line_freq,
            reference=own["reference"],
            bads=list(own["bads"]),
            notes=notes,
            **({"ch_types": list(own["ch_types"])} if own["ch_types"] else {}),
        )
        return patch_signal(signal, item.info_patch)


def _sidecar(sidecars: list[AnyPath], path: AnyPath) -> Sidecar:
    """Read and check the sidecar of an array."""
    if not sidecars:
        raise _Fault(
            "sidecar missing", f"{path.stem}.json (or .yaml) with sfreq, ch_names and unit must be in its folder"
        )
    file = sidecars[0]
    try:
        text = read_text(file)
        values = parse_json(text) if file.suffix == ".json" else parse_yaml(text)
    except Exception as error:  # The JSON and YAML libraries raise different types of errors.
        raise _Fault("sidecar broken", f"{file.name}: {one_line(error)[:200]}") from None
    if not isinstance(values, dict):
        raise _Fault("sidecar broken", f"{file.name}: must consist of keys with values")
    known = [f.name for f in dataclasses.fields(Sidecar)]
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"the keys are {', '.join(known)}"
            raise _Fault("sidecar broken", f"{file.name}: unknown key '{key}'; {hint}")
    for key in ("sfreq", "ch_names", "unit"):
        if key not in values:
            raise _Fault("sidecar broken", f"{file.name}: key '{key}' is missing")
    about = Sidecar(**values)
    lists = {"ch_names": about.ch_names, "ch_types": about.ch_types, "bads": about.bads, "images": about.images}
    lists |= {"captions": about.captions, "splits": about.splits, "blocks": about.blocks}
    for key, value in lists.items():
        if not isinstance(value, list) or not all(isinstance(entry, str | int | float) for entry in value):
            raise _Fault("sidecar broken", f"{file.name}: {key} must be a list of names")
    about = dataclasses.replace(about, **{key: [str(entry) for entry in value] for key, value in lists.items()})
    if isinstance(about.sfreq, bool) or not isinstance(about.sfreq, int | float) or not 0 < about.sfreq < 1e6:
        raise _Fault("sidecar broken", f"{file.name}: sfreq '{about.sfreq}' is not a sampling rate in Hz")
    if isinstance(about.tmin, bool) or not isinstance(about.tmin, int | float) or not abs(about.tmin) < 1e4:
        raise _Fault("sidecar broken", f"{file.name}: tmin '{about.tmin}' is not a time in seconds")
    if about.unit != "standardised" and to_volts(str(about.unit)) is None:
        raise _Fault("sidecar broken", f"{file.name}: unit '{about.unit}' must be V, mV, uV, nV or standardised")
    if not about.ch_names or len(set(about.ch_names)) != len(about.ch_names):
        raise _Fault("sidecar broken", f"{file.name}: ch_names is empty, or names a channel twice")
    if about.ch_types and len(about.ch_types) != len(about.ch_names):
        raise _Fault(
            "sidecar broken",
            f"{file.name}: ch_types has {len(about.ch_types)} entries, and ch_names has {len(about.ch_names)}",
        )
    if about.axes and sorted(about.axes.upper()) not in (["C", "T"], ["C", "N", "T"]):
        raise _Fault("sidecar broken", f"{file.name}: axes '{about.axes}' must be an order of C, T and (for epochs) N")
    texts = {"subject": str(about.subject), "session": str(about.session), "reference": str(about.reference)}
    return dataclasses.replace(about, axes=about.axes.upper(), data=str(about.data), **texts)


def _trials(
    about: Sidecar, path: AnyPath, near: dict[str, AnyPath], images: AnyPath | None
) -> tuple[Trial, ...] | None:
    """Return the trials that the sidecar describes; None if the sidecar describes no trials."""
    if about.events is not None:
        if isinstance(about.events, str):
            if about.events not in near:
                raise _Fault("sidecar missing", f"events '{about.events}' is not in the folder of the array")
            if images is not None:
                return read_trials(near[about.events], images)
            raise _Fault("sidecar broken", text="the events name images, but the corpus has no key 'images'")
        if not isinstance(about.events, list) or not all(isinstance(row, dict) for row in about.events):
            raise _Fault("sidecar broken", "the key events is neither the name of a table nor a list of rows")
        return make_trials(about.events, images, path.name, first_line=1)
    if isinstance(about.labels, str):
        labels = [str(entry) for entry in _variable(path, about.labels)]
    elif isinstance(about.labels, list):
        labels = [str(entry) for entry in about.labels]
    else:
        raise _Fault("sidecar broken", "the key labels is neither a list nor the name of a variable")
    if about.images and images is None:
        raise _Fault("sidecar broken", text="the sidecar names images, but the corpus has no key 'images'")
    shown = about.images or ([""] * len(labels))
    if not shown:
        return None
    for name, value in (("labels", labels), ("captions", about.captions), ("splits", about.splits)):
        if value and len(value) != len(shown):
            raise _Fault("sidecar broken", f"the key {name} has {len(value)} entries for {len(shown)} epochs")
    if wrong := sorted(set(about.splits) - {*SPLITS, ""}):
        raise _Fault("sidecar broken", f"split '{wrong[0]}' must be one of {', '.join(SPLITS)}")
    rows = [
        {
            "onset": 0.0,
            "image": image,
            "label_name": labels[i] if labels else "",
            "caption": about.captions[i] if about.captions else "",
            "split": about.splits[i] if about.splits else "",
            "block": about.blocks[i] if about.blocks else "",
        }
        for i, image in enumerate(shown)
    ]
    trials = make_trials(rows, images if about.images else None, path.name, first_line=1)
    if len(trials) != len(shown):
        raise _Fault("sidecar broken", "an epoch has neither an image nor a label")
    return tuple(dataclasses.replace(trial, segment=i, onset=float(i)) for i, trial in enumerate(trials))


def _variable(path: AnyPath, name: str) -> np.ndarray:
    if path.suffix.lower() != ".npz":
        raise _Fault(
            "sidecar broken",
            text="the key labels is a text, which is possible only for .npz files; write the list into the sidecar",
        )
    with localised([path]) as (local,):
        try:
            with open_npz(local) as archive:
                if name not in archive:
                    raise _Fault(
                        "variable not found", text=f"has no variable '{name}'; it has {', '.join(archive.files)}"
                    )
                return archive[name].ravel()
        except _Fault:
            raise
        except Exception as error:
            raise _Fault("unreadable", f"{one_line(error)[:200]}") from None


def _array(path: Path, name: str) -> np.ndarray:
    suffix = path.suffix.lower()
    os.close(open_regular(path))
    if suffix == ".npy":
        return np.load(path, mmap_mode="r", allow_pickle=False)
    if suffix == ".npz":
        with open_npz(path) as archive:
            return archive[_one_of(archive.files, name)]
    from pymatreader import read_mat

    check_hdf5(path)
    check_matlab(path)
    variables = read_mat(path, variable_names=[name] if name else None)
    return np.asarray(variables[_one_of([key for key in variables if not key.startswith("__")], name)])


def _one_of(names: list[str], name: str) -> str:
    if name and name not in names:
        raise _Fault(
            "variable not found", text=f"has no variable '{name}'; it has {', '.join(sorted(names)) or 'none'}"
        )
    if not name and len(names) != 1:
        raise _Fault(
            "variable not found",
            text=f"the variables are {', '.join(sorted(names)) or 'none'}; name one in the key 'data' of the sidecar",
        )
    return name or names[0]


def _ordered(x: np.ndarray, axes: str, channels: int) -> np.ndarray:
    """Return the array with its dimensions in the order CT or NCT."""
    wanted = "NCT" if x.ndim == 3 else "CT"
    axes = axes or wanted
    if x.ndim not in (2, 3) or len(axes) != x.ndim:
        raise _Fault(
            "array does not fit its sidecar",
            text=f"the array has {x.ndim} dimensions; continuous recordings have 2, epochs have 3 (key 'axes')",
        )
    if x.dtype.kind not in "fiu":
        raise _Fault("array does not fit its sidecar", text=f"the values of the array are not numbers, but {x.dtype}")
    x = x.transpose([axes.index(axis) for axis in wanted])
    if x.shape[-2] != channels:
        raise _Fault(
            "array does not fit its sidecar",
            text=f"the array {tuple(x.shape)} has {x.shape[-2]} channels, but ch_names has {channels} names; check "
            "ch_names and axes",
        )
    return x
