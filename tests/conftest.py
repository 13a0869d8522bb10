"""Small datasets for many tests, and pytest hooks for environments without torch."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("WANDB_MODE", "offline")
if "DREAMSCALE_CACHE" not in os.environ:
    # A temporary cache, so that the tests do not fill the cache of the user who runs them.
    _CACHE = tempfile.TemporaryDirectory(prefix="dreamscale-test-cache-")
    os.environ["DREAMSCALE_CACHE"] = _CACHE.name

from data_sharding.dataset.dataset import write_dataset
from data_sharding.dataset.samples import Sample
from data_sharding.processing.preprocess import PreprocessSpec

HAS_TORCH = importlib.util.find_spec("torch") is not None


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """If torch is not installed, as with ``make test-python``, leave out the test files that import torch."""
    if HAS_TORCH or collection_path.suffix != ".py":
        return None
    return True if re.search(r"^(import|from) torch\b", collection_path.read_text(), re.MULTILINE) else None


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call() -> Any:
    """Skip a test that fails only because torch is not installed."""
    try:
        return (yield)
    except ModuleNotFoundError as error:
        if HAS_TORCH or error.name != "torch":
            raise
        pytest.skip("needs torch")


SPEC = PreprocessSpec(sfreq=128.0, highpass=0.5, lowpass=45.0, window=128, stride=128)
LABELS = ["circle", "square"]


def _make_window(rng: np.random.Generator, n: int) -> np.ndarray:
    """Return a simulated EEG window in microvolts: 10 Hz activity, correlated between channels, and noise."""
    t = np.arange(SPEC.window) / SPEC.sfreq
    waves = np.sin(2 * np.pi * (10 * t + rng.uniform())) * rng.uniform(5, 20)
    return (np.outer(np.linspace(0.5, 1.5, n), waves) + rng.normal(0, 2, (n, SPEC.window))).astype(np.float32)


def _make_meta(n: int, subject: str, number: int, split: str) -> dict:
    return {
        "n": n,
        "ch_names": [f"E{i + 1}" for i in range(n)],
        "positions": [None] * n,
        "reference": "average",
        "sfreq": SPEC.sfreq,
        "start": float(number),
        "recording": f"rec-{subject}",
        "subject": subject,
        "session": "",
        "corpus": "tiny",
        "bads": [],
        "split": split,
    }


def _make_unpaired(split: str, count: int, seed: int) -> list[Sample]:
    rng = np.random.default_rng(seed)
    out = []
    for i in range(count):
        n = (19, 32, 64)[i % 3]
        subject = f"{split}-{i % 3}"
        out.append(Sample(key=f"{split}-{i:05d}", eeg=_make_window(rng, n), meta=_make_meta(n, subject, i, split)))
    return out


def _draw_picture(label: int, rng: np.random.Generator) -> bytes:
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (32, 32), (20, 20, 20))
    box = [6 + int(rng.integers(3)), 6, 24, 24]
    colour = tuple(int(c) for c in rng.integers(120, 255, 3))
    (ImageDraw.Draw(image).ellipse if label == 0 else ImageDraw.Draw(image).rectangle)(box, fill=colour)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _make_paired(split: str, count: int, seed: int) -> list[Sample]:
    rng = np.random.default_rng(seed)
    out = []
    for i in range(count):
        label, n = i % 2, 16
        eeg = _make_window(rng, n)
        # The label of a trial decides the sign of its evoked response.
        eeg += (1 if label else -1) * 25 * np.exp(-((np.arange(SPEC.window) - 50) ** 2) / 200)
        meta = _make_meta(n, f"{split}-{i % 2}", i, split)
        meta |= {
            "image_id": f"{split}-img-{i:04d}",
            "label": label,
            "label_name": LABELS[label],
            "caption": f"a {LABELS[label]}",
        }
        out.append(Sample(key=f"{split}-{i:05d}", eeg=eeg, meta=meta, image=_draw_picture(label, rng), image_ext="png"))
    return out


@pytest.fixture(scope="session")
def grow() -> Callable[[Path], None]:
    """Return a function that writes version 2 of a dataset; version 2 withdraws samples of the first training shard."""
    import dataclasses

    from data_sharding.dataset.manifest import Manifest, version_folder

    def write(dataset: Path) -> None:
        manifest = Manifest.read(dataset)
        manifest.write(version_folder(dataset, 1))
        first, *others = manifest.splits["train"]
        splits = {**manifest.splits, "train": [dataclasses.replace(first, withdrawn=[[3, 20]]), *others]}
        dataclasses.replace(manifest, dataset_id="0" * 64, splits=splits, extra={"version": 2}).write(dataset)

    return write


@pytest.fixture(scope="session")
def unpaired_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a dataset of 144 windows without images: 96 for training, 24 for validation and 24 for testing.

    A window has 19 to 64 channels and 128 samples at 128 Hz.
    """
    path = tmp_path_factory.mktemp("data") / "unpaired"
    splits = {
        "train": _make_unpaired("train", 96, 0),
        "val": _make_unpaired("val", 24, 1),
        "test": _make_unpaired("test", 24, 2),
    }
    write_dataset(path, splits, SPEC, samples_per_shard=40)
    return path


@pytest.fixture(scope="session")
def paired_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a dataset of 96 trials with images: 64 for training, 16 for validation and 16 for testing.

    A trial has 16 channels. The image of a trial has 32 x 32 pixels and shows one of two categories.
    """
    path = tmp_path_factory.mktemp("data") / "paired"
    splits = {
        "train": _make_paired("train", 64, 0),
        "val": _make_paired("val", 16, 1),
        "test": _make_paired("test", 16, 2),
    }
    write_dataset(path, splits, SPEC, labels=LABELS, samples_per_shard=40)
    return path


WIDTHS = (390, 1200)
PROBE = """
<script>
const errors = [];
window.addEventListener("error", event => errors.push(event.message));
window.addEventListener("load", () => parent.postMessage({
  width: innerWidth,
  needed: document.documentElement.scrollWidth,
  pictures: document.images.length,
  broken: [...document.images].filter(image => !image.complete || !image.naturalWidth).map(image => image.alt),
  errors: errors,
}, "*"));
</script>
"""
FRAMES = """<!doctype html><meta charset="utf-8"><pre id="found"></pre>
<script>
const found = [];
window.addEventListener("message", event => {
  found.push(event.data);
  document.getElementById("found").textContent = JSON.stringify(found);
});
</script>
"""


@pytest.fixture(scope="session")
def open_in_browser(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], list[dict]]:
    """Return a function that opens a page in headless Chromium and fails if the page is too wide or has errors.

    The function shows the page in frames with widths of 390 and 1200 pixels, because a headless browser window cannot
    be as narrow as a phone.
    """
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("chromium is not installed")
    folder = tmp_path_factory.mktemp("browser")

    def check(page: Path) -> list[dict]:
        (folder / "page.html").write_text(page.read_text().replace("<head>", f"<head>{PROBE}", 1))
        frames = "".join(f'<iframe src="page.html" width="{width}" height="900"></iframe>' for width in WIDTHS)
        (folder / "frames.html").write_text(FRAMES + frames)
        command = [chromium, "--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
        command += [f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=20000", "--dump-dom"]
        done = subprocess.run([*command, f"file://{folder}/frames.html"], capture_output=True, text=True, timeout=300)
        console = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
        assert not console, console
        found = json.loads(re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL).group(1))
        assert sorted(view["width"] for view in found) == sorted(WIDTHS)
        for view in found:
            assert not view["errors"] and not view["broken"], view
            assert view["needed"] <= view["width"], f"the page is wider than its window: {view}"
        return found

    return check
