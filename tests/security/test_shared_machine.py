"""Attacks by other users of the same machine: folders that they can write to, and file names that change a terminal."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from data_sharding.common.errors import RequestError, printable, run_main, show
from data_sharding.common.storage import scratch_folder
from data_sharding.common.untrusted import private_folder
from data_sharding.dataset.cache import ShardCache
from data_sharding.dataset.ledger import NAME, LedgerRow, write_ledger
from launch.cli import main

ROOT = Path(__file__).parents[2]
EVIL = "\x1b]0;title\x07\x1b[31mred\x9b2J\u202egpj.exe\r\x00"
OTHER = 65534
"""User id of the user 'nobody'."""
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder to another user")


def is_clean(text: str) -> bool:
    return not any((ord(c) < 32 and c not in "\n\t") or 127 <= ord(c) < 160 or c in "\u202e\u2066" for c in text)


def test_control_characters_become_codes() -> None:
    assert is_clean(printable(EVIL)) and "\\x1b]0;title\\x07" in printable(EVIL)
    assert printable("Müller 脳\tµV\n") == "Müller 脳\tµV\n"
    assert "\\ud800" in printable("\ud800")
    assert show([EVIL] * 10**6) == "a list" and len(show("x" * 10**7)) == 80 and show(10**5000) == "a very large number"


def test_error_messages_are_clean(capsys: pytest.CaptureFixture[str]) -> None:
    def refuse(_: list[str]) -> int:
        raise RequestError(f"{EVIL}: no such file")

    assert run_main(refuse, []) == 2
    error = capsys.readouterr().err
    assert is_clean(error) and error.count("\n") == 1 and "no such file" in error


def test_names_in_a_ledger_are_clean_on_a_terminal(dataset: Any, capsys: pytest.CaptureFixture[str]) -> None:
    row = LedgerRow(
        key="rec", status="sharded", corpus=EVIL, path=f"{EVIL}.edf", files=[f"{EVIL}.edf"], bytes=9, sha256="0" * 64,
        format="edf", reader="edf", subject=EVIL, sfreq=200.0, seconds=60.0, unit="plausible", unit_factor=1.0,
        line_freq=50.0, line_freq_from="spectrum", channels=[EVIL],
    )  # fmt: skip
    write_ledger(dataset.root / NAME, [row])
    for words in ([], ["--recordings"], ["--recording", "rec"], ["--recordings", "--json"], ["--markdown"]):
        code = main(["inspect", str(dataset.root), *words])
        output = capsys.readouterr()
        assert is_clean(output.out) and is_clean(output.err), words
        assert code == 0 or words == ["--markdown"]


def test_ledger_that_unpacks_to_gigabytes_is_refused(dataset: Any, run_command: Any, assert_refused: Any) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    text = pa.array(["x" * 10**7]).dictionary_encode()
    rows = pa.DictionaryArray.from_arrays(pa.array([0] * 100_000, pa.int32()), text.dictionary)
    pq.write_table(pa.table({"key": rows}), dataset.root / NAME, compression="zstd")
    assert (dataset.root / NAME).stat().st_size < 10**6
    assert_refused(run_command("inspect", dataset.root), NAME)


def test_scratch_folders_are_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DREAMSCALE_SCRATCH", str(tmp_path / "scratch"))
    with scratch_folder() as folder:
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700 and folder.parent == tmp_path / "scratch"
    assert not folder.exists()
    (tmp_path / "scratch").chmod(0o777)
    with pytest.raises(RequestError, match="every user can delete"), scratch_folder():
        pass
    (tmp_path / "scratch").chmod(0o1777)
    with scratch_folder() as folder:
        assert folder.is_dir()


@as_root
def test_folders_of_other_users_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DREAMSCALE_SCRATCH", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    os.chown(tmp_path / "scratch", OTHER, OTHER)
    with pytest.raises(RequestError, match="belongs to another user"), scratch_folder():
        pass
    with pytest.raises(RequestError, match="belongs to another user"):
        private_folder(tmp_path / "scratch")
    with pytest.raises(RequestError, match="belongs to another user"):
        private_folder(tmp_path / "scratch" / "shards")
    (tmp_path / "x.tar").write_bytes(b"x")
    with pytest.raises(RequestError, match="belongs to another user"):
        ShardCache(1.0, tmp_path / "scratch").open(tmp_path / "x.tar", "0" * 64, 1)


def test_cache_is_private(tmp_path: Path) -> None:
    import hashlib

    (tmp_path / "x.tar").write_bytes(b"x")
    (tmp_path / "cache" / "shards").mkdir(parents=True)
    (tmp_path / "cache" / "shards").chmod(0o777)
    os.close(ShardCache(1.0, tmp_path / "cache").open(tmp_path / "x.tar", hashlib.sha256(b"x").hexdigest(), 1))
    assert stat.S_IMODE((tmp_path / "cache" / "shards").stat().st_mode) == 0o700


def test_a_link_in_place_of_a_lock_is_not_followed(tmp_path: Path) -> None:
    from data_sharding.dataset.cache import locked

    (tmp_path / "lock").symlink_to(tmp_path / "target")
    with pytest.raises(OSError, match="symbolic links"), locked(tmp_path / "lock"):
        pass
    assert not (tmp_path / "target").exists()


def test_links_in_a_corpus_do_not_bring_in_other_files(tmp_path: Path) -> None:
    """A job ignores a link to a file that is not a recording, and a link to a device does not block a job."""
    (tmp_path / "a.edf").symlink_to("/dev/zero")
    (tmp_path / "b.edf").symlink_to("/etc/passwd")
    (tmp_path / "c").symlink_to(tmp_path)
    code = (
        "import sys\nfrom data_sharding.formats.sniffing import find_recordings\n"
        "print([(r.path.name, str(r.problem)) for r in find_recordings(sys.argv[1])])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0 and "a.edf" not in done.stdout, done.stderr
    assert "root:" not in done.stdout
