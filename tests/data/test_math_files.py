"""Public files of problems, made small here in the layouts in which they are published."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from drpo_megatron.data.jsonl import read_jsonl, write_jsonl
from drpo_megatron.data.math_files import INSTRUCTION, collect, read_rows, sample

TOOLS = Path(__file__).parents[2] / "tools"
BEFORE = (
    "Solve the following math problem step by step. The last line of your response should be of the form Answer: "
    "$Answer (without quotes) where $Answer is the answer to the problem.\n\n"
)
AFTER = '\n\nRemember to put your answer on its own line after "Answer:".'


def dapo_row(question: str, answer: str) -> dict[str, Any]:
    """As in BytedTsinghua-SIA/DAPO-Math-17k."""
    return {
        "data_source": "math_dapo",
        "prompt": [{"content": f"{BEFORE}{question}{AFTER}", "role": "user"}],
        "ability": "MATH",
        "reward_model": {"ground_truth": answer, "style": "rule-lighteval/MATH_v2"},
        "extra_info": {"index": f"{question[:4]}-{answer}"},
    }


def run(tool: str, *arguments: Any) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, str(TOOLS / tool), *map(str, arguments)], capture_output=True, text=True, cwd=TOOLS.parent
    )
    return done.returncode, done.stdout, done.stderr


def lines(path: Path) -> list[dict[str, Any]]:
    return [fields for _, fields in read_jsonl(path)]


def test_dapo_math_is_stripped_deduplicated_checked_and_counted(tmp_path: Path) -> None:
    two = "What is $1+1$?\nGive an integer."
    rows = [
        dapo_row(two, "2"),
        dapo_row("What is $2+2$?", "4"),
        dapo_row("What is $1+1$?  Give an integer.", "2"),  # The first, spaced otherwise.
        dapo_row("What is $x$?", "3"),
        dapo_row("What is $x$?", "5"),
        dapo_row("Who?", "}{"),
        dapo_row("What is $3+3$?", "6"),
    ] * 2
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "dapo.parquet")
    (tmp_path / "aime.json").write_text(json.dumps([{"ID": "2024-I-1", "Problem": "What is $2+2$?", "Answer": 4}]))
    out = tmp_path / "data" / "dapo.jsonl"
    code, text, error = run("prepare_dapo_math.py", tmp_path / "dapo.parquet", out, "--exclude", tmp_path / "aime.json")
    assert code == 0, error
    # 5 of 14 rows are the first of their question, 2 are x = 5, which contradicts x = 3.
    assert text.startswith("14 rows, 7 repeated, 1 contradicted, 1 unusable, 1 excluded, 2 problems; 2 written"), text
    assert lines(out) == [
        {"id": "dapo-0", "prompt": f"{two}\n\n{INSTRUCTION}", "answer": "2"},
        {"id": "dapo-6", "prompt": f"What is $3+3$?\n\n{INSTRUCTION}", "answer": "6"},
    ]


def test_every_published_layout_of_aime_gives_the_same_lines(tmp_path: Path) -> None:
    pq.write_table(  # HuggingFaceH4/aime_2024
        pa.Table.from_pylist(
            [{"id": 60, "problem": "P1", "solution": "By symmetry 7.", "answer": "073", "url": "u", "year": "2024"}]
        ),
        tmp_path / "aime_2024.parquet",
    )
    write_jsonl(tmp_path / "aime_2025.jsonl", [{"question": "P2", "answer": "336^\\circ"}])  # opencompass/AIME2025
    write_jsonl(tmp_path / "math_arena.jsonl", [{"problem_idx": 1, "problem": "P2 ", "answer": 336}])
    sources = [tmp_path / name for name in ("aime_2024.parquet", "aime_2025.jsonl", "math_arena.jsonl")]
    code, text, error = run("prepare_aime.py", *sources, tmp_path / "aime.jsonl", "--instruction", "")
    assert code == 0, error
    assert text.startswith("3 rows, 1 repeated,")
    assert lines(tmp_path / "aime.jsonl") == [
        {"id": "aime_2024-0", "prompt": "P1", "answer": "73"},
        {"id": "aime_2025-0", "prompt": "P2", "answer": "336"},
    ]


def test_what_was_written_can_be_read_again_and_excluded(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "first.jsonl", [{"prompt": "P1", "solution": "3"}, {"prompt": "P2", "solution": "4"}])
    problems, _ = collect([tmp_path / "first.jsonl"], str)
    write_jsonl(tmp_path / "ours.jsonl", [problems[0].as_line(INSTRUCTION)])
    rest, counts = collect([tmp_path / "first.jsonl"], str, exclude=[tmp_path / "ours.jsonl"])
    assert [problem.question for problem in rest] == ["P2"]
    assert (counts.rows, counts.excluded, counts.problems) == (2, 1, 1)


def test_a_sample_does_not_depend_on_the_order_of_the_file(tmp_path: Path) -> None:
    rows = [{"prompt": f"P{i}", "answer": str(i)} for i in range(50)]
    chosen = []
    for name, ordered in (("a", rows), ("b", rows[::-1])):
        write_jsonl(tmp_path / f"{name}.jsonl", ordered)
        problems, _ = collect([tmp_path / f"{name}.jsonl"], str)
        chosen.append({problem.question for problem in sample(problems, 10)})
    assert chosen[0] == chosen[1] and len(chosen[0]) == 10
    with pytest.raises(ValueError, match="51 problems are wanted, and there are 50"):
        sample(problems, 51)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "x", r"ends in neither \.parquet"),
        ("a.json", "{}", "not a list of objects"),
        ("a.json", "[", "is not JSON"),
        ("a.parquet", "PAR0", "can't be read as parquet"),
        ("a.jsonl", '{"prompt": "P", "label": true}', r"row 0 has no answer in .*; it has: prompt, label"),
        ("a.jsonl", '{"text": "P", "answer": 1}', r"row 0 has no question in .*; it has: text, answer"),
        ("a.jsonl", f'{{"prompt": "{BEFORE.strip()}", "answer": 1}}', "row 0 has no question"),
    ],
)
def test_files_of_another_kind_are_refused(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        collect([tmp_path / name], str)


def test_answers_that_are_none_of_aime_end_the_tool(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"problem": "P", "answer": "1/2"}, {"problem": "Q", "answer": "5"}])
    code, _, error = run("prepare_aime.py", tmp_path / "a.jsonl", tmp_path / "out.jsonl")
    assert code == 2 and "1 answers are no integer from 0 to 999" in error
    assert not (tmp_path / "out.jsonl").exists()


def test_rows_are_numbered_as_errors_name_them(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist([{"a": 1}, {"a": 2}]), tmp_path / "t.parquet")
    assert [(number, place.rpartition(" ")[2]) for number, place, _ in read_rows(tmp_path / "t.parquet")] == [
        (0, "0"),
        (1, "1"),
    ]


@pytest.mark.parametrize(
    "turns",
    [
        [("user", "What is $1+1$?"), ("assistant", "2"), ("user", "And $3+3$?")],
        [("user", "What is $1+1$?"), ("user", "And $3+3$?")],
        [("user", "What is $1+1$?"), ("assistant", "2")],
        [("system", "Be brief."), ("assistant", "2")],
        [("human", "What is $1+1$?")],
    ],
)
@pytest.mark.parametrize("tool", ["prepare_dapo_math.py", "prepare_aime.py"])
def test_a_conversation_is_refused_by_row_instead_of_pairing_its_first_question_with_the_last_answer(
    tmp_path: Path, tool: str, turns: list[tuple[str, str]]
) -> None:
    row = dapo_row("What is $2+2$?", "4")
    several = row | {"prompt": [{"role": role, "content": content} for role, content in turns]}
    write_jsonl(tmp_path / "rows.jsonl", [row, several])
    code, _, error = run(tool, tmp_path / "rows.jsonl", tmp_path / "out.jsonl")
    roles = ", ".join(role for role, _ in turns)
    assert code == 2 and f"rows.jsonl, row 1 is a conversation of {roles}; one question" in error
    assert not (tmp_path / "out.jsonl").exists()


def test_a_system_turn_before_the_question_goes_as_other_instructions_do(tmp_path: Path) -> None:
    prompt = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is $2+2$?"}]
    write_jsonl(tmp_path / "rows.jsonl", [{"prompt": prompt, "answer": "4"}])
    problems, _ = collect([tmp_path / "rows.jsonl"], lambda answer: answer)
    assert [(problem.question, problem.answer) for problem in problems] == [("What is $2+2$?", "4")]


def test_answers_are_read_as_the_reward_reads_them(tmp_path: Path) -> None:
    rows = [{"problem": f"P{i}", "answer": answer} for i, answer in enumerate(["\\$5", "1e-5", "}{", "3 1/2"])]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    code, text, error = run("prepare_dapo_math.py", tmp_path / "rows.jsonl", tmp_path / "out.jsonl")
    assert code == 0, error
    assert "1 unusable" in text and [line["answer"] for line in lines(tmp_path / "out.jsonl")] == [
        "\\$5",
        "1e-5",
        "3 1/2",
    ]
