"""Detects block designs: finds out from the order of the trials whether each category was shown in one block.

In a block design, all trials of one category follow one another. So the time of a trial reveals its category, and a
classifier can be correct without using the response of the brain.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence

import numpy as np

from data_sharding.corpora.base import ADAPTERS, CorpusConfig
from data_sharding.corpora.item import Item

FEWEST_TRIALS = 20
"""The order of the trials is called unknown if a corpus has fewer trials than this."""
SURE_SIGMA = 5.0
"""If the number of repeats is more than this many standard deviations above the number expected in a random order, the
order is not random. (A repeat is a trial with the same category as the previous trial.)"""
CHANCE_SIGMA = 3.0
"""If the number of repeats is less than this many standard deviations above the number expected in a random order, the
order is called random."""
LONGER = 2.0
"""In a block design, the mean number of consecutive trials with the same category is more than this many times the mean
number in a random order."""


def measure_order(items: Sequence[Item]) -> tuple[str, str]:
    r"""Decide whether the trials were shown in blocks or in random order.

    Parameters
    ----------
    items : sequence of Item
        Recordings of a corpus, with their trials.

    Returns
    -------
    design : str
        block, random or unknown.
    evidence : str
        A sentence with the measured lengths of runs, for reports.

    Notes
    -----
    A repeat is a trial with the same category as the previous trial. If :math:`n_k` of :math:`n` trials have category
    k, a random order has :math:`\sum n_k (n_k - 1) / n` repeats on average. The variance of this number is estimated as
    if the category of each trial were drawn independently. A run is a sequence of consecutive trials with the same
    category. Its mean length is :math:`n / (n - repeats)`.
    """
    repeats, expected, variance, trials, recordings = 0, 0.0, 0.0, 0, 0
    labels: set[str] = set()
    single = True
    for item in items:
        shown = sorted(item.trials or (), key=lambda trial: (trial.onset, trial.segment or 0))
        if len(shown) < 2:
            continue
        names = [trial.label_name for trial in shown]
        labels |= set(names)
        counts, n = np.array(list(Counter(names).values())), len(names)
        chance = float((counts * (counts - 1)).sum()) / n
        repeats += sum(a == b for a, b in itertools.pairwise(names))
        expected += chance
        variance += chance * (1 - chance / (n - 1))
        trials, recordings, single = trials + n, recordings + 1, single and len(counts) == 1
    if not trials:
        return "unknown", "no trials: continuous recordings"
    what = f"{trials} trials of {len(labels)} categories in {recordings} recordings"
    if trials < FEWEST_TRIALS or len(labels) < 2:
        return "unknown", f"{what} are too few to decide about their order"
    if single:
        return (
            "block",
            f"each recording contains only one category ({what}), so the time or the subject reveals the category",
        )
    run, by_chance = trials / (trials - repeats), trials / (trials - expected)
    sigma = (repeats - expected) / max(variance, 1e-9) ** 0.5
    text = f"runs of one category are {run:.1f} trials long on average, {by_chance:.1f} in a random order ({what})"
    if sigma > SURE_SIGMA and run > LONGER * by_chance:
        return "block", f"{text}; the time of a trial reveals its category"
    if sigma < CHANCE_SIGMA:
        return "random", text
    return "unknown", f"{text}: this is longer than in a random order, but too short for clear blocks"


def describe_design(config: CorpusConfig, items: Sequence[Item]) -> dict[str, str]:
    """Describe the order in which the categories of a corpus were shown.

    Parameters
    ----------
    config : CorpusConfig
        Config of the corpus.
    items : sequence of Item
        The recordings that `list_items` returned for this corpus.

    Returns
    -------
    dict
        Dictionary with the keys name, kind, design (block, random or unknown), and evidence (a sentence).

    References
    ----------
    Li et al., The perils and pitfalls of block design for EEG classification experiments, TPAMI 43 (2021).
    """
    design, evidence = ADAPTERS[config.kind].design(config, measure_order(items))
    names = sorted({item.corpus for item in items})
    return {"name": config.name or ", ".join(names), "kind": config.kind, "design": design, "evidence": evidence}
