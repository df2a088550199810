"""Regular expressions of JSON schemas as rules of llama.cpp's grammars."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from math import inf

# Sets of characters are sorted ranges of code points, both ends included.
Ranges = list[tuple[int, int]]

_LAST = 0x10FFFF
_DIGITS: Ranges = [(48, 57)]
_WORDS: Ranges = [(48, 57), (65, 90), (95, 95), (97, 122)]
_SPACES: Ranges = [(9, 13), (32, 32)]
_BREAKS: Ranges = [(10, 10), (13, 13)]
_SETS = {"d": _DIGITS, "w": _WORDS, "s": _SPACES}
_CONTROLS = {"n": 10, "r": 13, "t": 9, "f": 12, "v": 11, "0": 0}
_QUANTIFIER = re.compile(r"\{(\d+)(?:(,)(\d*))?\}")
_GROUP = re.compile(r"\?(?::|P?<[A-Za-z_]\w*>)")
# What a JSON string has to write with a backslash: of a control character only the short way.
_ESCAPES = {8: r"\b", 9: r"\t", 10: r"\n", 12: r"\f", 13: r"\r", 34: r"\"", 92: r"\\"}


def _without(ranges: Ranges) -> Ranges:
    result, start = [], 0
    for low, high in _sorted(ranges):
        if low > start:
            result.append((start, low - 1))
        start = max(start, high + 1)
    return [*result, (start, _LAST)] if start <= _LAST else result


def _sorted(ranges: Ranges) -> Ranges:
    result: Ranges = []
    for low, high in sorted(ranges):
        if result and low <= result[-1][1] + 1:
            result[-1] = (result[-1][0], max(high, result[-1][1]))
        else:
            result.append((low, high))
    return result


def _characters(ranges: Ranges) -> str:
    """The rule of one character of the set, as a JSON string writes it."""
    raw = _without([*_without(ranges), (0, 31), (34, 34), (92, 92), (127, 127)])
    alternatives = ["[" + "".join(f"{_code(low)}-{_code(high)}" for low, high in raw) + "]"] if raw else []
    for code, text in _ESCAPES.items():
        if any(low <= code <= high for low, high in ranges):
            escaped = text.replace("\\", "\\\\").replace('"', '\\"')
            alternatives.append(f'"{escaped}"')
    if not alternatives:
        raise ValueError("a set of it has no character that a JSON text can hold")
    return alternatives[0] if len(alternatives) == 1 else f"({' | '.join(alternatives)})"


def _one(code: int) -> Ranges:
    return [(code, code)]


def _code(code: int) -> str:
    return f"\\U{code:08X}"


@dataclass(frozen=True)
class _Part:
    """A rule, and the least and the most characters of what it lets through."""

    rule: str
    least: float
    most: float
    unit: str = ""  # the rule that it repeats, where that is of one character


class PatternRules:
    """The rules of one pattern, which JSON schema searches for: without an anchor, any characters may stand there.

    Args:
        add: gives a rule a name, and returns it.
        repeat: writes a rule as often as from a least to a most number, None for any.
    """

    def __init__(self, add: Callable[[str], str], repeat: Callable[[str, int, int | None], str]) -> None:
        self._add, self._repeat = add, repeat
        self._pattern, self._at = "", 0

    def of(self, pattern: str, least: int = 0, most: int | None = None) -> str:
        """The rule of the texts with at least and at most so many characters.

        Raises:
            ValueError: a grammar cannot say what the pattern says.
        """
        self._pattern, self._at = pattern, 0
        branches = [self._fitted(parts, least, most) for parts in self._branches(0)]
        return f"({' | '.join(branches)})"

    def _fitted(self, parts: list[_Part], least: int, most: int | None) -> str:
        low, high = sum(part.least for part in parts), sum(part.most for part in parts)
        limit = inf if most is None else most
        if low < least or high > limit:
            loose = [number for number, part in enumerate(parts) if part.least != part.most]
            if low > limit or high < least or len(loose) != 1 or not parts[loose[0]].unit:
                raise self._error("cannot be joined with minLength or maxLength")
            part = parts[loose[0]]
            others_low = low - part.least
            new_high = min(part.most, limit - others_low)
            rule = self._repeat(
                part.unit, int(max(part.least, least - others_low)), None if new_high == inf else int(new_high)
            )
            parts = [*parts[: loose[0]], _Part(rule, 0, 0), *parts[loose[0] + 1 :]]
        return " ".join(part.rule for part in parts) or '""'

    def _error(self, why: str) -> ValueError:
        return ValueError(f"the pattern /{self._pattern}/ {why}")

    def _next(self) -> str:
        return self._pattern[self._at : self._at + 1]

    def _take(self, text: str) -> bool:
        found = self._pattern.startswith(text, self._at)
        self._at += len(text) * found
        return found

    def _branches(self, depth: int) -> list[list[_Part]]:
        """Alternatives, up to the parenthesis that ends them or the end."""
        if depth > 50:
            raise self._error("has too many parentheses in each other")
        branches = [self._sequence(depth)]
        while self._take("|"):
            branches.append(self._sequence(depth))
        if not depth and self._next():
            raise self._error("has a parenthesis that does not begin")
        return branches

    def _sequence(self, depth: int) -> list[_Part]:
        parts: list[_Part] = []
        ended = depth > 0
        if not depth and not self._take("^"):
            parts.append(self._anything())
        while self._next() not in ("", "|", ")"):
            if self._take("$"):
                if depth or self._next() not in ("", "|"):
                    raise self._error("has a $ that is not at its end")
                ended = True
                break
            parts.append(self._quantified(self._atom(depth)))
        if not ended:
            parts.append(self._anything())
        return parts

    def _anything(self) -> _Part:
        return self._repeated(_Part(_characters([(0, _LAST)]), 1, 1, "one"), 0, None)

    def _quantified(self, part: _Part) -> _Part:
        if match := _QUANTIFIER.match(self._pattern, self._at):
            self._at = match.end()
            low = int(match[1])
            high = low if match[2] is None else int(match[3]) if match[3] else None
        elif (sign := self._next()) and sign in "*+?":
            self._at += 1
            low, high = {"*": (0, None), "+": (1, None), "?": (0, 1)}[sign]
        else:
            return part
        self._take("?")  # which of several matches is of no matter
        if self._next() and self._next() in "*+?":
            raise self._error("repeats a repetition")
        if high is not None and low > high:
            raise self._error("repeats from more to less")
        return self._repeated(part, low, high)

    def _repeated(self, part: _Part, low: int, high: int | None) -> _Part:
        if not part.least and (high is None or high > 1):
            raise self._error("repeats what may be empty")
        if high == 0:
            return _Part('""', 0, 0)
        rule = self._add(part.rule)
        unit = rule if part.unit == "one" else ""
        most = inf if high is None else part.most * high
        return _Part(self._repeat(rule, low, high), part.least * low, most, unit)

    def _atom(self, depth: int) -> _Part:
        character = self._next()
        if character in "^*+?":
            raise self._error(f"has a {character} where a grammar has none")
        self._at += 1
        if character == "(":
            if self._next() == "?":
                match = _GROUP.match(self._pattern, self._at)
                if not match:
                    raise self._error("looks ahead or behind, or sets flags, which a grammar cannot")
                self._at = match.end()
            branches = self._branches(depth + 1)
            if not self._take(")"):
                raise self._error("has a parenthesis without an end")
            least = min(sum(part.least for part in parts) for parts in branches)
            most = max(sum(part.most for part in parts) for parts in branches)
            rules = [" ".join(part.rule for part in parts) or '""' for parts in branches]
            return _Part(f"({' | '.join(rules)})", least, most)
        if character == "[":
            return _Part(_characters(self._set()), 1, 1, "one")
        if character == ".":
            return _Part(_characters(_without(_BREAKS)), 1, 1, "one")
        return _Part(_characters(self._escape() if character == "\\" else _one(ord(character))), 1, 1, "one")

    def _set(self) -> Ranges:
        negated = self._take("^")
        ranges: Ranges = []
        while not self._take("]"):
            low = self._member()
            if self._next() == "-" and self._pattern[self._at + 1 : self._at + 2] not in ("]", ""):
                self._at += 1
                high = self._member()
                if len(low) != 1 or len(high) != 1 or low[0][0] != low[0][1] or low[0][0] > high[0][1]:
                    raise self._error("has a range that is none")
                low = [(low[0][0], high[0][1])]
            ranges += low
        return _without(ranges) if negated else _sorted(ranges)

    def _member(self) -> Ranges:
        character = self._next()
        if not character:
            raise self._error("has a bracket without an end")
        self._at += 1
        return self._escape(within=True) if character == "\\" else _one(ord(character))

    def _escape(self, within: bool = False) -> Ranges:
        character = self._next()
        self._at += 1
        if character.lower() in _SETS and character:
            return _SETS[character] if character.islower() else _without(_SETS[character.lower()])
        if character in _CONTROLS and character:
            return _one(_CONTROLS[character])
        if within and character == "b":
            return [(8, 8)]
        if match := re.compile(r"x([0-9A-Fa-f]{2})|u([0-9A-Fa-f]{4})").match(self._pattern, self._at - 1):
            self._at = match.end()
            return _one(int(match[1] or match[2], 16))
        if not character or character.isalnum():
            raise self._error(f"has \\{character}, which a grammar cannot say")
        return _one(ord(character))
