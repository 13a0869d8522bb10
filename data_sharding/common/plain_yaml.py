"""Read untrusted YAML. Only plain values are allowed, and short files that expand to a huge value are refused."""

from __future__ import annotations

from typing import Any

MAX_YAML = 2**20
"""Largest size of a YAML file in bytes. PyYAML needs a few seconds for a file of this size."""
MAX_YAML_DEPTH = 50
"""Largest depth of nested lists and mappings in a YAML file."""
MAX_YAML_VALUES = 200_000
"""Largest number of values in a YAML file. A value is counted again each time that an alias repeats it."""


def check_yaml(text: str | bytes) -> None:
    """Refuse YAML that expands to a huge or endless value.

    Parameters
    ----------
    text : str or bytes
        The YAML text.

    Raises
    ------
    ValueError
        If the text is longer than `MAX_YAML`, if it expands to more than `MAX_YAML_VALUES` values, if an alias
        (``*name``) contains itself, or if the nesting is deeper than `MAX_YAML_DEPTH`.
    yaml.YAMLError
        If the text is not YAML.
    """
    import yaml

    if len(text) > MAX_YAML:
        raise ValueError(f"longer than {MAX_YAML // 2**20} MiB")
    depth = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_YAML_DEPTH:
            raise ValueError("its lists and keys are nested too deeply")
    _measure(yaml.compose(text, yaml.SafeLoader), {})


def _measure(node: Any, known: dict[int, tuple[int, int]]) -> tuple[int, int]:
    """Return the number of values below a YAML node, including repetitions by aliases, and the depth of the nesting."""
    if node is None or isinstance(node.value, str):
        return 1, 0
    if id(node) not in known:
        known[id(node)] = 0, 0
        parts = node.value if node.id == "sequence" else [part for pair in node.value for part in pair]
        found = [_measure(part, known) for part in parts]
        count, depth = 1 + sum(count for count, _ in found), 1 + max((depth for _, depth in found), default=0)
        if count > MAX_YAML_VALUES or depth > MAX_YAML_DEPTH:
            raise ValueError(f"its aliases expand to more than {MAX_YAML_VALUES} values, or are nested too deeply")
        known[id(node)] = count, depth
    if known[id(node)] == (0, 0):
        raise ValueError("an alias refers to a list or mapping that contains the alias")
    return known[id(node)]


def parse_yaml(text: str | bytes) -> Any:
    """Check a YAML text with `check_yaml`, and parse it; only plain values (no Python objects) are allowed.

    Parameters
    ----------
    text : str or bytes
        The YAML text.

    Returns
    -------
    Any
        The value.

    Raises
    ------
    ValueError
        If `check_yaml` refuses the text.
    yaml.YAMLError
        If the text is not YAML of plain values.
    """
    import yaml

    check_yaml(text)
    return yaml.safe_load(text)
