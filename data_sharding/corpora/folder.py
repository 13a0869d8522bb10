"""Folders of recordings in the file formats of EEG makers, in any layout."""

from __future__ import annotations

import fnmatch
import re
from typing import Any

from data_sharding.common.errors import RequestError
from data_sharding.common.reason import Reason
from data_sharding.common.storage import AnyPath
from data_sharding.corpora.base import Adapter, CorpusConfig, register
from data_sharding.corpora.item import Item
from data_sharding.corpora.paths import check_folder, recording_key, relative_path, root_name
from data_sharding.formats.sniffing import Recording, find_recordings

INTRACRANIAL = re.compile(r"(?:^|[_\W])(ecog|ieeg|seeg)(?:$|[_\W])", re.IGNORECASE)
KEYS = frozenset({"exclude", "unit_factors", "subject_pattern", "intracranial"})
"""Keys of all corpora that consist of such files."""


def is_excluded(config: CorpusConfig, relative: str) -> bool:
    """Whether a path is to be ignored.

    Parameters
    ----------
    config : CorpusConfig
        The corpus.
    relative : str
        Path below its root.

    Returns
    -------
    bool
        True if it matches a pattern of 'exclude'.
    """
    return any(fnmatch.fnmatch(relative, pattern) for pattern in config.exclude)


def find_subject(config: CorpusConfig, relative: str, key: str) -> tuple[str, str]:
    """Find subject and session in the path of a recording.

    Parameters
    ----------
    config : CorpusConfig
        The corpus.
    relative : str
        Path below its root.
    key : str
        Key of the recording, which stands for the subject if the path names no subject.

    Returns
    -------
    subject, session : str
        The session may be empty.
    """
    if config.subject_pattern:
        match = re.search(config.subject_pattern, relative)
        if not match:
            return key, ""
        groups = match.groupdict()
        return groups["subject"], groups.get("session") or ""
    subject = re.search(r"(?:^|[/_])(sub-[A-Za-z0-9]+)", relative)
    session = re.search(r"(?:^|[/_])(ses-[A-Za-z0-9]+)", relative)
    return subject.group(1) if subject else key, session.group(1) if session else ""


def make_item(config: CorpusConfig, root: AnyPath, relative: str, recording: Recording, **more: Any) -> Item:
    """Make the item of a recording.

    Parameters
    ----------
    config : CorpusConfig
        The corpus.
    root : Path or UPath
        Its root.
    relative : str
        Path below it.
    recording : Recording
        The files.
    **more : Any
        Other fields of `Item`.

    Returns
    -------
    Item
        With everything that path and config say.
    """
    name = config.name or (relative.split("/")[0] if "/" in relative else root_name(root))
    key = recording_key(name, relative)
    subject, session = find_subject(config, relative, key)
    for pattern, factor in config.unit_factors.items():
        if fnmatch.fnmatch(relative, pattern):
            more["unit_factor"] = factor
    if not config.intracranial and INTRACRANIAL.search(relative):
        text = "the path says so; only scalp EEG is used (key 'intracranial' changes this)"
        more["reason"] = Reason("intracranial", text)
    values: dict[str, Any] = {"corpus": name, "subject": subject, "session": session}
    return Item(
        key=key,
        path=relative,
        recording=recording,
        line_freq=config.line_freq,
        trial_offset=config.trial_offset,
        **(values | more),
    )


def check_unit_factors(config: CorpusConfig, paths: list[str]) -> None:
    """Refuse unit factors that match no recording.

    Parameters
    ----------
    config : CorpusConfig
        The corpus.
    paths : list of str
        Paths of its recordings, below its root.

    Raises
    ------
    RequestError
        With the pattern.
    """
    for pattern in config.unit_factors:
        if not any(fnmatch.fnmatch(path, pattern) for path in paths):
            raise RequestError(f"corpora: unit_factors '{pattern}' matches no recording under {config.root}")


def find(config: CorpusConfig) -> tuple[AnyPath, list[tuple[str, Recording]]]:
    """Find the recordings of a corpus by the content of their files.

    Parameters
    ----------
    config : CorpusConfig
        The corpus.

    Returns
    -------
    root : Path or UPath
        Its root.
    found : list of (str, Recording)
        Path below the root and the recording, sorted.

    Raises
    ------
    RequestError
        If the folder does not exist or holds no recording.
    """
    root = check_folder(config.root, "corpora: root")
    found = [(relative_path(recording.path, root), recording) for recording in find_recordings(root)]
    found = [(relative, recording) for relative, recording in found if not is_excluded(config, relative)]
    if not found:
        raise RequestError(f"corpora: root '{root}': no recording found there; check the path and the key 'exclude'")
    check_unit_factors(config, [relative for relative, _ in found])
    return root, found


@register("folder")
class FolderCorpus(Adapter):
    """Continuous recordings, cut into windows."""

    keys = KEYS

    def items(self, config: CorpusConfig) -> list[Item]:
        """List all recordings under the root; see `Adapter.items`."""
        root, found = find(config)
        return [make_item(config, root, relative, recording) for relative, recording in found]
