"""1 if the response is the integer that was asked for and nothing else, else 0."""

from __future__ import annotations

import re

from drpo_megatron.types import Prompt

_INTEGER = re.compile(r"[+-]?[0-9]+")


def arithmetic_reward(response: str, answer: str, prompt: Prompt) -> float:
    """The whole response, spaces around it aside, must be the integer: a search for the last number in it would reward
    a policy that lists candidates."""
    text = response.strip()
    return float(is_integer(text) and _same_integer(text, answer.strip()))


def is_integer(answer: str) -> bool:
    return _INTEGER.fullmatch(answer.strip()) is not None


def _same_integer(first: str, second: str) -> bool:
    """Compares digits as text: int() refuses numbers of more than 4300 digits, which a policy may well write."""
    return _canonical(first) == _canonical(second)


def _canonical(text: str) -> str:
    digits = text.lstrip("+-").lstrip("0") or "0"
    return "-" + digits if text.startswith("-") and digits != "0" else digits
