"""Seconds by activity, some of which go on at once."""

from __future__ import annotations

import time

import pytest

from drpo_megatron.orchestration.clock import Clock


def test_activities_at_once_each_get_their_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    clock = Clock()
    clock.go_on_from({"train": 10.0}, wall_s=50.0)
    clock.begin("generate")  # at 0
    now += 2
    with clock.phase("train"):  # 2 to 7
        now += 3
        clock.end("generate")  # at 5
        now += 2
    clock.begin("generate")  # at 7
    now += 1
    assert clock.lap() == {"generate": 6.0, "train": 5.0, "overlap": 3.0, "step": 8.0}
    now += 4  # What goes on at a lap counts on both sides of it.
    assert clock.lap() == {"generate": 4.0, "step": 4.0}
    assert clock.totals == {"generate": 10.0, "train": 15.0, "overlap": 3.0}
    assert clock.wall_s == 62.0
