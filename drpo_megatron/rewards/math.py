"""1 if math-verify finds an expression in the response that equals the answer, else 0."""

from __future__ import annotations

import re

import math_verify

from drpo_megatron.rewards.math_text import choice, final_answer, last_box, plain, plain_boxes
from drpo_megatron.types import Prompt

_PLAIN_NUMBER = re.compile(r"[-+]?(?:\d{1,18}|\d{1,15}\.\d{1,15})")
_LETTER = re.compile(r"[A-J]|\\(?:text|textbf|mathrm|mathbf)\{[A-J]\}")
_NOTHING = {"", "nan", "null", "n/a", "-", "?"}


def math_reward(response: str, answer: str, prompt: Prompt) -> float:
    """Parse both texts (LaTeX, boxed, plain numbers and expressions) and compare them symbolically.

    Of multiple choice, `(C) 36`, as much is compared as both sides give: the letter, the value, or both.

    math-verify's own time limits are off: they are alarm signals, which only a main thread gets, and which do not
    interrupt all of sympy. The process that calls this is killed instead (`pool.py`).
    """
    gold = final_answer(answer)
    letter, value = choice(gold)
    if letter is None or not value:
        is_letter = letter is not None or _LETTER.fullmatch(gold.strip()) is not None
        return float(_equal(gold, _given(response, letter_only=is_letter)))
    given_letter, given_value = choice(last_box(response) or "")
    if given_letter is not None:
        return float(given_letter == letter and (not given_value or _equal(value, rf"\boxed{{{plain(given_value)}}}")))
    return float(_equal(value, _given(response, False)) or _equal(letter, _given(response, True)))


def readable(response: str, answer: str, prompt: Prompt) -> float:
    """1 if the answer can be read: it is an expression or words, and would be right in a box. For data files."""
    gold = final_answer(answer)
    if _PLAIN_NUMBER.fullmatch(gold.strip()):
        return 1.0
    if gold.strip().lower() in _NOTHING or not any(not isinstance(found, str) for found in _parsed(_value_of(gold))):
        return 0.0
    return math_reward(rf"\boxed{{{gold.strip()}}}", answer, prompt)


def _given(response: str, letter_only: bool) -> str:
    """The response as math-verify should read it. A box that holds a choice and its value counts as one of both."""
    box = last_box(response)
    if box is not None:
        letter, value = choice(box)
        if letter is not None and value:
            return rf"\boxed{{{letter if letter_only else plain(value)}}}"
    return plain_boxes(response)


def _value_of(gold: str) -> str:
    letter, value = choice(gold)
    return value if letter is not None and value else gold


def _equal(gold: str, given: str) -> bool:
    return math_verify.verify(_parsed(gold), math_verify.parse(given, parsing_timeout=None), timeout_seconds=None)


def _parsed(gold: str) -> list[object]:
    """Between delimiters: math-verify reads LaTeX only there, and data files hold answers without."""
    text = plain(gold)
    return math_verify.parse(text if "$" in text else f"${text}$", parsing_timeout=None)
