"""Lines for the terminal about corpora whose recordings all have the same wrong unit."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from data_sharding.corpora import CorpusConfig
from data_sharding.corpora.base import ADAPTERS
from data_sharding.dataset.ledger import LedgerRow
from data_sharding.processing.survey import PLAUSIBLE_UV

TYPICAL_UV = 10.0
"""Robust amplitude of typical EEG between 1 and 40 Hz, in microvolts."""
FACTORS = {1e-9: "1.0e-9", 1e-6: "1.0e-6", 1e-3: "0.001", 1e3: "1000.0", 1e6: "1.0e+6", 1e9: "1.0e+9"}
"""Factors that correct a unit with a wrong prefix, and for each factor a text that YAML parses as a number."""


def find_factor(amplitude_uv: float) -> float | None:
    """Return the power of 1000 that scales an amplitude to a value typical for EEG; None if there is no such power."""
    if not 0 < amplitude_uv < math.inf:
        return None
    factor = 10.0 ** (3 * round(math.log10(TYPICAL_UV / amplitude_uv) / 3))
    near = next((known for known in FACTORS if math.isclose(known, factor, rel_tol=1e-6)), None)
    return near if near and PLAUSIBLE_UV[0] <= amplitude_uv * near <= PLAUSIBLE_UV[1] else None


def suggest_unit_factors(
    corpora: Sequence[CorpusConfig], corpus_of: Mapping[str, int], rows: Sequence[LedgerRow]
) -> list[str]:
    """Describe each corpus whose recordings all have amplitudes that are too large or too small by the same factor.

    Parameters
    ----------
    corpora : sequence of CorpusConfig
        The corpora of the job.
    corpus_of : mapping of str to int
        Dictionary from the key of each recording to the index of its corpus.
    rows : sequence of LedgerRow
        Rows of all recordings.

    Returns
    -------
    list of str
        One line for each corpus that needs a unit factor, with a suggested line for the config. The job itself does not
        apply the suggested factor.
    """
    out = []
    for number, corpus in enumerate(corpora):
        if corpus.unit_factors or "unit_factors" not in ADAPTERS[corpus.kind].keys:
            continue
        own = [row for row in rows if corpus_of.get(row.key) == number and row.unit and row.amplitude_uv]
        factors = {find_factor(row.amplitude_uv or 0.0) if row.category == "unit unknown" else 1.0 for row in own}
        if len(factors) != 1 or factors <= {None, 1.0}:
            continue
        factor = factors.pop() or 1.0
        size, times = ("large", 1 / factor) if factor < 1 else ("small", factor)
        amplitudes = sorted(row.amplitude_uv or 0.0 for row in own)
        out.append(
            f"corpora[{number}] '{corpus.root}': all {len(own)} recordings with a measured amplitude have values that "
            f"are about {times:,.0f} times too {size} (median {amplitudes[len(amplitudes) // 2]:.3g} microvolts). "
            "If the documentation of the corpus confirms this, add to the corpus: "
            f'unit_factors: {{"*": {FACTORS[factor]}}}. Nothing was changed.'
        )
    return out
