"""What one turn of a conversation produced, and what it cost."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field


@dataclass
class Answer:
    """What one turn produced and what it cost. Times are seconds.

    ``finish_reason`` is ``stop`` (the model ended), ``length`` (the caller's limit), ``context`` (the context is
    full), ``repetition`` (it said the same again and again) or ``interrupted``. ``prefill_tokens`` of the
    ``prompt_tokens`` were computed, ``restored_tokens`` came from the document store; the rest was in the cache. Prompt
    lookup guessed ``drafted_tokens`` of the answer, ``accepted_tokens`` of them rightly.
    """

    text: str = ""
    finish_reason: str = "interrupted"
    prompt_tokens: int = 0
    prefill_tokens: int = 0
    restored_tokens: int = 0
    completion_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    decode_steps: int = field(default=0, repr=False)

    @property
    def prefill_speed(self) -> float:
        """Prompt tokens computed per second, 0 if nothing was measured."""
        return self.prefill_tokens / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_speed(self) -> float:
        """Tokens generated per second after the first one, 0 if nothing was measured."""
        return self.decode_steps / self.decode_seconds if self.decode_seconds else 0.0

    def add(self, other: Answer) -> None:
        """Count another answer's tokens and times too; texts and reasons stay."""
        # A prefill that was interrupted has no duration; counting its tokens would make the speed wrong.
        if other.prefill_seconds:
            self.prefill_tokens += other.prefill_tokens
            self.restored_tokens += other.restored_tokens
            self.prefill_seconds += other.prefill_seconds
        self.completion_tokens += other.completion_tokens
        self.drafted_tokens += other.drafted_tokens
        self.accepted_tokens += other.accepted_tokens
        self.decode_seconds += other.decode_seconds
        self.decode_steps += other.decode_steps

    def timed(self, stream: Iterator[int]) -> Iterator[int]:
        """The same tokens; the time that each takes is counted, and not that of whoever reads them."""
        first = True
        while True:
            start = time.perf_counter()
            token = next(stream, None)
            elapsed = time.perf_counter() - start
            if token is None:
                return
            if first:
                self.prefill_seconds = elapsed
                first = False
            else:
                self.decode_seconds += elapsed
                self.decode_steps += 1
            yield token
