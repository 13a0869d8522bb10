"""Tests of ablations: variants are checked before anything runs, finished work is kept, and variants are compared trial
by trial."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from data_sharding.common.errors import RequestError
from data_sharding.common.shipped import shipped_configs
from finetune.evaluation.per_trial import TrialValues, compare_models, read_trials_file, write_trials
from finetune.evaluation.pixel_metrics import PAIRED_METRICS
from launch.ablate.config import read_ablation
from launch.ablate.plan import plan_rows
from launch.ablate.run import main
from launch.ablate.table import render_markdown

TINY = """
dataset: {dataset}
output: unused
device: cpu
tracker: {{kind: none}}
evrnet:
  channels: 16
  widths: [4, 4, 4, 8, 8]
  training: {{steps: 4, batch_size: 8, warmup: 1, evaluation: {{every: 4}}}}
ddpm:
  image_size: 16
  base_channels: 8
  multipliers: [1, 2]
  heads: 2
  head_dim: 4
  training: {{steps: 4, batch_size: 8, warmup: 1, evaluation: {{every: 4}}}}
"""


@pytest.fixture
def folder(tmp_path: Path, paired_dataset: Path) -> Path:
    """Write the folder of an ablation with two rows (variants): the base row, and the row 'l1' with another loss."""
    (tmp_path / "ddpm.yaml").write_text(TINY.format(dataset=paired_dataset))
    rows = tmp_path / "rows"
    rows.mkdir()
    (rows / "ablation.yaml").write_text(
        f"output: {tmp_path / 'out'}\n"
        f"stages: {{ddpm: {tmp_path / 'ddpm.yaml'}}}\n"
        "split: test\n"
        "generate: {steps: 2, limit: 8, device: cpu}\n"
        "evaluate: {training.steps: 3, permutations: 99}\n"
        "resamples: 99\n"
    )
    (rows / "l1.yaml").write_text("# Another loss.\nddpm: {loss: l1}\nevrnet_from: '{base}/ddpm/model/evrnet'\n")
    return rows


def start(*words: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "launch", "ablate", *map(str, words)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_two_rows_are_trained_stopped_resumed_and_compared(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = start(folder)
    begun = out / "steps" / "l1.ddpm.begun.json"
    deadline = time.monotonic() + 500
    while not begun.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    text = process.communicate(timeout=300)[1]
    assert process.returncode == 75, text
    assert json.loads((out / "ablation.json").read_text())["rows"]["l1"]["state"] == "not run yet"
    # The second call finishes the row that was stopped, and does not repeat the base row.
    process = start(folder)
    printed, text = process.communicate(timeout=500)
    assert process.returncode == 0, text
    assert text.count("already complete") == 3 and printed.strip() == str(out / "ablation.md")
    result = json.loads((out / "ablation.json").read_text())
    assert {row["state"] for row in result["rows"].values()} == {"done"} and list(result["rows"]) == ["base", "l1"]
    for name, row in result["rows"].items():
        of_networks = {name for name in row["metrics"] if name.endswith("[dataset-classifier]")}
        assert set(row["metrics"]) - of_networks == {"accuracy", "psnr", "ssim", "pixel_correlation"}
        assert "two_way_identification[dataset-classifier]" in of_networks
        assert row["metrics"]["ssim"]["own"]["n"] == 8 and row["metrics"]["ssim"]["shuffled"] is not None
        assert (row["metrics"]["ssim"]["difference"] is None) == (name == "base")
        stored = json.loads((out / "images" / name / "metrics.json").read_text())
        assert (
            row["metrics"]["accuracy"]["own"]["mean"] == stored["generated"]["accuracy[dataset-classifier]"]["accuracy"]
        )
    assert "ddpm.loss: l1" in (out / "ablation.md").read_text()
    assert (out / "ablation.png").stat().st_size > 1000
    # The row 'l1' used the EVRNet of the base row, so 'l1' has no run of EVRNet.
    assert (out / "rows/base/ddpm/evrnet").is_dir() and not (out / "rows/l1/ddpm/evrnet").exists()
    assert not (out / "images/l1/classifier.safetensors").exists()


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("l1.yaml", "ddpm: {los: l1}", r"l1\.yaml: row 'l1': .*ddpm\.los"),
        ("l1.yaml", "ddpm: {loss: l3}", r"l1\.yaml: row 'l1': .*ddpm\.loss"),
        (
            "l1.yaml",
            "output: elsewhere",
            r"l1\.yaml: row 'l1': key 'output' cannot be set in a row, because all rows have the same output; ",
        ),
        ("l1.yaml", "generate: {split: val}", r"l1\.yaml: row 'l1': key 'generate\.split' is set by the ablation"),
        ("l1.yaml", "generate: {stepps: 3}", r"l1\.yaml: row 'l1': generate: .*stepps"),
        ("l1.yaml", "- a", r"l1\.yaml: holds no keys"),
        ("l1.yaml", "a: [", r"l1\.yaml: cannot be read as YAML"),
        ("l 2.yaml", "ddpm: {loss: l1}", r"l 2\.yaml: rows: 'l 2' is not the name of a row"),
        ("ablation.yaml", "output: x\nstages: {align: a.yaml}", r"stages: 'align' cannot be the last command"),
        ("ablation.yaml", "output: x\nstages: {ddpm: none.yaml}", r"row 'base': none\.yaml: no such config file"),
        ("ablation.yaml", "output: x\nstages: {ddpm: none.yaml}\nstage: 3", r"ablation\.yaml.*stage"),
    ],
)
def test_a_wrong_row_is_refused_before_anything_runs(
    folder: Path, tmp_path: Path, file: str, text: str, message: str
) -> None:
    (folder / file).write_text(text)
    with pytest.raises(RequestError, match=message):
        plan_rows(read_ablation([str(folder)]))
    assert not (tmp_path / "out").exists()


def test_other_wrong_requests_are_refused(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*words: str) -> str:
        assert main(list(words)) == 2
        return capsys.readouterr().err

    assert "has no ablation.yaml" in refused(str(tmp_path))
    assert "no such dataset directory" in refused(str(folder), "--dataset", str(tmp_path / "none"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    assert "is not an ablation" in refused(str(folder), "--output", str(tmp_path / "full"))
    (folder / "l1.yaml").unlink()
    assert "there is nothing to compare with 'base'" in refused(str(folder))
    assert not (tmp_path / "out").exists()


def test_rows_share_runs_with_equal_configs_and_get_the_aligned_encoder(tmp_path: Path) -> None:
    configs = shipped_configs() / "finetune"
    (tmp_path / "a.yaml").write_text(
        f"output: {tmp_path / 'out'}\ndataset: /data/paired\n"
        f"stages: {{align: {configs / 'align.yaml'}, finetune: {configs / 'stable_diffusion.yaml'}}}\n"
        "rows:\n  cosine: {align.loss: cosine}\n  all: {finetune: {tune: E}}\n"
        "  guided: {generate.guidance_scale: 4}\n"
        "common: {finetune.num_processes: 1, align.num_processes: 1}\n"
    )
    base, cosine, tuned, guided = plan_rows(read_ablation([str(tmp_path / "a.yaml")]))
    assert [step.name for step in base.steps[:2]] == ["base.align", "base.finetune"]
    assert base.steps[1].config is not None and cosine.steps[1].config is not None
    assert base.steps[1].config["encoder"] == str(tmp_path / "out/rows/base/align/encoder")
    assert cosine.steps[1].config["encoder"] == str(tmp_path / "out/rows/cosine/align/encoder")
    assert cosine.steps[1].needs == ["cosine.align"] and cosine.changes == {"align.loss": "cosine"}
    # The row 'all' changes only the second command, so it uses the aligned encoder of the base row.
    assert [step.name for step in tuned.steps[:1]] == ["all.finetune"] and tuned.steps[0].needs == ["base.align"]
    # The row 'guided' changes only the generation of images, so it trains nothing.
    assert [step.name.split(".")[1] for step in guided.steps] == ["generate", "evaluate"]
    assert str(tmp_path / "out/rows/base/finetune/model") in guided.steps[0].words
    assert guided.steps[0].words[-2:] == ["--guidance_scale", "4"]
    assert "base.evaluate" in guided.steps[-1].needs
    with pytest.raises(
        RequestError,
        match=r"key 'loss' does not say to which command it belongs; begin the key with one of align\., finetune\.",
    ):
        plan_rows(read_ablation([str(tmp_path / "a.yaml"), "--common", '{"loss": "cosine"}']))


def test_rows_with_other_pretraining_export_their_own_encoder() -> None:
    """The ablation of DreamDiffusion's paper has 14 rows and eight pretrained encoders."""
    folder = shipped_configs() / "finetune" / "ablations" / "dreamdiffusion"
    rows = plan_rows(read_ablation([str(folder), "--dataset", "/data/paired"]))
    assert len(rows) == 15 and {row.dataset for row in rows} == {"/data/paired"}
    steps = {step.name: step for row in rows for step in row.steps}
    pretrained = [step for name, step in steps.items() if name.endswith(".pretrain")]
    assert len(pretrained) == 8 and all((step.config or {})["dataset"] == "data/lab" for step in pretrained)
    assert len({(step.config or {})["model"]["mask_ratio"] for step in pretrained}) == 4
    for row in rows:
        (training,) = (step for step in row.steps if step.name.endswith(".finetune"))
        (export,) = training.needs
        assert steps[export].words[2] == (training.config or {})["encoder"] and export.endswith(".export")
        assert steps[export].needs == [export.replace("export", "pretrain")]
    # The row '11_18m' differs from '04_not_pretrained_18m' only in its weights, so both use the same pretraining.
    assert steps["11_18m.finetune"].needs == steps["04_not_pretrained_18m.finetune"].needs
    swapped = '{"align": "configs/finetune/align.yaml", "pretrain": "configs/pretrain/paper.yaml", "ddpm": "x.yaml"}'
    with pytest.raises(RequestError, match="pretrain must come before align"):
        plan_rows(read_ablation([str(folder), "--stages", swapped]))


