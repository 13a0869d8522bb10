"""Tests of the plan of a job.

The plan reads the size and the time of change of each file once. The identity of a recording changes if its file
changes. The planning time is proportional to the number of files.
"""

from __future__ import annotations

import itertools
import json
import os
import runpy
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from upath import UPath

import data_sharding.job.request as planning
from data_sharding.audit.hold_back import HoldBackConfig
from data_sharding.common.errors import RequestError
from data_sharding.corpora import CorpusConfig
from data_sharding.dataset.ledger import LedgerRow
from data_sharding.job import journal
from data_sharding.job.journal import Journal, lock_output
from data_sharding.job.pack_shards import plan_shards
from data_sharding.job.request import ShardConfig, make_plan, resolve_output
from data_sharding.job.task import PartResult

from ...ray_cluster import until

BENCHMARK = runpy.run_path(str(Path(__file__).parents[3] / "benchmarks" / "planning.py"))
make_corpus, measure = BENCHMARK["make_corpus"], BENCHMARK["measure"]


def config(root: Path | str, **more) -> ShardConfig:
    return ShardConfig(corpora=[CorpusConfig(root=str(root), name="lab")], output="/nowhere", **more)


def result(key: str, **fields) -> PartResult:
    row = LedgerRow(key=key, corpus="c", path="p", files=[], subject="s", status="sharded", windows_left_out={"x": 1})
    return PartResult(row=row, **fields)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    make_corpus(tmp_path / "corpus", 40)
    return tmp_path / "corpus"


