"""Requests become dataclasses, and bad ones a single line that names the key."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from data_sharding.common.config import parse_config, to_yaml
from data_sharding.common.errors import EXIT_BAD_REQUEST, EXIT_STOPPED, RankError, RequestError, StopRequested, run_main
from data_sharding.processing.preprocess import PreprocessSpec


@dataclass(frozen=True, kw_only=True)
class Inner:
    """Inner."""

    width: int = 3
    """Width in tokens."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """A request."""

    output: str
    """Where to."""
    names: list[str] = field(default_factory=list)
    """Names."""
    inner: Inner = field(default_factory=Inner)
    """Inner options."""
    seed: int = 0
    """Seed."""
    preprocess: PreprocessSpec = field(default_factory=PreprocessSpec)
    """Preprocessing."""


def parse(*argv: str) -> Request:
    return parse_config(Request, list(argv), prog="dreamscale test", positionals=("config",), aliases={"-o": "output"})


def test_command_line_wins_over_yaml_and_round_trips(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("output: a\nnames: [x, y]\ninner: {width: 5}\n")
    config = parse(str(path), "--inner.width", "7", "-o", "b")
    assert config == Request(output="b", names=["x", "y"], inner=Inner(width=7))
    path.write_text(to_yaml(config))
    assert parse(str(path)) == config


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--inner.widht", "1", "-o", "a"], "unknown key 'inner.widht'; did you mean 'inner.width'?"),
        (["--inner.width", "many", "-o", "a"], "inner.width"),
        (["--inner.wid", "1", "-o", "a"], "unknown key 'inner.wid'; did you mean 'inner.width'?"),
        (["-o", "a", "--seed", "-1"], "seed is -1; it must not be negative"),
        ([], "output"),
        (["missing.yaml"], "missing.yaml: no such config file"),
        (["-o", "a", "--preprocess.sfreq", "100"], "preprocess.lowpass 95.0 Hz needs sfreq"),
    ],
)
def test_bad_requests_are_one_line_and_exit_2(argv: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main(lambda words: bool(parse(*(words or []))), argv) == EXIT_BAD_REQUEST
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1


def test_unknown_key_in_yaml_is_named(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("output: a\ninner: {depth: 5}\n")
    with pytest.raises(RequestError, match=r"unknown key 'inner\.depth'"):
        parse(str(path))


def test_print_config_prints_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse("-o", "a", "--print_config")
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert "width: 3" in out and "highpass: 5.0" in out


@pytest.mark.parametrize(
    ("rank", "local", "error", "said"),
    [
        ("0", "0", RequestError, "dreamscale: wrong\n"),
        ("1", "1", RequestError, ""),
        # One line a machine, and whatever only this process knows.
        ("8", "0", RequestError, "dreamscale: process 8: wrong\n"),
        ("1", "1", RankError, "dreamscale: process 1: wrong\n"),
    ],
)
def test_who_tells_of_a_fault(
    rank: str,
    local: str,
    error: type[Exception],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def body(words: list[str]) -> int:
        raise error("wrong")

    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("LOCAL_RANK", local)
    assert run_main(body, []) == EXIT_BAD_REQUEST
    assert capsys.readouterr().err == said


def test_stop_is_75() -> None:
    def main(argv: list[str] | None) -> int:
        raise StopRequested

    assert run_main(main, []) == EXIT_STOPPED