def make_values(more: float, count: int = 60, control: bool = True) -> TrialValues:
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 0.1, count)
    return TrialValues(
        keys=[f"t{i}" for i in range(count)],
        subjects_B=np.array([f"s{i % 6}" for i in range(count)]),
        images_B=np.array([f"i{i % 15}" for i in range(count)]),
        values={"ssim": 0.5 + noise + more, "psnr": np.where(np.arange(count) == 3, np.nan, 9.0)},
        shuffled={"ssim": 0.4 + noise, "psnr": np.full(count, 9.0)} if control else {},
    )


def test_differences_are_paired_by_trial() -> None:
    models = {"base": make_values(0.0), "better": make_values(0.05), "short": make_values(0.0, 40, control=False)}
    found = compare_models(models, "base", resamples=500)
    # The noise of a trial is the same in both models, so it does not widen the interval of the difference.
    more = found["better"]["ssim"]["difference"]
    assert more["mean"] == pytest.approx(0.05) and more["n"] == 60 and (more["images"], more["people"]) == (15, 6)
    assert more["over_images"] == pytest.approx([0.05, 0.05]) and more["over_people"] == pytest.approx([0.05, 0.05])
    assert more["p_images"] < 0.01 and more["p_people"] == pytest.approx(2 / 2**6)
    own = found["better"]["ssim"]["own"]
    assert own["over_images"][1] - own["over_images"][0] > 0.01
    assert found["better"]["ssim"]["own_minus_shuffled"]["mean"] == pytest.approx(0.15)
    assert found["short"]["ssim"]["difference"]["n"] == 40 and found["short"]["ssim"]["shuffled"] is None
    assert found["base"]["psnr"]["own"]["n"] == 59 and found["base"]["psnr"]["difference"] is None
    rows = {name: {"changes": {}, "state": "done", "seconds": 60.0, "metrics": m} for name, m in found.items()}
    rows["bad"] = {"changes": {"a": "x|y"}, "state": "failed", "seconds": 1.0, "metrics": None}
    result = {"stages": {"ddpm": "c"}, "base": "base", "split": "val", "dataset": "d", "rows": rows}
    text = render_markdown(result)
    assert "| better | 0." in text and "+0.050 [+0.050, +0.050], p = 0.0" in text and "x\\|y" in text
    widths = {line.count(" | ") for line in text.splitlines() if line.startswith(("| better", "| short"))}
    assert widths == {3, 6}