def test_each_file_is_looked_up_once(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looks: Counter[str] = Counter()
    real = planning.file_state
    monkeypatch.setattr(planning, "file_state", lambda file: (looks.update([str(file)]), real(file))[1])
    plan = make_plan(config(corpus))
    assert len(plan.items) == 40 and set(looks.values()) == {1} and len(looks) == 40
    assert all(plan.size(key) == item.recording.path.stat().st_size for key, item in plan.items.items())


def test_identities_change_with_the_files(corpus: Path) -> None:
    before = make_plan(config(corpus))
    changed, *_ = sorted(corpus.rglob("*.edf"))
    content = changed.read_bytes()
    # This file is a hard link to a real file. Other recordings are links to the same real file, so write a separate new
    # file instead of changing its content.
    changed.unlink()
    changed.write_bytes(content)
    os.utime(changed, ns=(1, 1))
    after = make_plan(config(corpus))
    different = {key for key in before.items if before.identity(key, "s") != after.identity(key, "s")}
    assert {after.items[key].recording.path for key in different} == {changed}
    # The checksum of the request includes the names and sizes of files, but not their content.
    assert after.request == before.request
    assert before.identity(next(iter(before.items)), "other settings") != before.identity(next(iter(before.items)), "s")


def test_what_is_held_back_is_part_of_the_request(corpus: Path) -> None:
    plain, held = make_plan(config(corpus)), make_plan(config(corpus, hold_back=HoldBackConfig(subjects=["00001"])))
    assert plain.request != held.request
    with pytest.raises(RequestError, match="sub-77"):
        make_plan(config(corpus, hold_back=HoldBackConfig(subjects=["sub-77"])))


def test_memory_is_refused_where_several_processes_must_see_it(corpus: Path) -> None:
    with pytest.raises(RequestError, match="output 'memory://x': is in the memory of one process"):
        resolve_output("memory://x")
    with pytest.raises(RequestError, match="corpora: root 'memory://x': is in the memory of one process"):
        make_plan(config("memory://x"))
    assert resolve_output("relative") == Path.cwd() / "relative" and isinstance(resolve_output("s3://bucket/x"), UPath)


@pytest.mark.parametrize("remote", [False, True])
def test_a_journal_with_an_incomplete_line_is_read(tmp_path: Path, remote: bool) -> None:
    folder = UPath(f"memory://{tmp_path.name}/rows") if remote else tmp_path / "rows"
    with Journal(folder) as journal:
        journal.add("a", "1", result("a", part="p", signature=[1, 2], samples={"train": 3}))
        journal.add("b", "1", result("b", limits=(60.0, 2.0), may_pass=True))
    (segment,) = folder.iterdir()
    segment.write_text(segment.read_text() + '{"key": "c", "ident')
    with Journal(folder) as journal:
        assert journal.find("a", "1") == result("a", part="p", signature=[1, 2], samples={"train": 3})
        assert journal.find("b", "1") == result("b", limits=(60.0, 2.0), may_pass=True)
        assert journal.find("a", "2") is None
        assert journal.find("c", "1") is None
        journal.add("a", "2", result("a"))
    with Journal(folder) as journal:
        assert journal.find("a", "2") == result("a") and journal.find("b", "1")


def test_a_journal_of_an_older_version_is_not_used(tmp_path: Path) -> None:
    old = '{"key": "a", "identity": "of the older version", "row": {"key": "a", "status": "sharded", "part": "p"}}\n'
    (tmp_path / "000000-abc.jsonl").write_text(old)
    with Journal(tmp_path) as journal:
        assert journal.find("a", "of this version") is None
        journal.add("a", "of this version", result("a"))
    with Journal(tmp_path) as journal:
        assert journal.find("a", "of this version") == result("a")


@pytest.mark.parametrize("remote", [False, True])
def test_one_job_at_a_time(tmp_path: Path, remote: bool) -> None:
    work = UPath(f"memory://{tmp_path.name}/out/.work") if remote else tmp_path / "out" / ".work"
    with lock_output(work), pytest.raises(RequestError, match="another job is writing there"), lock_output(work):
        pass
    with lock_output(work):
        pass


@pytest.mark.parametrize("hours", [-1, 1])
def test_the_lock_of_a_dead_job_is_taken_over(hours: int, monkeypatch: pytest.MonkeyPatch, capfd) -> None:
    """The job was on a machine whose clock differs by an hour, so only the own clock tells that the job is dead."""
    monkeypatch.setattr(journal, "DEAD_S", 1.0)
    monkeypatch.setattr(journal, "LOOK_S", 0.1)
    work = UPath(f"memory://dead{hours}/.work")
    work.mkdir(parents=True, exist_ok=True)
    lock = {"id": "x", "host": "elsewhere", "pid": 1, "time": time.time() + 3600 * hours}
    (work / "lock.json").write_text(json.dumps(lock))
    with lock_output(work):
        assert '"id": "x"' not in (work / "lock.json").read_text()
    assert "the lock of another job (host elsewhere, process 1)" in capfd.readouterr().err


@pytest.mark.parametrize("hours", [-1, 1])
def test_the_lock_of_a_live_job_on_a_machine_with_another_clock_is_kept(
    hours: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal, "LOOK_S", 0.1)
    work = UPath(f"memory://live{hours}/.work")
    work.mkdir(parents=True, exist_ok=True)
    lock, end = {"id": "x", "host": "elsewhere", "pid": 1}, threading.Event()

    def renew() -> None:
        for beat in itertools.count():
            (work / "lock.json").write_text(json.dumps(lock | {"beat": beat, "time": time.time() + 3600 * hours}))
            if end.wait(0.05):
                return

    other = threading.Thread(target=renew)
    other.start()
    try:
        until(lambda: (work / "lock.json").exists())
        with pytest.raises(RequestError, match="another job is writing there"), lock_output(work):
            pass
    finally:
        end.set()
        other.join()


def test_the_lock_of_a_dead_process_of_this_machine_is_taken_over_at_once(tmp_path: Path) -> None:
    """The process id of the dead job belongs to another process now, so the start of the process is compared."""
    work = UPath(f"memory://{tmp_path.name}/reused/.work")
    with lock_output(work):
        lock = json.loads((work / "lock.json").read_text())
    if not lock["table"]:
        pytest.skip("this system has no /proc")
    (work / "lock.json").write_text(json.dumps(lock | {"id": "x", "start": "1"}))
    with lock_output(work):
        assert json.loads((work / "lock.json").read_text())["start"] == lock["start"]


def test_each_sample_is_in_exactly_one_shard() -> None:
    results = [result(f"k{i:02d}", part=f"p{i}", samples={"train": 3 + i % 5, "val": i % 2}) for i in range(20)]
    plans = plan_shards(results[::-1], 8)
    assert plans == plan_shards(results, 8)
    seen = Counter(
        (piece.key, piece.split, n) for plan in plans for piece in plan.pieces for n in range(piece.start, piece.stop)
    )
    assert set(seen.values()) == {1}
    assert len(seen) == sum(sum(one.samples.values()) for one in results)
    sizes = [sum(piece.stop - piece.start for piece in plan.pieces) for plan in plans if "train" in plan.path]
    assert set(sizes[:-1]) == {8} and sizes[-1] <= 8


def test_planning_is_linear() -> None:
    """Count function calls instead of seconds, because the load of the machine does not change the count."""
    import cProfile
    import pstats

    def calls(n: int) -> int:
        profile = cProfile.Profile()
        profile.enable()
        measure(n)
        profile.disable()
        return pstats.Stats(profile).total_calls  # type: ignore[attr-defined]

    measure(100)
    assert calls(600) < 4 * calls(200)
