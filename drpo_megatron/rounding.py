"""How far apart numbers may be that would be equal, had they been computed without rounding."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_DOUBLE, _SINGLE = 2.0**-43, 2.0**-20
"""Over the larger of 1 and the size of the numbers.

A sum of n terms, added one after the other, is off by at most n u times the sum of their sizes. Doubles: u = 2^-53 and up
to n = 2^10 terms. Single precision comes from arrays and tensors, whose sums are made pairwise, off by at most log2(n) u:
u = 2^-24, and 2^4 for up to 2^16 terms. The floor of 1 is for terms that cancel: 0.1 + 0.2 - 0.3 is 5.6e-17, and not 0.
"""


def tolerance(numbers: Sequence[float]) -> float:
    """Of rewards, say. Whole numbers are exact; what are all numbers of single precision is taken to be computed in it."""
    if all(float(number).is_integer() for number in numbers):
        return 0.0
    scale = max(1.0, *(abs(number) for number in numbers))
    with np.errstate(over="ignore"):  # Beyond its range is infinity, which is another number.
        is_single = all(float(np.float32(number)) == number for number in numbers)
    return (_SINGLE if is_single else _DOUBLE) * scale
