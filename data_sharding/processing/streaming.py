"""Process signals that are too long for memory: resampling and zero-phase filtering, block by block.

Except for rounding, the result does not depend on the size of the blocks. SciPy's `resample_poly` and `sosfiltfilt` are
not used, because they need the whole signal in memory. If they were applied to each block separately, the samples near
the borders of the blocks would be wrong.

Letters in array shapes: n channels, S samples at the recorded rate, T samples at the target rate, b samples per block.
"""

from __future__ import annotations

import functools
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import TracebackType

import numpy as np

from data_sharding.formats.signal import Segment

BLOCK_BYTES = 24 * 2**20
"""Largest size of a block in bytes, with 8 bytes (float64) for each value. A reader may need several times this size to
decode a block."""
STOP_DB = 80.0
"""Attenuation of aliased frequencies in dB. More attenuation would be useless, because samples are stored as float16,
and the rounding error of float16 is only 66 dB smaller than the sample."""
TRUNCATION = 1e-7
"""The *lookahead* of a filter is the number of samples after which its response is smaller than this fraction. The rest
of the response is ignored."""
MAX_UPSAMPLING = 8
"""Recordings are resampled to at most this many times their own sampling rate. A higher rate adds no information, but
the work and the scratch file grow with the rate."""
HELD_BYTES = 128 * 2**20
"""If a block and its lookahead need more than this number of bytes (8 bytes for each value), filtered samples are
stored on disk."""


# --- blocks ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Piece:
    """The samples in a block that belong to the same segment: the whole segment, or a part of the segment."""

    segment: int
    """Index of the segment in the signal."""
    start: int
    """Index of the first sample of the piece in the signal."""
    stop: int
    """Index of the last sample of the piece, plus one."""


