"""1 if math-verify finds an expression in the response that equals the answer, else 0."""

from __future__ import annotations

import math_verify

from drpo_megatron.types import Prompt


def math_reward(response: str, answer: str, prompt: Prompt) -> float:
    """Parse both texts (LaTeX, boxed, plain numbers and expressions) and compare them symbolically.

    math-verify's own time limits are off: they are alarm signals, which only a main thread gets, and which do not
    interrupt all of sympy. The process that calls this is killed instead (`worker.py`).
    """
    gold = math_verify.parse(_delimited(answer), parsing_timeout=None)
    given = math_verify.parse(response, parsing_timeout=None)
    return float(math_verify.verify(gold, given, timeout_seconds=None))


def _delimited(answer: str) -> str:
    """math-verify reads LaTeX only between delimiters; data files hold answers without."""
    return answer if "$" in answer or "\\boxed" in answer else f"${answer}$"
