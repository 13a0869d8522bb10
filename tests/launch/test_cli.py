"""Tests of the command line: help is fast, every command runs, and wrong requests are refused with one error line."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from data_sharding.common.cores import count_cores
from launch.cli import main
from launch.local import _environment, launcher_command, processes_wanted
from launch.stages import STAGES


def command(*words: str, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "launch", *words], capture_output=True, text=True, **options)


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from launch.cli import main; assert main(['--help']) == 0; "
        "heavy = {'torch', 'mne', 'ray', 'numpy', 'jsonargparse', 'rich', 'yaml'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in STAGES:
        assert f"\n  {name} " in done.stdout


@pytest.mark.parametrize("name", STAGES)
def test_every_command_answers_help(name: str, capsys: pytest.CaptureFixture[str]):
    stage = STAGES[name]
    assert callable(importlib.import_module(stage.module).main)
    with pytest.raises(SystemExit) as end:
        main([name, "--help"])
    assert end.value.code == 0
    assert "usage:" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["pretain"], "did you mean 'pretrain'"),
        (["pretrain"], "usage: dreamscale pretrain CONFIG"),
        (["submit"], "usage: dreamscale submit slurm|ray|k8s STAGE [CONFIG] [-- ARGUMENTS]"),
        (["encode"], "usage: dreamscale encode ENCODER RECORDING -o OUT.npz"),
        (["pretrain", "no_such.yaml"], "no_such.yaml"),
        (["shard", "no_such.yaml"], "no_such.yaml"),
        (["verify", "no_such_dataset"], "no_such_dataset"),
        (["generate", "no_such_model", "no_such_dataset", "-o", "x"], "no_such"),
        (["evaluate", "no_such_folder"], "no_such_folder"),
        (["submit", "slurm", "inspect", "x.yaml"], "inspect"),
        (["demo", "--sed", "1"], "seed"),
        (["doctor", "--path", "a", "b"], "b"),
    ],
)
def test_wrong_requests_are_one_line_and_exit_code_2(words: list[str], names: str, tmp_path: Path):
    done = command(*words, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert names in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_processes_are_read_from_config_and_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    config = tmp_path / "c.yaml"
    config.write_text("num_processes: 3\n")
    assert processes_wanted([str(config)]) == 3
    assert processes_wanted([str(config), "--num_processes", "2"]) == 2
    assert processes_wanted(["--config", str(config), "--num_processes=4"]) == 4
    assert processes_wanted([str(config), "--num_processes", "1"]) == 0
    # The first argument of 'generate' is the folder of a model, so the config is given with --config.
    assert processes_wanted([str(tmp_path), "data", "--config", str(config)]) == 3
    # With restarts, even a single training process needs a launcher, which can start the training again.
    assert processes_wanted([str(config), "--num_processes", "1", "--restarts", "2"]) == 1
    assert processes_wanted([str(config), "--help"]) == 0
    assert processes_wanted([str(tmp_path / "none.yaml")]) == 0
    config.write_text("num_processes: many\n")
    assert processes_wanted([str(config)]) == 0
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert processes_wanted(["--num_processes", "4"]) == 0


def test_launchers_get_the_module_and_its_arguments():
    for name, stage in STAGES.items():
        if stage.launcher:
            words = launcher_command(stage, ["c.yaml", "--seed", "1"], 2)
            assert words[-4:] == [stage.module, "c.yaml", "--seed", "1"], name
            assert words[3] == stage.launcher


def test_threads_wait_passively_unless_the_user_chose(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    assert main(["--version"]) == 0 and os.environ["OMP_WAIT_POLICY"] == "ACTIVE"
    monkeypatch.delenv("OMP_WAIT_POLICY")
    assert main(["--version"]) == 0 and os.environ["OMP_WAIT_POLICY"] == "PASSIVE"


def test_launched_processes_keep_freed_memory_unless_the_user_chose(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "5")
    found = _environment(tmp_path, 2)
    assert found["MALLOC_TRIM_THRESHOLD_"] == "5" and int(found["MALLOC_MMAP_THRESHOLD_"]) == 2**25
    assert found["OMP_NUM_THREADS"] == os.environ.get("OMP_NUM_THREADS", str(max(1, count_cores() // 2)))
