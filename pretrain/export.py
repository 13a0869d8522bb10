"""Export the encoder of a pretraining run as a package: ``dreamscale export RUN OUT``."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

from data_sharding.common.config import command
from data_sharding.common.errors import EXIT_DONE, RequestError
from pretrain.runs.checkpoint import MANIFEST, CheckpointReader, complete_checkpoints
from pretrain.runs.metrics import read_metrics
from pretrain.runs.stored_config import load_stored_config
from pretrain.training.config import PretrainConfig
from pretrain.training.data_summary import check_licenses, describe_people_in_words, describe_versions_in_words


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Write an encoder package from the newest checkpoint of a pretraining run."""

    run: str
    """Run directory of 'dreamscale pretrain'. The pretraining may still be running."""
    output: str
    """Directory for the encoder package; an existing encoder package is replaced."""
    allowed_licenses: list[str] | None = None
    """Licences that the training data may have, as glob patterns: [CC0*, CC-BY-*]. If a recording has another licence,
    or no known licence, nothing is exported. By default, the list in the run's config is used."""
    program: bool = True
    """Also write encoder.pt2, a program that needs only PyTorch to run."""


def read_run(run: str | Path) -> tuple[PretrainConfig, Path, dict[str, Any]]:
    """Read the config of a pretraining run, and find its newest checkpoint.

    Parameters
    ----------
    run : str or Path
        The run directory.

    Returns
    -------
    config : PretrainConfig
        The run's config.
    checkpoint : Path
        Folder of the newest checkpoint.
    saved : dict
        The checkpoint's manifest.

    Raises
    ------
    RequestError
        If the directory is not a pretraining run, or if the run has no complete checkpoint yet.
    """
    run = Path(run)
    if not (run / "config.yaml").is_file():
        raise RequestError(f"{run}: no config.yaml in this folder; give the output folder of 'dreamscale pretrain'")
    config = load_stored_config(run / "config.yaml", PretrainConfig)
    complete = complete_checkpoints(run / "checkpoints")
    if not complete:
        raise RequestError(f"{run}: no complete checkpoint yet; let 'dreamscale pretrain' write one first")
    names = ("dataset_id", "preprocess", "windows", "hours_seen")
    with CheckpointReader(complete[-1]) as saved:
        needed = ("step", "epochs", "skipped", "zero_stage", "world_size", *(f"data.{name}" for name in names))
        return config, complete[-1], saved.check_manifest(*needed)


def load_model(config: PretrainConfig, checkpoint: Path) -> Any:
    """Build the autoencoder and load its weights from a checkpoint of a run with any ZeRO stage and process count.

    Parameters
    ----------
    config : PretrainConfig
        The run's config.
    checkpoint : Path
        Folder of a complete checkpoint.

    Returns
    -------
    MaskedAutoencoder
        The model on the CPU, in float32 and in evaluation mode.

    Raises
    ------
    RequestError
        If the weights are damaged or do not fit the config.
    """
    from pretrain.model.build import build_autoencoder
    from pretrain.model.weights import check_network, measure_weights, set_weights

    with CheckpointReader(checkpoint) as saved:
        size = measure_weights(checkpoint / name for name in sorted(saved.manifest["files"]))
        check_network(lambda: build_autoencoder(config.model), size, "the run's config.yaml")
        model = build_autoencoder(config.model)
        set_weights(model, saved.group("weights/"), checkpoint, "the run's config.yaml")
    return model.eval()


