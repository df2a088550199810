"""A conversation as a file: JSON that a person can read, refused where anything in it is not as it must be."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime, timezone
from typing import Any

from clex_local.commands.options import options_in
from clex_local.errors import ClexError
from clex_local.model_file.kv_types import KV_TYPES
from clex_local.runtime.run_options import RunOptions
from clex_local.runtime.sampling import Sampling
from clex_local.session.exchange import AttachedFile, Exchange

FORMAT, VERSION = "clex-local session", 1
_RUN: dict[str, type] = {
    "ctx": int,
    "kv_type": str,
    "flash_attn": bool,
    "extend": str,
}  # options of the run that are kept
_NUMBERS = re.compile(r"\[\n *(\d+(?:,\n *\d+)*)\n *\]")  # no text in JSON has a line end


class SessionError(ClexError):
    """A saved conversation that cannot be read, written or taken up."""


@dataclass(frozen=True)
class SessionModel:
    """The model that a conversation was with.

    Attributes:
        path: of its file, absolute.
        name: as the file says.
        identity: tells apart files, and ways to run one; see ``prompt_cache.model_number``.
    """

    path: str
    name: str
    identity: str


@dataclass
class SavedSession:
    """A conversation that was saved.

    Attributes:
        name: as it was given.
        model: that it was with at last.
        system: the system message.
        chat_template: ``model``, ``chatml`` or ``plain``.
        sampling: how tokens are drawn.
        run: of the options of the run, those that were given and decide how the cache is laid out.
        turns: what was said.
        unanswered: a message whose answer was under way.
        left_out, summary, template_arguments: see ``Session``.
        began: when the conversation began, by the person's clock; see ``Session.began``.
        created, saved: times of the file, all of them ISO 8601.
    """

    name: str
    model: SessionModel
    system: str | None = None
    chat_template: str = "model"
    sampling: Sampling = field(default_factory=Sampling)
    run: dict[str, Any] = field(default_factory=dict)
    turns: list[Exchange] = field(default_factory=list)
    unanswered: Exchange | None = None
    left_out: int = 0
    summary: str = ""
    template_arguments: dict[str, Any] = field(default_factory=dict)
    began: str = ""
    created: str = field(default_factory=lambda: now())
    saved: str = ""

    @staticmethod
    def run_of(options: RunOptions) -> dict[str, Any]:
        """The options that are kept."""
        return {name: getattr(options, name) for name in _RUN}

    def text(self) -> str:
        """The file's text."""
        value = {"format": FORMAT, "version": VERSION, **asdict(self)}
        # Tokens in one line, and not in a line each.
        return _NUMBERS.sub(_in_one_line, json.dumps(value, ensure_ascii=False, indent=1)) + "\n"

    @classmethod
    def parse(cls, text: str, name: str) -> SavedSession:
        """Read a file's text.

        Args:
            text: of the file.
            name: of the file, for messages.

        Raises:
            SessionError: it is none of ours, of a later version, or damaged.
        """
        try:
            value = json.loads(text)
            json.dumps(value, ensure_ascii=False).encode()  # texts that are not Unicode would be met much later
        except (ValueError, RecursionError) as error:
            raise SessionError(f"{name}: a damaged session, or none: not JSON ({error})") from None
        if not isinstance(value, dict) or value.get("format") != FORMAT:
            raise SessionError(f"{name}: no session of clex-local")
        if value.get("version") != VERSION:
            raise SessionError(f"{name}: a session of version {value.get('version')!r}, this program reads {VERSION}")
        try:
            return _session(_Object(value, "the session"))
        except _Wrong as error:
            raise SessionError(f"{name}: a damaged session: {error}") from None


def now() -> str:
    """The time, as files have it."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _in_one_line(numbers: re.Match[str]) -> str:
    return f"[{' '.join(numbers[1].split())}]"


class _Wrong(Exception):
    """Something in a file that is not as it must be."""


class _Object:
    """A JSON object whose values are asked for by their types."""

    def __init__(self, value: Any, where: str) -> None:
        if not isinstance(value, dict):
            raise _Wrong(f"{where} is no object")
        self.value, self.where = value, where

    def get(self, name: str, *kinds: type, default: Any = ...) -> Any:
        """A value of one of these types; None is one."""
        value = self.value.get(name, default)
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise _Wrong(f"{name!r} of {self.where} is missing or of a wrong kind")
        return value

    def objects(self, name: str) -> list[_Object]:
        """A list of objects."""
        values = self.get(name, list)
        return [_Object(value, f"{name}[{index}] of {self.where}") for index, value in enumerate(values)]


def _session(value: _Object) -> SavedSession:
    model = _Object(value.get("model", dict), "the model")
    unanswered = value.get("unanswered", dict, type(None), default=None)
    template = value.get("chat_template", str)
    if template not in ("model", "chatml", "plain"):
        raise _Wrong(f"there is no chat template {template!r}")
    return SavedSession(
        name=value.get("name", str),
        model=SessionModel(*(model.get(name.name, str) for name in fields(SessionModel))),
        system=value.get("system", str, type(None)),
        chat_template=template,
        sampling=_sampling(_Object(value.get("sampling", dict), "the sampling")),
        run=_run(_Object(value.get("run", dict), "the run")),
        turns=[_exchange(turn) for turn in value.objects("turns")],
        unanswered=None if unanswered is None else _exchange(_Object(unanswered, "the unanswered message")),
        left_out=_number(value, "left_out", len(value.get("turns", list))),
        summary=value.get("summary", str, default=""),
        template_arguments=value.get("template_arguments", dict, default={}),
        began=_time(value, "began"),
        created=value.get("created", str),
        saved=value.get("saved", str),
    )


def _exchange(value: _Object) -> Exchange:
    tokens = value.get("tokens", list)
    if not all(type(token) is int and 0 <= token < 2**31 for token in tokens):
        raise _Wrong(f"the tokens of {value.where} are not all tokens")
    files = value.objects("files")
    return Exchange(
        message=value.get("message", str),
        typed_from=_number(value, "typed_from", len(value.get("message", str))),
        answer=value.get("answer", str),
        tokens=tokens,
        finish_reason=value.get("finish_reason", str),
        files=[AttachedFile(file.get("path", str), file.get("size", int), file.get("sha256", str)) for file in files],
    )


def _number(value: _Object, name: str, most: int) -> int:
    number = value.get(name, int, default=0)
    if not 0 <= number <= most:
        raise _Wrong(f"{name!r} of {value.where} is {number}")
    return number


def _time(value: _Object, name: str) -> str:
    text = value.get(name, str, default="")
    try:
        return text and datetime.fromisoformat(text).isoformat()
    except ValueError:
        raise _Wrong(f"{name!r} of {value.where} is no time") from None


def _run(value: _Object) -> dict[str, Any]:
    run = {name: value.get(name, kind, type(None), default=None) for name, kind in _RUN.items()}
    if run["kv_type"] not in (None, *KV_TYPES) or (run["ctx"] or 0) < 0:
        raise _Wrong("a setting of the run is not known")
    return run


def _sampling(value: _Object) -> Sampling:
    given: dict[str, Any] = {}
    for place, known in options_in(Sampling):
        number = value.get(place.name, int, *[float] * isinstance(place.default, float), default=place.default)
        low = known.minimum if known.above is None else known.above
        inside = (low is None or low <= number) and (known.maximum is None or number <= known.maximum)
        if not inside or number == known.above:  # NaN is inside of nothing
            raise _Wrong(f"{place.name} of the sampling is {number}")
        given[place.name] = number
    return Sampling(**given)
