"""Tests of corpora: their configs and kinds, folders and events tables on any storage, and the order of trials."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from data_sharding.common.config import parse_config
from data_sharding.common.errors import RequestError
from data_sharding.corpora import (
    Adapter,
    CorpusConfig,
    Item,
    Trial,
    describe_design,
    expand,
    list_items,
    open_item,
    register,
)
from data_sharding.corpora.base import ADAPTERS
from data_sharding.corpora.design import measure_order
from data_sharding.formats.signal import Signal
from data_sharding.formats.sniffing import Recording


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"kind": "bidz"}, "unknown kind 'bidz'; did you mean 'bids'?"),
        (
            {"kind": "folder", "images": "y"},
            "the key 'images' does not belong to kind folder; remove it, or use a kind that has it (arrays, bids, ",
        ),
        ({"kind": "events"}, "the key 'images' is missing"),
        (
            {"kind": "eeg_imagenet", "images": "y", "exclude": ["*"]},
            "the key 'exclude' does not belong to kind eeg",
        ),
        ({"kind": "folder", "options": {"fold": 1}}, "unknown option 'fold' for kind folder; this kind has no options"),
        (
            {"kind": "eeg_imagenet", "images": "y", "options": {"flod": 1}},
            "did you mean 'fold'? The options are file, splits, fold, unit",
        ),
        ({"kind": "eeg_imagenet", "images": "y", "options": {"fold": "one"}}, "fold"),
        ({"subject_pattern": "(?P<who>x)"}, "has no group"),
        ({"subject_pattern": "("}, "not a valid regular expression"),
    ],
)
def test_keys_of_another_kind_are_refused_in_one_line(values: dict, words: str) -> None:
    with pytest.raises(ValueError) as caught:
        CorpusConfig(root="x", **values)
    assert words in str(caught.value) and "\n" not in str(caught.value)


@dataclasses.dataclass(kw_only=True)
class Corpora:
    """A config that contains a list of corpora."""

    corpora: list[CorpusConfig]
    """Corpora of the recordings."""


def test_from_yaml(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(
        "corpora:\n- kind: eeg_imagenet\n  root: x\n  images: y\n  options: {fold: 2, splits: ''}\n- root: z\n"
    )
    config = parse_config(Corpora, [str(tmp_path / "a.yaml")], prog="test", positionals=["config"])
    assert config.corpora[0].options == {"fold": 2, "splits": ""} and config.corpora[1].kind == "folder"
    (tmp_path / "b.yaml").write_text("corpora:\n- kind: eeg_imagenet\n  root: x\n  images: y\n  options: {fold: one}\n")
    with pytest.raises(RequestError, match="fold"):
        parse_config(Corpora, [str(tmp_path / "b.yaml")], prog="test", positionals=["config"])


def test_a_new_kind_is_a_class(folder_corpus: Path) -> None:
    @register("one")
    class OneCorpus(Adapter):
        def items(self, config: CorpusConfig) -> list[Item]:
            return list_items(CorpusConfig(root=config.root))[:1]

        def open(self, item: Item) -> Signal:
            raise FileNotFoundError(item.kind)

    try:
        config = CorpusConfig(kind="one", root=str(folder_corpus))
        items = list_items(config)
        assert [item.kind for item in items] == ["one"] and describe_design(config, items)["design"] == "unknown"
        with pytest.raises(FileNotFoundError, match="one"):
            open_item(items[0])
    finally:
        del ADAPTERS["one"]


def in_memory(root: Path, name: str) -> str:
    from upath import UPath

    for path in root.rglob("*"):
        if path.is_file():
            target = UPath(f"memory://{name}") / path.relative_to(root).as_posix()
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    return f"memory://{name}"


def test_folder_on_an_object_store(folder_corpus: Path) -> None:
    here = list_items(CorpusConfig(root=str(folder_corpus), name="lab", exclude=["copies/*"]))
    there = list_items(CorpusConfig(root=in_memory(folder_corpus, "lab"), name="lab", exclude=["copies/*"]))
    assert [(i.key, i.path, i.subject, i.recording.problem) for i in here] == [
        (i.key, i.path, i.subject, i.recording.problem) for i in there
    ]


def test_events_on_an_object_store(events_corpus: Path) -> None:
    root = in_memory(events_corpus, "pictures")
    items = list_items(CorpusConfig(kind="events", root=f"{root}/eeg", images=f"{root}/images"))
    assert len(items) == 3 and len(items[0].trials or ()) == 7
    from upath import UPath

    (UPath(root) / "images" / "img-3.png").unlink()
    with pytest.raises(RequestError, match=r"1 of 6 images are missing, the first is memory://.*img-3\.png"):
        list_items(CorpusConfig(kind="events", root=f"{root}/eeg", images=f"{root}/images"))
    with pytest.raises(RequestError, match="no such folder"):
        list_items(CorpusConfig(root="memory://nothing-there"))
    with pytest.raises(RequestError, match="works on a local disk only"):
        list_items(CorpusConfig(kind="eeg_imagenet", root=root, images=root))


def test_bids_columns_in_an_events_table(events_corpus: Path, tmp_path: Path) -> None:
    from shutil import copytree

    root = Path(copytree(events_corpus, tmp_path / "copy"))
    table = root / "eeg" / "sub-01" / "sub-01_task-images_events.tsv"
    table.write_text(
        "onset\tduration\tstim_file\tconcept\tblock\n1.0\t0.5\timg-0.png\tanimal\tb1\n2.0\t0.5\tn/a\tn/a\tn/a\n",
        encoding="utf-8-sig",
    )
    items = list_items(CorpusConfig(kind="events", root=str(root / "eeg"), images=str(root / "images")))
    (trial,) = items[0].trials or ()
    assert (trial.image_id, trial.concept, trial.block, trial.label_name) == ("img-0", "animal", "b1", "image")


@pytest.mark.parametrize("value", ["nan", "inf", "soon", ""])
def test_an_onset_that_is_not_a_number(events_corpus: Path, tmp_path: Path, value: str) -> None:
    from shutil import copytree

    root = Path(copytree(events_corpus, tmp_path / "copy"))
    table = root / "eeg" / "sub-01" / "sub-01_task-images_events.tsv"
    table.write_text(f"onset\timage\n{value}\timg-0.png\n")
    with pytest.raises(RequestError, match="line 2: the onset"):
        list_items(CorpusConfig(kind="events", root=str(root / "eeg"), images=str(root / "images")))


def test_expand(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LAB", str(tmp_path))
    assert expand("${LAB}/a", "root") == tmp_path / "a"
    with pytest.raises(RequestError, match="NOT_SET is not set"):
        expand("${NOT_SET}/a", "root")
    with pytest.raises(RequestError, match="does not know the protocol 'gopher://'"):
        expand("gopher://a", "root")


def item(labels: list[str], key: str = "a") -> Item:
    path = Path("x")
    trials = tuple(
        Trial(onset=float(i), image="i", image_id="i", label_name=name, caption="", split="")
        for i, name in enumerate(labels)
    )
    return Item(
        key=key,
        corpus="c",
        path="x",
        recording=Recording(path=path, format="x", files=(path,)),
        subject="s",
        session="",
        trials=trials,
    )


BLOCKS = [f"c{i // 20}" for i in range(200)]


class TestOrder:
    def test_blocks_are_recognised_from_one_recording_or_many(self) -> None:
        design, evidence = measure_order([item(BLOCKS)])
        assert design == "block" and "20.0 trials long" in evidence and "200 trials of 10 categories" in evidence
        assert measure_order([item(BLOCKS[i : i + 50]) for i in (0, 50, 100, 150)])[0] == "block"
        assert measure_order([item([name] * 30) for name in ("a", "b")])[0] == "block"

    def test_two_categories_in_blocks(self) -> None:
        assert measure_order([item((["a"] * 25 + ["b"] * 25) * 2)])[0] == "block"

    @pytest.mark.parametrize("seed", range(20))
    @pytest.mark.parametrize("categories", [2, 10, 150])
    def test_random_order_is_not_a_block_design(self, seed: int, categories: int) -> None:
        rng = np.random.default_rng(seed)
        names = [f"c{i % categories}" for i in range(300)]
        assert measure_order([item(list(rng.permutation(names)))])[0] == "random"

    def test_rare_and_frequent_categories_in_random_order(self) -> None:
        names = ["common"] * 250 + ["rare"] * 50
        assert measure_order([item(list(np.random.default_rng(0).permutation(names)))])[0] == "random"

    def test_the_order_is_that_of_the_onsets_not_of_the_table(self) -> None:
        shuffled = np.random.default_rng(0).permutation(200)
        blocks = item(BLOCKS)
        trials = tuple((blocks.trials or ())[i] for i in shuffled)
        assert measure_order([dataclasses.replace(blocks, trials=trials)])[0] == "block"

    def test_an_unclear_order_is_called_unknown(self) -> None:
        assert measure_order([item(["a", "a", "b", "b"])])[0] == "unknown"
        assert measure_order([item(["a"] * 100)])[0] == "unknown"
        assert measure_order([dataclasses.replace(item([]), trials=None)]) == (
            "unknown",
            "no trials: continuous recordings",
        )
        # Trials come in pairs of the same category. So neighbouring trials have the same category more often than by
        # chance, but a pair is not a block.
        rng = np.random.default_rng(0)
        pairs = [name for name in rng.permutation([f"c{i % 3}" for i in range(150)]) for _ in range(2)]
        assert measure_order([item(pairs)])[0] == "unknown"


def test_marks_in_a_table_beside_a_recording_are_used(tmp_path: Path, make_raw, write_raw) -> None:
    path = write_raw(make_raw(4, 200, 6), tmp_path / "a_raw.fif")
    rows = "1.0\t0.5\tBAD_move\n3.0\t0\tboundary\n4.0\t0.1\tface\nn/a\t1\tBAD\n"
    (tmp_path / "a_events.tsv").write_text(f"onset\tduration\ttrial_type\n{rows}")
    (item,) = list_items(CorpusConfig(root=str(tmp_path), name="c"))
    info = open_item(item).info
    assert item.path == path.name and [(s.start, s.stop) for s in info.segments] == [(0, 600), (600, 1200)]
    assert info.bad_spans == [(1.0, 1.5, "BAD_move")]
    assert info.notes == ["a_events.tsv, line 5: the mark 'BAD' has no onset, and is not used"]
