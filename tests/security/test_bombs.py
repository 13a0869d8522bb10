"""Small files that would cause huge or endless work are refused with one error line, in limited time and memory."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from data_sharding.common.errors import RequestError
from data_sharding.common.matlab_files import check_matlab
from data_sharding.common.plain_yaml import parse_yaml
from data_sharding.common.untrusted import check_hdf5, open_image, open_npz
from data_sharding.corpora.base import CorpusConfig, list_items, open_item
from data_sharding.corpora.safe_pickle import RefusedPickle, load_npy
from data_sharding.formats.open_signal import ReadError
from launch.cli import main
from pretrain.encoder.encoder import EEGEncoder
from pretrain.model.config import EncoderConfig

MARK, TUPLE2, DUP, EMPTY_DICT, SETITEM, STOP = b"(", b"\x86", b"2", b"}", b"s", b"."
# 40 levels of tuples that each contain the next tuple twice. This makes 2^40 empty tuples.
NESTED = b")" + (DUP + TUPLE2) * 40
# 45 levels of lists that each contain the next list twice.
LISTS = b"]q\x00" + b"".join(b"0](h%ch%ceq%c" % (i, i, i + 1) for i in range(45))
INTS = b"".join(b"\x8a\x0a" + (i * (2**61 - 1)).to_bytes(10, "little", signed=True) + b"N" for i in range(200_000))
PICKLES = {
    "key": EMPTY_DICT + NESTED + b"N" + SETITEM + STOP,
    "keys": EMPTY_DICT + MARK + NESTED + b"Nu" + STOP,
    "dict": MARK + NESTED + b"Nd" + STOP,
    "set": b"\x8f" + MARK + NESTED + b"\x90" + STOP,
    "frozenset": MARK + NESTED + b"\x91" + STOP,
    "old set": b"cbuiltins\nset\n" + MARK + b"](" + NESTED + b"et" + b"R" + STOP,
    "ordered": b"ccollections\nOrderedDict\n" + MARK + b"](" + MARK + NESTED + b"Ntet" + b"R" + STOP,
    "dtype": b"cnumpy\ndtype\n" + MARK + NESTED + b"tR" + STOP,
    "dtype of lists": b"cnumpy\ndtype\n" + MARK + LISTS + b"tR" + STOP,
    "storage": MARK + b"X\x07\x00\x00\x00storage" + b"ctorch\nFloatStorage\n" + LISTS + b"NK\x01t" + b"Q" + STOP,
    "value": LISTS + STOP,
    "value of tuples": NESTED + STOP,
    "itself": b"]q\x00h\x00a" + STOP,
    "collisions": EMPTY_DICT + MARK + INTS + b"u" + STOP,
    "memo": b"".join(b"Np%d\n0" % (i * (2**61 - 1)) for i in range(1, 60_000)) + b"N" + STOP,
    "deep": b"]" * 100_000 + b"a" * 99_999 + STOP,
    "sets": MARK + b"\x8f" * 10_000_000 + b"l" + STOP,
    "one blob": b"B" + struct.pack("<I", 2**20) + bytes(2**20) + b"q\x000]" + MARK + b"h\x00" * 100_000 + b"e" + STOP,
    "long number": b"L" + b"9" * 5000 + b"L\n" + STOP,
}
LOAD = """
from pathlib import Path
from data_sharding.corpora.safe_pickle import RefusedPickle, load_npy
try:
    value = load_npy(Path(sys.argv[1]))
except RefusedPickle as error:
    sys.exit(f"REFUSED {error}")
