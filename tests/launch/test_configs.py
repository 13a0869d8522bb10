"""Tests of the configs that come with Dreamscale.

The commands find the shipped configs in any folder, and `dreamscale configs` lists, prints and copies them.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from data_sharding.common.shipped import find_config, shipped_configs
from launch.cli import main

ROOT = Path(__file__).parents[2]


def test_a_checkout_uses_its_own_configs() -> None:
    assert shipped_configs() == ROOT / "configs"


def test_a_path_below_configs_is_found_in_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    released = Path("configs/pretrain/released.yaml")
    assert find_config(released) == ROOT / released
    assert find_config("configs/pretrain/none.yaml") == Path("configs/pretrain/none.yaml")
    assert find_config("pretrain/released.yaml") == Path("pretrain/released.yaml")
    # A config file in the user's folder is used instead of the shipped config with the same path.
    released.parent.mkdir(parents=True)
    released.write_text("steps: 3\n")
    assert find_config(released) == released


def test_list_names_every_config_with_its_first_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["configs"]) == 0
    lines = {line.split()[0]: line.split(maxsplit=1)[1] for line in capsys.readouterr().out.splitlines()[:-3]}
    assert set(lines) == {str(path.relative_to(ROOT)) for path in (ROOT / "configs").rglob("*.*")}
    assert lines["configs/finetune/evaluate.yaml"] == "Evaluate generated images."


@pytest.mark.parametrize("name", ["finetune/evaluate", "configs/finetune/evaluate.yaml"])
def test_one_config_is_printed(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["configs", name]) == 0
    assert capsys.readouterr().out == (ROOT / "configs/finetune/evaluate.yaml").read_text()


def test_a_folder_of_configs_is_copied_but_never_over_other_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "mine"
    for _ in range(2):
        assert main(["configs", "pretrain", "-o", str(out)]) == 0
    copied = sorted(path.relative_to(out).as_posix() for path in out.rglob("*.yaml"))
    assert copied == sorted(f"pretrain/{path.name}" for path in (ROOT / "configs/pretrain").glob("*.yaml"))
    assert str(out / "pretrain/released.yaml") in capsys.readouterr().out
    (out / "pretrain/released.yaml").write_text("steps: 3\n")
    (out / "pretrain/tiny.yaml").unlink()
    assert main(["configs", "-o", str(out)]) == 2
    assert "released.yaml: a file with this name and other content exists" in capsys.readouterr().err
    assert not (out / "pretrain/tiny.yaml").exists() and not (out / "demo").exists()


def test_an_unknown_config_is_one_line_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["configs", "pretran"]) == 2
    assert "did you mean 'pretrain'" in capsys.readouterr().err
