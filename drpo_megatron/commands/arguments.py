"""Types of command-line values, all with bounds: `type=whole(1)`, `type=real(0.1, 3600)`, `type=size`."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable

MOST = 2**31 - 1
_UNITS = {"": 1, "G": 2**30, "GB": 2**30, "GIB": 2**30, "M": 2**20, "MB": 2**20, "MIB": 2**20}


def whole(low: int, high: int = MOST) -> Callable[[str], int]:
    """An integer within [low, high]."""

    def parse(text: str) -> int:
        if not re.fullmatch(r"\s*[+-]?\d{1,18}\s*", text, re.ASCII) or not low <= int(text) <= high:
            limit = f"at least {low}" if high == MOST else f"within {low} ... {high}"
            raise argparse.ArgumentTypeError(f"{_short(text)} is no whole number {limit}")
        return int(text)

    return parse


def real(low: float, high: float) -> Callable[[str], float]:
    """A number within [low, high]."""

    def parse(text: str) -> float:
        try:
            value = float(text) if text.isascii() else math.nan
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{_short(text)} is no number within {low:g} ... {high:g}")
        return value

    return parse


def whole_list(low: int, high: int = MOST) -> Callable[[str], list[int]]:
    """Integers between commas, each once."""

    def parse(text: str) -> list[int]:
        numbers = [whole(low, high)(part) for part in text.split(",")]
        if twice := sorted({number for number in numbers if numbers.count(number) > 1}):
            raise argparse.ArgumentTypeError(f"{twice[0]} stands in {_short(text)} more than once")
        return numbers

    return parse


def memory_size(text: str) -> int:
    """Bytes of `80GB`, GB being 2^30 bytes."""
    return _size(text, _UNITS, "80GB")


def decimal_size(text: str) -> int:
    """Bytes of `5GB`, GB being 10^9 bytes, as disks have them."""
    return _size(text, {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}, "5GB or 500MB")


def slurm_time(text: str) -> str:
    """A time limit as sbatch takes it: minutes, MM:SS, HH:MM:SS, D-HH, D-HH:MM, D-HH:MM:SS, or UNLIMITED."""
    if re.fullmatch(
        r"\d{1,6}(:\d\d?){0,2}|\d{1,4}-\d\d?(:\d\d?){0,2}|unlimited|infinite", text, re.ASCII | re.IGNORECASE
    ):
        return text
    raise argparse.ArgumentTypeError(f"{_short(text)} is no time limit; use HH:MM:SS, D-HH:MM:SS, minutes or UNLIMITED")


def _size(text: str, units: dict[str, int], example: str) -> int:
    match = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,15})?)\s*([A-Za-z]*)\s*", text, re.ASCII)
    num_bytes = int(float(match[1]) * units[match[2].upper()]) if match and match[2].upper() in units else 0
    if not 0 < num_bytes < 2**60:
        raise argparse.ArgumentTypeError(f"{_short(text)} is not a size such as {example}")
    return num_bytes


def _short(text: str) -> str:
    return ascii(text if len(text) <= 60 else f"{text[:60]}...")