# Read the peak memory of this program from /proc. The peak in getrusage includes that of the parent process.
status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
print(type(value).__name__, status["VmHWM"].split()[0])
"""


@pytest.mark.parametrize("name", PICKLES)
def test_pickles_that_never_end(name: str, tmp_path: Path, run_limited: Callable[..., Any]) -> None:
    path = tmp_path / "x.npy"
    path.write_bytes(PICKLES[name])
    done = run_limited(LOAD, path)
    if name == "one blob":
        assert done.returncode == 0 and int(done.stdout.split()[1]) < 1e6, done.stderr
        return
    assert done.returncode == 1 and done.stderr.startswith("REFUSED"), (done.stdout, done.stderr[-500:])
    assert done.stderr.count("\n") == 1 and len(done.stderr) < 400


def test_plain_pickles_with_shared_values_are_still_read(tmp_path: Path) -> None:
    shared = ["a", 1.5, ("x", (1, 2))]
    value = {"a": shared, "b": [shared] * 1000, ("k", (1, 2)): {("z",), ("y", 2)}, 2**60: [(1, (2, (3, 4)))]}
    for protocol in range(6):
        (tmp_path / "x.npy").write_bytes(pickle.dumps(value, protocol))
        assert load_npy(tmp_path / "x.npy") == value


@pytest.mark.parametrize("name", ["image_metadata.npy", "preprocessed_eeg_training.npy"])
def test_the_driver_ends_in_one_line_for_a_hanging_pickle(
    name: str, tmp_path: Path, run_command: Any, assert_refused: Any
) -> None:
    root = tmp_path / "things"
    (root / "images").mkdir(parents=True)
    (root / "sub-01").mkdir()
    (root / "sub-01" / "preprocessed_eeg_training.npy").write_bytes(PICKLES["value"])
    (root / "sub-01" / "preprocessed_eeg_test.npy").write_bytes(PICKLES["keys"])
    table = {f"{word}_img_{part}": [] for word in ("train", "test") for part in ("concepts", "files")}
    (root / "image_metadata.npy").write_bytes(pickle.dumps(table))
    (root / name if "/" not in name and "meta" in name else root / "sub-01" / name).write_bytes(PICKLES["key"])
    config = {"corpora": [{"kind": "things_eeg2", "root": str(root), "images": str(root / "images")}]}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    done = run_command("shard", tmp_path / "config.yaml", "--output", tmp_path / "out")
    assert_refused(done)
    assert not (tmp_path / "out" / "manifest.json").exists()


BILLION = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join([f'*{chr(97 + i)}'] * 9)}]\n" for i in range(9)
)
CHAIN = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 5000))
YAMLS = {
    "billion laughs": BILLION,
    "merge": "a: &a {x: 1}\n" + "b: {<<: [" + ", ".join(["*a"] * 300_000) + "]}\n",
    "itself": "a: &a [*a]\n",
    "deep": "[" * 5000,
    "deep by aliases": CHAIN,
    "long": "a: " + "x" * 2**21,
}


@pytest.mark.parametrize("name", YAMLS)
def test_yaml_that_stands_for_a_huge_value(name: str, tmp_path: Path, run_command: Any, assert_refused: Any) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(YAMLS[name])
    assert_refused(run_command("shard", path, "--output", tmp_path / "out"), "config.yaml")
    with pytest.raises(ValueError, match=r"\w"):
        parse_yaml(YAMLS[name])
    assert not (tmp_path / "out").exists()


def test_configs_may_still_use_a_few_aliases() -> None:
    assert parse_yaml("a: &a {x: 1}\nb: *a\nc: {<<: *a, y: 2}") == {"a": {"x": 1}, "b": {"x": 1}, "c": {"x": 1, "y": 2}}
    for code in ("!!python/object/apply:os.system [id]", "!!python/name:os.system"):
        with pytest.raises(yaml.YAMLError):
            parse_yaml(code)


def _array_corpus(root: Path, name: str, data: bytes, sidecar: str) -> Path:
    root.mkdir(exist_ok=True)
    (root / name).write_bytes(data)
    (root / name).with_suffix(".yaml").write_text(sidecar)
    return root


SIDECAR = "sfreq: 100\nch_names: [Cz, Pz]\nunit: uV\n"


def _zeros_npz(total: int) -> bytes:
    """Return a .npz file of a few kB that decompresses to `total` bytes of zeros."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (2, total // 8)})
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("x.npy", "w") as stream:
        stream.write(header.getvalue())
        for _ in range(total // 2**24):
            stream.write(bytes(2**24))
    return buffer.getvalue()


def _open_items(root: Path) -> list[str]:
    """Open every recording of a corpus of arrays, and return the faults."""
    faults = []
    for item in list_items(CorpusConfig(kind="arrays", root=str(root))):
        if item.recording.problem:
            faults.append(str(item.recording.problem))
            continue
        try:
            open_item(item)
        except ReadError as error:
            faults.append(str(error))
    return faults


def test_archives_that_unpack_to_gigabytes(tmp_path: Path) -> None:
    data = _zeros_npz(2**29)
    assert len(data) < 2**21
    path = tmp_path / "x.npz"
    path.write_bytes(data)
    with pytest.raises(RequestError, match="unpack to"):
        open_npz(path)
    small = io.BytesIO()
    np.savez_compressed(small, x=np.zeros((2, 100_000), np.float32))
    path.write_bytes(small.getvalue())
    with open_npz(path) as archive:
        assert archive["x"].shape == (2, 100_000)
    for bad in (b"", b"PK\x03\x04", b"not a zip", small.getvalue()[:-30]):
        path.write_bytes(bad)
        with pytest.raises(RequestError, match="not a \\.npz"):
            open_npz(path)


def test_images_of_other_kinds_and_bombs() -> None:
    def save(kind: str, **options: Any) -> bytes:
        buffer = io.BytesIO()
        Image.new("RGB", (8, 8), (1, 2, 3)).save(buffer, kind, **options)
        return buffer.getvalue()

    for kind in ("PNG", "JPEG", "WEBP"):
        assert open_image(save(kind)).size == (8, 8)

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    def png(width: int, height: int, data: bytes) -> bytes:
        head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        return b"\x89PNG\r\n\x1a\n" + head + data + chunk(b"IEND", b"")

    rows = chunk(b"IDAT", zlib.compress(bytes(3 * 8 * 8 + 8)))
    bad = {
        "EPS": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n(x) run\n",
        "GIF": save("GIF"),
        "BMP": save("BMP"),
        "TIFF": save("TIFF"),
        "PPM": b"P6 8 8 255\n" + bytes(192),
        "SVG": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        "large": png(60_000, 60_000, rows),
        "very large": png(2**31 - 1, 2**31 - 1, rows),
        "text": png(8, 8, chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2**28))) + rows),
        "truncated": save("PNG")[:-30],
        "truncated JPEG": save("JPEG")[:-200],
        "empty": b"",
        "zeros": bytes(100),
    }
    for name, data in bad.items():
        try:
            image = open_image(data)
        except OSError as error:
            assert "\n" not in str(error), name
        else:
            assert name == "text" and image.size == (8, 8), name


