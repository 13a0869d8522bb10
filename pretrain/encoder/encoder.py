"""The class `EEGEncoder`: pretrained weights together with the preprocessing that they were trained with.

Tensor names end with the shape, such as BCT in `x_BCT`; the docstring of `pretrain.model` explains these letters.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from data_sharding.common.errors import RequestError
from data_sharding.dataset.samples import N_PADDED, pad_channels
from data_sharding.processing.preprocess import PreprocessSpec, band_of
from pretrain.encoder.package import CONFIG, check_example, damage_error, read_package, write_package
from pretrain.encoder.result import CoverageReport, Encoding
from pretrain.model.build import build_encoder
from pretrain.model.config import EncoderConfig
from pretrain.model.weights import WEIGHTS, check_network, load_strictly, measure_weights

if TYPE_CHECKING:
    import mne

    from data_sharding.dataset.dataset import EEGDataset
    from data_sharding.formats.signal import Signal


class EEGEncoder(nn.Module):
    """Pretrained encoder of EEG windows.

    Parameters
    ----------
    config : EncoderConfig, optional
        Architecture of the encoder. Without `config`, the architecture follows from the arguments below, which have the
        same names as in Braindecode.
    spec : PreprocessSpec, optional
        Preprocessing that the weights were trained with.
    n_chans : int, optional
        Number of channels in the windows that `forward` will get, at most 128. If it is below 128, the temporal
        tokenizer pads each window to 128 rows with copies of the window's channels.
    n_times : int, optional
        Number of time samples in a window.
    sfreq : float, optional
        Sampling rate in Hz.
    n_outputs : int, optional
        Number of classes of a linear head; the head classifies the mean of the tokens. Without `n_outputs`, there is no
        head, and `forward` returns tokens.
    chs_info : list of dict, optional
        MNE's channel descriptions; they give the number of channels and the positions of the electrodes (``loc``).
    input_window_seconds : float, optional
        Length of a window in seconds; give this length or `n_times`.
    **shape
        Further fields of `EncoderConfig`, e.g. ``dim=256``.

    Raises
    ------
    ValueError
        If the arguments contradict each other.

    Examples
    --------
    >>> encoder = EEGEncoder.from_pretrained("encoder")  # doctest: +SKIP
    >>> encoder.encode(mne.io.read_raw("subject.edf")).pooled  # doctest: +SKIP
    """

    positions_C3: Tensor | None

    def __init__(
        self,
        config: EncoderConfig | None = None,
        spec: PreprocessSpec | None = None,
        *,
        n_chans: int | None = None,
        n_times: int | None = None,
        sfreq: float | None = None,
        n_outputs: int | None = None,
        chs_info: Sequence[dict[str, Any]] | None = None,
        input_window_seconds: float | None = None,
        **shape: Any,
    ) -> None:
        super().__init__()
        if chs_info is not None:
            if n_chans not in (None, len(chs_info)):
                raise ValueError(
                    f"n_chans is {n_chans}, but chs_info describes {len(chs_info)} channels; leave n_chans out"
                )
            n_chans = len(chs_info)
        if sfreq is None:
            sfreq = spec.sfreq if spec else PreprocessSpec().sfreq
        if input_window_seconds is not None:
            from_seconds = round(input_window_seconds * sfreq)
            if n_times not in (None, from_seconds):
                raise ValueError(
                    f"n_times is {n_times}, but input_window_seconds x sfreq is {from_seconds}; leave n_times out"
                )
            n_times = from_seconds
        if config is None:
            samples = n_times or (spec.window if spec else EncoderConfig().samples)
            config = EncoderConfig(channels=N_PADDED, samples=samples, **shape)
        elif shape:
            raise ValueError(f"{', '.join(shape)}: cannot be given together with config; set these values in config")
        if spec is None:
            default = PreprocessSpec()
            spec = PreprocessSpec(
                sfreq=sfreq,
                lowpass=min(default.lowpass, 0.45 * sfreq),
                window=config.samples,
                stride=config.samples,
            )
        if spec.window != config.samples:
            raise ValueError(
                f"spec.window is {spec.window}, but the encoder takes windows of {config.samples} samples; make "
                "spec.window and config.samples equal"
            )
        if spec.sfreq != sfreq:
            raise ValueError(f"sfreq is {sfreq}, but the preprocessing resamples to {spec.sfreq} Hz; leave sfreq out")
        if n_times not in (None, config.samples):
            raise ValueError(
                f"n_times is {n_times}, but the encoder takes windows of {config.samples} samples; leave n_times out"
            )
        if n_chans is not None and not 1 <= n_chans <= config.channels:
            raise ValueError(f"n_chans is {n_chans}; the encoder takes 1 to {config.channels} channels")
        self.config, self.spec = config, spec
        self.n_chans, self.n_times, self.sfreq, self.n_outputs = (
            n_chans or config.channels,
            config.samples,
            sfreq,
            n_outputs,
        )
        self.chs_info = list(chs_info) if chs_info is not None else None
        self.backbone: Any = build_encoder(config)
        positions_C3 = _positions_of(self.chs_info) if self.chs_info is not None else None
        # Electrode positions are not saved with the weights, because the same weights work with any montage.
        self.register_buffer("positions_C3", positions_C3, persistent=False)
        self.head = _head(config.dim, n_outputs)

    @property
    def dim(self) -> int:
        """Width of a token."""
        return self.config.dim

    @property
    def n_tokens(self) -> int:
        """Number of tokens in a window, without the class token."""
        return self.config.tokens

    def inputs_of(self, metas: list[dict[str, Any]], device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """Return the electrode positions of a batch of samples, if the encoder needs electrode positions.

        Parameters
        ----------
        metas : list of dict, [B]
            Metadata of samples (`data_sharding.dataset.batch.Batch.metas`).
        device : torch.device or str
            Device of the encoder.

        Returns
        -------
        dict of str to Tensor
            Keyword arguments for `tokens` and `forward`; an empty dictionary for the temporal tokenizer.
        """
        return {name: value.to(device) for name, value in self.backbone.electrode_inputs(metas).items()}

    def keep_electrodes(self, dataset: EEGDataset) -> None:
        """Store the electrode positions of a dataset in the encoder, so that `tokens` can be called without positions.

        Parameters
        ----------
        dataset : EEGDataset
            A split that was recorded with one montage.

        Raises
        ------
        RequestError
            If the encoder needs electrode positions and the dataset has several montages.
        """
        positions_C3 = self.backbone.common_positions(dataset)
        if positions_C3 is not None:
            self.positions_C3 = positions_C3

    def fit_to(self, dataset: EEGDataset, what: str) -> EEGEncoder:
        """Check that the encoder and a dataset fit, and shorten the encoder if the dataset's windows are shorter.

        An encoder can read windows that are shorter than those of its pretraining: it then has fewer tokens, each with
        the same duration and the same weights.

        Parameters
        ----------
        dataset : EEGDataset
            Windows that the encoder is to read.
        what : str
            Name of the encoder, for messages.

        Returns
        -------
        EEGEncoder
            This encoder, or a shorter encoder with the same weights. A message says if the encoder was shortened.

        Raises
        ------
        RequestError
            If the preprocessing differs, or if the windows are too long, or not a whole number of tokens.
        """
        config, window = self.config, dataset.n_times
        dataset.require_preprocess(dataclasses.replace(self.spec, window=dataset.spec.window), what)
        if window == config.samples:
            return self
        if window > config.samples:
            raise RequestError(
                f"{what} reads {config.samples} time points, and {dataset.path} has {window}; set eeg.tmax to "
                f"{self.spec.window_s:g} s after eeg.tmin, or shard with --encoder"
            )
        if window % config.patch:
            whole = window - window % config.patch
            fix = f"set eeg.tmax to {whole / self.sfreq:g} s after eeg.tmin, or " if whole else ""
            raise RequestError(
                f"{what} reads tokens of {config.patch} time points, and {dataset.path} has {window} time points, "
                f"which is not a whole number of tokens; {fix}shard with --encoder"
            )
        shape = dataclasses.replace(config, samples=window)
        spec = dataclasses.replace(self.spec, window=window, stride=window)
        short = EEGEncoder(shape, spec, n_chans=self.n_chans, n_outputs=self.n_outputs)
        weights = self.state_dict()
        if config.learned_positions:
            weights["backbone.positions_ND"] = weights["backbone.positions_ND"][: shape.tokens]
        short.load_state_dict(weights)
        short.positions_C3 = self.positions_C3
        print(
            f"{what}: reads the {spec.window_s:g} s of a trial with {shape.tokens} of the {config.tokens} tokens of "
            "its pretraining"
        )
        return short.train(self.training)

    def scale_for_model(self, x_uv_BCT: Tensor, channels: Any = None) -> Tensor:
        """Scale windows from microvolts to model units (the values that the model reads), as in pretraining.

        Parameters
        ----------
        x_uv_BCT : Tensor, [B, C, T]
            Windows in microvolts, padded or not; float32 or float64.
        channels : int, or sequence or Tensor of int, [B], optional
            Number of recorded channels of each window; by default, the number of electrode positions stored in the
            encoder, or the number of rows if no positions are stored. The montage tokenizer computes the scale of a
            window over the recorded channels only. The temporal tokenizer always computes the scale over the whole
            padded window.

        Returns
        -------
        Tensor, [B, C, T]
            Windows in model units.
        """
        return self.spec.scale_for_model(x_uv_BCT, self.backbone.channels_for_scale(channels, self.positions_C3))

    def tokens(self, x_BCT: Tensor, positions: Tensor | None = None, count_B: Tensor | None = None) -> Tensor:
        """Encode windows.

        Parameters
        ----------
        x_BCT : Tensor, [B, C, T]
            Windows in model units (see `scale_for_model`). The temporal tokenizer pads windows that have fewer than
            `config.channels` channels.
        positions : Tensor, [C, 3] or [B, C, 3], optional
            Montage tokenizer only: electrode positions in metres, NaN for an unknown position. If there are fewer
            positions than channels, the last channels of `x_BCT`, which have no position, are ignored. By default, the
            positions stored in the encoder are used, e.g. those of `chs_info`.
        count_B : Tensor, [B], int64, optional
            Montage tokenizer only: number of recorded channels of each window, if this number differs between windows.

        Returns
        -------
        Tensor, [B, N, D]
            Tokens in the order of time, without the class token. The montage tokenizer's tokens are averaged over the
            channels.

        Raises
        ------
        ValueError
            If the windows have another length than the encoder takes, or if there are too many channels or positions.
        RequestError
            If the encoder has the montage tokenizer and there are no electrode positions.
        """
        if x_BCT.shape[-1] != self.config.samples or x_BCT.shape[-2] > self.config.channels:
            raise ValueError(
                f"got windows of {x_BCT.shape[-2]} channels x {x_BCT.shape[-1]} samples; "
                f"the encoder takes at most {self.config.channels} x {self.config.samples}"
            )
        positions = self.positions_C3 if positions is None else positions
        if positions is not None and positions.ndim == 2:
            positions = positions.expand(x_BCT.shape[0], -1, -1)
        return self.backbone.over_time(x_BCT, positions, count_B)

    def forward(self, x_BCT: Tensor, positions: Tensor | None = None, count_B: Tensor | None = None) -> Tensor:
        """Encode windows, and classify them if the encoder has a head.

        Parameters
        ----------
        x_BCT : Tensor, [B, C, T]
            Windows in model units (see `scale_for_model`). The temporal tokenizer pads windows that have fewer than
            `config.channels` channels.
        positions, count_B : Tensor, optional
            See `tokens`.

        Returns
        -------
        Tensor, [B, N, D] or [B, n_outputs]
            Tokens in the order of time, without the class token; or logits if the encoder has a head.
        """
        tokens_BND = self.tokens(x_BCT, positions, count_B)
        return tokens_BND if self.head is None else self.head(tokens_BND.mean(dim=1))

    @torch.no_grad()
    def encode(
        self,
        recording: mne.io.BaseRaw | mne.BaseEpochs | Signal | tuple[np.ndarray, Sequence[str], float, str],
        *,
        line_freq: float | None = None,
        unit_factor: float | None = None,
        batch_size: int = 64,
    ) -> Encoding:
        """Encode a recording, with the same preprocessing as in pretraining.

        Parameters
        ----------
        recording : mne.io.BaseRaw, mne.BaseEpochs, data_sharding.formats.signal.Signal or tuple
            A recording, or ``(x, ch_names, sfreq, unit)`` where x is an array [C, samples] and unit is one of
            "V", "mV", "uV", "nV".
        line_freq : float, optional
            Mains frequency in Hz, from 40 to 70. If the preprocessing includes a notch filter, the filter removes the
            mains frequency. By default the mains frequency is detected in the recording.
        unit_factor : float, optional
            Factor that converts the recording's values to volts, if the recording states a wrong unit.
        batch_size : int
            Number of windows to encode in one forward pass.

        Returns
        -------
        Encoding
            Tokens and mean token of each window, start times of the windows, and a report on what was encoded.

        Raises
        ------
        RequestError
            If the recording has no EEG channel, or more EEG channels than the encoder takes. If the recording cannot be
            used for another reason, e.g. because its unit is unknown or it is shorter than a window. If an argument has
            an impossible value.
        """
        from pretrain.encoder.recording import MAX_BATCH, windows_of

        if batch_size < 1:
            raise RequestError(f"batch_size is {batch_size}; it must be at least 1")
        spec, device = self.spec, next(self.parameters()).device
        batch_size = min(batch_size, max(1, MAX_BATCH // (self.config.channels * self.config.samples)))
        times: list[float] = []
        with (
            _evaluation_mode(self),
            windows_of(recording, spec, unit_factor=unit_factor, line_freq=line_freq) as found,
        ):
            if len(found.names) > self.config.channels:
                raise RequestError(
                    f"the recording has {len(found.names)} EEG channels to encode, but this encoder takes at most "
                    f"{self.config.channels}; pick at most {self.config.channels} channels of the recording"
                )
            # `tokens_BND` has a row for every window that the recording could give. Windows that cannot be used are
            # skipped, so rows at the end can stay unused. Unused rows need no memory, because the system allocates
            # memory at the first write.
            tokens_BND = np.empty((found.most, self.n_tokens, self.dim), np.float32)
            # All windows of a recording have the same electrodes, so collect the electrode positions only once.
            inputs = self.inputs_of([{"n": len(found.names), "positions": found.positions}], device)
            positions_C3 = inputs["positions"][0] if inputs else None
            while batch := list(itertools.islice(found.stream, batch_size)):
                # Round the values to float16 microvolts, because the windows of the pretraining were stored in this
                # format.
                block = np.stack([one.x.astype(np.float16).astype(np.float32) for one in batch])
                uv_BCT = torch.from_numpy(pad_channels(block, self.config.channels)).to(device)
                x_BCT = self.scale_for_model(uv_BCT, len(found.names))
                rows = slice(len(times), len(times) + len(batch))
                tokens_BND[rows] = self.tokens(x_BCT, positions_C3).float().cpu().numpy()
                times += [one.start_s for one in batch]
        if not times:
            why = ", ".join(f"{count} {reason}" for reason, count in sorted(found.account.windows.items()))
            raise RequestError(f"no window of the recording can be encoded: {why}")
        tokens_BND = tokens_BND[: len(times)]
        report = CoverageReport(
            channels_used=found.names,
            channels_left_out=found.left_out,
            channel_selection=found.selection,
            channels_bad=found.bads,
            sfreq_in=found.sfreq,
            sfreq_model=spec.sfreq,
            band=band_of(found.sfreq, spec),
            line_freq=found.line_freq if spec.notch == "auto" else None if isinstance(spec.notch, str) else spec.notch,
            seconds=found.seconds,
            window_seconds=spec.window_s,
            windows=len(times),
            windows_left_out=dict(sorted(found.account.windows.items())),
            seconds_left_out=found.account.seconds_left_out(),
            bad_in_windows=dict(sorted(found.account.kinds.items())),
        )
        return Encoding(tokens=tokens_BND, pooled=tokens_BND.mean(axis=1), times=np.array(times), report=report)

    def save_pretrained(
        self, path: str | Path, *, card: str | None = None, program: bool = False, extra: dict[str, Any] | None = None
    ) -> None:
        """Write an encoder package, either completely or not at all.

        Parameters
        ----------
        path : str or Path
            Directory to write; an existing package is replaced.
        card : str, optional
            Text of the model card; a short text by default.
        program : bool
            If True, also write `encoder.pt2`, a program that needs only PyTorch to run.
        extra : dict, optional
            Information about the encoder's origin, to store in `config.json`.

        Raises
        ------
        RequestError
            If the encoder's output holds NaN or infinite values; then no package is written.
        """
        # Make a copy on the CPU in float32, because the output that is stored for the self-check must not depend on the
        # device of the training.
        model = EEGEncoder(self.config, self.spec, n_chans=self.n_chans, n_outputs=self.n_outputs)
        model.load_state_dict({k: v.detach().float().cpu() for k, v in self.state_dict().items()})
        model.eval()
        write_package(path, model, self.positions_C3, card=card, program=program, extra=extra or {})

    @classmethod
    def from_pretrained(cls, path_or_hub_id: str | Path, *, n_outputs: int | None = None) -> EEGEncoder:
        """Read an encoder package, and check that the encoder computes the example output stored in the package.

        Parameters
        ----------
        path_or_hub_id : str or Path
            Directory of the package, or its name on the Hugging Face hub (``user/name``).
        n_outputs : int, optional
            Number of classes, if the encoder is to get a new classification head.

        Returns
        -------
        EEGEncoder
            The encoder on the CPU, in float32 and in evaluation mode.

        Raises
        ------
        RequestError
            If a file is missing or damaged, if the weights do not fit the config, or if the encoder's output for the
            package's example input differs from the output stored there.
        """
        found = read_package(path_or_hub_id)

        def build() -> EEGEncoder:
            return cls(found.config, found.spec, n_chans=found.n_chans, n_outputs=found.n_outputs)

        check_network(build, measure_weights([found.folder / WEIGHTS]), found.folder / CONFIG)
        try:
            model = build()
        except (ArithmeticError, TypeError, ValueError, RuntimeError) as error:
            raise damage_error(found.folder, error) from None
        model.positions_C3 = found.positions_C3
        load_strictly(model, found.folder / WEIGHTS)
        model.eval()
        check_example(model, found.folder)
        if n_outputs and n_outputs != found.n_outputs:
            model.head, model.n_outputs = _head(model.dim, n_outputs), n_outputs
        return model


def _head(dim: int, n_outputs: int | None) -> nn.Linear | None:
    if n_outputs is not None and n_outputs < 0:
        raise ValueError(f"n_outputs is {n_outputs}; it must be the number of classes, or 0 or None for no head")
    return nn.Linear(dim, n_outputs) if n_outputs else None


def _positions_of(chs_info: Sequence[dict[str, Any]]) -> Tensor:
    """Read electrode positions [C, 3] in metres from MNE's channel descriptions; NaN for an unknown position."""
    places_C3 = torch.full((len(chs_info), 3), math.nan)
    for row, channel in zip(places_C3, chs_info, strict=True):
        place = np.asarray(channel.get("loc", [math.nan] * 3), np.float64)[:3]
        # For an unknown position, `loc` holds NaN (from MNE) or zeros (from some files).
        if np.isfinite(place).all() and place.any():
            row[:] = torch.from_numpy(place)
    return places_C3


@contextlib.contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
