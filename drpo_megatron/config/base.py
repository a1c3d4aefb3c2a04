"""The one base of all config sections, and the types of their keys.

A section is frozen, has no unknown keys, and the docstring under a field is its help text. A number has a lower and an
upper bound, is finite and is not `true`; a text is one that can be shown and saved. A test walks all sections and fails
where a field is a bare `int`, `float` or `str`.
"""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from drpo_megatron.paths import file_name, unshown_characters


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True)


def _no_truth(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError(f"{str(value).lower()} is no number")
    return value


def _characters(text: str) -> str:
    """Text that a terminal, a file and a process can be given."""
    if found := unshown_characters(re.sub(r"[\n\t]", "", text)):
        raise ValueError(f"{ascii(text[:80])} has the character {found[0]} in it; remove it")
    return text


def _line(text: str) -> str:
    if not text.strip():
        raise ValueError(f"{text!r} is empty; give a text, or leave the key out")
    if "\n" in text or "\t" in text:
        raise ValueError(f"{text!r} has more than one line, or a tab; give one line")
    return _characters(text)


def _import_path(path: str) -> str:
    if not re.fullmatch(r"[A-Za-z_][\w.]*(?<!\.):[A-Za-z_]\w*", path) or ".." in path:
        raise ValueError(f"{path!r} is not of the form package.module:function")
    return path


def _address(address: str) -> str:
    host, _, port = address.rpartition(":")
    if address == "auto" or (re.fullmatch(r"[\w.-]+|\[[\w:.]+\]", host) and port.isdecimal() and int(port) < 2**16):
        return address
    raise ValueError(f"{address!r} is neither auto nor HOST:PORT, such as 10.0.0.7:6379")


def _flag_name(name: str) -> str:
    if not re.fullmatch(r"-*[A-Za-z][\w.-]*", name):
        raise ValueError(f"{name!r} is no name of a flag; use letters, digits and '-'")
    return name


def _flag_value(value: Any) -> Any:
    if isinstance(value, str):
        return _line(value)
    if not isinstance(value, bool | int | float) or not abs(value) < 2**63:
        raise ValueError(f"{str(value)[:80]!r} is no value of a flag; give a text, a finite number or true")
    return value


def _directory_name(name: str) -> str:
    return file_name(_line(name), "the name")


_Whole = Annotated[int, BeforeValidator(_no_truth)]
_Real = Annotated[float, BeforeValidator(_no_truth)]

Count = Annotated[_Whole, Field(ge=1, le=2**31 - 1)]
"""Of things that there must be one of."""
CountOrNone = Annotated[_Whole, Field(ge=0, le=2**31 - 1)]
"""0: none, or never."""
Processes = Annotated[_Whole, Field(ge=1, le=2**17)]
Threads = Annotated[_Whole, Field(ge=1, le=4096)]
TopK = Annotated[_Whole, Field(ge=-1, le=2**31 - 1)]
"""-1: off."""
Seed = Annotated[_Whole, Field(ge=0, le=2**31 - 1)]
"""numpy takes 32 bits, and seeds of steps and prompts are derived by addition."""
Seconds = Annotated[_Real, Field(gt=0, le=30 * 24 * 3600, allow_inf_nan=False)]
"""A month is longer than any job; timers of the operating system and of torch end at 2^63 ns."""
Positive = Annotated[_Real, Field(gt=0, le=1e6, allow_inf_nan=False)]
"""Of ratios, factors and boundaries: beyond a million FP32 doesn't tell r - 1 from r."""
Coefficient = Annotated[_Real, Field(ge=0, le=1e6, allow_inf_nan=False)]
Beta = Annotated[_Real, Field(ge=0, lt=1, allow_inf_nan=False)]
"""Of a running average. With 1 it never moves."""
LearningRate = Annotated[_Real, Field(gt=0, le=1, allow_inf_nan=False)]
"""AdamW moves a weight by about this much a step, and weights are about 0.02."""
NoLearningRate = Annotated[_Real, Field(ge=0, le=1, allow_inf_nan=False)]
LogRatio = Annotated[_Real, Field(gt=0, le=80, allow_inf_nan=False)]
"""exp(88) is beyond FP32."""
GradientNorm = Annotated[_Real, Field(ge=0, le=1e12, allow_inf_nan=False)]
Share = Annotated[_Real, Field(ge=0, le=1, allow_inf_nan=False)]
UpperRatio = Annotated[_Real, Field(gt=1, le=1e6, allow_inf_nan=False)]
"""Of a ratio that is clipped from above."""
Temperature = Annotated[_Real, Field(gt=0, le=100, allow_inf_nan=False)]
TemperatureOrZero = Annotated[_Real, Field(ge=0, le=100, allow_inf_nan=False)]

Text = Annotated[str, AfterValidator(_characters)]
"""Any text, of several lines or empty."""
Line = Annotated[str, AfterValidator(_line)]
"""One line that is not empty: paths, names of fields, URLs."""
ImportPath = Annotated[str, AfterValidator(_import_path)]
"""`package.module:function`."""
Address = Annotated[str, AfterValidator(_address)]
"""`auto` or HOST:PORT."""
DirectoryName = Annotated[str, AfterValidator(_directory_name)]
"""Becomes part of the name of a directory."""
FlagName = Annotated[str, AfterValidator(_flag_name)]
FlagValue = Annotated[bool | int | float | str, BeforeValidator(_flag_value)]
"""Of another program's flag, which that program checks."""
