import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from data_sharding.common.errors import run_main
from data_sharding.dataset.batch import collate
from data_sharding.dataset.dataset import EEGDataset
from finetune.align import main
from finetune.clip_head import ClipHead
from finetune.eeg import scale_eeg
from pretrain.encoder.encoder import EEGEncoder
from pretrain.model.config import EncoderConfig
from pretrain.runs.stop import STOP_FILE

Launch = Callable[..., subprocess.CompletedProcess[str]]
TINY = ["--tracker.kind", "none", "--training.warmup", "2", "--training.log_every", "1"]


def _args(dataset: Path, encoder: Path, miniature: Path, output: Path, *more: object) -> list[str]:
    paths = {"dataset": dataset, "encoder": encoder, "target.model": miniature / "clip", "output": output}
    return [*(str(w) for k, v in paths.items() for w in (f"--{k}", v)), *TINY, *map(str, more)]


def test_alignment_learns_and_two_processes_learn_the_same(
    paired_dataset: Path, encoder_package: Path, miniature: Path, tmp_path: Path, launch: Launch
) -> None:
    curves = {}
    more = ["--training.batch_size", 16, "--training.lr", 3e-3, "--training.evaluation.every", 6]
    for processes in (1, 2):
        output = tmp_path / str(processes)
        args = _args(paired_dataset, encoder_package, miniature, output, "--training.steps", 12)
        done = launch("finetune.align", *args, *more, processes=processes)
        assert done.returncode == 0, done.stderr
        lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
        curves[processes] = [line["train/loss"] for line in lines if "train/loss" in line]
        assert any("val/top5" in line for line in lines)
    assert len(curves[1]) == 12 and curves[1][-1] < curves[1][0]
    torch.testing.assert_close(curves[1], curves[2], rtol=1e-4, atol=1e-4)

    encoder = EEGEncoder.from_pretrained(tmp_path / "2" / "encoder")
    head = ClipHead.from_pretrained(tmp_path / "2" / "align")
    data = EEGDataset(paired_dataset, "val")
    with torch.no_grad():
        embeds = head(encoder(scale_eeg(collate(data, [0, 1]).eeg, data.spec)))
    assert embeds.shape == (2, 64)
    assert (tmp_path / "1" / "plots" / "loss.png").stat().st_size > 1000
    assert json.loads((tmp_path / "1" / "status.json").read_text())["state"] == "done"


def test_two_stopped_processes_resume_to_the_same_weights(
    paired_dataset: Path, encoder_package: Path, miniature: Path, tmp_path: Path, launch: Launch
) -> None:
    more = ["--training.steps", 150, "--training.batch_size", 16, "--training.ema", 0.9]
    more += ["--training.evaluation.every", 20]

    def run(name: str, **env: str) -> subprocess.CompletedProcess[str]:
        args = _args(paired_dataset, encoder_package, miniature, tmp_path / name, *more)
        return launch("finetune.align", *args, processes=2, env=env)

    assert run("whole").returncode == 0
    (tmp_path / "stop").touch()
    # The stop file exists from the start, and the training looks for it once a second, so the training stops before its
    # last step.
    stopped = run("parts", **{STOP_FILE: str(tmp_path / "stop")})
    assert stopped.returncode != 0 and "stopped on request" in stopped.stderr
    (checkpoint,) = (tmp_path / "parts" / "checkpoints").iterdir()
    files = {path.name for path in checkpoint.iterdir()}
    assert files == {"complete.json", "state_00000.safetensors", "state_00001.safetensors"}
    assert run("parts").returncode == 0
    for name in ("encoder", "align"):
        whole, parts = (load_file(tmp_path / run / name / "model.safetensors") for run in ("whole", "parts"))
        assert whole.keys() == parts.keys() and all(torch.equal(whole[key], parts[key]) for key in whole)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--dataset", "UNPAIRED"], "no paired images"),
        (["--target.model", "."], "not a frozen image model"),
        (["--encoder", "nowhere/"], "nowhere"),
        (["--loss", "hinge"], "loss"),
        (["--training.setps", "3"], "training.steps"),
        (["--num_processes", "2"], "but 1 process was started"),
    ],
)
def test_wrong_requests_end_with_one_line(
    change: list[str],
    message: str,
    paired_dataset: Path,
    unpaired_dataset: Path,
    encoder_package: Path,
    miniature: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    args = _args(paired_dataset, encoder_package, miniature, tmp_path / "run", "--device", "cpu")
    args += [str(unpaired_dataset) if word == "UNPAIRED" else word for word in change]
    assert run_main(main, args) == 2
    error = capsys.readouterr().err.strip()
    assert message in error and "\n" not in error


def test_an_encoder_of_single_channels_keeps_the_electrodes_and_a_complete_run_does_nothing(
    paired_dataset: Path, miniature: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = EEGDataset(paired_dataset, "val")
    shape = EncoderConfig(samples=128, dim=24, depth=1, heads=2, mlp_ratio=2.0, tokenizer="montage", patch=16)
    EEGEncoder(shape, data.spec).save_pretrained(tmp_path / "encoder")
    output = tmp_path / "run"
    assert run_main(main, _args(paired_dataset, tmp_path / "encoder", miniature, output, "--training.steps", 2)) == 0
    encoder = EEGEncoder.from_pretrained(output / "encoder")
    assert run_main(main, _args(paired_dataset, tmp_path / "encoder", miniature, output, "--training.steps", 2)) == 0
    assert "nothing to do" in capsys.readouterr().out
    batch = collate(data, [0, 1])
    x = scale_eeg(batch.eeg, encoder)
    with torch.no_grad():
        torch.testing.assert_close(encoder(x), encoder(x, **encoder.inputs_of(batch.metas)))
    (output / "encoder" / "config.json").unlink()
    assert run_main(main, _args(paired_dataset, tmp_path / "encoder", miniature, output, "--training.steps", 2)) == 2
    assert "encoder/config.json is missing" in capsys.readouterr().err
