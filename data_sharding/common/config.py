"""Read command lines and YAML files into typed dataclasses, with jsonargparse."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

from data_sharding.common.errors import RequestError, one_line, run_main
from data_sharding.common.plain_yaml import MAX_YAML, check_yaml
from data_sharding.common.shipped import find_config
from data_sharding.common.untrusted import read_limited

T = TypeVar("T")


def parse_config(
    cls: type[T],
    argv: Sequence[str] | None,
    *,
    prog: str,
    positionals: Sequence[str] = (),
    aliases: Mapping[str, str] | None = None,
) -> T:
    """Read the config of a command into its dataclass.

    Parameters
    ----------
    cls : type
        A dataclass with keyword-only, typed fields, each with a docstring under it.
    argv : sequence of str or None
        The arguments; None stands for `sys.argv[1:]`.
    prog : str
        The command as the user types it, for help and messages.
    positionals : sequence of str
        For each positional argument (an argument without a key), the name of its field, or ``"config"`` if the argument
        is the path of a YAML file.
    aliases : mapping, optional
        Field name for each short flag, for example ``{"-o": "output"}``.

    Returns
    -------
    object
        An instance of `cls`. A value on the command line overrides the value in the YAML file.

    Raises
    ------
    RequestError
        If a key is unknown or missing, a value has the wrong type, or a file is missing. The message names the key.
    """
    from jsonargparse import ActionConfigFile, ArgumentParser, set_parsing_settings

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    flags = dict(aliases or {})
    words = list(sys.argv[1:] if argv is None else argv)
    words = [f"--{flags[word]}" if word in flags else word for word in words]
    lead: list[str] = []
    while words and not words[0].startswith("-") and len(lead) < 2 * len(positionals):
        lead += [f"--{positionals[len(lead) // 2]}", words.pop(0)]
    usage = " ".join(
        [
            prog,
            *("[CONFIG.yaml]" if name == "config" else name.upper() for name in positionals),
            *(f"[{short} {name.upper()}]" for short, name in flags.items()),
            "[--key value ...]",
        ]
    )
    if words and not words[0].startswith("-"):
        raise RequestError(f"{prog}: unexpected argument '{words[0]}'; usage: {usage}")
    words = lead + words
    parser = ArgumentParser(
        prog=prog,
        usage=usage,
        exit_on_error=False,
        allow_abbrev=False,
        description=one_line((cls.__doc__ or "").split("\n\n")[0]),
    )
    parser.add_argument("--config", action=ActionConfigFile, help="YAML file with any of the keys below.")
    parser.add_class_arguments(cls, nested_key=None, sub_configs=False)
    short_of = {name: short for short, name in flags.items()}
    for action in parser._actions:
        # The code above has already replaced each short flag in the arguments by its key. The parser gets the short
        # flags only to show them in the help text.
        if short := short_of.get(action.dest):
            action.option_strings = [short, *action.option_strings]
    files = []
    for position, word in enumerate(words):
        if word == "--config" and position + 1 < len(words):
            words[position + 1] = _check_config_file(words[position + 1])
            files.append(Path(words[position + 1]))
    try:
        namespace = parser.parse_args(words)
        built = parser.instantiate_classes(namespace)
        request = cls(**{field.name: getattr(built, field.name) for field in dataclasses.fields(cls)})  # type: ignore[arg-type]
    except RequestError:
        raise
    except Exception as error:
        # Errors of the parser, of YAML and of the config class have a cause that the user can correct.
        from data_sharding.common.config_errors import explain

        raise RequestError(explain(error, cls, files, words, flags)) from None
    # NumPy accepts no negative seeds, so check the seeds of all commands here.
    if (seed := getattr(request, "seed", 0)) < 0:
        raise RequestError(f"seed is {seed}; it must not be negative")
    return request


def _check_config_file(text: str) -> str:
    """Return the path of a config file; raise `RequestError` if the path is not a file."""
    path = find_config(text)
    if path.is_dir():
        inside = sorted(file.name for pattern in ("*.yaml", "*.yml") for file in path.glob(pattern))
        hint = f"give one of its files: {', '.join(inside[:5])}" if inside else "give a YAML file"
        raise RequestError(f"{text}: is a folder, not a config file; {hint}")
    if not path.is_file():
        raise RequestError(f"{text}: no such config file; 'dreamscale configs' lists the configs of the package")
    import yaml

    try:
        check_yaml(read_limited(path, MAX_YAML))
    except RequestError:
        raise
    except OSError as error:
        raise RequestError(f"{text}: cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeError):
        pass  # Text that is not YAML is refused later by the parser; the message names the line.
    except ValueError as error:
        raise RequestError(f"{text}: cannot be used ({error}); write the values without YAML aliases (*name)") from None
    return str(path)


class Command(Generic[T]):
    """A command: call it with arguments (default: `sys.argv[1:]`), and it returns an exit code.

    Parameters
    ----------
    config_class : type
        Class of the config, as in `parse_config`.
    body : callable
        Function that takes a config, does the work and returns the exit code. This function may raise `RequestError`
        and `StopRequested`.
    prog, positionals, aliases
        Passed to `parse_config`.
    """

    def __init__(
        self,
        config_class: type[T],
        body: Callable[[T], int],
        *,
        prog: str,
        positionals: Sequence[str],
        aliases: Mapping[str, str] | None,
    ) -> None:
        self.config_class, self.body = config_class, body
        self.prog, self.positionals, self.aliases = prog, positionals, aliases
        self.__doc__ = f"Run ``{prog}``; returns its exit code."

    def parse(self, words: Sequence[str]) -> T:
        """Read the arguments of the command.

        Parameters
        ----------
        words : sequence of str
            The arguments.

        Returns
        -------
        object
            The config.

        Raises
        ------
        RequestError
            If an argument is wrong.
        """
        # DeepSpeed's launcher adds the flag --local_rank. Remove this flag, because the environment variable LOCAL_RANK
        # contains the rank, too.
        words = [word for word in words if not word.startswith("--local_rank=")]
        return parse_config(
            self.config_class, words, prog=self.prog, positionals=self.positionals, aliases=self.aliases
        )

    def __call__(self, argv: list[str] | None = None) -> int:
        """Run the command."""
        return run_main(lambda words: self.body(self.parse(words)), argv)


def command(
    config_class: type[T],
    body: Callable[[T], int],
    *,
    prog: str,
    positionals: Sequence[str] = ("config",),
    aliases: Mapping[str, str] | None = None,
) -> Command[T]:
    """Make the function ``main(argv)`` that runs a command and returns its exit code.

    Parameters
    ----------
    config_class, body, prog, positionals, aliases
        As for `Command`.

    Returns
    -------
    Command
        The command.
    """
    return Command(config_class, body, prog=prog, positionals=positionals, aliases=aliases)


def to_dict(config: Any) -> dict[str, Any]:
    """Convert a config dataclass to nested dictionaries.

    Parameters
    ----------
    config : dataclass instance
        The config.

    Returns
    -------
    dict
        The config as dictionaries, lists and scalars; paths become strings.
    """

    def plain(value: Any) -> Any:
        if isinstance(value, Path):
            return str(value)
        if isinstance(value, Mapping):
            return {k: plain(v) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [plain(v) for v in value]
        return value

    return plain(dataclasses.asdict(config))


def to_yaml(config: Any) -> str:
    """Convert a config dataclass to YAML text, in the order of its fields.

    Parameters
    ----------
    config : dataclass instance
        The config.

    Returns
    -------
    str
        YAML text; `parse_config` reads an equal config from this text.
    """
    import yaml

    return yaml.safe_dump(to_dict(config), sort_keys=False)


def merge_configs(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Merge two nested configs into a new config.

    Parameters
    ----------
    base : mapping
        A config.
    over : mapping
        A config whose values replace the values of the same keys in `base`.

    Returns
    -------
    dict
        The merged config. If the value of a key is a mapping in both configs, these two mappings are merged, too.
    """
    merged = dict(base)
    for key, value in over.items():
        known = merged.get(key)
        if isinstance(value, Mapping) and isinstance(known, Mapping):
            value = merge_configs(known, value)
        merged[key] = value
    return merged
