"""Answers as people write them, rewritten so that math-verify reads what they mean.

Gold answers of data sets and the contents of a response's boxes go through `plain`; what is known to be read wrongly
otherwise (math-verify 0.9): `\\$5` is nothing, `1e-5` is -5 + e, `3 1/2` is 2, `5 000` is 0, `5,000 dollars` is {0, 5}, `Yes`
is the product of e, s and y.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

_SIGNS = {
    "−": "-", "–": "-", "—": "-", "×": r"\times ", "·": r"\cdot ", "÷": r"\div ", "π": r"\pi ", "∞": r"\infty ",
    "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "±": r"\pm ", "°": r"^\circ ", "∪": r"\cup ", "∩": r"\cap ",
    "∈": r"\in ", "∅": r"\emptyset ", "²": "^2", "³": "^3", "½": r"\frac{1}{2}", "⅓": r"\frac{1}{3}",
    "⅔": r"\frac{2}{3}", "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}", "≈": "", "\u00a0": " ", "\u2009": " ", "\u202f": " ",
}  # fmt: skip
_ROOT = re.compile(r"√\s*(\d+|[A-Za-z]|\([^()]*\)|\{[^{}]*\})")
_CURRENCY = re.compile(r"\\\$|\\(?:pounds|euro)\b|[€£¥]")
_SCIENTIFIC = re.compile(r"(?<![\w.}])(\d+(?:\.\d*)?|\.\d+)[eE]([+-]?\d+)(?![\w.{^])")
_TINY = re.compile(r"(?<![\d.\w])0?\.(0{3,}\d*[1-9])0*(?![\d.])")
"""math-verify rounds decimals to 6 places, so that 1e-7 would be 2e-7 and 0."""
_GROUPED = re.compile(r"(?<![\d.])\d{1,3}(?:(?:\s*\\[,!;:]\s*|\s|,\\!\s*|\{,\}|~)\d{3})+(?!\d)")
_MIXED = re.compile(
    r"(?<![\d/.^_{}])(\d+)\s*(?:\\[dt]?frac\s*(?:\{(\d+)\}\s*\{(\d+)\}|(\d)\s*(\d)(?!\d))|(?<=\s)(\d+)\s*/\s*(\d+)(?![\d/.]))"
)
_PERCENT = re.compile(r"(\\frac\{\d+\}\{\d+\})\s*\\?%")
_LEADING = re.compile(
    r"^(?:(?:the\s+)?(?:final\s+)?answers?(?:\s+is\b|\s+are\b)?\s*[:=]?|approximately|approx\.?|about|around|\\approx)\s+",
    re.IGNORECASE,
)
_DELIMITERS = re.compile(r"^(?:\$\$(.*)\$\$|\$([^$]*)\$|\\\((.*)\\\)|\\\[(.*)\\\])$", re.DOTALL)
_NUMBER_AND_WORDS = re.compile(r"([-+]?(?:\d[\d,]*(?:\.\d+)?|\.\d+|\d+\s*/\s*\d+))\s+([A-Za-z][A-Za-z .]+)")
_TEXT_NUMBER = re.compile(r"\\text\s*\{\s*([-+]?[\d.][^{}]*)\}")
_NOT_UNITS = re.compile(r"\b(?:percent|or|and|pi|am|pm|a\.m|p\.m|to|mod)\b", re.IGNORECASE)
_SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_CLOCK = re.compile(r"(\d{1,2}:\d\d)\s*(?:\\text\{\s*)?([ap])\.?\s*m\.?\s*\}?", re.IGNORECASE)
_WORDS = re.compile(r"[A-Za-z][A-Za-z' .,-]*(?:\s\d+)?")
_FUNCTIONS = {"sin", "cos", "tan", "cot", "sec", "log", "exp", "max", "min", "gcd", "lcm", "det", "mod", "sqrt", "inf"}
_SHORT_WORDS = {"yes", "no", "odd", "dne"}
_CHOICE = re.compile(
    r"(?:\\(?:text|textbf|mathrm|mathbf|rm|bf|textit)\s*\{)?\s*\(?\s*([A-Z])\s*\)\s*\}?(?:\\ |\\quad|[~:.\s])*(.*)",
    re.DOTALL,
)
_GSM8K = "####"


def final_answer(gold: str) -> str:
    """What a solution ends with: GSM8K's text after `####`, MATH's last box; any other text as it is."""
    if _GSM8K in gold:
        gold = gold.rpartition(_GSM8K)[2]
    boxes = list(_boxes(gold))
    return gold[slice(*boxes[-1])] if boxes else gold


def plain(text: str) -> str:
    """An answer alone, without delimiters: signs, currencies, thousands, mixed numbers, units and words as LaTeX has them."""
    text = text.strip().rstrip(".") if text.strip().count(".") == 1 and text.strip().endswith(".") else text.strip()
    if match := _DELIMITERS.match(text):
        text = next(group for group in match.groups() if group is not None).strip()
    if match := _TEXT_NUMBER.fullmatch(text):
        text = match[1]
    text = _ROOT.sub(lambda m: rf"\sqrt{{{m[1].strip('(){}')}}}", text)
    for sign, latex in _SIGNS.items():
        text = text.replace(sign, latex)
    text = without_pitfalls(_LEADING.sub("", text.strip())).strip()
    if text.startswith("$") and "$" not in text[1:]:
        text = text[1:].strip()
    text = _GROUPED.sub(lambda m: re.sub(r"\D", "", m[0]), text)
    text = _PERCENT.sub(r"\1\\cdot\\frac{1}{100}", _MIXED.sub(_improper, text))
    if match := _CLOCK.fullmatch(text):
        return rf"\text{{{match[1]} {match[2].lower()}m}}"
    if match := _NUMBER_AND_WORDS.fullmatch(text):
        return _with_unit(match[1], match[2], text)
    return rf"\text{{{text}}}" if _is_words(text) else text


def without_pitfalls(text: str) -> str:
    """What can be said of any text, prose around it included."""
    text = _SCIENTIFIC.sub(lambda m: rf"{m[1]} \times 10^{{{int(m[2])}}}", _CURRENCY.sub("", text))
    return _TINY.sub(lambda m: rf"{int(m[1])} \times 10^{{-{len(m[1])}}}", text)


def plain_boxes(response: str) -> str:
    """The response, with the content of every box as `plain` writes it."""
    pieces, end = [], 0
    for begin, stop in _boxes(response):
        pieces += [without_pitfalls(response[end:begin]), plain(response[begin:stop])]
        end = stop
    return "".join([*pieces, without_pitfalls(response[end:])])


def last_box(text: str) -> str | None:
    boxes = list(_boxes(text))
    return text[slice(*boxes[-1])] if boxes else None


def choice(text: str) -> tuple[str | None, str]:
    r"""`\textbf{(C)}\ 36` -> (C, 36); `(C)` -> (C, ""); anything else -> (None, the text)."""
    match = _CHOICE.fullmatch(text.strip())
    return (match[1], match[2].strip()) if match else (None, text)


def _boxes(text: str) -> Iterator[tuple[int, int]]:
    """Begin and end of the content of every box that is closed and in no other."""
    place = 0
    while (found := text.find("\\boxed{", place)) >= 0:
        begin = place = found + len("\\boxed{")
        depth = 1
        while place < len(text) and depth:
            depth += {"{": 1, "}": -1}.get(text[place], 0) if text[place - 1] != "\\" else 0
            place += 1
        if not depth:
            yield begin, place - 1


def _improper(match: re.Match[str]) -> str:
    whole, *parts = match.groups()
    above, below = (int(part) for part in parts if part is not None)
    return rf"\frac{{{int(whole) * below + above}}}{{{below}}}" if below else match[0]


def _with_unit(number: str, words: str, text: str) -> str:
    first = words.split()[0].lower()
    if first in _SCALES:
        return rf"{number.replace(',', '')} \times 10^{{{_SCALES[first]}}}"
    return text if _NOT_UNITS.search(words) else number


def _is_words(text: str) -> bool:
    """Words, not a product of variables: capitalised, of four letters or more, or several."""
    if not _WORDS.fullmatch(text) or text.lower().split()[0] in _FUNCTIONS:
        return False
    first, *others = text.split()
    if first.lower() in _SHORT_WORDS:
        return True
    if "," in text and all(len(word.strip(",")) == 1 for word in (first, *others)):
        return False
    is_word = len(first) >= 4 or (len(first) == 3 and first[0].isupper() and first[1:].islower())
    return is_word or (bool(others) and any(len(word) >= 4 for word in others))