def test_eps_named_png_in_a_dataset_is_one_line() -> None:
    from finetune.images import decode_image

    with pytest.raises(RequestError, match="sample x: the image cannot be decoded"):
        decode_image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n", name="sample x")


def test_hdf5_that_reads_other_files(tmp_path: Path) -> None:
    import h5py

    secret = tmp_path / "secret.mat"
    with h5py.File(secret, "w") as file:
        file["x"] = np.arange(20.0).reshape(2, 10)

    def link(file: Any) -> None:
        file["x"] = h5py.ExternalLink(str(secret), "/x")

    def nested(file: Any) -> None:
        file.create_group("a").create_group("b")["x"] = h5py.ExternalLink(str(secret), "/x")

    def virtual(file: Any) -> None:
        layout = h5py.VirtualLayout((2, 10), float)
        layout[:] = h5py.VirtualSource(str(secret), "x", (2, 10))
        file.create_virtual_dataset("x", layout)

    def outside(file: Any) -> None:
        file.create_dataset("x", (2, 10), float, external=[("/etc/passwd", 0, 160)])

    def huge(file: Any) -> None:
        file.create_dataset("x", (2, 10**12), float, chunks=(2, 1000), compression="gzip")

    def good(file: Any) -> None:
        file["x"] = np.zeros((2, 10))
        file["y"] = h5py.SoftLink("/x")
        file["loop"] = file["/"]

    for number, write in enumerate((link, nested, virtual, outside, huge)):
        path = tmp_path / f"{number}.mat"
        with h5py.File(path, "w", userblock_size=(0, 512, 1024, 8192, 0)[number]) as file:
            write(file)
        with pytest.raises(RequestError, match=f"{number}\\.mat: damaged or changed"):
            check_hdf5(path)
    with h5py.File(tmp_path / "good.mat", "w") as file:
        good(file)
    check_hdf5(tmp_path / "good.mat")


def test_nwb_files_cannot_read_other_files(tmp_path: Path) -> None:
    import h5py

    (tmp_path / "eeg").mkdir()
    for name, folder in (("outside", "/etc/passwd"), ("inside", "")):
        with h5py.File(tmp_path / "eeg" / f"{name}.nwb", "w") as file:
            series = file.create_group("acquisition/series")
            series.attrs["neurodata_type"] = "ElectricalSeries"
            external = [(folder, 0, 1000)] if folder else None
            series.create_dataset("data", (500, 2), "u1", external=external)
            series.create_dataset("starting_time", data=0.0).attrs["rate"] = 100.0
    inside, outside = list_items(CorpusConfig(kind="folder", root=str(tmp_path / "eeg")))
    open_item(inside).close()
    with pytest.raises(ReadError, match="the values of 'data' are in another file"):
        open_item(outside)


def test_bad_arrays_become_quarantined_rows(tmp_path: Path) -> None:
    import h5py

    root = tmp_path / "arrays"
    _array_corpus(root, "bomb.npz", _zeros_npz(2**28), SIDECAR)
    _array_corpus(root, "alias.npy", b"x", SIDECAR + BILLION)
    _array_corpus(root, "pickle.npy", PICKLES["key"], SIDECAR)
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (2, 1000000000000), }".ljust(117) + b"\n"
    _array_corpus(root, "claims.npy", b"\x93NUMPY\x01\x00v\x00" + header + bytes(100), SIDECAR)
    _array_corpus(root, "nan.npy", b"x", "sfreq: .nan\nch_names: [Cz]\nunit: uV\n")
    _array_corpus(root, "link.mat", b"", SIDECAR)
    with h5py.File(root / "link.mat", "w") as file:
        file["x"] = h5py.ExternalLink("/etc/x.h5", "/x")
    faults = _open_items(root)
    assert len(faults) == 6 and all("\n" not in fault for fault in faults)


