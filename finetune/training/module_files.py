"""Save and load small modules as a folder with config.json and model.safetensors."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, nn

from data_sharding.common.errors import RequestError
from data_sharding.common.files import read_json, write_json
from data_sharding.common.typed_values import check_fields
from pretrain.model.weights import WEIGHTS, check_network, measure_weights, read_tensors, set_weights

M = TypeVar("M", bound=nn.Module)


def save_module(module: nn.Module, config: Any, folder: str | Path, kind: str) -> None:
    """Write a small module as config.json and model.safetensors.

    Parameters
    ----------
    module : Module
        Module to write. Floating-point weights are written in fp32.
    config : dataclass instance
        Config from which the module can be built again.
    folder : str or Path
        Directory to write; a missing directory is created.
    kind : str
        Name of the kind of module, which `load_module` checks.
    """
    from safetensors.torch import save_file

    def plain(value: Tensor) -> Tensor:
        value = value.detach().cpu().contiguous()
        return value.float() if value.is_floating_point() else value

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: plain(value) for name, value in module.state_dict().items()}, folder / WEIGHTS)
    write_json(folder / "config.json", {"kind": kind, **dataclasses.asdict(config)})


def load_module(module_class: type[M], config_class: type, folder: str | Path, kind: str) -> M:
    """Load a module that `save_module` wrote.

    Parameters
    ----------
    module_class : type
        Class of the module; its only argument is the config.
    config_class : type
        Dataclass of the module's config.
    folder : str or Path
        Directory to read.
    kind : str
        Expected kind of module.

    Returns
    -------
    Module
        The module in evaluation mode.

    Raises
    ------
    RequestError
        If a file is missing or damaged, the module is of another kind, or config.json does not fit the weights.
    """
    folder = Path(folder)
    values = read_json(folder / "config.json")
    if not isinstance(values, dict) or values.pop("kind", None) != kind:
        raise RequestError(f"{folder}: not a '{kind}' package; give the folder that Dreamscale wrote")
    values = check_fields(config_class, values, str(folder / "config.json"), least=0)
    check_network(
        lambda: module_class(config_class(**values)), measure_weights([folder / WEIGHTS]), folder / "config.json"
    )
    try:
        module = module_class(config_class(**values))
        set_weights(module, read_tensors(folder / WEIGHTS), folder / WEIGHTS, "config.json")
    except RequestError:
        raise
    except (TypeError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise RequestError(
            f"{folder}: config.json does not fit the weights ({reason}); train the model again"
        ) from None
    return module.eval()
