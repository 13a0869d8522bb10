"""Simulate the EEG of a head: background, artefacts and responses to pictures, for any electrode layout.

The signals come from simulated sources on a sphere, so the same person can be recorded with different electrode
layouts.

Letters in array shapes: n electrodes, K sources, C response components, T samples.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.fft
from numpy.typing import NDArray

from launch.demo.pictures import CATEGORIES, Picture

Array = NDArray[np.float32]

N_SOURCES = 40
RESPONSE_GAIN = 5.5
"""Factor of all evoked responses. With a larger factor, it is easier to decode the category from a single trial."""
PERSON_DELAY_S = 0.020
"""All responses of a person are shifted in time by the same random delay. This is the standard deviation of the delay
over people, in seconds."""
TRIAL_DELAY_S = 0.025
"""All components of the response in a trial are also shifted by a random delay of this trial. This is the standard
deviation of the delay over trials, in seconds."""


@dataclass(frozen=True)
class Component:
    """One component of the evoked response: its location, its time, and the feature of the picture that scales it."""

    name: str
    centre: tuple[float, float, float]
    """Direction of the source from the middle of the head: x to the right, y to the front, z up."""
    width: float
    """Width of the area with a high potential, on a sphere of radius 1."""
    latency: float
    """Seconds from the onset of the picture to the peak."""
    duration: float
    """Standard deviation of the Gaussian peak in time, in seconds."""
    gain: float
    """Potential at the peak in microvolts, if the feature of the picture is 1 (before the factor `RESPONSE_GAIN`)."""
    feature: str
    """Name of the picture feature that scales this component; see `compute_features`."""


# The responses to the categories differ in location, time and sign, as in real occipito-temporal cortex.
COMPONENTS = (
    Component("P1", (0.0, -0.9, 0.35), 0.55, 0.105, 0.018, 3.5, "always"),
    Component("N1", (0.0, -0.8, 0.1), 0.60, 0.165, 0.020, -4.5, "size"),
    Component("P3", (0.0, -0.4, 0.9), 0.70, 0.380, 0.070, 4.0, "always"),
    Component("disc-early", (0.75, -0.65, 0.1), 0.45, 0.19, 0.024, -5.5, "disc"),
    Component("disc-late", (0.35, -0.2, 0.9), 0.50, 0.31, 0.045, 4.5, "disc"),
    Component("cross-early", (-0.75, -0.65, 0.1), 0.45, 0.21, 0.024, -5.5, "cross"),
    Component("cross-late", (-0.6, 0.1, 0.75), 0.50, 0.36, 0.045, 4.5, "cross"),
    Component("stripes-early", (0.0, -0.95, 0.1), 0.40, 0.15, 0.024, 6.0, "stripes"),
    Component("stripes-late", (0.0, 0.5, 0.85), 0.50, 0.34, 0.045, -4.5, "stripes"),
    Component("triangle-early", (0.3, -0.75, 0.55), 0.40, 0.24, 0.024, 6.0, "triangle"),
    Component("triangle-late", (-0.5, -0.6, 0.6), 0.50, 0.42, 0.050, 4.5, "triangle"),
    Component("hue-cos", (-0.5, -0.85, 0.2), 0.40, 0.13, 0.020, 6.0, "hue-cos"),
    Component("hue-sin", (0.5, -0.85, 0.2), 0.40, 0.27, 0.030, 6.0, "hue-sin"),
    Component("background", (0.0, -0.75, 0.65), 0.50, 0.09, 0.016, 4.0, "background"),
)


def compute_features(picture: Picture) -> Array:
    """Compute how strongly a picture evokes each component, without the random variation between trials.

    Parameters
    ----------
    picture : Picture
        The picture that is shown.

    Returns
    -------
    ndarray, shape (C,)
        For each component, the factor by which the picture scales it.
    """
    table = {
        "always": 1.0,
        "size": (picture.size - 9.75) / 3.0 + 1.0,
        "hue-cos": float(np.cos(2 * np.pi * picture.hue)),
        "hue-sin": float(np.sin(2 * np.pi * picture.hue)),
        "background": (picture.background - 0.3) / 0.15,
        **{name: float(index == picture.category) for index, name in enumerate(CATEGORIES)},
    }
    return np.array([table[c.feature] for c in COMPONENTS], np.float32)


def _normalise(vectors: Any) -> NDArray[np.float64]:
    """Scale vectors to length 1."""
    vectors = np.asarray(vectors, float)
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def _compute_potential(electrodes_n3: NDArray[np.float64], centre: Any, width: float) -> Array:
    """Return a source's potential at each electrode: a peak, surrounded by a weak potential of opposite sign."""
    cosine = electrodes_n3 @ _normalise(centre)
    return (np.exp((cosine - 1) / width**2) - 0.5 * np.exp((cosine - 1) / (2 * width) ** 2) * width).astype(np.float32)


