"""What git ignores in a folder, by its files ``.gitignore``."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

_STAR, _FOLDERS = "[^/]*", "(?:.*/)?"
_LONGEST = 1 << 20  # bytes of a .gitignore that are read


@dataclass(frozen=True)
class _Rule:
    pattern: re.Pattern[str]
    wanted: bool  # begins with !
    folders: bool  # ends with /


@dataclass
class Ignored:
    """The rules of a folder and of those around it.

    Attributes:
        folder: that the rules are of.
        outer: rules of the folder around it.
    """

    folder: Path
    outer: Ignored | None = None
    rules: list[_Rule] = field(default_factory=list)

    @classmethod
    def around(cls, folder: Path) -> Ignored | None:
        """The rules that hold inside a folder: its own, and those of the repository that it is in."""
        places = [folder, *folder.parents]
        top = next((index for index, place in enumerate(places) if (place / ".git").exists()), 0)
        rules: Ignored | None = None
        for place in reversed(places[: top + 1]):
            rules = cls.inside(place, rules)
        return rules

    @classmethod
    def inside(cls, folder: Path, outer: Ignored | None) -> Ignored | None:
        """The same, where those of the folder around it are known."""
        try:
            with open(folder / ".gitignore", encoding="utf-8", errors="replace") as file:
                lines = file.read(_LONGEST).splitlines()
        except OSError:
            return outer
        return cls(folder, outer, [rule for line in lines if (rule := _rule(line))])

    def has(self, path: Path, is_folder: bool) -> bool:
        """Whether git ignores a path inside the folder; of the folders that it is in that is asked before."""
        name = path.relative_to(self.folder).as_posix()
        for rule in reversed(self.rules):
            if (is_folder or not rule.folders) and rule.pattern.fullmatch(name):
                return not rule.wanted
        return self.outer.has(path, is_folder) if self.outer else False


def _rule(line: str) -> _Rule | None:
    line = re.sub(r"(?<!\\) +$", "", line.rstrip("\r"))
    if not line or line.startswith("#"):
        return None
    wanted = line.startswith("!")
    line = line[1:] if wanted else line
    folders = line.endswith("/")
    line = line.rstrip("/")
    anchored = "/" in line
    pattern = glob_pattern(line.lstrip("/"))
    try:
        return _Rule(re.compile(pattern if anchored else f"(?:.*/)?{pattern}", re.DOTALL), wanted, folders)
    except re.error:
        return None


def glob_pattern(text: str) -> str:
    """The regular expression of a pattern in which ``*`` is within a name and ``**`` is any folders."""
    parts: list[str] = []
    at = 0
    while at < len(text):
        if text.startswith("**/", at):
            if parts[-1:] != [_FOLDERS]:
                parts.append(_FOLDERS)
            at += 3
        elif text[at:] == "**" and (at == 0 or text[at - 1] == "/"):
            parts.append(".*")
            at += 2
        elif text[at] == "*":
            parts.append(_STAR)
            at += 1
        elif text[at] == "?":
            parts.append("[^/]")
            at += 1
        elif text[at] == "[" and (found := re.compile(r"\[([!^]?)(\]?[^\]]*)\]").match(text, at)):
            inside = found[2].replace("\\", r"\\").replace("[", r"\[")
            parts.append(f"[{'^/' if found[1] else ''}{inside}]")
            at = found.end()
        else:
            at += text[at] == "\\" and at + 1 < len(text)
            parts.append(re.escape(text[at]))
            at += 1
    return "".join(_at_once(parts))


def _at_once(parts: list[str]) -> Iterator[str]:
    """The parts, so that what several ``*`` of a name stand for is not tried again and again.

    What stands between two of them may as well be found where it comes first.
    """
    at = 0
    while at < len(parts):
        stops = (index for index in range(at + 1, len(parts)) if parts[index] in (_STAR, _FOLDERS, "/"))
        end = next(stops, len(parts)) if parts[at] == _STAR else at + 1
        between = "".join(parts[at + 1 : end])
        if parts[at] == _STAR and parts[end : end + 1] == [_STAR]:
            yield f"(?=(?P<s{at}>[^/]*?{between}))(?P=s{at})"
        else:
            yield parts[at] + between
        at = end