@pytest.mark.parametrize("name", ["recording.edf", "recording.vhdr", "recording.vmrk", "x.json", "events.tsv"])
def test_named_pipes_in_a_corpus_do_not_make_a_job_wait(name: str, tmp_path: Path, run_limited: Any) -> None:
    (tmp_path / "recording.vhdr").write_text("Brain Vision Data Exchange Header File Version 1.0\n")
    (tmp_path / "broken.bdf").write_bytes(b"not EEG")
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    code = (
        "from data_sharding.formats.sniffing import find_recordings\n"
        "print(len(find_recordings(sys.argv[1])), 'recordings')"
    )
    done = run_limited(code, tmp_path)
    assert done.returncode == 0 and "recordings" in done.stdout, done.stderr


def test_generated_folder_with_foreign_paths_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trial = {"key": "a", "label": 0, "file": "../../etc/passwd", "real_file": "real/a.png"}
    about = {"dataset": "d", "dataset_id": "x", "split": "test", "control": "none", "labels": ["a"]}
    for trials in ([trial], [{**trial, "file": "/etc/passwd"}], [5], "abc", [{**trial, "file": ["x"]}]):
        (tmp_path / "generated.json").write_text(json.dumps({**about, "trials": trials}))
        assert main(["evaluate", str(tmp_path)]) == 2
        assert capsys.readouterr().err.count("dreamscale: ") == 1


def test_refused_pickles_name_no_hidden_text(tmp_path: Path) -> None:
    (tmp_path / "x.npy").write_bytes(b"cos\x1b[31m\nsystem\n(tR.")
    with pytest.raises(RefusedPickle) as caught:
        load_npy(tmp_path / "x.npy")
    assert "\x1b" not in str(caught.value)


def _matlab_cells(depth: int) -> bytes:
    """Return a MATLAB 5 file with a cell array inside a cell array, and so on."""
    value = struct.pack("<2I", 14, 0)
    for _ in range(depth):
        header = struct.pack("<4I2I2i2HI", 6, 8, 1, 0, 5, 8, 1, 1, 1, 1, 0x41)
        value = struct.pack("<2I", 14, len(header) + len(value)) + header + value
    return b"MATLAB 5.0 MAT-file".ljust(124) + struct.pack("<H", 0x0100) + b"IM" + value


def test_matlab_files_that_need_too_much_memory_or_crash_the_reader(
    tmp_path: Path, run_command: Any, assert_refused: Any
) -> None:
    from scipy.io import savemat

    (tmp_path / "deep.set").write_bytes(_matlab_cells(20_000))
    cells = bytearray(_matlab_cells(1))
    cells[128 + 8 + 24 : 128 + 8 + 32] = struct.pack("<2i", 2**15, 2**15)
    (tmp_path / "cells.set").write_bytes(cells)
    savemat(tmp_path / "zeros.set", {"x": np.zeros(2**27, np.uint8)}, appendmat=False, do_compression=True)
    faults = {"deep": "nested over 100 levels deep", "cells": "unpack to more than", "zeros": "unpack to more than"}
    for name, fault in faults.items():
        with pytest.raises(RequestError, match=fault):
            check_matlab(tmp_path / f"{name}.set")
    encoder = tmp_path / "encoder"
    EEGEncoder(EncoderConfig(samples=512, dim=8, depth=1, heads=2, mlp_ratio=1.0)).save_pretrained(encoder)
    done = run_command("encode", encoder, tmp_path / "deep.set", "-o", tmp_path / "out.npz")
    assert_refused(done, "deep.set", "nested over 100 levels deep")
    _array_corpus(tmp_path / "arrays", "deep.mat", _matlab_cells(20_000), SIDECAR)
    assert "nested over 100 levels deep" in _open_items(tmp_path / "arrays")[0]


@pytest.mark.parametrize("packed", [True, False])
def test_usual_matlab_files_are_read(packed: bool, tmp_path: Path) -> None:
    from scipy.io import savemat
    from scipy.sparse import csc_array

    events = np.array([(float(i), "stimulus") for i in range(300)], dtype=[("latency", "O"), ("type", "O")])
    values = {"data": np.ones((4, 5000)), "z": np.array([1 + 2j]), "sparse": csc_array(np.eye(5)), "text": ["a", "bc"]}
    content = {"EEG": {**values, "event": events, "cells": np.array([1, "a", np.zeros(0), [2.5]], dtype=object)}}
    savemat(tmp_path / "a.mat", content, do_compression=packed)
    check_matlab(tmp_path / "a.mat")
    whole = (tmp_path / "a.mat").read_bytes()
    for length in range(100, min(len(whole), 4000), 37):
        (tmp_path / "cut.mat").write_bytes(whole[:length])
        check_matlab(tmp_path / "cut.mat")
