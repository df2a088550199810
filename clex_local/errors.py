"""The errors that a person sees."""

from __future__ import annotations

LONGEST = 1000  # characters of a message; what a hostile file puts into one can be megabytes


class ClexError(Exception):
    """Base of every error meant for the user.

    Its message is one line that says what is wrong, in which file, and what to do. Commands print it after
    their name and end with exit code 1; everything else that is raised is a defect of ours.
    """

    def __str__(self) -> str:
        return escaped(super().__str__(), LONGEST)


class ModelError(ClexError, ValueError):
    """A model file that cannot be used; a ValueError too, as llama-cpp-python raises."""


def escaped(text: str, longest: int = 200) -> str:
    """Text from a file as a terminal can show it: control characters escaped, and no more than `longest` characters."""
    if len(text) > longest:
        text = text[: longest - 1] + "…"
    return text if text.isprintable() else "".join(map(_escape, text))


def one_line(text: object, limit: int = 300) -> str:
    """A log, a value or an exception, by its name where it has no text, on one line of at most `limit` characters."""
    line = " ".join(str(text).split()) or (type(text).__name__ if isinstance(text, BaseException) else "")
    return line if len(line) <= limit else line[: limit - 1] + "…"


def shown(text: str) -> str:
    """Text of several lines as a terminal can show it: what controls one escaped, except line ends and tabs.

    Whatever a command prints goes through here or through `escaped`, because names, metadata and messages come out of
    files; only answers are stripped of such characters instead, and only on a terminal.
    """
    return "".join(character if character in "\n\t" else _escape(character) for character in text)


def _escape(character: str) -> str:
    return character if character.isprintable() else character.encode("unicode_escape").decode()
