"""Tests that the code of the project never loads files in a way that could run code, and that all code that reads files
uses the checks for untrusted files."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ["data_sharding", "pretrain", "finetune", "launch", "benchmarks"]
FORBIDDEN = {
    "eval", "exec", "os.system", "os.popen", "torch.jit.load", "torch.export.load", "torch.hub.load", "pickle.load",
    "marshal.load", "marshal.loads", "shelve.open", "joblib.load", "dill.load", "cloudpickle.load", "yaml.load",
    "yaml.unsafe_load", "yaml.full_load", "yaml.load_all", "json.loads", "pd.read_pickle", "pandas.read_pickle",
    "tempfile.mktemp", "os.tempnam", "shutil.unpack_archive", "Image.open", "tarfile.open", "zipfile.ZipFile",
    "pickle.loads", "pickle.Unpickler", "yaml.safe_load", "np.load", "numpy.load", "torch.load",
}  # fmt: skip
ALLOWED = {
    ("data_sharding/common/untrusted.py", "json.loads"): "the strict parser itself",
    ("data_sharding/common/plain_yaml.py", "yaml.safe_load"): "after the check for bombs",
    ("data_sharding/common/untrusted.py", "np.load"): "without pickles, after the check of sizes",
    ("data_sharding/common/untrusted.py", "Image.open"): "with a list of kinds",
    ("data_sharding/common/untrusted.py", "zipfile.ZipFile"): "lists sizes only",
    ("data_sharding/corpora/safe_pickle.py", "zipfile.ZipFile"): "stored members only",
    ("data_sharding/corpora/safe_pickle.py", "np.load"): "memory-mapped, without pickles",
    ("data_sharding/corpora/arrays.py", "np.load"): "memory-mapped, without pickles",
    ("data_sharding/corpora/bids.py", "json.loads"): "sidecars of BIDS, whose size is limited, may have NaN",
    ("data_sharding/dataset/samples.py", "tarfile.open"): "writes",
    ("data_sharding/dataset/ledger.py", "json.loads"): "columns of the ledger, whose size is limited",
    ("data_sharding/job/isolation.py", "pickle.loads"): "an object of this process, to see whether it can be sent",
    ("data_sharding/job/versions.py", "np.load"): "a file of this job, without pickles",
    ("data_sharding/job/versions.py", "json.loads"): "values of this process",
    ("data_sharding/job/journal.py", "json.loads"): "the journal of this job",
    ("finetune/evaluation/classifier.py", "json.loads"): "the header that this process wrote",
    ("data_sharding/formats/unread/recorders.py", "zipfile.ZipFile"): "lists names only",
    ("data_sharding/formats/unread/recorders.py", "tarfile.open"): "lists some names only",
    ("pretrain/convert.py", "torch.load"): "with weights_only",
}
"""Calls that are allowed in one file, each with the reason."""
OWN_RUN = {"pretrain", "launch"}
"""Packages that may read lines of JSON without the strict parser, because the same run has written the lines."""


def _calls(tree: ast.AST) -> list[tuple[str, ast.Call]]:
    return [(ast.unparse(node.func), node) for node in ast.walk(tree) if isinstance(node, ast.Call)]


def _trees() -> list[tuple[str, ast.Module]]:
    paths = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    return [(path.relative_to(ROOT).as_posix(), ast.parse(path.read_text())) for path in paths]


def test_no_unsafe_loading() -> None:
    found = {(path, name) for path, tree in _trees() for name, _ in _calls(tree) if name in FORBIDDEN}
    found = {(path, name) for path, name in found if not (name == "json.loads" and path.split("/")[0] in OWN_RUN)}
    found = {
        (path, name) for path, name in found if path.split("/")[0] != "benchmarks" or name in ("eval", "os.system")
    }
    assert found - ALLOWED.keys() == set()


@pytest.mark.parametrize("keyword", ["allow_pickle", "trust_remote_code", "weights_only", "shell"])
def test_no_unsafe_options(keyword: str) -> None:
    safe = {"allow_pickle": "False", "weights_only": "True", "trust_remote_code": "False", "shell": "False"}[keyword]
    for path, tree in _trees():
        for name, call in _calls(tree):
            values = [ast.unparse(word.value) for word in call.keywords if word.arg == keyword]
            assert values in ([], [safe]), f"{path}: {name}({keyword}={values[0]})"
            if keyword == "weights_only" and name == "torch.load":
                assert values == [safe], path


def test_pickle_is_imported_only_where_nothing_foreign_is_read() -> None:
    allowed = {"data_sharding/corpora/safe_pickle.py", "data_sharding/job/isolation.py"}
    for path, tree in _trees():
        names = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
        names += [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        if path.split("/")[0] != "benchmarks" and {"pickle", "marshal", "shelve", "dill", "cloudpickle"} & {*names}:
            assert path in allowed, path


def test_subprocesses_get_lists_of_words() -> None:
    for path, tree in _trees():
        for name, call in _calls(tree):
            if name.startswith("subprocess.") and call.args and isinstance(call.args[0], ast.Constant | ast.JoinedStr):
                pytest.fail(f"{path}: {name} gets a text, which a shell would parse")