def _draw_noise(
    rng: np.random.Generator, rows: int, samples: int, sfreq: float, exponent: Any, band: Any = None
) -> Array:
    """Draw Gaussian noise with unit variance in each row.

    The power of the noise falls as 1/f^exponent. If a band is given (centre and width in Hz), the exponent is ignored
    and the noise lies in this band.
    """
    length = int(scipy.fft.next_fast_len(samples, real=True) or samples)
    f = np.fft.rfftfreq(length, 1 / sfreq).astype(np.float32)
    gain = np.maximum(f, 0.5)[None, :] ** (-np.atleast_1d(exponent).astype(np.float32)[:, None] / 2)
    if band is not None:
        gain = np.exp(-(((f - band[0]) / band[1]) ** 2) / 2)[None, :]
    gain = gain * (f > 0.02)
    spectrum = rng.standard_normal((rows, len(f), 2), dtype=np.float32).view(np.complex64)[..., 0] * gain
    wave = np.asarray(scipy.fft.irfft(spectrum, n=length, axis=-1))[:, :samples]
    return np.asarray(wave / (wave.std(axis=-1, keepdims=True) + 1e-12), np.float32)


class Head:
    """A simulated person: locations of the sources, strength of the rhythms, and the personal response to pictures.

    Parameters
    ----------
    seed : int
        Seed of the corpus.
    subject : str
        Name of the person. The seed and the name determine all properties of the person.
    """

    def __init__(self, seed: int, subject: str) -> None:
        rng = np.random.default_rng([seed, 2, zlib.crc32(subject.encode())])
        centres = rng.standard_normal((N_SOURCES, 3))
        centres[:, 2] = abs(centres[:, 2]) * 1.2 - 0.5
        self.centres_K3 = _normalise(centres)
        self.widths_K = rng.uniform(0.35, 0.9, N_SOURCES)
        self.exponents_K = rng.uniform(1.0, 1.9, N_SOURCES)
        self.powers_K = rng.lognormal(0.0, 0.35, N_SOURCES)
        self.alpha_hz = float(rng.uniform(8.8, 11.3))
        self.alpha_uv = float(rng.uniform(4.0, 8.0))
        self.blinks_per_minute = float(rng.uniform(6, 14))
        n = len(COMPONENTS)
        self.response_centres_C3 = _normalise(
            _normalise([c.centre for c in COMPONENTS]) + 0.12 * rng.standard_normal((n, 3))
        )
        self.response_gains_C = rng.lognormal(0.0, 0.25) * rng.lognormal(0.0, 0.2, n)
        self.response_delays_C = rng.normal(0.0, PERSON_DELAY_S) + rng.normal(0.0, 0.006, n)

    def describe(self) -> dict[str, float]:
        """Return the person's properties for `truth.json`."""
        return {
            "alpha_hz": round(self.alpha_hz, 3),
            "alpha_uv": round(self.alpha_uv, 3),
            "blinks_per_minute": round(self.blinks_per_minute, 3),
            "response_gain": round(float(self.response_gains_C.mean()), 4),
            "response_delay_s": round(float(self.response_delays_C.mean()), 5),
        }

    def simulate_background(
        self, electrodes_n3: NDArray[np.float64], sfreq: float, seconds: float, rng: np.random.Generator, line_hz: float
    ) -> Array:
        """Simulate the background EEG, with rhythms, blinks, muscle activity, mains hum and drift.

        Parameters
        ----------
        electrodes_n3 : ndarray, shape (n, 3)
            Unit vectors from the middle of the head to the electrodes.
        sfreq : float
            Sampling rate, Hz.
        seconds : float
            Length of the recording, seconds.
        rng : numpy.random.Generator
            Random numbers for this recording.
        line_hz : float
            Mains frequency, Hz.

        Returns
        -------
        ndarray of float32, shape (n, T)
            Microvolts, relative to an ideal reference without any signal.
        """
        n, samples = len(electrodes_n3), round(seconds * sfreq)
        mixing_nK = np.stack(
            [_compute_potential(electrodes_n3, c, w) for c, w in zip(self.centres_K3, self.widths_K, strict=True)], 1
        )
        sources_KT = _draw_noise(rng, N_SOURCES, samples, sfreq, self.exponents_K)
        data_nT: Array = (mixing_nK * (4.5 * self.powers_K)).astype(np.float32) @ sources_KT

        # The alpha rhythm comes from two occipital sources with independent amplitudes.
        alpha_KT = _draw_noise(rng, 2, samples, sfreq, 0, band=(self.alpha_hz, 0.6))
        alpha_KT *= np.maximum(0.2, 1 + 0.7 * _draw_noise(rng, 2, samples, sfreq, 0, band=(0.1, 0.08)))
        alpha_n2 = np.stack([_compute_potential(electrodes_n3, (side, -0.85, 0.45), 0.6) for side in (-0.35, 0.35)], 1)
        data_nT += (alpha_n2 * np.float32(self.alpha_uv)) @ alpha_KT

        data_nT += self._simulate_blinks(electrodes_n3, sfreq, samples, rng)
        self._add_muscle(data_nT, electrodes_n3, sfreq, rng)

        time = np.arange(samples, dtype=np.float64) / sfreq
        pickup = rng.lognormal(np.log(2.5), 0.5, n).astype(np.float32)
        data_nT += pickup[:, None] * np.sin(2 * np.pi * line_hz * time + rng.uniform(0, 0.4)).astype(np.float32)
        drift = _draw_noise(rng, n, samples, sfreq, 0, band=(0.03, 0.03)) * rng.lognormal(np.log(15), 0.4, (n, 1))
        data_nT += drift.astype(np.float32)
        data_nT += rng.standard_normal((n, samples), dtype=np.float32) * np.float32(1.2)
        return data_nT

    def _simulate_blinks(
        self, electrodes_n3: NDArray[np.float64], sfreq: float, samples: int, rng: np.random.Generator
    ) -> Array:
        """Simulate blinks: potentials that last a third of a second and are largest at the front of the head."""
        trace = np.zeros(samples, np.float32)
        count = rng.poisson(self.blinks_per_minute * samples / sfreq / 60)
        shape = np.hanning(round(0.35 * sfreq)).astype(np.float32)
        for start in rng.integers(0, samples - len(shape), count):
            trace[start : start + len(shape)] += shape * np.float32(rng.uniform(70, 130))
        topography = _compute_potential(electrodes_n3, (0.0, 1.0, -0.25), 0.5)
        return np.maximum(topography, 0)[:, None] * trace[None, :]

    def _add_muscle(
        self, data_nT: Array, electrodes_n3: NDArray[np.float64], sfreq: float, rng: np.random.Generator
    ) -> None:
        """Add bursts of jaw muscle activity to the signal, in place; they are strongest over one temple."""
        length = round(1.5 * sfreq)
        for _ in range(rng.poisson(data_nT.shape[1] / sfreq / 60)):
            start = int(rng.integers(0, data_nT.shape[1] - length))
            topography = _compute_potential(electrodes_n3, (rng.choice([-1.0, 1.0]), 0.25, 0.0), 0.35)
            burst = np.diff(rng.standard_normal((len(electrodes_n3), length + 1), dtype=np.float32)) * np.hanning(
                length
            )
            data_nT[:, start : start + length] += 8 * np.maximum(topography, 0)[:, None] * burst.astype(np.float32)

    def simulate_responses(
        self,
        electrodes_n3: NDArray[np.float64],
        sfreq: float,
        samples: int,
        onsets: NDArray[np.float64],
        pictures: list[Picture],
        rng: np.random.Generator,
    ) -> Array:
        """Simulate the evoked responses to pictures.

        Parameters
        ----------
        electrodes_n3 : ndarray, shape (n, 3)
            Unit vectors from the middle of the head to the electrodes.
        sfreq : float
            Sampling rate, Hz.
        samples : int
            Length of the recording, samples.
        onsets : ndarray, shape (trials,)
            Onset of each picture, seconds.
        pictures : list of Picture
            The pictures that appear, in the order of `onsets`.
        rng : numpy.random.Generator
            Random numbers for this recording.

        Returns
        -------
        ndarray of float32, shape (n, samples)
            Evoked responses in microvolts. The caller adds the responses to the background EEG.
        """
        topographies_nC = np.stack(
            [
                _compute_potential(electrodes_n3, centre, c.width)
                for centre, c in zip(self.response_centres_C3, COMPONENTS, strict=True)
            ],
            1,
        )
        latency = np.array([c.latency for c in COMPONENTS]) + self.response_delays_C
        duration = np.array([c.duration for c in COMPONENTS])
        gain = np.array([c.gain for c in COMPONENTS]) * self.response_gains_C * RESPONSE_GAIN
        trace_CT = np.zeros((len(COMPONENTS), samples), np.float32)
        length = round(0.8 * sfreq)
        for onset, picture in zip(onsets, pictures, strict=True):
            first = round(onset * sfreq)
            time = (np.arange(length) + first) / sfreq - onset
            when = latency + rng.normal(0, TRIAL_DELAY_S) + rng.normal(0, 0.006, len(latency))
            amplitude = gain * compute_features(picture) * rng.lognormal(0, 0.3) * rng.lognormal(0, 0.2, len(gain))
            bumps = amplitude[:, None] * np.exp(-(((time[None, :] - when[:, None]) / duration[:, None]) ** 2) / 2)
            stop = min(samples, first + length)
            trace_CT[:, first:stop] += bumps[:, : stop - first].astype(np.float32)
        return topographies_nC @ trace_CT