def blocks_of(segments: Sequence[Segment], n_channels: int, block_bytes: int | None = None) -> Iterator[list[Piece]]:
    """Divide a signal into blocks of limited size.

    Parameters
    ----------
    segments : sequence of Segment
        Segments of the signal.
    n_channels : int
        Number of channels that are read.
    block_bytes : int, optional
        Largest size of a block in bytes, with 8 bytes for each value; `BLOCK_BYTES` by default.

    Yields
    ------
    list of Piece
        Pieces of one block: a part of a long segment, or many short segments. In the file, each piece of a block begins
        where the previous piece ends, so one read operation gets the whole block.
    """
    most = max(1024, (block_bytes or BLOCK_BYTES) // (8 * max(1, n_channels)))
    block: list[Piece] = []
    for number, segment in enumerate(segments):
        start = segment.start
        while start < segment.stop:
            if block and (block[-1].stop != start or start - block[0].start >= most):
                yield block
                block = []
            stop = min(segment.stop, (block[0].start if block else start) + most)
            block.append(Piece(number, start, stop))
            start = stop
    if block:
        yield block


class Scratch:
    """Temporary file for samples. The file has no name, so the system deletes it even if the process crashes.

    Parameters
    ----------
    n_channels : int
        Number of channels.

    Notes
    -----
    The file is in the folder that the environment variable DREAMSCALE_SCRATCH names. If this variable is not set, the
    file is in the system's temporary folder. The file is not memory-mapped, because mapped pages would be counted as
    memory of the process.
    """

    def __init__(self, n_channels: int) -> None:
        base = os.environ.get("DREAMSCALE_SCRATCH")
        if base:
            Path(base).mkdir(parents=True, exist_ok=True)
        self.n_channels = n_channels
        self.n_samples = 0
        self._file = tempfile.TemporaryFile(dir=base, buffering=0)  # noqa: SIM115 - closed by close()

    def write(self, x: np.ndarray) -> None:
        """Append samples.

        Parameters
        ----------
        x : ndarray, shape (n, b)
            Samples to append; they are stored as float32.
        """
        data = memoryview(np.ascontiguousarray(x.T, dtype=np.float32).reshape(-1).view(np.uint8).data)
        at = self.n_samples * self.n_channels * 4
        while data:
            done = os.pwrite(self._file.fileno(), data, at)
            data, at = data[done:], at + done
        self.n_samples += x.shape[1]

    def read(self, start: int, stop: int) -> np.ndarray:
        """Read samples of all channels.

        Parameters
        ----------
        start, stop : int
            First sample to read, and last sample plus one. Samples are numbered in the order in which they were
            written.

        Returns
        -------
        ndarray, shape (n, stop - start), float32
            The samples that were read.
        """
        out = np.empty((stop - start, self.n_channels), np.float32)
        view, at = memoryview(out.reshape(-1).view(np.uint8).data), start * self.n_channels * 4
        while view:
            done = os.preadv(self._file.fileno(), [view], at)
            if not done:
                raise EOFError(f"the temporary file of the signal ends before sample {stop}")
            view, at = view[done:], at + done
        return out.T

    def close(self) -> None:
        """Close the temporary file, so that the system frees its disk space."""
        self._file.close()

    def __enter__(self) -> Scratch:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self.close()


# --- resampling ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Plan:
    """Polyphase filter for resampling, stored as a few small matrices.

    The signal is divided into frames. From the `inputs` input samples of a frame, exactly `outputs` output samples are
    computed. The outputs of a frame are divided into groups, and one matrix computes the outputs of one group. All
    frames use the same matrices, because the phases of the filter are the same in each frame.
    """

    up: int
    down: int
    reach: int
    """An output sample depends on at most this many input samples before it, and on as many after it."""
    inputs: int
    outputs: int
    groups: tuple[tuple[int, int, np.ndarray], ...]
    """For each group: index of its first output in the frame; index of its first input, counted from `reach` samples
    before the frame; and its matrix, of shape [inputs of the group, outputs of the group]."""


@functools.lru_cache(maxsize=64)
def ratio_of(sfreq: float, target: float) -> Fraction:
    """Return the target rate divided by the recorded rate.

    Parameters
    ----------
    sfreq, target : float
        Recorded rate and target rate in Hz.

    Returns
    -------
    Fraction
        The ratio, with a denominator of at most 10,000.
    """
    return Fraction(target / sfreq).limit_denominator(10_000)


def resampled_length(n_samples: int, sfreq: float, target: float) -> int:
    """Return the number of samples after resampling.

    Parameters
    ----------
    n_samples : int
        Number of samples at the recorded rate.
    sfreq, target : float
        Recorded rate and target rate in Hz.

    Returns
    -------
    int
        T = ceil(S * target / sfreq).
    """
    return math.ceil(n_samples * ratio_of(sfreq, target))


@functools.lru_cache(maxsize=8)
def _plan(sfreq: float, target: float, passband: float) -> _Plan:
    """Design the anti-aliasing filter, and store the filter as matrices.

    Resampling by ``up / down`` means: insert ``up - 1`` zeros after each input sample, apply the low-pass filter ``h``,
    and keep every ``down``-th sample. In the signal with the inserted zeros, output ``j`` is at position ``j * down``,
    and input ``i`` is at position ``i * up``. So output ``j`` is the sum of ``h[half + j * down - i * up] * x[i]`` over
    ``i``, where ``half`` is the index of the middle of ``h``. Only the inputs ``i`` within `reach` samples of ``j *
    down / up`` contribute to output ``j``.

    The weights of a group of `count` consecutive outputs form a matrix. One matrix product computes the outputs of this
    group in all frames. The matrices contain many zeros, but the matrix products need only a third of the time of
    SciPy's `upfirdn`, which computes each output separately.
    """
    from scipy.signal import firwin, kaiserord

    ratio = ratio_of(sfreq, target)
    up, down = ratio.numerator, ratio.denominator
    lower = min(sfreq, target)
    passed = min(passband, 0.45 * lower)
    # The transition band can extend from `passed` to `lower - passed`, because the aliases of these frequencies are
    # above `passed`, outside the pass band.
    taps, beta = kaiserord(STOP_DB, (lower - 2 * passed) / (0.5 * up * sfreq))
    half = taps // 2 + 1
    h = up * np.asarray(firwin(2 * half + 1, 0.5 * lower, window=("kaiser", beta), fs=up * sfreq))  # type: ignore[arg-type]
    for phase in range(up):
        # Scale the filter weights of each phase so that their sum is exactly one. Without this scaling, each phase
        # would multiply a constant signal by another factor, and the output would contain a tone.
        h[phase::up] /= h[phase::up].sum()
    reach = half // up + 1
    count = max(4, min(64, round(2 * reach * up / down)))
    width = math.ceil(count * down / up) + 2 * reach + 1
    # Make a frame at least as long as the inputs of a group. Then the inputs of one group in one frame do not overlap
    # its inputs in the next frame, and BLAS can read them without a copy.
    times = max(math.ceil(width / down), math.ceil(4 * count / up))
    inputs, outputs = times * down, times * up
    groups = []
    for first in range(0, outputs, count):
        j = np.arange(first, min(first + count, outputs))
        begin = j[0] * down // up  # Index of the group's first input, counted from `reach` samples before the frame.
        # Do not use inputs after the last input that the group needs, because later inputs may not have been read yet.
        i = np.arange(begin - reach, j[-1] * down // up + reach + 1)
        k = half + j[None, :] * down - i[:, None] * up
        matrix = np.where((k >= 0) & (k < len(h)), h[np.clip(k, 0, len(h) - 1)], 0.0)
        groups.append((int(j[0]), int(begin), np.ascontiguousarray(matrix)))
    return _Plan(up, down, reach, inputs, outputs, tuple(groups))


def resampler_reach(sfreq: float, target: float, passband: float) -> int:
    """Return how far a recorded sample affects the resampled signal to each side, in samples at the target rate."""
    if ratio_of(sfreq, target) == 1:
        return 0
    return math.ceil(_plan(sfreq, target, passband).reach * target / sfreq)


def _odd(x: np.ndarray, before: int, after: int) -> np.ndarray:
    """Extend a signal at both ends: its samples next to an end are rotated by 180 degrees about the end point."""
    return np.pad(x, ((0, 0), (before, after)), mode="reflect", reflect_type="odd")


class Resampler:
    """Polyphase resampling of one segment, block by block.

    Parameters
    ----------
    sfreq, target : float
        Recorded rate and target rate in Hz.
    passband : float
        Upper edge of the pass band in Hz, at most 0.45 times the lower of the two rates. The pass band is not
        attenuated. Aliases of other frequencies that fall into the pass band are attenuated by `STOP_DB`.

    Notes
    -----
    The filter is a Kaiser-windowed sinc. The segment is extended at both ends: its samples next to an end are rotated
    by 180 degrees about the end point. (Some libraries remove a linear trend instead. Then every output sample depends
    on the length of the signal.)

    Between two calls of `push`, `_held` contains the input samples that are needed for later outputs. The first sample
    in `_held` is `reach` samples before the next frame. When `_held` contains the whole next frame and `reach` samples
    after the frame, the outputs of this frame are computed, and its inputs are dropped.
    """

    def __init__(self, sfreq: float, target: float, passband: float) -> None:
        self._same = ratio_of(sfreq, target) == 1
        self._plan = _plan(sfreq, target, passband) if not self._same else None
        self._held: np.ndarray | None = None
        # True after the segment was extended before its first sample. From then on, `_held` begins `reach` samples
        # before the next frame.
        self._begun = False
        self._n_channels = self._n_in = self._n_out = 0
        self._scale: float = 1.0
        self._offset: np.ndarray | float = 0.0

    def push(self, x: np.ndarray, scale: float = 1.0, offset: np.ndarray | float = 0.0) -> np.ndarray:
        """Add a block.

        Parameters
        ----------
        x : ndarray, shape (n, b)
            Next samples of the segment.
        scale : float
            Factor by which the samples are multiplied.
        offset : ndarray or float
            Value that is subtracted after the multiplication: one value, or one value for each channel.

        Returns
        -------
        ndarray, shape (n, k), float64
            New output samples that can be computed now; k may be zero.
        """
        self._n_channels = len(x)
        self._n_in += x.shape[1]
        plan = self._plan
        if plan is None:
            return x * scale - offset
        # Scale the output and not the input, because the output usually has fewer samples. (The filter is linear.)
        self._scale, self._offset = scale, offset
        kept = 0 if self._held is None else self._held.shape[1]
        lead = 0 if self._begun else plan.reach
        data = np.empty((len(x), lead + kept + x.shape[1]))
        if self._held is not None:
            data[:, lead : lead + kept] = self._held
        data[:, lead + kept :] = x
        if not self._begun:
            if kept + x.shape[1] <= plan.reach + 1:
                self._held = data[:, lead:].copy()
                return np.empty((len(x), 0))
            # There are now enough samples to extend the segment before its first sample.
            data[:, :lead] = _odd(data[:, lead : lead + plan.reach + 1], plan.reach, 0)[:, : plan.reach]
            self._begun = True
        return self._frames(data)

    def _frames(self, data: np.ndarray) -> np.ndarray:
        """Compute the outputs of all complete frames (groups of inputs). The other input samples stay in `_held`."""
        plan = self._plan
        assert plan is not None
        n_frames = max(0, (data.shape[1] - 2 * plan.reach - 1) // plan.inputs)
        out = np.empty((len(data), n_frames, plan.outputs))
        if n_frames:
            for first, begin, matrix in plan.groups:
                frames = np.lib.stride_tricks.as_strided(
                    data[:, begin:],
                    (len(data), n_frames, len(matrix)),
                    (data.strides[0], plan.inputs * data.itemsize, data.itemsize),
                    writeable=False,
                )
                np.matmul(frames, matrix, out=out[:, :, first : first + matrix.shape[1]])
        self._held = data[:, n_frames * plan.inputs :].copy()
        self._n_out += n_frames * plan.outputs
        out *= self._scale
        out -= np.reshape(self._offset, (-1, 1, 1))
        return out.reshape(len(data), -1)

    def finish(self) -> np.ndarray:
        """Finish the segment.

        Returns
        -------
        ndarray, shape (n, k), float64
            The last output samples.
        """
        plan, data = self._plan, self._held
        if plan is None or data is None:
            return np.empty((self._n_channels, 0))
        total = math.ceil(self._n_in * plan.up / plan.down)
        missing = total - self._n_out
        if not self._begun:
            data = np.concatenate([_odd(data, plan.reach, 0)[:, : plan.reach], data], axis=1)
        if missing <= 0:
            return np.empty((len(data), 0))
        need = 2 * plan.reach + 1 + plan.inputs * math.ceil(missing / plan.outputs)
        real = data.shape[1] - (plan.reach if not self._begun else 0)
        context = data[:, -min(real, plan.reach + 1) :]
        extension = _odd(context, 0, plan.reach + 1)[:, context.shape[1] :]
        data = np.concatenate([data, extension], axis=1)
        if data.shape[1] < need:
            # Fill the last frame with zeros. The outputs that depend on these zeros are removed from the result.
            data = np.pad(data, ((0, 0), (0, need - data.shape[1])))
        return self._frames(data)[:, :missing]


def resample(x: np.ndarray, sfreq: float, target: float, passband: float | None = None) -> np.ndarray:
    """Resample one segment in memory, with the anti-aliasing filter.

    Parameters
    ----------
    x : ndarray, shape (n, S)
        Signal to resample.
    sfreq, target : float
        Recorded rate and target rate in Hz.
    passband : float, optional
        Upper edge of the pass band in Hz; by default, 0.4 times the lower of the two rates.

    Returns
    -------
    ndarray, shape (n, T), float64
        Signal at the target rate, T = ceil(S * target / sfreq).
    """
    resampler = Resampler(sfreq, target, 0.4 * min(sfreq, target) if passband is None else passband)
    first = resampler.push(x)
    return np.concatenate([first, resampler.finish()], axis=1) if ratio_of(sfreq, target) != 1 else first


# --- filtering -------------------------------------------------------------------------------------------------------


def lookahead(sos: np.ndarray) -> int:
    """Compute after how many samples a filter's initial state has practically no effect.

    Parameters
    ----------
    sos : ndarray, shape (n_sections, 6)
        Second-order sections of the filter.

    Returns
    -------
    int
        Number of samples after which the response of the slowest pole is smaller than `TRUNCATION`.
    """
    radius = max(float(np.abs(np.roots(section[3:])).max()) for section in sos)
    return math.ceil(math.log(TRUNCATION) / math.log(min(max(radius, 1e-3), 1 - 1e-9)))


@functools.lru_cache(maxsize=16)
def _memory(sections: bytes, count: int) -> tuple[int, np.ndarray]:
    """Return a filter's lookahead (see `TRUNCATION`), and its state after a long constant input of 1."""
    from scipy.signal import sosfilt_zi

    sos = np.frombuffer(sections).reshape(count, 6)
    return lookahead(sos), np.asarray(sosfilt_zi(sos))[:, None, :]


def zero_phase(
    read: Callable[[int, int], np.ndarray], n_samples: int, sos: np.ndarray, pad: int, block: int
) -> Iterator[np.ndarray]:
    """Filter one segment forward and backward.

    Parameters
    ----------
    read : callable
        Function of (start, stop) that returns the samples from `start` to `stop - 1` as an array of shape (n, stop -
        start).
    n_samples : int
        Length of the segment in samples.
    sos : ndarray, shape (n_sections, 6)
        Second-order sections of the filter.
    pad : int
        Number of samples by which the segment is extended at each end (see `Resampler`). A segment with at most `pad`
        samples is extended by its length minus one.
    block : int
        Number of samples per block. If this number is less than four times the filter's lookahead (see `TRUNCATION`),
        blocks of four times the lookahead are used, unless the signal is stored on disk (see Notes).

    Yields
    ------
    ndarray, shape (n, b), float64
        Filtered blocks in order. All blocks together have `n_samples` samples.

    Notes
    -----
    The forward pass starts each block with the filter state from the end of the previous block. For the backward pass,
    the exact state at the end of a block depends on all later samples. So the backward filter starts one lookahead
    after the block, with an approximate state. When the backward filter reaches the block, the relative error of its
    state is smaller than `TRUNCATION`. For a single block, the result equals `scipy.signal.sosfiltfilt`.

    With many channels and a high-pass below about 0.1 Hz, a block with its lookahead does not fit into memory. In this
    case, the signal is stored on disk as float32 between the two passes.
    """
    from scipy.signal import sosfilt

    look, zi = _memory(sos.tobytes(), len(sos))
    pad = min(pad, n_samples - 1)
    head = np.asarray(read(0, pad + 1), np.float64)
    if min(5 * look, n_samples) * len(head) * 8 > HELD_BYTES:
        yield from _zero_phase_on_disk(read, n_samples, sos, pad, block)
        return
    block = max(block, 4 * look)
    state = _initial_state(sos, zi, head, pad)
    held = np.empty((len(head), 0))
    for start in range(0, n_samples, block):
        stop = min(start + block, n_samples)
        forward, state = sosfilt(sos, np.asarray(read(start, stop), np.float64), zi=state)
        held = np.concatenate([held, forward], axis=1) if held.size else forward
        ready = held.shape[1] - look
        if stop == n_samples:
            ready = held.shape[1]
            held = np.concatenate([held, _filter_extension(read, n_samples, sos, pad, state)], axis=1)
        if ready > 0:
            backward, _ = sosfilt(sos, held[:, ::-1], zi=zi * held[None, :, -1:])
            yield backward[:, ::-1][:, :ready]
            held = held[:, ready:]


def _initial_state(sos: np.ndarray, zi: np.ndarray, head: np.ndarray, pad: int) -> np.ndarray:
    """Compute the forward filter's state at the start of a segment; `head` contains the segment's first samples."""
    from scipy.signal import sosfilt

    before = _odd(head, pad, 0)[:, :pad]
    if not pad:
        return zi * head[None, :, :1]
    return sosfilt(sos, before, zi=zi * before[None, :, :1])[1]


def _filter_extension(
    read: Callable[[int, int], np.ndarray], n_samples: int, sos: np.ndarray, pad: int, state: np.ndarray
) -> np.ndarray:
    """Apply the forward filter to the extension after the end of a segment."""
    from scipy.signal import sosfilt

    tail = np.asarray(read(n_samples - 1 - pad, n_samples), np.float64)
    return sosfilt(sos, _odd(tail, 0, pad)[:, pad + 1 :], zi=state)[0] if pad else tail[:, :0]


def _zero_phase_on_disk(
    read: Callable[[int, int], np.ndarray], n_samples: int, sos: np.ndarray, pad: int, block: int
) -> Iterator[np.ndarray]:
    """Do the same as `zero_phase` for a filter with a long lookahead; the results of both passes are stored on disk."""
    from scipy.signal import sosfilt

    _, zi = _memory(sos.tobytes(), len(sos))
    head = np.asarray(read(0, pad + 1), np.float64)
    state, starts = _initial_state(sos, zi, head, pad), list(range(0, n_samples, block))
    with Scratch(len(head)) as once, Scratch(len(head)) as twice:
        for start in starts:
            x = np.asarray(read(start, min(start + block, n_samples)), np.float64)
            forward, state = sosfilt(sos, x, zi=state)
            once.write(forward)
        if pad:
            end = _filter_extension(read, n_samples, sos, pad, state)
            state = sosfilt(sos, end[:, ::-1], zi=zi * end[None, :, -1:])[1]
        else:
            state = zi * once.read(n_samples - 1, n_samples)[None]
        for start in reversed(starts):
            x = once.read(start, min(start + block, n_samples)).astype(np.float64)
            backward, state = sosfilt(sos, x[:, ::-1], zi=state)
            twice.write(backward[:, ::-1])
        # Read from the end of the file, because the backward pass wrote the blocks in reverse order.
        at = n_samples
        for start in starts:
            size = min(block, n_samples - start)
            at -= size
            yield twice.read(at, at + size).astype(np.float64)
