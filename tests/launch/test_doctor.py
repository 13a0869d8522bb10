"""Tests that ``dreamscale doctor`` names the installed packages and the missing packages."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import pytest

from launch import doctor
from launch.cli import main


def test_the_table_names_versions_and_nothing_is_missing(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    assert main(["doctor", "--path", str(tmp_path / "not" / "there" / "yet")]) == 0
    text = capsys.readouterr().out
    for name in ("torch", "ray", "deepspeed"):
        assert metadata.version(name) in text
    assert "MISSING" not in text


def test_a_missing_package_is_exit_code_1_with_advice(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(doctor, "_REQUIRED", ("numpy", "no-such-package"))
    assert main(["doctor"]) == 1
    text = capsys.readouterr().out
    assert "pip install no-such-package" in text
