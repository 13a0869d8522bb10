"""Configs are read into dataclasses; a fault in a config is reported in one line that names the key."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

import pytest

from data_sharding.common.config import merge_configs, parse_config, to_yaml
from data_sharding.common.errors import EXIT_BAD_REQUEST, EXIT_STOPPED, RankError, RequestError, StopRequested, run_main
from data_sharding.processing.preprocess import PreprocessSpec


@dataclass(frozen=True, kw_only=True)
class Inner:
    """A group of keys."""

    width: int = 3
    """Width in tokens."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """A request."""

    output: str
    """Output folder."""
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


def test_command_line_overrides_yaml_and_config_round_trips(tmp_path: Path) -> None:
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
        (["--inner.width", "many", "-o", "a"], "inner.width must be a whole number, not 'many'"),
        (["--inner.wid", "1", "-o", "a"], "unknown key 'inner.wid'; did you mean 'inner.width'?"),
        (["-o", "a", "--seed", "-1"], "seed is -1; it must not be negative"),
        ([], "output"),
        ([], "missing key 'output'; write it into the config file, or give --output (short: -o)"),
        (["-o"], "the key 'output' has no value; write --output VALUE"),
        (["-o", "a", "--outptu", "b"], "unknown key 'outptu'; did you mean 'output'?"),
        (["a.yaml", "b.yaml"], "unexpected argument 'b.yaml'; usage: dreamscale test [CONFIG.yaml] [-o OUTPUT]"),
        (["missing.yaml"], "missing.yaml: no such config file"),
        (["-o", "a", "--preprocess.sfreq", "100"], "preprocess.lowpass 95.0 Hz needs sfreq"),
    ],
)
def test_bad_request_prints_one_line_and_exits_with_code_2(
    argv: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
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
        # Local rank 0 of each machine prints a RequestError. Every process prints its own RankError.
        ("8", "0", RequestError, "dreamscale: process 8: wrong\n"),
        ("1", "1", RankError, "dreamscale: process 1: wrong\n"),
    ],
)
def test_error_is_printed_by_the_right_processes(
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


def test_stop_request_exits_with_code_75() -> None:
    def main(argv: list[str] | None) -> int:
        raise StopRequested

    assert run_main(main, []) == EXIT_STOPPED


@dataclass(frozen=True, kw_only=True)
class Entry:
    """Class of a list entry; the class checks the values of the entry."""

    kind: str = "plain"
    """Kind."""
    root: str
    """Folder."""
    factor: float | None = None
    """Factor."""
    mode: Literal["fast", "slow"] = "fast"
    """Mode."""
    patterns: list[str] = field(default_factory=list)
    """Patterns."""
    units: dict[str, float] = field(default_factory=dict)
    """Units."""

    def __post_init__(self) -> None:
        if self.kind not in ("plain", "other"):
            raise ValueError(f"unknown kind '{self.kind}'; the kinds are other, plain")


@dataclass(frozen=True, kw_only=True)
class Listed:
    """A request with a list of entries."""

    RENAMED: ClassVar[dict[str, str]] = {"old": "inner.width"}
    entries: list[Entry]
    """Entries."""
    inner: Inner = field(default_factory=Inner)
    """Inner options."""
    use_it: bool = True
    """Whether to use it."""


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("entries: [{rooot: a}]", "entries[0] (kind plain): unknown key 'rooot'; did you mean 'root'?"),
        ("entries: [{root: a}, {kind: other}]", "entries[1] (kind other): missing key 'root'; add it"),
        ("entries: [{root: a, kind: strange}]", "entries[0] (kind strange): unknown kind 'strange'; the kinds are"),
        ("entries: [{root: 5}]", "entries[0] (kind plain): root must be text, not 5; put it into quotes"),
        ("entries: [{root: a, factor: x}]", "entries[0] (kind plain): factor must be a number or empty, not 'x'"),
        ("entries: [{root: a, mode: slo}]", "entries[0] (kind plain): mode must be one of fast, slow, not 'slo'"),
        ("entries: [{root: a, patterns: b}]", "patterns must be a list of texts, not 'b'; write [\"b\"]"),
        ("entries: [{root: a, patterns: [b, [c]]}]", "entries[0] (kind plain): patterns[1] must be text, not a list"),
        ("entries: [{root: a, units: {x: y}}]", "entries[0] (kind plain): units['x'] must be a number, not 'y'"),
        ("entries: {root: a}", "entries must be a list, not keys with values; write each entry with a dash: '- root: "),
        ("entries: a", "entries must be a list, not 'a'; write each entry with a dash: '- root: ...'"),
        ("entries: [a]", "entries[0] must be keys with values, such as 'root: ...', not 'a'"),
        ("entries: [null]", "entries[0] must be keys with values, such as 'root: ...', not empty"),
        ("inner: 3", "inner must be a group of keys (width), not 3"),
        ("entries: [{root: a}]\nuse_it: perhaps", "use_it must be true or false, not 'perhaps'"),
        ("entries: [{root: a}]\ninner: {width: 1.5}", "inner.width must be a whole number, not 1.5"),
        ("entries: [{root: a}]\nentriess: b", "unknown key 'entriess'; did you mean 'entries'?"),
        ("entries: [{root: a}]\nold: 3", "the key 'old' was renamed; use 'inner.width'"),
        ("use_it: true", "missing key 'entries'; write it into the config file"),
        ("entries: [{root: a", "c.yaml, line 1: not valid YAML"),
        ("- entries", "must consist of lines such as 'key: value', not a list"),
        ("", "c.yaml: the file is empty"),
        ("\x00\x01", "c.yaml: not a YAML file"),
    ],
)
def test_config_error_uses_the_words_of_the_config(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(RequestError) as error:
        parse_config(Listed, [str(path)], prog="dreamscale test", positionals=("config",))
    message = str(error.value)
    assert said in message and "\n" not in message
    assert not any(word in message for word in ("Parser", "Union", "class", "subtype"))


def test_folder_given_as_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="is a folder, not a config file; give a YAML file"):
        parse(str(tmp_path))
    (tmp_path / "lab.yaml").write_text("output: a")
    with pytest.raises(RequestError, match=r"is a folder, not a config file; give one of its files: lab\.yaml"):
        parse(str(tmp_path))


def test_help_shows_the_short_flags(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("--help")
    out = capsys.readouterr().out
    # In the help for -o, Python 3.13 writes the name OUTPUT once, and older versions write it twice.
    assert "[-o OUTPUT]" in out.splitlines()[0] and re.search("-o( OUTPUT)?, --output OUTPUT", out)


def test_nested_configs_are_merged_into_a_new_config() -> None:
    base = {"a": {"b": 1, "c": {"d": 2}}, "e": [1]}
    assert merge_configs(base, {"a": {"c": {"f": 3}}, "e": [2], "g": 4}) == {
        "a": {"b": 1, "c": {"d": 2, "f": 3}},
        "e": [2],
        "g": 4,
    }
    assert merge_configs(base, {"a": 5}) == {"a": 5, "e": [1]} and merge_configs({"a": 5}, base) == base
    assert base == {"a": {"b": 1, "c": {"d": 2}}, "e": [1]}
