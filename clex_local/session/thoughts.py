"""Tells what a model thinks, between ``<think>`` and ``</think>``, from what it answers, while both come in pieces."""

from __future__ import annotations

from collections.abc import Iterator

OPEN, CLOSE = "<think>", "</think>"


class Thoughts:
    """Divides a stream of text.

    Args:
        begun: the prompt has opened the part already, as some templates do.

    Attributes:
        text: what was thought, as far as it came.
    """

    def __init__(self, begun: bool = False) -> None:
        self.text = ""
        self.inside = begun
        self._answered = begun  # whether anything but space came; a later tag is text
        self._ended = False  # a thought, and nothing has come behind it
        self._waiting = ""

    def feed(self, piece: str, last: bool = False) -> Iterator[tuple[bool, str]]:
        """Take a piece of an answer.

        Args:
            piece: of it.
            last: no other follows.

        Yields:
            Pieces, each with whether it is thought.
        """
        self._waiting += piece
        while self._waiting:
            tag = CLOSE if self.inside else OPEN
            before, found, after = self._waiting.partition(tag)
            if not found:
                kept = 0 if last else _overlap(self._waiting, tag)
                before, after = self._waiting[: len(self._waiting) - kept], self._waiting[len(self._waiting) - kept :]
            if self._ended:  # lines between the thought and the answer
                self._waiting = self._waiting.lstrip("\n")
                self._ended = not self._waiting
                if self._ended:
                    return
            if not self.inside and (self._answered or before.strip()):
                # What mentions the tag in the middle of an answer means it.
                self._answered = True
                yield False, self._waiting
                self._waiting = ""
                return
            if self.inside and before:
                self.text += before
                yield True, before
            if found:
                self.inside = not self.inside
                self._answered = self._ended = not self.inside
            self._waiting = after
            if not found:
                return


def opens_thought(prompt: str) -> bool:
    """Whether a prompt ends with the beginning of a thought, as some templates write it."""
    return prompt.rstrip().endswith(OPEN)


def ended(answer: str, begun: bool) -> str:
    """An answer as templates are to read it: a thought that was stopped has an end, at which they can leave it out.

    Args:
        answer: of the model.
        begun: the prompt had opened a thought.
    """
    if CLOSE in answer or not (begun or answer.lstrip().startswith(OPEN)):
        return answer
    return f"{OPEN if begun else ''}{answer}{CLOSE}\n\n"


def _overlap(text: str, tag: str) -> int:
    """Characters at the end of a text that may become a tag."""
    return next((n for n in range(min(len(text), len(tag) - 1), 0, -1) if text.endswith(tag[:n])), 0)