def model_card(config: PretrainConfig, saved: dict[str, Any], metrics: list[dict[str, Any]], parameters: int) -> str:
    """Return the text of an encoder's model card: its architecture, its training data and its loss on the val split.

    Parameters
    ----------
    config : PretrainConfig
        The run's config.
    saved : dict
        The checkpoint's manifest.
    metrics : list of dict
        The lines of metrics.jsonl.
    parameters : int
        Number of parameters of the encoder.

    Returns
    -------
    str
        The model card in Markdown.
    """
    shape, data = config.model.encoder, saved["data"]
    spec = data["preprocess"]
    metrics = [m for m in metrics if m["step"] <= saved["step"]]
    held = [m for m in metrics if None not in (m.get("val_loss"), m.get("val_explained"))]
    windows = data["windows"]
    unit = (
        f"{spec['scale_uv']:g}"
        if spec["scaling"] == "constant"
        else f"the window's standard deviation over {shape.scale_rows}"
    )
    hours = {split: count * spec["stride"] / spec["sfreq"] / 3600 for split, count in windows.items()}
    people, counted = data.get("people") or {}, data.get("subjects") is not None
    lines = [
        "# EEG encoder",
        "",
        f"A transformer ({shape.depth} layers x {shape.dim}, {parameters / 1e6:.1f}M parameters) that "
        f"turns {spec['window'] / spec['sfreq']:g} s of EEG into {shape.tokens} tokens, pretrained by reconstructing "
        f"masked signal. {shape.about}",
        "",
        "```python",
        "from pretrain.encoder.encoder import EEGEncoder",
        "",
        'encoder = EEGEncoder.from_pretrained("PATH")',
        "features = encoder.encode(raw)              # an mne.io.Raw, any rate, up to 128 channels are used",
        'features = encoder.encode((x, ch_names, sfreq, "uV"))',
        "features.tokens, features.pooled, features.times, features.report",
        "```",
        "",
        f"`encoder.pt2` is the same encoder for PyTorch alone: {shape.program_usage}",
        "",
        "## Data",
        "",
        *describe_versions_in_words(data),
        f"- Training: {windows.get('train', 0):,} windows, {hours.get('train', 0.0):.2f} hours"
        + (f", {data['subjects']} {'known ' * bool(people.get('unknown'))}subjects" if counted else ""),
        *describe_people_in_words(people),
        f"- Seen in training: {saved['epochs']:.1f} passes, {data['hours_seen']:.2f} hours",
        *(
            f"- Held out ({split}): {windows[split]:,} windows, {hours[split]:.2f} hours"
            for split in ("val", "test")
            if split in windows
        ),
        "",
        "## Preprocessing",
        "",
        "| field | value |",
        "|---|---|",
        *(f"| {key} | {value} |" for key, value in spec.items()),
        "",
        f"Scaled for the model: microvolts divided by {unit}"
        + (f", then limited to {spec['clip']:g} in both directions." if spec["clip"] else "."),
        "",
        "## Training",
        "",
        f"- {saved['step']:,} steps of {config.batch_size} windows; mask ratio {config.model.mask_ratio:g}; "
        f"AdamW, learning rate {config.optimizer.peak_lr(config.batch_size):g}; {config.precision}",
        f"- DeepSpeed ZeRO stage {saved['zero_stage']} on {saved['world_size']} process(es); seed {config.seed}; "
        f"{saved['skipped']} steps skipped",
    ]
    if held:
        last = held[-1]
        lines += [
            f"- Held-out loss {last['val_loss']:.4f} (step {last['step']}), from {held[0]['val_loss']:.4f} at the "
            f"start; {last['val_explained']:.1%} of the hidden signal's power explained (0 % is predicting zero)",
        ]
    lines += [
        "",
        "## Limits",
        "",
        "The loss above measures the reconstruction of masked signal. `dreamscale probe` measures how useful the "
        "features are for a task, in comparison with an untrained encoder and with band power. Not a medical device.",
        "",
    ]
    return "\n".join(lines)


def export(config: ExportConfig) -> int:
    """Write an encoder package from the newest checkpoint of a run.

    Parameters
    ----------
    config : ExportConfig
        Config of the command.

    Returns
    -------
    int
        Exit code 0.

    Raises
    ------
    RequestError
        If the run has no checkpoint, if the output exists and is not an encoder package, or if the training data have
        a licence that is not allowed.
    """
    from pretrain.encoder.package import check_output

    run_config, checkpoint, saved = read_run(config.run)
    allowed = run_config.allowed_licenses if config.allowed_licenses is None else config.allowed_licenses
    licenses = (saved["data"].get("people") or {}).get("license")
    check_licenses(allowed, licenses, config.run)
    output = check_output(config.output)
    from data_sharding.processing.preprocess import PreprocessSpec
    from pretrain.encoder.encoder import EEGEncoder
    from pretrain.model.build import count_parameters

    model = load_model(run_config, checkpoint)
    try:
        spec = PreprocessSpec.from_dict(saved["data"]["preprocess"], str(checkpoint / MANIFEST))
        encoder = EEGEncoder(run_config.model.encoder, spec)
    except RequestError:
        raise
    except ValueError as error:
        raise RequestError(
            f"{checkpoint / MANIFEST}: the preprocessing does not fit the run's config.yaml ({error}); copy the run "
            "again"
        ) from None
    encoder.backbone.load_state_dict(model.encoder.state_dict())
    encoder.save_pretrained(
        output,
        card=model_card(run_config, saved, read_metrics(Path(config.run) / "metrics.jsonl"), count_parameters(encoder)),
        program=config.program,
        extra={
            "step": saved["step"],
            "dataset_id": saved["data"]["dataset_id"],
            "dataset_versions": saved["data"].get("versions"),
            "run": Path(config.run).name,
            "licenses": licenses,
        },
    )
    # Read the finished package once: reading checks that the package is complete and correct.
    EEGEncoder.from_pretrained(output)
    print(
        f"dreamscale export: encoder of step {saved['step']} in {output}. Next: 'dreamscale probe {output} DATASET' "
        f"or 'dreamscale encode {output} RECORDING'"
    )
    return EXIT_DONE


main = command(ExportConfig, export, prog="dreamscale export", positionals=("run", "output"), aliases={"-o": "output"})


if __name__ == "__main__":
    sys.exit(main())
