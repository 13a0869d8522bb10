"""Tests of the demo: its steps, its report, resuming after a stop, and the whole chain with very short training."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from data_sharding.common.errors import RequestError
from launch.demo import report
from launch.demo.run import DemoConfig, choose_folder
from launch.demo.steps import CONTROLS, make_steps
from launch.local import processes_wanted


def start_demo(out: Path, *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "launch", "demo", "--out", str(out), "--profile", "smoke", *words]
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def test_steps_read_what_earlier_steps_write(tmp_path: Path):
    steps = make_steps(tmp_path, 3, "full")
    written: set[str] = set()
    names: set[str] = set()
    for step in steps:
        assert set(step.needs) <= names, step.name
        assert not written & set(step.outputs), step.name
        for value in json.dumps([step.words, step.config]).split('"'):
            if value.startswith(f"{tmp_path}/") and "/configs/" not in value:
                top = Path(value).relative_to(tmp_path).parts[0]
                assert top in {Path(name).parts[0] for name in written | set(step.outputs)}, (step.name, value)
        written |= set(step.outputs)
        names.add(step.name)
        if step.config and "seed" in step.config:
            assert step.config["seed"] == 3, step.name
    assert "runs/demo" not in json.dumps([[s.words, s.config] for s in steps])


def test_the_chain_uses_several_processes(tmp_path: Path):
    by_name = {step.name: step for step in make_steps(tmp_path, 0, "full")}
    (tmp_path / "c.yaml").write_text(f"num_processes: {by_name['pretrain'].config['num_processes']}\n")
    assert processes_wanted([str(tmp_path / "c.yaml")]) == 2
    assert by_name["pretrain"].config["zero_stage"] == 2
    assert processes_wanted(by_name["generate_eg_ddpm"].words[1:]) == 2


def test_folders_of_two_seeds_do_not_mix(tmp_path: Path):
    out = tmp_path / "demo"
    first = choose_folder(DemoConfig(out=str(out), seed=1))
    assert first == out == choose_folder(DemoConfig(out=str(out), seed=1))
    assert choose_folder(DemoConfig(out=str(out), seed=2)) == out / "seed-2"
    assert choose_folder(DemoConfig(out=str(out), seed=1, profile="smoke")) == out / "seed-1-smoke"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    with pytest.raises(RequestError, match="not a demo"):
        choose_folder(DemoConfig(out=str(tmp_path / "other")))


def make_scores(own: float, low: float, colour_low: float = -0.1) -> dict:
    """Make the scores of a model. `low` and `colour_low` are lower ends of intervals: of the score with the trials' own
    EEG minus the score with shuffled EEG, for category and for colour."""

    def measure(mean: float, low: float) -> dict:
        return {"mean": mean, "interval": [low, mean + 0.1], "n": 336}

    return {
        "scores": {"none": {"category": measure(own, own - 0.1)}, "shuffle": {"category": measure(0.25, 0.2)}},
        "own_minus_shuffled": {
            "category": measure(own - 0.25, low),
            "colour": measure(0.1, colour_low),
            "identification": measure(0.1, -0.1),
        },
    }


MODELS = {"stable_diffusion": make_scores(0.7, 0.3, colour_low=0.05), "eg_ddpm": make_scores(0.6, 0.2)}


@pytest.mark.parametrize(
    ("words", "passed"),
    [(("signal", "signal"), True), (("signal", "category only"), False), (("confounded", "signal"), False)],
)
def test_the_conclusion_follows_the_verdicts(words: tuple[str, str], passed: bool):
    verdicts = {kind: {"word": word, "why": ["Because."]} for kind, word in zip(MODELS, words, strict=True)}
    concluded = report.conclude(MODELS, verdicts)
    assert concluded["passed"] is passed
    assert ("Not shown" in concluded["conclusion"]) is ("Because." in concluded["conclusion"]) is not passed
    assert all(f"verdict {word};" in concluded["conclusion"] for word in words)


def test_the_conclusion_names_what_else_is_above_shuffled_eeg():
    text = report.conclude(MODELS, {kind: {"word": "signal", "why": []} for kind in MODELS})["conclusion"]
    assert "also above shuffled EEG: colour." in text and "also above shuffled EEG: nothing else." in text


class PageParser(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.pictures: list[str] = []
        self.links: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag == "img":
            self.pictures.append(values["src"] or "")
        self.links += [values[key] or "" for key in ("href", "src") if key in values]

    def handle_data(self, data: str) -> None:
        self.text += data


def check_that_names_are_escaped(out: Path, tmp_path: Path) -> None:
    """Render the report of a copy of the demo in which a subject's name contains HTML code."""
    copy = shutil.copytree(out, tmp_path / "copy", ignore=shutil.ignore_patterns("checkpoints"))
    truth = json.loads((copy / "corpus" / "truth.json").read_text())
    truth["unpaired"][0]["subject"] = "<script>alert(1)</script>"
    (copy / "corpus" / "truth.json").write_text(json.dumps(truth))
    steps = make_steps(copy, 0, "smoke")
    report.write_report(copy, steps, {step.name: 1.0 for step in steps}, seed=0, profile="smoke")
    text = (copy / "report.html").read_text()
    assert "<script" not in text and "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    shutil.rmtree(copy)


