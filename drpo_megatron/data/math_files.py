"""Public files of mathematical problems as our JSONL: one line a problem, each problem once, counted.

Known layouts, all found in files that people publish:

    DAPO-Math-17k and others for verl   prompt = [{role, content}], reward_model.ground_truth
    DAPO-Math-17k-Processed             prompt, solution (which is the answer)
    AIME 2024, 2025 by several hands    problem | Problem | question, answer | Answer

DAPO-Math-17k repeats every problem a hundred times and puts an instruction before and after it. Both go: repetition is
the prompt stream's business, and one instruction for training and evaluation is added here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from drpo_megatron.data.jsonl import read_jsonl
from drpo_megatron.reading import read_json

INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."
_QUESTIONS = ("prompt", "problem", "Problem", "question")
_ANSWERS = ("answer", "Answer", "label", "solution")
"""In the order of preference: where a file has an answer and a solution, the solution is the way to it."""
_DAPO_BEFORE = (
    "Solve the following math problem step by step. The last line of your response should be of the form Answer:"
)
_DAPO_AFTER = "\n\nRemember to put your answer on its own line after"
_ROWS_A_BATCH = 10_000


@dataclass(frozen=True, slots=True)
class Problem:
    problem_id: str
    """`<file>-<row>` of its first appearance."""
    question: str
    """Without any instruction."""
    answer: str

    def as_line(self, instruction: str) -> dict[str, str]:
        """What `drpo_megatron.data.prompts` reads."""
        prompt = f"{self.question}\n\n{instruction}" if instruction else self.question
        return {"id": self.problem_id, "prompt": prompt, "answer": self.answer}


@dataclass(slots=True)
class Counts:
    rows: int = 0
    repeated: int = 0
    """Rows whose question and answer came before."""
    contradicted: int = 0
    """Questions that came with two different answers. All their rows are left out."""
    unusable: int = 0
    """Questions whose answer the check refused."""
    excluded: int = 0
    """Questions of the files that were to be kept out."""
    problems: int = 0
    """What remains."""

    def as_text(self) -> str:
        return ", ".join(f"{number:,} {name}" for name, number in asdict(self).items())


def collect(
    files: Sequence[Path], usable: Callable[[str], str | None], exclude: Iterable[Path] = ()
) -> tuple[list[Problem], Counts]:
    """Every problem of the files once, in order of appearance.

    Args:
        usable: an answer as it should be written, or None if it can't be used.
        exclude: files (of any known layout) whose questions are left out: held-out problems.
    Raises: ValueError with file and row for a file that can't be read or a row without a question or an answer, and
        when nothing remains.
    """
    if len({file.stem for file in files}) < len(files):
        raise ValueError(f"{', '.join(map(str, files))}: two files of one name; ids are made of it, so rename one")
    held_out = {_key(_question(fields, place)) for file in exclude for _, place, fields in read_rows(file)}
    counts = Counts()
    answers: dict[str, str] = {}
    """By question, what `usable` made of the first answer; an unusable one as it came."""
    contradicted: set[str] = set()
    found: dict[str, Problem] = {}
    for file in files:
        for number, place, fields in read_rows(file):
            counts.rows += 1
            question, written = _question(fields, place), _answer(fields, place)
            key, answer = _key(question), usable(written)
            if key in answers:
                same = answers[key] == (answer or written)
                counts.repeated += same
                if not same:
                    contradicted.add(key)
                continue
            answers[key] = answer or written
            if key in held_out:
                counts.excluded += 1
            elif answer is None:
                counts.unusable += 1
            else:
                found[key] = Problem(f"{file.stem}-{number}", question, answer)
    counts.contradicted = len(contradicted)
    problems = [problem for key, problem in found.items() if key not in contradicted]
    counts.problems = len(problems)
    if not problems:
        raise ValueError(f"{', '.join(map(str, files))}: no problem remains ({counts.as_text()})")
    return problems, counts


def sample(problems: Sequence[Problem], count: int) -> list[Problem]:
    """`count` of them in their order: always the same, however the file is sorted. ValueError if there are fewer."""
    if count > len(problems):
        raise ValueError(f"{count} problems are wanted, and there are {len(problems)}; ask for fewer")
    chosen = set(sorted(problems, key=lambda p: hashlib.sha256(p.question.encode()).digest())[:count])
    return [problem for problem in problems if problem in chosen]


def read_rows(file: Path) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """(row number from 0, `FILE, row N`, fields) of a .parquet, .jsonl or .json (a list of objects) file."""
    if file.suffix == ".parquet":
        rows: Iterable[dict[str, Any]] = _parquet_rows(file)
    elif file.suffix == ".jsonl":
        rows = (fields for _, fields in read_jsonl(file))
    elif file.suffix == ".json":
        rows = _json_rows(file)
    else:
        raise ValueError(f"{file}: its name ends in neither .parquet, .jsonl nor .json; give one of them")
    for number, fields in enumerate(rows):
        yield number, f"{file}, row {number}", fields


def _parquet_rows(file: Path) -> Iterator[dict[str, Any]]:
    try:
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"{file}: reading parquet needs pyarrow; pip install 'drpo_megatron[data]'") from None
    try:
        table = pyarrow.parquet.ParquetFile(file)
    except (OSError, pyarrow.ArrowException) as error:
        raise ValueError(f"{file} can't be read as parquet: {error}") from None
    for batch in table.iter_batches(_ROWS_A_BATCH):
        yield from batch.to_pylist()


def _json_rows(file: Path) -> list[dict[str, Any]]:
    rows = read_json(file)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{file} is not a list of objects; give one object a problem")
    return rows


def _question(fields: dict[str, Any], place: str) -> str:
    value = next((fields[name] for name in _QUESTIONS if fields.get(name)), None)
    if isinstance(value, list):
        value = _only_turn(value, place)
    if not isinstance(value, str) or not (question := _without_instruction(value)):
        raise ValueError(
            f"{place} has no question in {', '.join(_QUESTIONS)}; it has: {', '.join(fields) or 'nothing'}"
        )
    return question


def _only_turn(turns: Sequence[Any], place: str) -> Any:
    """The content of the one turn of the user; a turn of the system before it is an instruction and goes.

    Raises: ValueError for a conversation: the answer of a row is to its last question, which is none without the others.
    """
    roles = [turn.get("role") if isinstance(turn, dict) else None for turn in turns]
    if [role for role in roles if role not in ("system", "developer")] != ["user"]:
        raise ValueError(
            f"{place} is a conversation of {', '.join(map(str, roles))}; one question and its answer are needed: give "
            "rows with one turn of role user"
        )
    return turns[roles.index("user")].get("content")


def _answer(fields: dict[str, Any], place: str) -> str:
    verl = fields.get("reward_model")
    value = verl.get("ground_truth") if isinstance(verl, dict) else None
    if value is None:
        value = next((fields[name] for name in _ANSWERS if fields.get(name) not in (None, "")), None)
    text = str(value).strip() if isinstance(value, str | int | float) and not isinstance(value, bool) else ""
    if not text:
        raise ValueError(
            f"{place} has no answer in reward_model.ground_truth, {', '.join(_ANSWERS)}; it has: {', '.join(fields)}"
        )
    return text


def _without_instruction(text: str) -> str:
    text = text.strip()
    if text.startswith(_DAPO_BEFORE):
        text = text.partition("\n\n")[2]
    return text.partition(_DAPO_AFTER)[0].strip()


def _key(question: str) -> str:
    """Equal for questions that differ in spacing only, or in an instruction of ours at the end."""
    return " ".join(question.removesuffix(INSTRUCTION).split())
