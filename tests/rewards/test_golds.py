"""Answers as DAPO, AIME, MATH, GSM8K and Numina write them, each with a right and a wrong response, judged by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from drpo_megatron.config.sections import ArithmeticReward, ImportedReward, MathReward
from drpo_megatron.orchestration.answers import unreadable_answers
from drpo_megatron.rewards.math import math_reward, readable
from drpo_megatron.rewards.math_text import choice, final_answer, plain
from drpo_megatron.types import Prompt

NOBODY = Prompt("p", (), "")

TABLE = [  # gold, right, wrong
    # plain numbers
    ("42", "42", "24"),
    ("-5", "-5", "5"),
    ("−5", "-5", "5"),
    ("007", "7", "70"),
    ("+5", "5", "-5"),
    ("3.0", "3", "3.1"),
    (".5", "\\frac12", "5"),
    ("1e-5", "10^{-5}", "-5 + e"),
    ("1e-05", "0.00001", "1e-06"),
    ("1.5e10", "15000000000", "1.5e9"),
    ("2E3", "2000", "2 \\times 3"),
    ("1e-7", "1e-7", "2e-7"),
    ("1e-7", "0.0000001", "0"),
    ("0.0000001", "10^{-7}", "0.0000002"),
    ("3×10^5", "300000", "30000"),
    ("1.5 \\times 10^{-3}", "1.5e-3", "1.5e3"),
    # thousands
    ("1,234", "1234", "234"),
    ("1,234,567.89", "1234567.89", "1234567"),
    ("1{,}234", "1{,}234", "1.234"),
    ("1\\,234", "1234", "235"),
    ("5 000", "5000", "0"),
    ("1 234 567", "1{,}234{,}567", "802"),
    ("11,\\! 111,\\! 111,\\! 100", "11111111100", "11"),
    ("12 \\; 345", "12345", "4140"),
    # money
    ("\\$5", "5", "50"),
    ("\\$32,\\!348", "32348", "\\$32"),
    ("\\$ 5.50", "5.5", "550"),
    ("$18.90", "\\$18.90", "18"),
    ("$1,234.50", "1234.5", "1234"),
    ("£5", "5", "6"),
    ("5€", "\\text{5 euros}", "6"),
    ("18 dollars", "18", "17"),
    ("5,000 dollars", "\\$5{,}000", "5"),
    # fractions and mixed numbers
    ("\\frac43", "\\frac{4}{3}", "43"),
    ("\\dfrac{4}{3}", "4/3", "3/4"),
    ("-\\frac{3}{4}", "-0.75", "0.75"),
    ("1 4/5", "\\frac95", "1"),
    ("3 1/2", "3.5", "2"),
    ("3 1/2", "3\\frac{1}{2}", "\\frac{31}{2}"),
    ("1\\frac{4}{5}", "\\frac95", "\\frac45"),
    ("7 \\frac 12", "7 1/2", "\\frac{7}{2}"),
    ("½", "0.5", "2"),
    ("\\frac{1}{2}", "½", "\\frac{1}{3}"),
    ("2/3 hours", "\\frac23", "\\frac32"),
    # percent
    ("50\\%", "50\\%", "5\\%"),
    ("20 percent", "20\\%", "2\\%"),
    ("33\\frac{1}{3}\\%", "33\\frac13\\%", "33\\%"),
    # units
    ("5 cm", "5", "25"),
    ("12\\,\\text{cm}^2", "12", "144"),
    ("5.4 \\text{ cents}", "5.4", "54"),
    ("90^\\circ", "90", "9"),
    ("90°", "90^{\\circ}", "60^\\circ"),
    ("12 years old", "12", "21"),
    ("42 apples", "42", "41"),
    ("2 million", "2000000", "2"),
    ("approximately 3.14", "3.14", "3.1"),
    ("≈3.14", "3.14", "4.13"),
    # roots, symbols
    ("\\sqrt2", "\\sqrt{2}", "2"),
    ("√2", "\\sqrt2", "2"),
    ("2π", "2\\pi", "\\pi"),
    ("\\frac{\\pi}{3}", "\\pi/3", "3\\pi"),
    ("6 - 5i", "6-5i", "6+5i"),
    ("\\infty", "\\infty", "-\\infty"),
    ("5²", "25", "52"),
    ("3·4", "12", "34"),
    ("2^{10}", "1024", "20"),
    ("\\log_2 8", "3", "8"),
    ("\\binom{5}{2}", "10", "52"),
    ("n!", "n!", "n"),
    ("p - q", "p-q", "q-p"),
    ("x^2+2x+1", "(x+1)^2", "x^2+1"),
    # intervals, points, sets
    ("[2,5)", "[2,5)", "[2,5]"),
    ("(-\\infty, 2]", "(-\\infty,2]", "(-\\infty,2)"),
    ("x \\in [-2,7]", "[-2,7]", "[-2,6]"),
    ("(0,9) \\cup (9,36)", "(0,9)\\cup(9,36)", "(0,36)"),
    ("(3,\\frac{\\pi}{2})", "\\left(3,\\frac{\\pi}{2}\\right)", "\\left(\\frac{\\pi}{2},3\\right)"),
    ("(1, 2, 3)", "(1,2,3)", "(3,2,1)"),
    ("{3,5}", "\\{5,3\\}", "\\{3\\}"),
    ("1, 2, 3", "3,2,1", "1,2"),
    ("$2$, $3$", "2,3", "3"),
    ("5 or 6", "5, 6", "5"),
    ("\\pm 3", "3, -3", "3"),
    ("3:4", "3:4", "4:3"),
    ("\\begin{pmatrix} 1\\\\2\\end{pmatrix}", "\\begin{pmatrix}1\\\\2\\end{pmatrix}", "\\begin{pmatrix}2\\\\1\\end{pmatrix}"),
    ("\\emptyset", "\\emptyset", "0"),
    # equations
    ("x=5", "5", "6"),
    ("y = 2x + 1", "y=2x+1", "y=2x-1"),
    ("x > 3", "x>3", "x<3"),
    # choices
    ("\\text{(C)}", "C", "B"),
    ("(C)", "\\text{C}", "\\text{D}"),
    ("A", "(A)", "(B)"),
    ("\\textbf{(B)}", "\\textbf{(B)}", "\\textbf{(D)}"),
    ("(A) 12", "A", "B"),
    ("(A) 12", "12", "13"),
    ("\\textbf{(C)}\\ 36", "\\textbf{(C)}\\ 36", "\\textbf{(B)}\\ 36"),
    ("\\text{(C)} 36", "36", "\\textbf{(C)}\\ 35"),
    ("C", "\\text{(C) } 36", "\\text{(D) } 36"),
    ("36", "\\textbf{(C)}\\ 36", "\\textbf{(C)}\\ 35"),
    # words
    ("\\text{Yes}", "Yes", "No"),
    ("Yes", "yes", "\\text{No}"),
    ("No", "\\text{no}", "on"),
    ("True", "true", "False"),
    ("Monday", "\\text{Monday}", "\\text{Tuesday}"),
    ("evil", "\\text{evil}", "live"),
    ("no solution", "\\text{no solution}", "0"),
    ("\\text{June 20}", "\\text{June 20}", "20"),
    ("June 20", "\\text{June 20}", "\\text{June 21}"),
    ("11:00 \\text{ a.m.}", "11:00 a.m.", "11:00 p.m."),
    # delimiters, boxes, whole solutions
    ("$\\frac{1}{2}$", "\\frac{1}{2}", "2"),
    ("$$7$$", "7", "77"),
    ("\\(5\\)", "5", "6"),
    ("\\[5\\]", "5", "6"),
    ("\\boxed{42}", "42", "43"),
    ("$\\boxed{\\frac{a}{b}}$", "\\frac{a}{b}", "\\frac{b}{a}"),
    ("Hence $x=\\pm 3$. As $x>0$ the answer is $\\boxed{3}$.", "3", "9"),
    ("We had \\boxed{1} at first, but \\boxed{\\frac{1}{2}} is right.", "0.5", "1"),
    ("Answer: 42", "42", "4"),
    ("The final answer is 12.", "12", "21"),
    ("Ann sold 96/2 = <<96/2=48>>48 pens.\n#### 144", "144", "48"),
    ("Then he pays $60-$12=$<<60-12=48>>48\n#### 1,048", "1048", "48"),
    ("#### $18", "18", "1"),
    ("#### -3", "-3", "3"),
]  # fmt: skip


@pytest.mark.parametrize(("gold", "right", "wrong"), TABLE)
def test_a_gold_as_published_takes_the_right_answer_and_no_wrong_one(gold: str, right: str, wrong: str) -> None:
    assert math_reward(f"Therefore we get $\\boxed{{{right}}}$.", gold, NOBODY) == 1.0
    assert math_reward(f"Therefore we get $\\boxed{{{wrong}}}$.", gold, NOBODY) == 0.0
    assert readable("", gold, NOBODY) == 1.0


@pytest.mark.parametrize(
    ("response", "gold", "reward"),
    [
        ("The last line is $42$.", "42", 1),
        ("so it costs \\$18.90", "$18.90", 1),
        ("We get $1e-5$.", "1e-5", 1),
        ("So $x=1$. The final answer is: $\\boxed{2}$. I hope it is correct.", "2", 1),
        ("\\boxed{1}\\boxed{2}", "1", 0),
        ("\\boxed{}", "0", 0),
        ("\\boxed{", "0", 0),
        ("", "42", 0),
    ],
)
def test_other_responses(response: str, gold: str, reward: float) -> None:
    assert math_reward(response, gold, NOBODY) == reward


@pytest.mark.parametrize(
    "gold", ["", "  ", "nan", "null", "}{", "\\frac{1", "\\text{", "see the figure \\includegraphics{", "?"]
)
def test_what_is_no_answer_can_not_be_read(gold: str) -> None:
    assert readable("", gold, NOBODY) == 0.0


def test_the_parts_of_an_answer() -> None:
    assert final_answer("a \\boxed{x \\boxed{1}} b \\boxed{\\frac{1}{\\{2\\}}}") == "\\frac{1}{\\{2\\}}"
    assert choice("\\textbf{(C)}\\ 36") == ("C", "36") and choice("(1, 2)") == (None, "(1, 2)")
    assert plain("sin x") == "sin x" and plain("ab") == "ab" and plain("A, B") == "A, B"


def _file(directory: Path, answers: list[str]) -> tuple[str, list[Prompt]]:
    path = directory / "golds.jsonl"
    lines = [json.dumps({"prompt": "q", "answer": answer}) for answer in answers]
    path.write_text("\n\n".join(lines))  # Blank lines count in the line numbers.
    return str(path), [Prompt(f"g{i}", (1,), answer) for i, answer in enumerate(answers)]


def test_answers_that_can_not_be_read_are_listed_with_file_and_line(tmp_path: Path) -> None:
    path, prompts = _file(tmp_path, ["42", "}{", "\\$5", "\\frac{1"])
    assert unreadable_answers(path, prompts, MathReward(timeout_s=60)) == [
        f"2 of 4 answers of {path} can't be read by reward=math: never right",
        f"  {path}, line 3: '}}{{' (prompt g1)",
        f"  {path}, line 7: '\\\\frac{{1' (prompt g3)",
    ]
    assert unreadable_answers(path, prompts, ImportedReward(path="a:b")) == []
    path, prompts = _file(tmp_path, [*map(str, range(20)), "7", *["seven"] * 12])
    found = unreadable_answers(path, prompts, ArithmeticReward())
    assert found[0].startswith("12 of 33 answers") and len(found) == 12 and found[-1] == "  and 2 more"


def test_a_file_without_one_answer_that_can_be_read_is_refused(tmp_path: Path) -> None:
    path, prompts = _file(tmp_path, ["three", "3.5"])
    with pytest.raises(ValueError, match=r"(?s)2 of 2 answers of .*line 1: 'three'.*write the answers alone"):
        unreadable_answers(path, prompts, ArithmeticReward())