# On two cores of an older CPU, and with another test at the same time, the chain takes longer than the time limit of a
# test.
@pytest.mark.timeout(1800)
def test_the_whole_chain(tmp_path: Path, request: pytest.FixtureRequest):
    out = tmp_path / "demo"
    # Stop the demo in the middle of a step. The second run resumes at the interrupted step.
    process = start_demo(out)
    while not (out / "steps" / "corpus.done.json").is_file():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.1)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 75, err
    assert "run the same command" in err
    begun = list((out / "steps").glob("*.begun.json"))
    assert len(begun) == 1

    process = start_demo(out)
    text, err = process.communicate()
    assert process.returncode == 0, err
    assert text.splitlines()[-1] == str(out / "report.html")
    assert "5 formats, 5 electrode layouts, 4 sampling rates: already complete" in err
    assert not list((out / "steps").glob("*.begun.json"))

    numbers = json.loads((out / "report.json").read_text())
    for kind in ("stable_diffusion", "eg_ddpm"):
        for values in (numbers["models"][kind], numbers["models"][kind]["shuffled"]):
            assert 0 <= values["accuracy"] <= 1
            assert 0 < values["p_value"] <= 1
            assert 0.1 < values["chance"] < 0.5
            assert values["n"] == 16
    assert numbers["conclusion"]
    for kind in ("stable_diffusion", "eg_ddpm", "linear"):
        found = numbers["pictures"][kind]
        assert set(found["scores"]) == ({"none"} if kind == "linear" else set(CONTROLS))
        for scores in found["scores"].values():
            assert all(0 <= scores[name]["interval"][0] <= scores[name]["mean"] <= 1 for name in scores)
        assert len(found["people"]) > 1
    assert numbers["pretrain"]["held_out_loss_first"] > 0
    assert numbers["seed"] == 0
    steps = make_steps(out, 0, "smoke")
    assert set(numbers["seconds"]) == {step.name for step in steps} | {"total"}
    assert numbers["versions"]["deepspeed"]

    page = PageParser()
    page.feed((out / "report.html").read_text())
    assert all(link.startswith(("data:image/png;base64,", "#")) for link in page.links), "the page needs nothing else"
    assert len(page.pictures) >= 4 * 2 * 6
    for step in steps:
        assert step.command in page.text
        assert (out / "logs" / f"{step.name}.log").is_file()
    check_that_names_are_escaped(out, tmp_path)
    if shutil.which("chromium"):
        request.getfixturevalue("open_in_browser")(out / "report.html")
    with Image.open(out / "overview.png") as picture:
        assert min(picture.size) > 500

    # After a complete demo, the command repeats no step and writes the same report.
    before = (out / "report.json").read_bytes()
    process = start_demo(out)
    text, err = process.communicate()
    assert process.returncode == 0
    assert err.count("already complete") == len(steps)
    assert (out / "report.json").read_bytes() == before

    # If a step fails, the demo names the log of the step and returns the exit code of the step.
    (out / "generated" / "eg_ddpm" / "metrics.json").unlink()
    (out / "generated" / "eg_ddpm-shuffle" / "generated.json").unlink()
    process = start_demo(out)
    text, err = process.communicate()
    assert process.returncode == 2
    assert "generated.json" in err
    assert "evaluate_eg_ddpm.log" in err
    assert not text.strip()
