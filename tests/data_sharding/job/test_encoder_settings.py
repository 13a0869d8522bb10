"""Tests that a dataset gets the preprocessing of the encoder that will read it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from data_sharding.common.config import parse_config
from data_sharding.common.errors import RequestError
from data_sharding.job.encoder_settings import use_encoder_settings
from data_sharding.job.request import ShardConfig, reduce_config
from data_sharding.processing.preprocess import PreprocessSpec

CONFIGS = Path(__file__).parents[3] / "configs" / "data_sharding"


def write_encoder(folder: Path, spec: PreprocessSpec, patch: int = 4) -> Path:
    """Write the two files of an encoder package that sharding reads."""
    folder.mkdir(exist_ok=True)
    (folder / "preprocess.json").write_text(json.dumps(spec.to_dict()))
    (folder / "config.json").write_text(json.dumps({"encoder": {"patch": patch}}))
    return folder


@pytest.fixture
def shipped(monkeypatch: pytest.MonkeyPatch):
    for name in ("EEG_IMAGENET", "IMAGENET", "THINGS_EEG2", "THINGS_IMAGES", "LAB_EEG"):
        monkeypatch.setenv(name, "/data")

    def read(name: str, encoder: Path | None = None) -> ShardConfig:
        words = [str(CONFIGS / f"{name}.yaml"), *(["--encoder", str(encoder)] if encoder else [])]
        return parse_config(ShardConfig, words, prog="dreamscale shard", positionals=("config",))

    return read


@pytest.mark.parametrize(("name", "window"), [("eeg_imagenet", 112), ("things_eeg2", 204), ("paired_events", 256)])
def test_an_encoder_pretrained_with_lab_fits_every_image_dataset(shipped, tmp_path: Path, name: str, window) -> None:
    lab = shipped("lab").preprocess
    config, note = use_encoder_settings(shipped(name, write_encoder(tmp_path / "e", lab)))
    spec = config.preprocess
    assert spec == dataclasses.replace(lab, window=window, stride=window)
    assert f"the encoder reads {window // 4} of its 128 tokens" in note
    # The dataset does not depend on the path of the encoder, only on its preprocessing.
    assert reduce_config(config) == reduce_config(dataclasses.replace(config, encoder=""))
    assert use_encoder_settings(shipped(name)) == (shipped(name), "")


def test_a_released_encoder_reads_a_whole_trial_of_eeg_imagenet(shipped, tmp_path: Path) -> None:
    spec = PreprocessSpec(sfreq=1163.6364, notch="off", reference="keep", scaling="constant", clip=0.0)
    config, note = use_encoder_settings(shipped("eeg_imagenet", write_encoder(tmp_path / "e", spec)))
    assert (config.preprocess.window, config.preprocess.scaling) == (512, "constant")
    assert "sfreq 1163.6364 instead of 1000" in note and "of its" not in note


def test_an_encoder_with_short_windows_decides_the_length(shipped, tmp_path: Path) -> None:
    spec = PreprocessSpec(window=64, stride=64)
    config, _ = use_encoder_settings(shipped("eeg_imagenet", write_encoder(tmp_path / "e", spec)))
    assert (config.preprocess.window, config.preprocess.quality) == (64, shipped("eeg_imagenet").preprocess.quality)


def test_wrong_encoders_are_refused(shipped, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"encoder .*no preprocess\.json in this folder.*dreamscale export"):
        use_encoder_settings(shipped("things_eeg2", tmp_path))
    folder = write_encoder(tmp_path / "e", PreprocessSpec(), patch=256)
    with pytest.raises(RequestError, match=r"a token lasts 1 s, but preprocess\.window lasts only 0\.8 s"):
        use_encoder_settings(shipped("things_eeg2", folder))
    (folder / "preprocess.json").write_text('{"sfreq": "fast"}')
    with pytest.raises(RequestError, match=r"preprocess\.json"):
        use_encoder_settings(shipped("things_eeg2", folder))
