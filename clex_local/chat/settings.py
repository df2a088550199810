"""``/set``: what can be changed in a conversation, by the names of the command's options."""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from clex_local.chat.conversation import Chat
from clex_local.chat.options import ChatOptions
from clex_local.commands.options import options_in
from clex_local.errors import ClexError, escaped
from clex_local.runtime.run_options import RunOptions
from clex_local.runtime.sampling import Sampling
from clex_local.session.full_context import POLICIES

# What chat templates of models read beside the messages, and what can be told them.
TEMPLATE_ARGUMENTS = {
    "enable_thinking": ("true", "false"),
    "thinking": ("true", "false"),
    "reasoning_effort": ("low", "medium", "high"),
    "thinking_budget": (),
}
_ON, _OFF = ("true", "on", "yes"), ("false", "off", "no")
# What other programs call these settings, and the options that are chosen when the model is loaded.
_OTHERS = {
    "temperature": "temp",
    "topk": "top_k",
    "topp": "top_p",
    "minp": "min_p",
    "repetition_penalty": "repeat_penalty",
    "num_predict": "max_tokens",
    "n_predict": "max_tokens",
    "max_new_tokens": "max_tokens",
    "max_completion_tokens": "max_tokens",
    "num_ctx": "ctx",
    "n_ctx": "ctx",
    "ctx_size": "ctx",
    "context": "ctx",
    "context_length": "ctx",
    "num_thread": "threads",
    "n_threads": "threads",
    "num_gpu": "n_gpu_layers",
    "system_prompt": "system",
}


@dataclass(frozen=True)
class ChatSetting:
    """Something that can be set.

    Attributes:
        name: of it.
        help: what it is, in a line.
        get: its value now.
        put: takes a value that was typed; raises ValueError with what it must be.
        choices: the values there are, if there are few.
    """

    name: str
    help: str
    get: Callable[[Chat], object]
    put: Callable[[Chat, str], None]
    choices: tuple[str, ...] = ()


def settings(chat: Chat) -> list[ChatSetting]:
    """All that can be set in a conversation."""
    return [*_sampling(), *OWN, *_template(chat)]


def _sampling() -> Iterator[ChatSetting]:
    for field, known in options_in(Sampling):
        name, kind = field.name, type(field.default)

        def put(chat: Chat, text: str, name: str = name, kind: type = kind, known: Any = known) -> None:
            low = known.minimum if known.above is None else known.above
            number = _number(text, kind, low, known.maximum, above=known.above is not None)
            chat.session.sampling = dataclasses.replace(chat.session.sampling, **{name: number})

        yield ChatSetting(name, known.help, lambda chat, name=name: getattr(chat.session.sampling, name), put)


def _number(text: str, kind: type, low: float | None, high: float | None, above: bool = False) -> float:
    must = "a whole number" if kind is int else "a number"
    form = ",d" if kind is int else "g"
    must += "" if low is None else f" above {low:{form}}" if above else f" of at least {low:{form}}"
    must += "" if high is None else f", {high:{form}} at most"
    try:
        number = kind(text)
    except ValueError:
        raise ValueError(must) from None
    # A comparison with NaN is false.
    if not (low is None or (number > low if above else number >= low)) or not (high is None or number <= high):
        raise ValueError(must)
    if number in (float("inf"), float("-inf")):
        raise ValueError(must)
    return number


def _put_max_tokens(chat: Chat, text: str) -> None:
    if text.lower() in ("none", "0", "-1", *_OFF):  # as other programs have it
        chat.terminal.max_tokens = None
        return
    try:
        chat.terminal.max_tokens = int(_number(text, int, 1, None))
    except ValueError as error:
        raise ValueError(f"{error}, or none") from None


def _put_on_full(chat: Chat, text: str) -> None:
    policy = text.replace("_", "-").lower()
    if policy not in POLICIES:
        raise ValueError(" or ".join(POLICIES))
    chat.terminal.on_full = policy


def _put_seed(chat: Chat, text: str) -> None:
    chat.session.llm.set_seed(None if text == "-1" else int(_number(text, int, -1, 2**32 - 2)))


def _put_plain(chat: Chat, text: str) -> None:
    if text.lower() not in (*_ON, *_OFF):
        raise ValueError("true or false")
    chat.terminal.plain = text.lower() in _ON


