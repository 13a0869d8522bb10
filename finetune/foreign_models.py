"""Find and check models in the layouts of diffusers and transformers, before these libraries load them.

The folder of a model holds configs (JSON) and weights (safetensors), and can come from anybody. The checks of this
module refuse configs of networks that would be far larger than the weight files, and configs that would load code or
pickled weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data_sharding.common.errors import RequestError, one_line, show
from data_sharding.common.files import read_json
from data_sharding.common.untrusted import check_count, check_group, check_list
from pretrain.model.weights import check_network, measure_weights

MAX_SIDE = 2048
"""Largest width of an image in pixels that a model may read or generate."""
MAX_NOISE_STEPS = 100_000
"""Largest number of steps of a noise schedule."""
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
"""What a diffusion network can predict: the noise, the velocity or the image."""
_LOADS_CODE = frozenset(
    {"auto_map", "custom_pipelines", "quantization_config", "attn_implementation", "_attn_implementation"}
)
"""Keys of a config with which the libraries would load code of other packages or of the hub."""


def is_local(model: str | Path) -> bool:
    """Return True if a model is given as a directory, and False if the model is given as a hub id.

    Parameters
    ----------
    model : str or Path
        Directory or hub id from the config.

    Returns
    -------
    bool
        True if the model is a directory, False if the model is a hub id.

    Raises
    ------
    RequestError
        If the value looks like a path, but the directory does not exist.
    """
    text = str(model)
    looks_like_path = text.startswith((".", "/", "~")) or text.count("/") != 1
    if Path(text).is_dir():
        return True
    if looks_like_path:
        raise RequestError(f"{text}: no such directory, and not a hub id ('owner/name') either")
    return False


def read_model_config(path: Path) -> dict[str, Any]:
    """Read a JSON file of a model, and refuse keys with which the libraries would load code.

    Raises
    ------
    RequestError
        If the file is missing or damaged, or has a key that would load code.
    """
    values = check_group(read_json(path), str(path))
    groups: list[Any] = [values]
    while groups:
        group = groups.pop()
        for key, value in group.items():
            if key in _LOADS_CODE and value is not None:
                raise RequestError(
                    f"{path}: the key '{key}' would load code that is not part of the model; remove the key, or choose "
                    "another model"
                )
            if isinstance(value, dict):
                groups.append(value)
    return values


def check_diffusers_model(model_class: Any, folder: Path) -> dict[str, Any]:
    """Check that the config of a diffusers network does not describe a larger network than the weight file contains.

    Parameters
    ----------
    model_class : type
        Class of the network.
    folder : Path
        Folder with config.json and safetensors files.

    Returns
    -------
    dict
        The values of config.json.

    Raises
    ------
    RequestError
        If a file is missing or damaged, or if config.json describes a larger network than the weights.
    """
    values = read_model_config(folder / "config.json")
    size = measure_weights(_weights_of(folder))
    check_network(lambda: model_class.from_config(values), size, folder / "config.json")
    return values


def check_transformers_model(model_class: Any, folder: Path) -> None:
    """Check the config and the weights of a transformers network as `check_diffusers_model` does."""
    read_model_config(folder / "config.json")
    size = measure_weights(_weights_of(folder))
    check_network(
        lambda: model_class(model_class.config_class.from_pretrained(str(folder), local_files_only=True)),
        size,
        folder / "config.json",
    )


def check_noise_schedule(path: Path) -> None:
    """Check a scheduler's config, before the scheduler makes tables with one entry per step.

    Raises
    ------
    RequestError
        If the number of steps is too large, or if the kind of prediction is unknown.
    """
    values = read_model_config(path)
    steps = values.get("num_train_timesteps", 1000)
    check_count(steps, str(path), "num_train_timesteps", least=1, most=MAX_NOISE_STEPS)
    if (kind := values.get("prediction_type", "epsilon")) not in PREDICTION_TYPES:
        raise RequestError(
            f"{path}: the prediction_type '{show(kind)}' is not one of {', '.join(PREDICTION_TYPES)}; choose another "
            "model"
        )
    if values.get("trained_betas") is not None:
        betas = check_list(values["trained_betas"], str(path), "trained_betas")
        check_count(len(betas), str(path), "the number of trained_betas", least=steps, most=steps)


def _weights_of(folder: Path) -> list[Path]:
    found = sorted(folder.glob("*.safetensors"))
    if not found:
        raise RequestError(
            f"{folder}: has no weights in a .safetensors file; other files of weights can hold code and are not read"
        )
    return found


def load_with_library(load: Any, name: str | Path, what: str) -> Any:
    """Call a library function that loads a model, and turn every error into a `RequestError` of one line.

    Parameters
    ----------
    load : callable
        Function that is called without arguments.
    name : str or Path
        Name of the model, for the error message.
    what : str
        Kind of the model, for the error message.

    Returns
    -------
    Any
        The result of `load`.

    Raises
    ------
    RequestError
        If the function raises an error of any type, because libraries have no common error type for damaged files.
    """
    try:
        return load()
    except RequestError:
        raise
    except Exception as error:
        raise RequestError(f"{name}: cannot be loaded as {what} ({show(one_line(error), 200)})") from None
