"""Choose the preprocessing of a dataset so that an encoder that is already trained can read it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from data_sharding.common.errors import RequestError
from data_sharding.common.files import read_json
from data_sharding.common.untrusted import check_count, check_group
from data_sharding.job.request import ShardConfig
from data_sharding.processing.preprocess import PreprocessSpec

OWN = ("reject_uv", "quality")
"""Settings of the preprocessing that the dataset's config decides: which windows are used."""


def read_encoder_settings(encoder: str) -> tuple[PreprocessSpec, int]:
    """Read the preprocessing of an encoder, and the number of time points in one of its tokens.

    Parameters
    ----------
    encoder : str
        Folder of an encoder package (``dreamscale export``).

    Returns
    -------
    spec : PreprocessSpec
        Preprocessing of the encoder; `window` is the longest window that the encoder can read.
    patch : int
        Number of time points in a token.

    Raises
    ------
    RequestError
        If the folder is not an encoder package, or one of its files is damaged.
    """
    folder = Path(encoder)
    settings, shape = folder / "preprocess.json", folder / "config.json"
    for path in (settings, shape):
        if not path.is_file():
            raise RequestError(
                f"encoder '{encoder}': no {path.name} in this folder; give the folder of an encoder package, which "
                "'dreamscale export' and 'dreamscale convert' write (download an encoder of a hub first)"
            )
    try:
        spec = PreprocessSpec.from_dict(read_json(settings), str(settings))
    except ValueError as error:
        raise RequestError(f"{settings}: {error}") from None
    values = check_group(check_group(read_json(shape), str(shape)).get("encoder"), str(shape), "encoder")
    return spec, check_count(values.get("patch"), str(shape), "encoder.patch", least=1, most=spec.window)


def use_encoder_settings(config: ShardConfig) -> tuple[ShardConfig, str]:
    """Give the dataset the preprocessing of the encoder that the config names.

    The duration of a window stays as the config says, but it is at most the duration that the encoder reads, and it is
    shortened to a whole number of the encoder's tokens.

    Parameters
    ----------
    config : ShardConfig
        The config of the job.

    Returns
    -------
    config : ShardConfig
        The config of the job with the new preprocessing; the same config if it names no encoder.
    note : str
        Line that says which keys of `preprocess` were changed; empty if the config names no encoder.

    Raises
    ------
    RequestError
        If the encoder cannot be read, or if a window of the config is shorter than one token.
    """
    if not config.encoder:
        return config, ""
    theirs, patch = read_encoder_settings(config.encoder)
    ours = config.preprocess
    # Allow for the rounding of rates such as 1163.6364 Hz, which make a window a whole number of samples.
    samples = min(int(ours.window_s * theirs.sfreq + 1e-3), theirs.window)
    window = samples - samples % patch
    if not window:
        raise RequestError(
            f"encoder '{config.encoder}': a token lasts {patch / theirs.sfreq:g} s, but preprocess.window lasts only "
            f"{ours.window_s:g} s; make preprocess.window longer"
        )
    stride = window if ours.stride == ours.window else max(1, round(ours.stride / ours.sfreq * theirs.sfreq))
    own = {key: getattr(ours, key) for key in OWN}
    spec = dataclasses.replace(theirs, window=window, stride=stride, **own)
    changed = [
        f"{key} {value} instead of {getattr(ours, key)}"
        for key, value in dataclasses.asdict(spec).items()
        if key not in OWN and value != getattr(ours, key)
    ]
    note = f"preprocess as encoder {config.encoder} needs it: {', '.join(changed) or 'nothing changes'}"
    if window < theirs.window:
        note += f"; the encoder reads {window // patch} of its {theirs.window // patch} tokens"
    return dataclasses.replace(config, preprocess=spec), note
