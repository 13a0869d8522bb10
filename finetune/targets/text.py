"""Compute the embeddings of captions or labels with the frozen text encoder of CLIP, and keep them in the cache.

Tensor shapes: M different images, P width of the embeddings.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_sharding.common.files import digest_of, sha256_file
from data_sharding.common.storage import AnyPath
from finetune.targets.cache import Job, load_features
from finetune.targets.digest import digest_weights, plain_config
from finetune.targets.models import TOKENIZER_FILES, load_text_model
from pretrain.runs.distributed import World


def embed_texts(
    texts: Sequence[str], name: str | Path, dataset: AnyPath, *, what: str, world: World | None = None
) -> Tensor:
    """Compute the embedding of texts with the text encoder of a CLIP model.

    Parameters
    ----------
    texts : sequence of str
        One text for each image of a split. Equal texts are embedded once.
    name : str or Path
        Directory of a CLIP model with its tokenizer, or its hub id, e.g. ``openai/clip-vit-large-patch14``.
    dataset : Path or UPath
        Folder of the dataset, beside which the embeddings are stored.
    what : str
        Name of the texts for messages, such as "train captions".
    world : World, optional
        The processes of the run and the device of the computation; all processes must call this function. By default,
        this process alone, on the CPU.

    Returns
    -------
    Tensor of float32, shape (M, P)
        Embeddings of unit length, on the CPU, in the space that images and texts share.

    Raises
    ------
    RequestError
        If the model is no CLIP model, has no tokenizer, or cannot be loaded.
    """
    world = world or World()
    model, tokenizer, folder = load_text_model(name)
    length = int(model.config.max_position_embeddings)
    different = sorted(set(texts))

    @torch.no_grad()
    def compute(rows: list[int]) -> Tensor:
        chosen = [different[row] for row in rows]
        words = tokenizer(chosen, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        ids = words.input_ids.to(world.device)
        embeds_BP = model.to(world.device)(input_ids=ids, attention_mask=words.attention_mask.to(world.device))
        return torch.nn.functional.normalize(embeds_BP.text_embeds.float(), dim=-1)

    key: dict[str, Any] = {
        "what": "embeddings of texts",
        "weights": digest_weights(model),
        "config": plain_config(model.config.to_dict()),
        "tokenizer": {file: sha256_file(folder / file) for file in TOKENIZER_FILES if (folder / file).is_file()},
        "texts": digest_of(different),
    }
    job = Job(
        what=f"embeddings of the {what} ({name})",
        key=key,
        rows=len(different),
        compute=compute,
        name_row=lambda row: f"the text '{different[row]}'",
    )
    row_of = {text: row for row, text in enumerate(different)}
    return load_features(job, dataset, world)[[row_of[text] for text in texts]]
