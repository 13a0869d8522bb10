"""Train a miniature Stable Diffusion and a miniature CLIP on the images of a dataset, in minutes.

The demo and the tests use the miniature models in place of Stable Diffusion 1.5 and CLIP ViT-L/14, which are too large.
The miniature models have the classes and the file layout of diffusers and transformers, so other code can load them
like the original models.

Tensor shapes: B images, H = W pixels, L tokens of a caption.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data_sharding.common.config import command, to_dict
from data_sharding.common.errors import EXIT_DONE, RequestError
from data_sharding.common.files import atomic_directory, digest_of, read_json, write_json
from data_sharding.common.progress import progress
from finetune.images import ImageTable, open_paired, to_model_range
from finetune.training.accelerate import flush_subnormals, get_world, make_accelerator, quiet_libraries
from finetune.training.batch_norm import gather_rows
from pretrain.runs.distributed import World

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPModel, CLIPTokenizer

START, END = "<|startoftext|>", "<|endoftext|>"
MAX_TOKENS = 16
"""Largest number of tokens of a caption. With CLIP's limit of 77 tokens, cross-attentions would cost five times as
much."""


@dataclass(frozen=True, kw_only=True)
class MiniatureConfig:
    """Train a miniature Stable Diffusion and a miniature CLIP on the training images of a dataset."""

    RENAMED: ClassVar[dict[str, str]] = {"batch": "batch_size"}

    dataset: str
    """Path of the EEG-image dataset, of which only the images and captions of the train split are used."""
    output: str
    """Output directory, with the models in the subdirectories clip/ and stable-diffusion/."""
    size: int = 32
    """Width and height of the images in pixels; a multiple of 8."""
    seed: int = 0
    """Seed for initial weights, order of images and augmentation of images."""
    batch_size: int = 64
    """Number of images in one optimiser step; the autoencoder is trained with half this number."""
    clip_steps: int = 300
    """Number of optimiser steps for training CLIP."""
    vae_steps: int = 600
    """Number of optimiser steps for training the autoencoder."""
    unet_steps: int = 1200
    """Number of optimiser steps for training the U-Net."""
    num_processes: int = 1
    """Number of processes, each of which computes its share of every batch on the CPU. The number of processes changes
    the trained weights only by rounding errors."""

    def __post_init__(self) -> None:
        if self.size % 8 or self.size < 16:
            raise ValueError(f"size must be a multiple of 8 and at least 16, got {self.size}")
        for name in ("batch_size", "clip_steps", "vae_steps", "unet_steps", "num_processes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.num_processes > 1 and self.batch_size < 2 * self.num_processes:
            raise ValueError(
                f"batch_size must be at least twice num_processes, got {self.batch_size} and {self.num_processes}"
            )


def make_tokenizer(captions: Sequence[str]) -> CLIPTokenizer:
    """Build a CLIP tokenizer in which every word of the captions is one token.

    Parameters
    ----------
    captions : sequence of str
        The captions of the training images. The tokenizer divides words that are in no caption into several tokens.

    Returns
    -------
    CLIPTokenizer
        A tokenizer that has CLIP's byte alphabet and special tokens.
    """
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    words = sorted({word for caption in captions for word in caption.lower().split()})
    pieces = {word: [*word[:-1], f"{word[-1]}</w>"] for word in words if word.isascii()}
    merges: list[tuple[str, str]] = []
    while True:
        pairs = Counter(pair for split in pieces.values() for pair in itertools.pairwise(split))
        if not pairs:
            break
        # Byte-pair encoding merges the most frequent pair first, and equally frequent pairs in alphabetical order.
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        for word, split in pieces.items():
            joined: list[str] = []
            for piece in split:
                if joined and (joined[-1], piece) == best:
                    joined[-1] += piece
                else:
                    joined.append(piece)
            pieces[word] = joined
    alphabet = sorted(ByteLevel.alphabet())
    tokens = [*alphabet, *(f"{a}</w>" for a in alphabet), *("".join(pair) for pair in merges), START, END]
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=MAX_TOKENS)  # pyright: ignore[reportArgumentType] - the library's annotation is too narrow


def _tokenize(tokenizer: CLIPTokenizer, captions: Sequence[str]) -> Tensor:
    out = tokenizer(list(captions), padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
    return out.input_ids


def _batches(
    n: int, batch: int, steps: int, seed: int, world: World
) -> Iterator[tuple[Tensor, slice, torch.Generator]]:
    """Yield for each step the indices of the batch's images, this process's slice of the batch, and a random generator.

    Every process draws the random numbers of the whole batch, and then computes only its share.
    """
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    share = max(1, min(batch, n) // world.size)
    size, own = share * world.size, slice(share * world.rank, share * (world.rank + 1))
    for _ in range(steps):
        while len(order) < size:
            order += torch.randperm(n, generator=generator).tolist()
        yield torch.tensor(order[:size]), own, generator
        del order[:size]


def _average_gradients(model: torch.nn.Module, world: World) -> None:
    """Replace the gradients of each process by their mean over all processes, with a single all-reduce."""
    if world.size == 1:
        return
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    torch.distributed.all_reduce(flat)
    flat /= world.size
    for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view(gradient.shape))


class _Training:
    """AdamW with a one-cycle schedule for one model, whose gradients are the means over all processes."""

    def __init__(
        self, model: torch.nn.Module, lr: float, steps: int, world: World, *, weight_decay: float = 0.01
    ) -> None:
        self.model, self.world = model.train(), world
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=lr, weight_decay=weight_decay, betas=(0.9, 0.99), fused=True
        )
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, lr, total_steps=steps + 1, pct_start=0.1)

    def step(self, loss: Tensor) -> None:
        """Do one optimiser step."""
        self.optimizer.zero_grad()
        loss.backward()
        _average_gradients(self.model, self.world)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()


def _augment(x_B3HW: Tensor, generator: torch.Generator, *, captioned: bool, shift: int = 2) -> Tensor:
    """Shift images at random. If `captioned` is false, also mirror the images and permute their colour channels.

    A caption may name a colour, or the left or right side, so an image with a caption is only shifted.
    """
    b, size = len(x_B3HW), x_B3HW.shape[-1]
    x, channels = x_B3HW, torch.arange(3).expand(b, 3)
    if not captioned:
        flip = torch.rand(b, 1, 1, 1, generator=generator) < 0.5
        x = torch.where(flip, x_B3HW.flip(-1), x_B3HW)
        channels = torch.rand(b, 3, generator=generator).argsort(1)
    padded = F.pad(x, [shift] * 4, mode="replicate")
    dy, dx = torch.randint(2 * shift + 1, (2, b), generator=generator)
    grid = torch.arange(size)
    rows, columns = (dy[:, None] + grid)[:, None, :, None], (dx[:, None] + grid)[:, None, None, :]
    return padded[torch.arange(b)[:, None, None, None], channels[:, :, None, None], rows, columns]


def _warp(x_B3HW: Tensor, generator: torch.Generator) -> Tensor:
    """Shift, rotate and scale images a little, so that the small CLIP does not memorise positions."""
    b = len(x_B3HW)
    u_4b = torch.rand(4, b, generator=generator) * 2 - 1
    turn, scale = 0.15 * u_4b[0], 1 + 0.15 * u_4b[1]
    cosine, sine = scale * turn.cos(), scale * turn.sin()
    theta = torch.stack([cosine, -sine, 0.1 * u_4b[2], sine, cosine, 0.1 * u_4b[3]], 1)
    grid = F.affine_grid(theta.view(b, 2, 3), list(x_B3HW.shape), align_corners=False)
    return F.grid_sample(x_B3HW, grid, padding_mode="border", align_corners=False)


def _train_clip(
    x_M3HW: Tensor, captions: Sequence[str], tokenizer: CLIPTokenizer, config: MiniatureConfig, world: World
) -> CLIPModel:
    """Train a small CLIP from scratch. Two images with equal captions are not negative examples for each other.

    Every process gathers the embeddings of the whole batch, with gradients, and computes the same loss.
    """
    from transformers import CLIPConfig, CLIPModel

    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    tower = {"num_attention_heads": 4, "projection_dim": 64}
    clip = CLIPModel(
        CLIPConfig(
            text_config={
                **tower,
                **ids,
                "pad_token_id": tokenizer.pad_token_id,
                "vocab_size": len(tokenizer),
                "hidden_size": 64,
                "intermediate_size": 128,
                "num_hidden_layers": 2,
                "max_position_embeddings": MAX_TOKENS,
            },
            vision_config={
                **tower,
                "hidden_size": 96,
                "intermediate_size": 192,
                "num_hidden_layers": 3,
                "image_size": config.size,
                "patch_size": config.size // 8,
            },
            projection_dim=64,
        )
    )
    mean, std = _clip_statistics()
    tokens = _tokenize(tokenizer, captions)
    alike = torch.tensor([[a == b for b in captions] for a in captions])
    training = _Training(clip, 1.5e-3, config.clip_steps, world, weight_decay=0.05)
    batches = _batches(len(x_M3HW), config.batch_size, config.clip_steps, config.seed + 1, world)
    with progress("miniature CLIP", config.clip_steps, enabled=world.first) as advance:
        for rows, own, generator in batches:
            pixels = (_warp(x_M3HW[rows], generator) / 2 + 0.5 - mean) / std
            out = clip(input_ids=tokens[rows[own]], pixel_values=pixels[own])
            images, texts = gather_rows(out.image_embeds), gather_rows(out.text_embeds)
            logits = clip.logit_scale.exp() * images @ texts.T
            target = alike[rows][:, rows].float()
            target /= target.sum(1, keepdim=True)
            loss = F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)
            training.step(loss)
            advance(1, note=f"loss {loss.item():.3f}")
    return clip.eval()


def _clip_statistics() -> tuple[Tensor, Tensor]:
    from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

    return torch.tensor(OPENAI_CLIP_MEAN)[:, None, None], torch.tensor(OPENAI_CLIP_STD)[:, None, None]


def _train_vae(x_M3HW: Tensor, config: MiniatureConfig, world: World) -> AutoencoderKL:
    """Train a small autoencoder. Latents have 4 channels, and a quarter of the width and height of the images."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL(  # pyright: ignore[reportCallIssue] - the library's decorator hides the signature
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,  # pyright: ignore[reportArgumentType] - the library's annotation is too narrow
        up_block_types=("UpDecoderBlock2D",) * 3,  # pyright: ignore[reportArgumentType] - the library's annotation is too narrow
        block_out_channels=(16, 32, 48),  # pyright: ignore[reportArgumentType] - the library's annotation is too narrow
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=config.size,
    ).to(memory_format=torch.channels_last)
    with torch.no_grad():
        # Start with little noise on the latents: with strong noise, the autoencoder learns colours late or not at all.
        vae.quant_conv.bias[4:] -= 6.0
    training = _Training(vae, 3e-3, config.vae_steps, world)
    batches = _batches(len(x_M3HW), max(1, config.batch_size // 2), config.vae_steps, config.seed + 2, world)
    latent = (4, config.size // 4, config.size // 4)
    with progress("miniature autoencoder", config.vae_steps, enabled=world.first) as advance:
        for rows, own, generator in batches:
            x = _augment(x_M3HW[rows], generator, captioned=False)[own].contiguous(memory_format=torch.channels_last)
            noise = torch.randn(len(rows), *latent, generator=generator)[own]
            posterior = vae.encode(x).latent_dist
            y = vae.decode(posterior.mean + posterior.std * noise).sample
            # The L1 loss keeps edges sharp. The KL divergence only limits the scale of latents, as in Stable Diffusion.
            loss = F.l1_loss(y, x) + F.mse_loss(y, x) + 1e-6 * posterior.kl().mean()
            training.step(loss)
            advance(1, note=f"loss {loss.item():.4f}")
    vae.to(memory_format=torch.contiguous_format).eval()
    with torch.no_grad():
        latents = torch.cat([vae.encode(part).latent_dist.mean for part in x_M3HW.split(64)])
    vae.register_to_config(scaling_factor=1.0 / float(latents.std()))
    return vae


def _train_unet(
    x_M3HW: Tensor,
    captions: Sequence[str],
    tokenizer: CLIPTokenizer,
    clip: CLIPModel,
    vae: AutoencoderKL,
    config: MiniatureConfig,
    world: World,
) -> tuple[UNet2DConditionModel, Any]:
    """Train a small U-Net with the block types of Stable Diffusion 1.5.

    A tenth of the captions is replaced by the empty text, so that guidance can be used.
    """
    from diffusers import DDPMScheduler, PNDMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig

    text_config = clip.config.text_config
    assert isinstance(text_config, CLIPTextConfig)
    width = text_config.hidden_size
    unet = UNet2DConditionModel(  # pyright: ignore[reportCallIssue] - the library's decorator hides the signature
        sample_size=config.size // 4,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(32, 64),
        layers_per_block=1,
        norm_num_groups=16,
        cross_attention_dim=width,
        attention_head_dim=4,
    ).to(memory_format=torch.channels_last)
    # Use the scheduler settings of Stable Diffusion 1.5.
    scheduler = PNDMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        skip_prk_steps=True,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    noising = DDPMScheduler.from_config(scheduler.config)
    scale = vae.config.scaling_factor
    with torch.no_grad():
        # The autoencoder is not trained any more, so encode each image and seven augmented variants of it once, in
        # advance.
        generator = torch.Generator().manual_seed(config.seed + 3)
        views = [x_M3HW, *(_augment(x_M3HW, generator, captioned=True) for _ in range(7))]
        latents = torch.cat([vae.encode(p).latent_dist.mean * scale for view in views for p in view.split(64)])
        tokens = _tokenize(tokenizer, [*captions, ""])
        states = clip.text_model(tokens).last_hidden_state
    text = torch.arange(len(captions)).repeat(len(views))
    ema = {name: p.detach().clone() for name, p in unet.named_parameters()}
    training = _Training(unet, 2e-3, config.unet_steps, world)
    batches = _batches(len(latents), config.batch_size, config.unet_steps, config.seed + 4, world)
    with progress("miniature U-Net", config.unet_steps, enabled=world.first) as advance:
        for step, (rows, own, generator) in enumerate(batches):
            b = len(rows)
            noise = torch.randn(b, *latents.shape[1:], generator=generator)[own]
            times = torch.randint(1000, (b,), generator=generator)[own]
            dropped = (torch.rand(b, generator=generator) < 0.1)[own]
            rows = rows[own]
            condition = states[torch.where(dropped, len(captions), text[rows])]
            noisy = noising.add_noise(latents[rows], noise, times)  # pyright: ignore[reportArgumentType] - the library's annotation is too narrow
            guess = unet(noisy.contiguous(memory_format=torch.channels_last), times, condition).sample
            loss = F.mse_loss(guess, noise)
            training.step(loss)
            with torch.no_grad():
                decay = min(0.99, (1 + step) / (10 + step))
                torch._foreach_lerp_(list(ema.values()), list(unet.parameters()), 1 - decay)
            advance(1, note=f"loss {loss.item():.4f}")
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            parameter.copy_(ema[name])
    return unet.to(memory_format=torch.contiguous_format).eval(), scheduler


def make_miniature(
    pixels_MHW3: np.ndarray,
    captions: Sequence[str],
    out: str | Path,
    config: MiniatureConfig,
    world: World | None = None,
) -> Path:
    """Train the miniature models and write them to a folder, which appears only when all files are complete.

    Parameters
    ----------
    pixels_MHW3 : ndarray of uint8, shape (M, H, W, 3)
        Training images; H and W are equal to `config.size`.
    captions : sequence of str
        One caption for each image.
    out : str or Path
        Directory to create, with ``clip/`` (model, tokenizer, image processor) and ``stable-diffusion/`` (pipeline).
    config : MiniatureConfig
        Seed, numbers of steps, and image size.
    world : World, optional
        The processes that train together; every process must call this function. By default, this process trains alone.

    Returns
    -------
    Path
        The directory `out`.
    """
    from diffusers import StableDiffusionPipeline
    from transformers import CLIPTextConfig, CLIPTextModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    assert pixels_MHW3.shape[1:] == (config.size, config.size, 3) and len(captions) == len(pixels_MHW3)
    world = world or World()
    began = time.monotonic()
    seconds = {}
    with flush_subnormals(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        x_M3HW = to_model_range(pixels_MHW3)
        tokenizer = make_tokenizer(captions)
        clip = _train_clip(x_M3HW, captions, tokenizer, config, world)
        seconds["clip"] = time.monotonic() - began
        vae = _train_vae(x_M3HW, config, world)
        seconds["vae"] = time.monotonic() - began - seconds["clip"]
        unet, scheduler = _train_unet(x_M3HW, captions, tokenizer, clip, vae, config, world)
        seconds["unet"] = time.monotonic() - began - seconds["clip"] - seconds["vae"]
    if not world.first:
        return Path(out)
    text_config = clip.config.text_config
    assert isinstance(text_config, CLIPTextConfig)
    text_encoder = CLIPTextModel(text_config)
    text_encoder.load_state_dict(
        {k: v for k, v in clip.state_dict().items() if k.startswith("text_model.")}
        if any(k.startswith("text_model.") for k in text_encoder.state_dict())
        else clip.text_model.state_dict()
    )
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder.eval(),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,  # pyright: ignore[reportArgumentType] - the pipeline accepts None for optional components
        feature_extractor=None,  # pyright: ignore[reportArgumentType]
        image_encoder=None,  # pyright: ignore[reportArgumentType]
        requires_safety_checker=False,
    )
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": config.size}, crop_size={"height": config.size, "width": config.size}
    )
    with atomic_directory(out) as folder:
        pipeline.save_pretrained(folder / "stable-diffusion")
        clip.save_pretrained(folder / "clip")
        tokenizer.save_pretrained(folder / "clip")
        processor.save_pretrained(folder / "clip")
        write_json(
            folder / "miniature.json",
            {"config": to_dict(config), "digest": _digest(config), "seconds": seconds, "images": len(captions)},
        )
    return Path(out)


def _digest(config: MiniatureConfig) -> str:
    return digest_of({k: v for k, v in to_dict(config).items() if k not in ("output", "num_processes")})


def make(config: MiniatureConfig) -> int:
    """Train the miniature models on a dataset's training images, unless the same models exist already.

    Parameters
    ----------
    config : MiniatureConfig
        Config of the command.

    Returns
    -------
    int
        Exit code of the command.
    """
    quiet_libraries()
    accelerator = make_accelerator(num_processes=config.num_processes, device="cpu")
    table = ImageTable(open_paired(config.dataset, "train"))
    made = Path(config.output) / "miniature.json"
    if made.is_file():
        if read_json(made).get("digest") == _digest(config):
            accelerator.print(f"{config.output}: these miniature models exist already; nothing to do")
            return EXIT_DONE
        raise RequestError(
            f"{config.output}: holds miniature models of another config or version; choose another output, or delete "
            "this folder"
        )
    if Path(config.output).exists():
        raise RequestError(f"{config.output}: exists and does not hold miniature models; choose another output")
    # Wait until every process has checked the output folder, because the first process writes into this folder later.
    accelerator.wait_for_everyone()
    pixels_MHW3 = table.pixels(size=config.size)
    make_miniature(pixels_MHW3, table.captions, config.output, config, get_world(accelerator))
    accelerator.wait_for_everyone()
    accelerator.print(
        f"miniature models, trained on {len(table)} images -> {config.output}; next: dreamscale align "
        f"configs/demo/align.yaml --dataset {config.dataset} --target.model {Path(config.output) / 'clip'} --encoder "
        "ENCODER"
    )
    accelerator.end_training()
    return EXIT_DONE


main = command(MiniatureConfig, make, prog="dreamscale miniature", positionals=("dataset",), aliases={"-o": "output"})

if __name__ == "__main__":
    sys.exit(main())
