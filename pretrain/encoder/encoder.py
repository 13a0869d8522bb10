"""The encoder package: a pretrained encoder, its preprocessing and a proof of both, for anyone's downstream work.

Letters in names: B samples or windows, C channels, T time samples, N tokens, D width.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import itertools
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from data_sharding.common.errors import RequestError, one_line
from data_sharding.common.files import atomic_directory, atomic_write_text, read_json, write_json
from data_sharding.dataset.samples import N_PADDED, pad_channels
from data_sharding.processing.preprocess import PreprocessSpec, band_of
from pretrain.encoder.result import CoverageReport, Encoding
from pretrain.model.build import build_encoder, count_parameters
from pretrain.model.config import EncoderConfig
from pretrain.model.weights import WEIGHTS, load_strictly, save_weights

if TYPE_CHECKING:
    import mne

    from data_sharding.dataset.dataset import EEGDataset
    from data_sharding.formats.signal import Signal

KIND = "dreamscale_eeg_encoder"
SCHEMA = 1
CONFIG, SPEC, EXAMPLE, CARD = "config.json", "preprocess.json", "example.npz", "model_card.md"
PROGRAM = "encoder.pt2"
# The output is layer-normed, so of order one; other processors' sums differ by some 1e-5.
TOLERANCE = 2e-3
_EXAMPLE_INPUTS = ("x", "positions", "count")


class EEGEncoder(nn.Module):
    """Pretrained encoder of EEG windows.

    Parameters
    ----------
    config : EncoderConfig, optional
        Shape; built from the Braindecode arguments and `shape` where None.
    spec : PreprocessSpec, optional
        Preprocessing that the weights belong to.
    n_chans : int, optional
        Channels of the windows that `forward` will get, up to 128; they are padded by replication.
    n_times : int, optional
        Samples of a window.
    sfreq : float, optional
        Rate in Hz.
    n_outputs : int, optional
        Classes of a linear head on the pooled tokens. Without it `forward` returns tokens.
    chs_info : list of dict, optional
        MNE's channel descriptions: their number, and for the montage tokenizer the electrodes' positions (``loc``).
    input_window_seconds : float, optional
        Length of a window in seconds, in place of `n_times`.
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
                raise ValueError(f"n_chans is {n_chans}, but chs_info describes {len(chs_info)} channels")
            n_chans = len(chs_info)
        if sfreq is None:
            sfreq = spec.sfreq if spec else PreprocessSpec().sfreq
        if input_window_seconds is not None:
            from_seconds = round(input_window_seconds * sfreq)
            if n_times not in (None, from_seconds):
                raise ValueError(f"n_times is {n_times}, but input_window_seconds x sfreq is {from_seconds}")
            n_times = from_seconds
        if config is None:
            samples = n_times or (spec.window if spec else EncoderConfig().samples)
            config = EncoderConfig(channels=N_PADDED, samples=samples, **shape)
        elif shape:
            raise ValueError(f"{', '.join(shape)}: give the shape either in config or as arguments")
        if spec is None:
            default = PreprocessSpec()
            spec = PreprocessSpec(
                sfreq=sfreq,
                lowpass=min(default.lowpass, 0.45 * sfreq),
                window=config.samples,
                stride=config.samples,
            )
        if spec.window != config.samples:
            raise ValueError(f"preprocessing cuts windows of {spec.window} samples, the encoder takes {config.samples}")
        if spec.sfreq != sfreq:
            raise ValueError(f"sfreq is {sfreq}, but the preprocessing resamples to {spec.sfreq} Hz")
        if n_times not in (None, config.samples):
            raise ValueError(f"n_times is {n_times}, the encoder takes {config.samples}")
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
        # No part of the weights: the same encoder takes any montage.
        self.register_buffer("positions_C3", positions_C3, persistent=False)
        self.head = _head(config.dim, n_outputs)

    @property
    def dim(self) -> int:
        """Width of a token."""
        return self.config.dim

    @property
    def n_tokens(self) -> int:
        """Tokens of a window, without the class token."""
        return self.config.tokens

    def inputs_of(self, metas: list[dict[str, Any]], device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """Say where the electrodes of a dataset's samples sit, for those encoders that ask.

        Parameters
        ----------
        metas : list of dict, [B]
            Metadata of samples (`data_sharding.dataset.batch.Batch.metas`).
        device : torch.device or str
            Where the encoder is.

        Returns
        -------
        dict of str to Tensor
            Further arguments of `tokens` and `forward`; none for the temporal tokenizer.
        """
        return {name: value.to(device) for name, value in self.backbone.electrode_inputs(metas).items()}

    def keep_electrodes(self, dataset: EEGDataset) -> None:
        """Keep the electrodes of a dataset with the encoder, so that windows alone are enough for `tokens`.

        Parameters
        ----------
        dataset : EEGDataset
            A split that was recorded with one montage.

        Raises
        ------
        RequestError
            If the encoder needs electrodes and the dataset has several montages.
        """
        positions_C3 = self.backbone.common_positions(dataset)
        if positions_C3 is not None:
            self.positions_C3 = positions_C3

    def scale_for_model(self, x_uv_BCT: Tensor, channels: Any = None) -> Tensor:
        """Bring microvolts to what this encoder sees, as its pretraining did.

        Parameters
        ----------
        x_uv_BCT : Tensor, [B, C, T]
            Windows in microvolts, padded or not; float32 or float64.
        channels : int, or sequence or Tensor of int, [B], optional
            True channels of each window: the montage tokenizer's scale is theirs alone. As many as `chs_info` by
            default, or all; the temporal tokenizer's is that of the padded window.

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
            Windows in model units (`scale_for_model`); fewer channels than the encoder's are padded.
        positions : Tensor, [C, 3] or [B, C, 3], optional
            Montage tokenizer only: electrodes in metres, NaN where not known; rows of `x_BCT` beyond them are left out.
            Those of `chs_info` by default.
        count_B : Tensor, [B], int64, optional
            Montage tokenizer only: true channels of each window, where they differ.

        Returns
        -------
        Tensor, [B, N, D]
            Tokens in the order of time, without the class token; of the montage tokenizer the mean over channels.

        Raises
        ------
        ValueError
            If the windows have another length, or too many channels.
        RequestError
            If the montage tokenizer is given no positions.
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
        """Encode windows, and classify them where there is a head.

        Parameters
        ----------
        x_BCT : Tensor, [B, C, T]
            Windows in model units (`scale_for_model`); fewer channels than the encoder's are padded.
        positions, count_B : Tensor, optional
            As for `tokens`.

        Returns
        -------
        Tensor, [B, N, D] or [B, n_outputs]
            Tokens in the order of time without the class token; logits where `n_outputs` was given.
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
        """Encode a recording with the preprocessing of the pretraining.

        Parameters
        ----------
        recording : mne.io.BaseRaw, mne.BaseEpochs, data_sharding.formats.signal.Signal or tuple
            A recording, or ``(x, ch_names, sfreq, unit)`` with x an array [C, samples] and unit one of
            "V", "mV", "uV", "nV".
        line_freq : float, optional
            Mains frequency in Hz to notch out, 40 to 70, where the spec asks for that; found in the recording by
            default.
        unit_factor : float, optional
            Factor to true volts, where the recording's unit is wrong.
        batch_size : int
            Windows encoded at once.

        Returns
        -------
        Encoding
            Tokens, pooled features, times and a coverage report.

        Raises
        ------
        RequestError
            If there is no EEG channel, or more of them than the encoder takes, the unit is unknown, values are
            missing, it is shorter than a window, or an argument makes no sense.
        """
        from pretrain.encoder.recording import windows_of

        if batch_size < 1:
            raise RequestError(f"batch_size is {batch_size}; it must be at least 1")
        spec, device = self.spec, next(self.parameters()).device
        times: list[float] = []
        with (
            _evaluating(self),
            windows_of(recording, spec, unit_factor=unit_factor, line_freq=line_freq) as found,
        ):
            if len(found.names) > self.config.channels:
                raise RequestError(
                    f"{len(found.names)} EEG channels of the recording would be encoded, and this encoder takes at "
                    f"most {self.config.channels}; pick that many of them"
                )
            # Flawed windows leave rows at the end that are never touched, and so take no memory.
            tokens_BND = np.empty((found.most, self.n_tokens, self.dim), np.float32)
            # The same for every window; the encoder looks at true channels only, where it tells channels apart.
            inputs = self.inputs_of([{"n": len(found.names), "positions": found.positions}], device)
            positions_C3 = inputs["positions"][0] if inputs else None
            while batch := list(itertools.islice(found.stream, batch_size)):
                # Through float16 microvolts, as training sees them.
                block = np.stack([x.astype(np.float16).astype(np.float32) for _, x in batch])
                uv_BCT = torch.from_numpy(pad_channels(block, self.config.channels)).to(device)
                x_BCT = self.scale_for_model(uv_BCT, len(found.names))
                rows = slice(len(times), len(times) + len(batch))
                tokens_BND[rows] = self.tokens(x_BCT, positions_C3).float().cpu().numpy()
                times += [start for start, _ in batch]
        if not times:
            why = ", ".join(f"{count} {reason}" for reason, count in sorted(found.flawed.items()))
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
            windows_left_out=dict(sorted(found.flawed.items())),
            seconds_left_out=found.tails,
        )
        return Encoding(tokens=tokens_BND, pooled=tokens_BND.mean(axis=1), times=np.array(times), report=report)

    def save_pretrained(
        self, path: str | Path, *, card: str | None = None, program: bool = False, extra: dict[str, Any] | None = None
    ) -> None:
        """Write an encoder package, whole or not at all.

        Parameters
        ----------
        path : str or Path
            Directory to write; one that is there is replaced.
        card : str, optional
            Text of the model card; a short one by default.
        program : bool
            Also write `encoder.pt2`, which needs PyTorch and nothing of ours.
        extra : dict, optional
            Provenance for `config.json`.

        Raises
        ------
        RequestError
            If the encoder's output holds NaN or infinite values; nothing is written then.
        """
        # A copy on the processor in float32: the example must not depend on where the model trains.
        model = EEGEncoder(self.config, self.spec, n_chans=self.n_chans, n_outputs=self.n_outputs)
        model.load_state_dict({k: v.detach().float().cpu() for k, v in self.state_dict().items()})
        model.eval()
        example = _example_input(model)
        with torch.no_grad():
            output = model(*example)
        if not output.isfinite().all():
            raise RequestError(f"{path}: not written: the encoder's output holds NaN or infinite values")
        with atomic_directory(path) as folder:
            save_weights(model.state_dict(), folder / WEIGHTS)
            write_json(folder / SPEC, self.spec.to_dict())
            write_json(
                folder / CONFIG,
                {
                    "kind": KIND,
                    "schema": SCHEMA,
                    "encoder": dataclasses.asdict(self.config),
                    "n_chans": self.n_chans,
                    "n_outputs": self.n_outputs,
                    "positions": None if self.positions_C3 is None else _as_lists(self.positions_C3),
                    "parameters": count_parameters(model),
                    "versions": {"torch": torch.__version__, "dreamscale": _own_version()},
                    "extra": extra or {},
                },
            )
            arrays = dict(zip(_EXAMPLE_INPUTS, (value.numpy() for value in example), strict=False))
            np.savez(folder / EXAMPLE, **arrays, y=output.numpy(), tolerance=np.float64(TOLERANCE))
            atomic_write_text(folder / CARD, card or f"# EEG encoder\n\n{self.config}\n\n{self.spec}\n")
            if program:
                export_program(model, folder / PROGRAM)

    @classmethod
    def from_pretrained(cls, path_or_hub_id: str | Path, *, n_outputs: int | None = None) -> EEGEncoder:
        """Read an encoder package and prove that it computes what it did where it was written.

        Parameters
        ----------
        path_or_hub_id : str or Path
            Directory of the package, or its name on the Hugging Face hub (``user/name``).
        n_outputs : int, optional
            Put a fresh classification head of this many classes on it.

        Returns
        -------
        EEGEncoder
            On the processor, in float32, in evaluation mode.

        Raises
        ------
        RequestError
            If a file is missing or damaged, a weight is missing or too many, or the example's output differs.
        """
        folder = _resolve(path_or_hub_id)
        values = read_json(folder / CONFIG)
        if not isinstance(values, dict) or values.get("kind") != KIND:
            raise RequestError(f"{folder / CONFIG}: no encoder package of Dreamscale")
        if values.get("schema") != SCHEMA:
            raise RequestError(f"{folder / CONFIG}: schema {values.get('schema')}, this version reads {SCHEMA}")
        saved_outputs = values.get("n_outputs")
        try:
            spec = PreprocessSpec.from_dict(read_json(folder / SPEC))
            model = cls(
                EncoderConfig(**values["encoder"]), spec, n_chans=values.get("n_chans"), n_outputs=saved_outputs
            )
            if values.get("positions"):
                model.positions_C3 = _positions_from(values["positions"])
        except RequestError:
            raise
        except (ArithmeticError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise RequestError(f"{folder}: {CONFIG} or {SPEC} is damaged ({error}); export it again") from None
        load_strictly(model, folder / WEIGHTS)
        model.eval()
        _check_example(model, folder / EXAMPLE)
        if n_outputs and n_outputs != saved_outputs:
            model.head, model.n_outputs = _head(model.dim, n_outputs), n_outputs
        return model


def export_program(model: EEGEncoder, path: Path) -> None:
    """Write a model as a program that PyTorch runs without this package.

    Parameters
    ----------
    model : EEGEncoder
        On the processor, in evaluation mode.
    path : Path
        File to write, `.pt2`.

    Notes
    -----
    ``torch.export.load(path).module()(x_BCT)`` runs it: any number of windows, 128 channels, in model units. With the
    montage tokenizer it is ``(x_BCT, positions_BC3, count_B)``: any number of windows, 1 to 128 rows, electrodes in
    metres with NaN where not known, and how many rows of each window are true channels.
    """
    example = tuple(value.repeat(2, *[1] * (value.ndim - 1)) for value in _example_input(model))
    batch = torch.export.Dim("batch", min=1)
    rows = {1: torch.export.Dim("channels", min=1, max=model.config.channels)} if len(example) > 1 else {}
    dynamic = ({0: batch, **rows}, {0: batch, **rows}, {0: batch})[: len(example)]
    program = torch.export.export(model, example, dynamic_shapes=dynamic)
    torch.export.save(program, path)


def _head(dim: int, n_outputs: int | None) -> nn.Linear | None:
    if n_outputs is not None and n_outputs < 0:
        raise ValueError(f"n_outputs is {n_outputs}; it must be the number of classes, or 0 or None for no head")
    return nn.Linear(dim, n_outputs) if n_outputs else None


def _positions_of(chs_info: Sequence[dict[str, Any]]) -> Tensor:
    """Electrodes [C, 3] in metres out of MNE's channel descriptions; NaN where there is none."""
    places_C3 = torch.full((len(chs_info), 3), math.nan)
    for row, channel in zip(places_C3, chs_info, strict=True):
        place = np.asarray(channel.get("loc", [math.nan] * 3), np.float64)[:3]
        # MNE writes NaN, some files zeros, where there is no position.
        if np.isfinite(place).all() and place.any():
            row[:] = torch.from_numpy(place)
    return places_C3


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _as_lists(positions_C3: Tensor) -> list[list[float] | None]:
    return [place if all(map(math.isfinite, place)) else None for place in positions_C3.tolist()]


def _positions_from(lists: list[list[float] | None]) -> Tensor:
    """Invert `_as_lists`."""
    if not all(place is None or (isinstance(place, list) and len(place) == 3) for place in lists):
        raise ValueError("positions must hold three numbers or null for each channel")
    return torch.tensor([place or [math.nan] * 3 for place in lists])


def _example_input(model: EEGEncoder) -> tuple[Tensor, ...]:
    """Input of the self-check: oscillations written by formula, so that a package holds nobody's recording."""
    config = model.config
    time_T = torch.arange(config.samples, dtype=torch.float64) / config.samples
    channel_C1 = torch.arange(config.channels, dtype=torch.float64)[:, None]
    waves_CT = torch.sin(2 * math.pi * (3 + channel_C1 % 17) * time_T + channel_C1) + 0.5 * torch.cos(
        2 * math.pi * (1 + channel_C1 % 5) * time_T
    )
    # Electrodes on a spiral over a sphere of a head's size, every fifth not known; the last quarter are no channels.
    turns = torch.arange(config.channels, dtype=torch.float64)
    height = 1 - turns / config.channels
    around = (1 - height**2).sqrt()
    sphere_C3 = 0.095 * torch.stack([around * (2.4 * turns).cos(), around * (2.4 * turns).sin(), height], dim=1)
    places = [None if i % 5 == 4 else place for i, place in enumerate(sphere_C3.tolist())]
    electrodes = model.backbone.electrode_inputs([{"n": config.channels, "positions": places}])
    if "count_B" in electrodes:
        electrodes["count_B"] = torch.tensor([max(1, config.channels * 3 // 4)])
    return waves_CT.float()[None], *electrodes.values()


def _check_example(model: EEGEncoder, path: Path) -> None:
    if not path.is_file():
        raise RequestError(f"{path}: no such file; the package is not complete, export it again")
    try:
        with np.load(path, allow_pickle=False) as example:
            inputs = [torch.from_numpy(example[name]) for name in _EXAMPLE_INPUTS if name in example]
            y, tolerance = example["y"], float(example["tolerance"])
        with torch.no_grad():
            error = float(np.abs(model(*inputs).numpy() - y).max())
    except Exception as problem:
        # A damaged archive fails in as many ways as there are layers in it: zip, zlib, NumPy's header, shapes.
        why = f"{type(problem).__name__}: {one_line(problem)[:200]}"
        raise RequestError(f"{path}: damaged ({why}); export it again") from None
    if not error <= tolerance:
        raise RequestError(
            f"{path}: the encoder's output differs from the stored one by {error:.3g} (allowed {tolerance:g}); "
            "weights and config do not belong together, export it again"
        )


def _resolve(path_or_hub_id: str | Path) -> Path:
    path = Path(path_or_hub_id)
    if path.is_dir():
        if not (path / CONFIG).is_file():
            raise RequestError(f"{path}: no {CONFIG}, so no encoder package; write one with 'dreamscale export'")
        return path
    if not re.fullmatch(r"[\w-]+/[\w.-]+", str(path_or_hub_id)) or path.exists():
        raise RequestError(f"{path}: no such encoder package")
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(str(path_or_hub_id)))
    except Exception as error:
        raise RequestError(
            f"{path_or_hub_id}: no such directory, and not to be had from the Hugging Face hub ({type(error).__name__})"
        ) from None


def _own_version() -> str:
    try:
        return importlib.metadata.version("dreamscale")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
