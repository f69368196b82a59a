"""Samples to figures. Pure.

Contestants are measured in turns, so that one sample of each belongs to the same moment of the machine: its
*round*. A sample is None where a contestant failed or was not measured. Differences and ratios are taken within a
round and only then reduced to their median: what disturbs the machine for a while disturbs both sides, and
mostly cancels out.
"""

import statistics
from collections.abc import Sequence

Samples = Sequence[float | None]


def median(samples: Samples) -> float | None:
    """Return the middle sample, or None when there is none."""
    present = [sample for sample in samples if sample is not None]
    return statistics.median(present) if present else None


def percentile(samples: Samples, fraction: float) -> float | None:
    """Return the smallest sample that at least `fraction` (0 to 1) of the samples do not exceed (nearest rank)."""
    present = sorted(sample for sample in samples if sample is not None)
    if not present:
        return None
    rank = -(-len(present) * fraction // 1)  # the ceiling
    return present[max(0, int(rank) - 1)]


def paired_ratio(samples: Samples, reference: Samples) -> float | None:
    """Return the median over the rounds of sample / reference; None without a round that has both."""
    return median([a / b for a, b in zip(samples, reference, strict=False) if a is not None and b])


def paired_difference(samples: Samples, reference: Samples) -> float | None:
    """Return the median over the rounds of sample - reference; None without a round that has both."""
    return median([a - b for a, b in zip(samples, reference, strict=False) if a is not None and b is not None])
