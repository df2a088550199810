"""How long a prompt takes to be read: said before, corrected while it is read."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from clex_local.chat.attention_speed import measured_per_depth
from clex_local.chat.reading_speed import Growth, Measured, ReadingSpeed, attention_share, remember, remembered
from clex_local.errors import ClexError
from clex_local.model_file.gguf_file import GGUFFile
from clex_local.model_file.kv_types import cache_name
from clex_local.model_file.model_shape import ModelShape

if TYPE_CHECKING:
    from clex_local.runtime.llama import Llama

_SURE = 512  # tokens that have to be read before a machine is taken to be slower or faster than it was
_NO_BATCH = 64  # tokens: what is shorter says little about the others


class ReadingTime:
    """Follows a prompt as it is read, by ``Llama.on_prefill``.

    Args:
        llm: the model.
        clock: seconds.
        attention: see ``measured_per_depth``.
    """

    def __init__(
        self,
        llm: Llama,
        clock: Callable[[], float] = time.perf_counter,
        attention: Callable[[Llama, ModelShape | None], float | None] = measured_per_depth,
    ) -> None:
        self._llm, self._clock, self._attention = llm, clock, attention
        self._key = speed_key(llm)
        with GGUFFile(llm.model_path) as file:
            self._shape = ModelShape.from_metadata(file)
        self._growth = Growth(attention_share(self._shape))
        self._before = Measured()
        self._batches: list[tuple[int, int, float]] = []
        self._start = self._done = self._total = 0
        self._time = 0.0

    def update(self, done: int, total: int) -> None:
        """Take the model's count: ``done`` of ``total`` tokens."""
        now = self._clock()
        if done == 0:
            self._before = remembered(self._key)
            self._start, self._batches = self._llm.n_tokens, []
            if total > 2 * self._llm.settings.n_ubatch and self._before.deepest < self._start + total / 2:
                self._measure_attention()
                now = self._clock()
        elif done > self._done:
            self._batches.append((self._start + self._done, self._start + done, now - self._time))
        self._done, self._total, self._time = done, total, now

    def _measure_attention(self) -> None:
        """Find out how the cost grows with depth, once, before anything was read there."""
        if self._growth.alone is None:
            self._growth = replace(self._growth, alone=self._attention(self._llm, self._shape))

    @property
    def known(self) -> bool:
        """Whether there is more to go by than the first batch, which brings weights into memory."""
        return bool(self._before.steps) or len(self._batches) > 1

    @property
    def start(self) -> int:
        """Tokens that were there before."""
        return self._start

    @property
    def measured(self) -> Measured:
        """What this prompt showed."""
        measured = Measured()
        # The first batch brings weights into memory, and the last may be a few tokens.
        whole = [batch for batch in self._batches if batch[1] - batch[0] >= _NO_BATCH] or self._batches
        for batch in whole[1:] or whole:
            measured.add(*batch)
        return measured

    @property
    def speed(self) -> ReadingSpeed | None:
        """The speed to expect; None where nothing was ever measured."""
        measured = self.measured
        expected = self._before.speed(self._growth)
        if expected is None or not measured.steps:
            return expected or measured.speed(self._growth)
        took, would = 0.0, 0.0
        for tokens, depth, cost in measured.steps.values():
            took += tokens * cost
            would += tokens * (expected.base + expected.per_depth * depth)
        scale = (took + expected.seconds(0, _SURE)) / (would + expected.seconds(0, _SURE))
        return self._before.merged(measured, scale, most=_SURE).speed(self._growth)

    def left(self) -> float | None:
        """Seconds until the prompt is read, None where nothing is known."""
        if not self._total or (speed := self.speed) is None:
            return None
        begin = self._start + self._done
        end = min(begin + self._llm.n_batch, self._start + self._total)
        batch, rest = speed.seconds(begin, end), speed.seconds(end, self._start + self._total)
        late = self._clock() - self._time - batch
        if late <= 0 or not batch:
            return rest - min(late, 0.0)
        # The machine is busier than it was: what is late is taken to be late as much again, what follows to be slower
        # by half of that, as it will be once the batch is measured.
        return late + rest * (1 + late / (2 * batch))

    def remember(self) -> None:
        """Keep what was measured for the next time; the prompt is over."""
        if len(self._batches) > 1:
            remember(self._key, self.measured)
        self._batches, self._done, self._total = [], 0, 0


def reading_time(llm: Llama) -> ReadingTime | None:
    """One that follows the prompts of a model; None where its file went after it was loaded."""
    try:
        return ReadingTime(llm)
    except (ClexError, OSError):
        return None


def speed_key(llm: Llama) -> str:
    """What the speed of a model depends on, in a line."""
    from clex_local.runtime.prompt_cache import model_number

    settings = llm.settings
    parts = [
        f"{model_number(llm, llm._options):016x}",
        f"threads {settings.n_threads_batch}",
        f"cache {cache_name(settings.type_k, settings.type_v)}",
        f"flash attention {'on' if settings.flash_attn else 'off'}",
        f"batch {settings.n_ubatch}",
        f"gpu layers {llm.model_params.n_gpu_layers}",
    ]
    return ", ".join(parts)


def readable_time(seconds: float) -> str:
    """A duration for people, as precise as an estimate is."""
    if seconds < 60:
        return f"{max(1, round(seconds))} s"
    if seconds < 600:
        minutes, rest = divmod(round(seconds / 10) * 10, 60)
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
