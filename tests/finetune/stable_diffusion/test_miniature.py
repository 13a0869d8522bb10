import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from data_sharding.common.errors import RequestError, run_main
from finetune.base_models.load import load_base
from finetune.images import ImageTable, open_paired
from finetune.stable_diffusion.miniature import _augment, main, make_tokenizer
from finetune.targets.images import embed_images

CAPTIONS = ["a red disc on a dark background", "a green disc", "two stripes"]


def test_words_of_the_captions_are_single_tokens_and_other_words_are_divided() -> None:
    tokenizer = make_tokenizer(CAPTIONS)
    assert tokenizer.tokenize(CAPTIONS[0]) == [f"{word}</w>" for word in CAPTIONS[0].split()]
    assert tokenizer.decode(tokenizer("zebra stripes").input_ids, skip_special_tokens=True) == "zebra stripes"
    ids = tokenizer("a disc").input_ids
    assert ids[0] == tokenizer.bos_token_id and ids[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize("captioned", [True, False])
def test_augmentation_only_moves_pixels_and_permutes_colours(captioned: bool) -> None:
    x = torch.rand(6, 3, 16, 16)
    y = _augment(x, torch.Generator().manual_seed(0), captioned=captioned)
    assert y.shape == x.shape
    assert all(torch.isin(after, before).all() for before, after in zip(x, y, strict=True))


def test_images_with_captions_keep_their_colours_and_sides() -> None:
    x = torch.zeros(64, 3, 16, 16)
    x[:, 0, 4:12, :5] = 1.0  # red, on the left side
    y = _augment(x, torch.Generator().manual_seed(0), captioned=True)
    assert (y[:, 1:] == 0).all() and (y[:, 0, :, :8].sum(dim=(1, 2)) > y[:, 0, :, 8:].sum(dim=(1, 2))).all()
    free = _augment(x, torch.Generator().manual_seed(0), captioned=False)
    assert (free[:, 1:] != 0).any() and (free[..., 12:] != 0).any()


def test_the_miniature_is_a_pipeline_of_the_real_classes(miniature: Path) -> None:
    pipeline = load_base(miniature / "stable-diffusion")
    image = pipeline("a circle", num_inference_steps=3, guidance_scale=2.0, output_type="np").images
    assert image.shape == (1, 32, 32, 3)
    # The scaling factor brings latents to unit variance, as in the real Stable Diffusion.
    assert pipeline.vae.config.scaling_factor > 0


def test_the_pipeline_has_the_text_encoder_and_tokenizer_of_the_clip(miniature: Path) -> None:
    from transformers import CLIPModel, CLIPTokenizer

    clip = CLIPModel.from_pretrained(miniature / "clip")
    tokenizer = CLIPTokenizer.from_pretrained(miniature / "clip")
    pipeline = load_base(miniature / "stable-diffusion")
    assert tokenizer.get_vocab() == pipeline.tokenizer.get_vocab()
    assert tokenizer.model_max_length == pipeline.tokenizer.model_max_length == 16
    ids = tokenizer(["a circle"], padding="max_length", return_tensors="pt").input_ids
    torch.testing.assert_close(pipeline.text_encoder(ids).last_hidden_state, clip.text_model(ids).last_hidden_state)
    assert clip.config.text_config.eos_token_id == tokenizer.eos_token_id


def test_clip_embeds_the_images_of_a_split(miniature: Path, paired_dataset: Path) -> None:
    table = ImageTable(open_paired(paired_dataset, "val"))
    embeds = embed_images(table, miniature / "clip")
    assert embeds.shape == (len(table), 64)
    torch.testing.assert_close(embeds.norm(dim=1), torch.ones(len(table)))


def test_the_miniature_is_made_once_and_overwrites_nothing(
    miniature: Path, paired_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again = [str(paired_dataset), "-o", str(miniature), "--clip_steps", "2", "--vae_steps", "2", "--unet_steps", "2"]
    assert main([*again, "--batch_size", "8"]) == 0
    assert main([*again, "--batch_size", "9"]) == 2
    assert "another config" in capsys.readouterr().err
    (tmp_path / "mine.txt").write_text("keep")
    assert main([str(paired_dataset), "-o", str(tmp_path)]) == 2
    assert "does not hold miniature models" in capsys.readouterr().err


def test_two_processes_train_the_same_models_as_one(
    miniature: Path, paired_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = ["--clip_steps", "2", "--vae_steps", "2", "--unet_steps", "2", "--batch_size", "8"]
    words = [str(paired_dataset), "-o", str(tmp_path / "two"), *steps, "--num_processes", "2"]
    done = subprocess.run([sys.executable, "-m", "launch", "miniature", *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("miniature models, trained on") == 1
    files = sorted(path.relative_to(miniature) for path in miniature.rglob("*.safetensors"))
    assert len(files) == 4  # CLIP, text encoder, autoencoder, U-Net
    for file in files:
        one, two = load_file(miniature / file), load_file(tmp_path / "two" / file)
        gaps = torch.cat([(two[name] - weights).abs().flatten() for name, weights in one.items()])
        # Compare the mean difference between the weights, because a few gradients are zero except for rounding errors,
        # and Adam divides each gradient by its own size. If each process trained on its own share alone, the mean would
        # be about 1e-3.
        assert gaps.mean() < 5e-5, f"{file}: {gaps.mean()}"
    # Another number of processes is not another config, so the finished models are kept.
    assert main([*words[:-1], "1"]) == 0
    assert main([*words[:-1], "5"]) == 2
    assert "at least twice num_processes" in capsys.readouterr().err


def test_folders_without_a_model_are_refused(tmp_path: Path, unpaired_dataset: Path, paired_dataset: Path) -> None:
    with pytest.raises(RequestError, match=r"no model_index\.json"):
        load_base(tmp_path)
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(RequestError, match="holds a FluxPipeline"):
        load_base(tmp_path)
    with pytest.raises(RequestError, match="no such directory"):
        load_base("./nowhere")
    with pytest.raises(RequestError, match="not a frozen image model"):
        embed_images(ImageTable(open_paired(paired_dataset, "val")), tmp_path)
    assert run_main(main, [str(unpaired_dataset), "-o", str(tmp_path / "m")]) == 2