def test_values_of_trials_are_written_and_checked(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    real = rng.integers(0, 255, (3, 16, 16, 3), dtype=np.uint8)
    made = real.copy()
    made[1:] = 255 - made[1:]
    values = {name: compare(made, real) for name, compare in PAIRED_METRICS.items()}
    values = {"accuracy": np.array([1.0, 0.0, 1.0])} | {k: v for k, v in values.items() if isinstance(v, np.ndarray)}
    assert np.isinf(values["psnr"][0])
    trials = [{"key": f"t{i}", "subject": "a", "image_id": f"i{i}", "label": 0} for i in range(3)]
    write_trials(tmp_path, trials, values, {})
    found = read_trials_file(tmp_path)
    assert found.keys == ["t0", "t1", "t2"] and found.shuffled == {} and np.isnan(found.values["psnr"][0])
    assert np.array_equal(found.values["ssim"], values["ssim"])
    text = (tmp_path / "trials.json").read_text()
    for old, new, message in (
        ('"accuracy": 1.0', '"accuracy": "x"', "accuracy is 'x', not a finite number"),
        ('"key": "t1"', '"key": 3', "key is '3', not a text"),
        ('"ssim"', '"other"', "different metrics"),
    ):
        (tmp_path / "trials.json").write_text(text.replace(old, new, 1))
        with pytest.raises(RequestError, match=message):
            read_trials_file(tmp_path)
    (tmp_path / "trials.json").unlink()
    with pytest.raises(RequestError, match="run 'dreamscale evaluate"):
        read_trials_file(tmp_path)
