"""An encoder that reads electrode positions, on people with 17 and 63 channels: from files to images."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

from data_sharding.common.errors import RequestError, run_main
from data_sharding.common.shipped import shipped_configs
from data_sharding.dataset.batch import collate
from data_sharding.dataset.dataset import EEGDataset
from finetune.align import main as align
from finetune.eeg import ImageAugmentConfig, group_repeats, load_encoder, prepare_eeg, read_encoder_input
from finetune.electrodes import Electrodes, find_places
from finetune.generate import main as generate
from finetune.generators import load_generator
from finetune.images import ImageTable
from finetune.retrieval.run import main as retrieve
from finetune.stable_diffusion.train import main as finetune
from finetune.training.step_random import StepRandom
from launch.cli import main as dreamscale
from pretrain.encoder.encoder import EEGEncoder
from pretrain.model.config import EncoderConfig

from ..published import POSTERIOR, WHOLE, write_things_eeg2


@pytest.fixture(scope="module")
def things(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Shard a mimic of THINGS-EEG2 with two people, who have 17 and 63 channels, and write a tiny montage encoder."""
    root = tmp_path_factory.mktemp("things")
    with pytest.MonkeyPatch.context() as patch:
        caps = {"sub-01": POSTERIOR.split(), "sub-02": WHOLE.split()}
        assert {name: len(names) for name, names in caps.items()} == {"sub-01": 17, "sub-02": 63}
        for name, value in write_things_eeg2(root / "files", 1, 2, caps).items():
            patch.setenv(name, value)
        config = str(shipped_configs() / "data_sharding" / "things_eeg2.yaml")
        assert dreamscale(["shard", config, "--output", str(root / "data"), "--ray.num_cpus", "1"]) == 0
        torch.manual_seed(0)
        shape = EncoderConfig(samples=80, dim=24, depth=1, heads=2, mlp_ratio=2.0, tokenizer="montage", patch=16)
        EEGEncoder(shape, EEGDataset(root / "data").spec).save_pretrained(root / "encoder")
        yield root


def _words(**keys: object) -> list[str]:
    keys = {"device": "cpu", "tracker.kind": "none", "training.steps": 2, "training.batch_size": 8, **keys}
    return [str(word) for key, value in keys.items() for word in (f"--{key.replace('__', '.')}", value)]


@pytest.fixture(scope="module")
def model(things: Path, miniature: Path) -> Path:
    """Align the encoder, and fine-tune a tiny Stable Diffusion."""
    data, clip = things / "data", {"target__model": miniature / "clip"}
    assert run_main(align, _words(dataset=data, encoder=things / "encoder", output=things / "align", **clip)) == 0
    found = {"dataset": data, "encoder": things / "align" / "encoder", "base": miniature / "stable-diffusion"}
    assert run_main(finetune, _words(**found, output=things / "sd", order="joint", **clip)) == 0
    return things / "sd" / "model"


def test_the_tokens_of_a_person_do_not_depend_on_the_people_in_the_batch(things: Path) -> None:
    data = EEGDataset(things / "data")
    encoder = load_encoder(str(things / "encoder"), data, several_montages=True)
    electrodes = Electrodes(encoder, data)
    counts = data.trials.numbers("n")
    few, many = (int(np.flatnonzero(counts == n)[0]) for n in (17, 63))
    together = read_encoder_input(data, [[few], [many]], encoder, electrodes)
    assert together.places["count_B"].tolist() == [17, 63] and together.places["positions"].shape == (2, 63, 3)
    with torch.no_grad():
        tokens = encoder(together.x, **together.places)
        for row, number in enumerate((few, many)):
            meta = data.meta(number)
            alone = encoder.inputs_of([meta])
            x = encoder.scale_for_model(collate(data, [number]).eeg[:, : meta["n"]].float(), meta["n"])
            expected = encoder(x, alone["positions"])
            torch.testing.assert_close(tokens[row : row + 1], expected, rtol=1e-4, atol=1e-5)
    batch = collate(data, [many, few])
    random = StepRandom(0, 0)
    prepared = prepare_eeg(
        batch, data, ImageTable(data), ImageAugmentConfig(), random, encoder, electrodes.of(batch.numbers)
    )
    torch.testing.assert_close(prepared, together.x.flip(0))
    with pytest.raises(RequestError, match="one montage"):
        load_encoder(str(things / "encoder"), data)
    # An encoder that keeps the electrodes of the only montage needs no positions, but another montage is noticed.
    meta = data.meta(few)
    encoder.positions_C3 = encoder.inputs_of([meta])["positions"][0]
    assert find_places(encoder, [meta]) == {} and find_places(encoder, [meta, data.meta(many)])


def test_align_finetune_retrieve_and_generate_read_each_person_with_its_own_channels(things: Path, model: Path) -> None:
    data = EEGDataset(things / "data", "test")
    out = ["-o", str(things / "retrieval"), "--resamples", "99"]
    assert run_main(retrieve, [str(things / "align"), str(things / "data"), *out]) == 0
    people = json.loads((things / "retrieval" / "retrieval.json").read_text())["rows"]["single trials"]["by_person"]
    assert len(people) == 2
    images = ["-o", str(things / "images"), "--steps", "2", "--device", "cpu", "--controls", "[shuffle, noise]"]
    assert run_main(generate, [str(model), str(things / "data"), *images]) == 0
    for folder in ("images", "images-shuffle", "images-noise"):
        trials = json.loads((things / folder / "generated.json").read_text())["trials"]
        assert len(trials) == len(group_repeats(data, 0)) == 12

    # In a batch, the 63 channels of one person do not change the image of the other person.
    generator = load_generator(model)
    counts = data.trials.numbers("n")
    numbers = [int(np.flatnonzero(counts == n)[0]) for n in (17, 63)]
    batch = collate(data, numbers)
    eeg = batch.padded(dtype=torch.float32)
    together = generator.generate(eeg, seeds=[1, 2], steps=2, metas=batch.metas)
    alone = [generator.generate(eeg[i : i + 1], seeds=[i + 1], steps=2, metas=batch.metas[i : i + 1]) for i in (0, 1)]
    assert all(abs(together[i].astype(int) - alone[i][0]).max() <= 1 for i in (0, 1))

    # The package that diffusers loads gives the same images, if it gets the positions of the electrodes.
    pipeline = DiffusionPipeline.from_pretrained(model, trust_remote_code=True)
    for i, number in enumerate(numbers):
        sample = data[number]
        (places,) = generator.encoder.inputs_of([sample.meta])["positions"].numpy()
        made = pipeline(
            sample.eeg[None].astype(np.float32),
            seeds=[i + 1],
            positions=places,
            num_inference_steps=2,
            output_type="np",
        )
        assert abs(made.images[0].astype(int) - alone[i][0]).max() <= 1
