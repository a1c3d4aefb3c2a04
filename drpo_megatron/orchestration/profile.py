"""metrics.profile: trainer rank 0 under torch's profiler for a few steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from drpo_megatron.config.sections import ProfileSection
from drpo_megatron.orchestration.workers import ActorGroup


class Profiling:
    def __init__(
        self, section: ProfileSection | None, ranks: ActorGroup, directory: Path, say: Callable[[str], None]
    ) -> None:
        self.section, self.ranks, self.directory, self.say = section, ranks, directory, say
        self._is_on = False

    @contextmanager
    def of(self, step: int) -> Iterator[None]:
        """The block is the training of this step. The trace is written after the last step that is wanted."""
        section = self.section
        if section is not None and section.first_step <= step <= section.last_step and not self._is_on:
            self.ranks.call("start_profile")
            self._is_on = True
        yield
        if section is not None and self._is_on and step == section.last_step:
            file = self.directory / f"trainer-rank0-step{section.first_step}-{step}.json"
            self.ranks.call("stop_profile", file)
            self._is_on = False
            self.say(f"profile of trainer rank 0: {file} (open it in https://ui.perfetto.dev)")
