"""Every value on the command line has bounds: asked of argparse, and tried."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import pytest

from drpo_megatron.cli import _parser, main

FREE = (None, str)
"""Paths, names and overrides: what reads them checks them."""


def options(
    parser: argparse.ArgumentParser, command: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], argparse.Action]]:
    """(command, option) of every option that takes a value."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, inner in action.choices.items():
                yield from options(inner, (*command, name))
        elif action.nargs != 0:
            yield command, action


SIGNED = ("threshold",)
"""A reward may be below 0."""

OPTIONS = list(options(_parser()))
NUMERIC = [
    (command, action)
    for command, action in OPTIONS
    if action.choices is None and getattr(action.type, "__module__", "") == "drpo_megatron.commands.arguments"
]


def test_no_option_is_a_number_without_bounds() -> None:
    assert [(command, action.dest) for command, action in OPTIONS if action.type in (int, float, complex)] == []
    assert {action.dest for _, action in NUMERIC} >= {"seeds", "time", "interval", "nodes", "samples", "max_shard_size"}


@pytest.mark.parametrize(("command", "action"), NUMERIC, ids=["-".join((*c, a.dest)) for c, a in NUMERIC])
@pytest.mark.parametrize(
    "value", ["-1", "nan", "inf", "1e999", "9" * 5000, "soon", "", " ", "0x10", "٣", "1\n2", "-0.5"]
)
def test_what_is_no_sensible_value_is_refused_in_a_line(
    command: tuple[str, ...], action: argparse.Action, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if value.startswith("-") and action.dest in SIGNED:
        return
    option = action.option_strings[0]
    with pytest.raises(SystemExit) as stopped:
        main([*command, f"{option}={value}"])
    error = capsys.readouterr().err.splitlines()[-1]
    assert stopped.value.code == 2 and f"argument {option}: " in error and len(error) < 250
