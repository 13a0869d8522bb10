"""Shards of remote datasets are downloaded into a cache of limited size, checked, and shared by processes."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import resource
import socket
import subprocess
import sys
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from fsspec.implementations.local import LocalFileSystem
from upath import UPath

from data_sharding.common.errors import RequestError
from data_sharding.common.files import sha256_file
from data_sharding.dataset.batch import collate
from data_sharding.dataset.cache import ShardCache, locked
from data_sharding.dataset.dataset import EEGDataset, write_dataset
from data_sharding.dataset.loader import Loader
from data_sharding.dataset.samples import Sample
from data_sharding.processing.preprocess import PreprocessSpec

SPEC = PreprocessSpec(sfreq=64.0, highpass=0.5, lowpass=20.0, window=64, stride=64)


class LoggedFileSystem(LocalFileSystem):
    """A remote store that serves local files, logs which files are opened, and can truncate the first downloads."""

    protocol = "logged"
    root_marker = "/"
    local_file = False

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        if isinstance(path, list):
            return [cls._strip_protocol(p) for p in path]
        return LocalFileSystem._strip_protocol(str(path).removeprefix("logged://"))

    def _open(self, path: str, mode: str = "rb", **more: Any) -> Any:
        log = Path(os.environ["LOGGED"])
        if mode == "rb":
            with log.open("a") as stream:
                stream.write(f"{path}\n")
            if (cut := log.with_name("cut")).is_file() and path.endswith(".tar"):
                left = int(cut.read_text())
                cut.write_text(str(left - 1)) if left > 1 else cut.unlink()
                return Path(path).open("rb") if left <= 0 else _TruncatedFile(path)
        return super()._open(path, mode, **more)


class _TruncatedFile:
    """A download that ends before the end of the file."""

    def __init__(self, path: str) -> None:
        self.data = Path(path).read_bytes()[:-700]

    def __enter__(self) -> _TruncatedFile:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def read(self, size: int) -> bytes:
        block, self.data = self.data[:size], self.data[size:]
        return block


pytestmark = pytest.mark.filterwarnings("ignore:UPath 'logged'")
fsspec.register_implementation("logged", LoggedFileSystem, clobber=True)


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LOGGED", str(tmp_path / "log"))
    return tmp_path / "log"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DREAMSCALE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def make_samples(count: int, seed: int = 0) -> list[Sample]:
    rng = np.random.default_rng(seed)
    return [
        Sample(key=f"w-{i:04d}", eeg=rng.normal(0, 20, (4 + i % 3, 64)), meta={"n": 4 + i % 3, "i": i})
        for i in range(count)
    ]


def count_cached_bytes(cache: Path) -> int:
    """Count the bytes in the cache; a file that is renamed during the count is counted once."""
    sizes = {}
    # Files are added to the cache and evicted only under the lock 'room', so nothing changes during the count.
    with locked(cache / "shards" / "locks" / "room"):
        for path in (cache / "shards").rglob("*"):
            with contextlib.suppress(FileNotFoundError):
                if path.is_file() and path.parent.name != "locks":
                    sizes[path.stat().st_ino] = path.stat().st_size
    return sum(sizes.values())


def list_open_files() -> list[str]:
    names = []
    for link in Path("/proc/self/fd").iterdir():
        # One of the links is the file descriptor that listed the folder. It is closed by now, so this link no longer
        # exists.
        with contextlib.suppress(FileNotFoundError):
            names.append(str(link.readlink()))
    return names


def test_remote_dataset_reads_like_a_local_one(tmp_path: Path, own_cache: Path) -> None:
    write_dataset(tmp_path / "here", {"train": make_samples(40), "val": make_samples(8)}, SPEC, samples_per_shard=10)
    write_dataset("memory://lab/d", {"train": make_samples(3)}, SPEC)
    # Write the remote dataset a second time, in place of the first dataset.
    write_dataset("memory://lab/d", {"train": make_samples(40), "val": make_samples(8)}, SPEC, samples_per_shard=10)
    here, there = EEGDataset(tmp_path / "here"), EEGDataset("memory://lab/d")
    assert here.manifest == there.manifest and (here.index == there.index).all()
    numbers = list(range(40))
    a, b = collate(here, numbers), collate(there, numbers)
    assert torch.equal(a.packed, b.packed) and a.metas == b.metas and a.keys == b.keys
    assert b.shards[0] == "memory://lab/d/train/000000.tar"
    for workers in (0, 2):
        pairs = zip(Loader(here, 8, 1), Loader(there, 8, 1, num_workers=workers), range(12), strict=False)
        assert all(torch.equal(x.packed, y.packed) for x, y, _ in pairs)
    # The cached files are named by their checksums, and no temporary file is left.
    names = [p.name for p in (own_cache / "shards").rglob("*") if p.is_file() and p.parent.name != "locks"]
    assert {s.sha256 for s in there.shards} <= set(names) and not any(n.startswith(".") for n in names)


def test_missing_remote_dataset_and_unknown_protocol_are_refused() -> None:
    with pytest.raises(RequestError, match=r"memory://nowhere: no manifest\.json"):
        EEGDataset("memory://nowhere")
    with pytest.raises(RequestError, match="fsspec does not know the protocol"):
        EEGDataset("nonsense://lab")


def test_cache_stays_within_its_size_limit(tmp_path: Path, own_cache: Path, log: Path) -> None:
    write_dataset(tmp_path / "d", {"train": make_samples(120)}, SPEC, samples_per_shard=10)
    size = max(p.stat().st_size for p in (tmp_path / "d" / "train").iterdir())
    data = EEGDataset(f"logged://{tmp_path}/d", cache_gb=5 * size / 1e9)
    loader = Loader(data, 6, 0, order="shards", window=2)
    log.write_text("")
    largest = 0
    for _, _ in zip(loader, range(40), strict=False):
        largest = max(largest, count_cached_bytes(own_cache))
    assert 2 * size < largest <= 5 * size
    # Two epochs of 12 shards each are read. Two more windows are prefetched; a window is a group of 2 shards whose
    # samples are shuffled together. A shard is downloaded once for each epoch, and once more if it is read before its
    # prefetch is finished.
    opened = [line for line in log.read_text().splitlines() if line.endswith(".tar")]
    assert len(opened) <= 2 * 12 + 4 + 12
    # When a batch is read, the dataset closes shards that were deleted from the cache, to free their disk space.
    for _ in range(200):
        data.reader.close_evicted()
        gone = [name for name in list_open_files() if name.startswith(str(own_cache)) and name.endswith("(deleted)")]
        if not gone:
            break
        # Prefetch threads may still evict shards.
        time.sleep(0.05)
    assert not gone


def test_next_shards_are_prefetched(tmp_path: Path, own_cache: Path, log: Path) -> None:
    write_dataset(tmp_path / "d", {"train": make_samples(120)}, SPEC, samples_per_shard=10)
    data = EEGDataset(f"logged://{tmp_path}/d")
    loader = Loader(data, 6, 0, order="shards", window=2)
    next(iter(loader))
    window, shards = loader.orders[0].windows(0)
    assert window == (0, 0) and len(set(shards)) == 4 and loader.orders[0].windows(20)[1][:2] == shards[2:]
    assert set(np.searchsorted(data.first, loader.orders[0].at(np.arange(40))[0], side="right") - 1) == set(shards)
    # At the end of an epoch, the first shards of the next epoch are prefetched.
    assert loader.orders[0].windows(119)[1][2:] == loader.orders[0].windows(120)[1][:2]
    wanted = {data.shards[shard].sha256 for shard in shards}
    for _ in range(200):
        if wanted <= {p.name for p in (own_cache / "shards").rglob("*") if p.parent.name != "locks"}:
            break
        time.sleep(0.05)
    else:
        pytest.fail("the shards of the next window were not prefetched")


def test_order_that_would_download_shards_repeatedly_is_refused(tmp_path: Path, log: Path) -> None:
    write_dataset(tmp_path / "d", {"train": make_samples(120)}, SPEC, samples_per_shard=10)
    size = max(p.stat().st_size for p in (tmp_path / "d" / "train").iterdir())
    data = EEGDataset(f"logged://{tmp_path}/d", cache_gb=5 * size / 1e9)
    with pytest.raises(RequestError, match=r"order 'global' needs .* read it with order: shards, or raise"):
        Loader(data, 6, 0)
    with pytest.raises(RequestError, match="lower its window of 3 shards"):
        Loader(data, 6, 0, order="shards", window=3)
    small = EEGDataset(f"logged://{tmp_path}/d", cache_gb=0.9 * size / 1e9)
    with pytest.raises(RequestError, match=r"0000\d\d\.tar: .* more than the whole cache"):
        collate(small, [0, 50])


@pytest.mark.parametrize("name", ["DREAMSCALE_CACHE_GB", "cache_gb"])
def test_invalid_cache_sizes_are_refused(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("DREAMSCALE_CACHE_GB", "lots")
    with pytest.raises(RequestError, match=name):
        ShardCache(-1.0 if name == "cache_gb" else None)


@pytest.mark.parametrize("times", [1, 2])
def test_truncated_download_is_repeated_once_and_then_refused(
    tmp_path: Path, own_cache: Path, log: Path, times: int
) -> None:
    write_dataset(tmp_path / "d", {"train": make_samples(10)}, SPEC)
    data = EEGDataset(f"logged://{tmp_path}/d")
    log.with_name("cut").write_text(str(times))
    if times == 1:
        assert collate(data, [3]).keys == ["w-0003"]
    else:
        match = (
            r"shard logged://.*/d/train/000000\.tar: downloaded 2 times, each time with a fault \(\d+ bytes of \d+\)"
        )
        with pytest.raises(RequestError, match=match):
            collate(data, [3])
        assert not [p for p in (own_cache / "shards").rglob("*tar*")]
        # After the failed downloads, the store works again. No part of a failed download is used.
        assert collate(data, [3]).keys == ["w-0003"]
    assert sum(line.endswith(".tar") for line in log.read_text().splitlines()) == times + 1


def test_shard_with_wrong_checksum_is_refused(own_cache: Path) -> None:
    write_dataset("memory://lab/bad", {"train": make_samples(10)}, SPEC)
    path = UPath("memory://lab/bad/train/000000.tar")
    whole = bytearray(path.read_bytes())
    whole[900] ^= 1
    path.write_bytes(bytes(whole))
    data = EEGDataset("memory://lab/bad")
    for workers in (0, 1):
        with pytest.raises(RequestError, match=r"^shard memory://lab/bad/train/000000\.tar: .*its sha256 differs"):
            next(iter(Loader(data, 2, 0, num_workers=workers)))
    path.unlink()
    with pytest.raises(RequestError, match=r"memory://lab/bad/train/000000\.tar"):
        data[0]


def _read_all_keys(url: str, start: Any, done: Any) -> None:
    data = EEGDataset(url)
    start.wait()
    done.put([data[i].key for i in range(len(data))])


def test_processes_share_downloaded_shards(tmp_path: Path, log: Path) -> None:
    write_dataset(tmp_path / "d", {"train": make_samples(60)}, SPEC, samples_per_shard=10)
    EEGDataset(f"logged://{tmp_path}/d")
    context = multiprocessing.get_context("fork")
    start, done = context.Event(), context.Queue()
    readers = [context.Process(target=_read_all_keys, args=(f"logged://{tmp_path}/d", start, done)) for _ in range(4)]
    for reader in readers:
        reader.start()
    start.set()
    assert [done.get(timeout=60) for _ in readers] == [[f"w-{i:04d}" for i in range(60)]] * 4
    for reader in readers:
        reader.join()
    tars = [line for line in log.read_text().splitlines() if line.endswith(".tar")]
    assert len(tars) == len(set(tars)) == 6


def test_temporary_files_of_a_dead_process_are_removed(tmp_path: Path, own_cache: Path) -> None:
    source = tmp_path / "shard"
    source.write_bytes(os.urandom(100_000))
    sha = sha256_file(source)
    folder = own_cache / "shards" / "ab"
    folder.mkdir(parents=True)
    (folder / ".abdead.12345678").write_bytes(bytes(80_000))
    os.close(ShardCache(150_000 / 1e9).open(source, sha, 100_000))
    assert [p.name for p in (own_cache / "shards").rglob("*") if p.is_file() and p.parent.name != "locks"] == [sha]


def test_full_disk_is_reported_in_one_line(tmp_path: Path, own_cache: Path) -> None:
    source = tmp_path / "shard"
    source.write_bytes(os.urandom(100_000))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(RequestError, match=r"cache/shards: cannot hold .*shard \(.*\); free the disk, or set"):
            ShardCache().open(source, sha256_file(source), 100_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not count_cached_bytes(own_cache)
    os.close(ShardCache().open(source, sha256_file(source), 100_000))


def test_least_recently_used_shard_is_evicted_first(tmp_path: Path, own_cache: Path) -> None:
    cache = ShardCache(350_000 / 1e9)
    files = []
    for number in range(4):
        files.append(tmp_path / str(number))
        files[-1].write_bytes(os.urandom(100_000))

    def use(number: int) -> int:
        time.sleep(0.01)
        return cache.open(files[number], sha256_file(files[number]), 100_000)

    for number in (0, 1, 2, 0):
        os.close(use(number))
    first = use(1)
    os.close(use(2))
    os.close(use(0))
    os.close(use(3))
    left = {p.name for p in (own_cache / "shards").rglob("*") if p.is_file() and p.parent.name != "locks"}
    assert left == {sha256_file(files[n]) for n in (0, 2, 3)}
    # A process that has an evicted file open can still read it.
    assert os.pread(first, 100_000, 0) == files[1].read_bytes()
    os.close(first)


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """Start an S3 server on this machine, and give the URL of a bucket."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = subprocess.Popen(
        [str(Path(sys.executable).with_name("moto_server")), "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    url = f"http://127.0.0.1:{port}"
    values = {"AWS_ENDPOINT_URL": url, "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}
    values |= {"AWS_DEFAULT_REGION": "us-east-1"}
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        for _ in range(200):
            assert server.poll() is None, "moto_server ended"
            with socket.socket() as probe:
                if not probe.connect_ex(("127.0.0.1", port)):
                    break
            time.sleep(0.1)
        fsspec.filesystem("s3").mkdir("lab")
        yield "s3://lab"
    finally:
        server.kill()
        server.wait()
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)


def test_datasets_on_s3_are_read_by_forked_workers(tmp_path: Path, bucket: str) -> None:
    write_dataset(tmp_path / "here", {"train": make_samples(40)}, SPEC, samples_per_shard=10)
    write_dataset(f"{bucket}/d", {"train": make_samples(40)}, SPEC, samples_per_shard=10)
    here, there = EEGDataset(tmp_path / "here"), EEGDataset(f"{bucket}/d")
    loaders = Loader(here, 8, 1, order="shards"), Loader(there, 8, 1, order="shards", num_workers=2)
    for a, b, _ in zip(*loaders, range(10), strict=False):
        assert torch.equal(a.packed, b.packed) and a.keys == b.keys
    # All processes share the cache, so the shards can be read even after they are deleted from the store.
    fsspec.filesystem("s3").rm("lab/d/train", recursive=True)
    assert [s.key for s in map(there.__getitem__, range(40))] == [f"w-{i:04d}" for i in range(40)]
    with pytest.raises(RequestError, match=r"s3://lab/none: no manifest\.json"):
        EEGDataset(f"{bucket}/none")


def test_a_forked_process_does_not_keep_the_locks_of_its_parent(tmp_path: Path) -> None:
    path, end = tmp_path / "locks" / "a", multiprocessing.get_context("fork").Event()
    with locked(path):
        child = multiprocessing.get_context("fork").Process(target=end.wait)
        child.start()
        with pytest.raises(BlockingIOError), locked(path, wait=False):
            pass
    try:
        # The child still runs, but the lock belonged only to the parent, so the lock is free now.
        for _ in range(100):
            with contextlib.suppress(BlockingIOError), locked(path, wait=False):
                break
            time.sleep(0.1)
        else:
            raise AssertionError("the forked process keeps the lock")
        assert child.is_alive()
    finally:
        end.set()
        child.join()


def _use_store(url: str, done: Any) -> None:
    data = EEGDataset(url)
    keys = [data[i].key for i in range(len(data))]
    gc.collect()
    done.put(keys)


def test_a_forked_process_does_not_close_the_connections_of_its_parent(tmp_path: Path, bucket: str) -> None:
    write_dataset(f"{bucket}/f", {"train": make_samples(6)}, SPEC, samples_per_shard=3)
    store = fsspec.filesystem("s3", use_listings_cache=False)
    assert store.ls("lab/f")
    weakref.finalize(store, (tmp_path / "deleted").write_text, "the client of the parent was deleted")
    context = multiprocessing.get_context("fork")
    done = context.Queue()
    reader = context.Process(target=_use_store, args=(f"{bucket}/f", done))
    del store
    gc.collect()
    reader.start()
    assert done.get(timeout=60) == [f"w-{i:04d}" for i in range(6)]
    reader.join()
    assert not (tmp_path / "deleted").exists()
    assert fsspec.filesystem("s3", use_listings_cache=False).ls("lab/f")