OWN = [
    ChatSetting("max_tokens", "End an answer after so many tokens; none: when the model ends it.",
                lambda chat: chat.terminal.max_tokens or "none", _put_max_tokens),
    ChatSetting("seed", "Seed of the sampler; -1: a new one each time.", lambda chat: chat.seed, _put_seed),
    ChatSetting("on_full", "What to do when the conversation fills the context.",
                lambda chat: chat.terminal.on_full, _put_on_full, POLICIES),
    ChatSetting("plain", "Show answers as they are, and not as Markdown.",
                lambda chat: json.dumps(chat.terminal.plain), _put_plain, ("true", "false")),
]  # fmt: skip


def _template(chat: Chat) -> Iterator[ChatSetting]:
    """What the chat template is told, as far as it reads it."""
    told = chat.session.template_arguments
    for name in dict.fromkeys([*TEMPLATE_ARGUMENTS, *told]):
        if chat.session.reads_argument(name):
            yield _template_setting(name)


def _template_setting(name: str) -> ChatSetting:
    def put(chat: Chat, text: str) -> None:
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        chat.session.set_template_arguments({**chat.session.template_arguments, name: value})

    def get(chat: Chat) -> object:
        value = chat.session.template_arguments.get(name, "as the model's template has it")
        return value if isinstance(value, str) else json.dumps(value)

    return ChatSetting(name, "Read by the model's chat template.", get, put, TEMPLATE_ARGUMENTS.get(name, ()))


def put(chat: Chat, text: str) -> None:
    """Show all settings, or one, or set one: ``temp 0.3``, ``temp=0.3``, ``temperature 0.3``.

    Raises:
        ClexError: there is none of the name, or it cannot have the value.
    """
    found = settings(chat)
    name, _, value = text.replace("=", " ", 1).strip().partition(" ")
    if name == "parameter" and value:  # as Ollama has it
        name, _, value = value.strip().partition(" ")
    name, value = name.lstrip("-").replace("-", "_"), value.strip()
    if not name:
        width = max(len(setting.name) for setting in found)
        lines = [f"{setting.name:{width}}  {setting.get(chat)!s:8}  {setting.help}" for setting in found]
        chat.terminal.note("\n".join(lines))
        return
    by_name = {setting.name: setting for setting in found}
    own = _OTHERS.get(name.lower(), name.lower())
    setting = by_name.get(name) or by_name.get(own)
    if setting is None:
        if not value or not name.isidentifier() or not chat.session.reads_argument(name):
            raise _no_setting(name, own, list(by_name))
        setting = _template_setting(name)
    if value:
        try:
            setting.put(chat, value)
        except ValueError as error:
            if isinstance(error, ClexError):  # of a template
                raise
            raise ClexError(f"{setting.name} must be {error}, not {escaped(value, 40)}") from None
        chat.keeper.changed()
    chat.terminal.note(f"{setting.name} = {setting.get(chat)}")


def _no_setting(name: str, own: str, names: list[str]) -> ClexError:
    """The error of a name that is none, with what is near it.

    Args:
        name: as it was typed.
        own: what we would call it.
        names: of the settings there are.
    """
    if own == "system":
        return ClexError("/system TEXT sets the system message")
    loaded = {field.name: known for options in (RunOptions, ChatOptions) for field, known in options_in(options)}
    if own in loaded:
        option = " ".join(filter(None, ["--" + own.replace("_", "-"), loaded[own].metavar]))
        hint = "/save keeps the conversation, and clex-chat --session NAME goes on with it"
        return ClexError(f"{own} is chosen when the model is loaded, by {option}: {hint}")
    known = {other: other for other in names} | {other: meant for other, meant in _OTHERS.items() if meant in names}
    begun = [other for other in known if len(own) > 2 and own in other]
    close = begun[:1] or difflib.get_close_matches(own, known, n=1, cutoff=0.7)
    hint = f"did you mean {known[close[0]]}? /set lists them" if close else f"there are {', '.join(names)}"
    return ClexError(f"there is no setting {escaped(name, 40)}; {hint}")


def words(chat: Chat) -> list[str]:
    """What can stand behind ``/set``: names, and names with values."""
    found = settings(chat)
    return [setting.name for setting in found] + [
        f"{setting.name} {choice}" for setting in found for choice in setting.choices
    ]
