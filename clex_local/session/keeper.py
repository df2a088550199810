"""Keeps the conversation at a terminal in a file: saved after every turn, gone on with in another process."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clex_local.errors import ClexError, escaped
from clex_local.library.interrupt import kept_until_return
from clex_local.session.exchange import AttachedFile, Exchange, file_names
from clex_local.session.folder import KeptSession, file_name, is_session, listed_sessions, sessions_folder
from clex_local.session.saved_session import SavedSession, SessionError, SessionModel

if TYPE_CHECKING:
    from clex_local.session.session import Session


@dataclass
class SessionKeeper:
    """The file of a conversation, if it has one.

    Attributes:
        session: the conversation.
        tell: says a line to the person; the second argument is whether it is a failure.
        chat_template: by its name in the command.
        run: options that decide how the cache is laid out, see ``SavedSession``.
        kept: the file.
        unanswered: a message that was saved before its answer, and has none.
        failure: why what was said last could not be saved; None where it was, or where nothing is to be.
    """

    session: Session
    tell: Callable[[str, bool], None]
    chat_template: str = "model"
    run: dict[str, Any] = field(default_factory=dict)
    kept: KeptSession | None = None
    unanswered: Exchange | None = None
    failure: SessionError | None = None
    _model: SessionModel | None = None
    _answered: bool = False  # since the session was opened
    _changed: list[AttachedFile] = field(default_factory=list)  # since they were sent, and said to be

    @property
    def name(self) -> str | None:
        """Of the session, None where the conversation is not saved."""
        return self.kept.name if self.kept else None

    @property
    def model(self) -> SessionModel:
        """The model that is loaded."""
        if self._model is None:
            from clex_local.runtime.prompt_cache import model_number  # the library is loaded by now

            llm = self.session.llm
            name = llm.metadata.get("general.name") or Path(llm.model_path).name
            identity = ""
            with suppress(ClexError, OSError):  # the file may be gone since it was loaded
                identity = f"{model_number(llm, llm._options):016x}"
            self._model = SessionModel(str(Path(llm.model_path).absolute()), name, identity)
        return self._model

    @property
    def _is_new(self) -> bool:
        """Whether the file never had an answer in it."""
        return self.kept is None or self.kept.saved is None or not self.kept.saved.turns

    @contextmanager
    def turn(
        self, message: str, files: Sequence[AttachedFile], typed_from: int = 0, replaces: bool = False
    ) -> Iterator[None]:
        """Save the message before the block answers it, and the answer after that, whole or not.

        Args:
            message: what is asked.
            files: what the message was made of.
            typed_from: where in it what was typed begins.
            replaces: it takes the place of the last one, whose file is left alone until there is an answer.
        """
        before, waiting = len(self.session.exchanges) - replaces, self.unanswered
        if waiting and waiting.message != message:
            self.tell(f"[not answered until now: {self.waiting(60)}; left out once this message is answered]", False)
        if not replaces:
            self.unanswered = Exchange(message, files=list(files), typed_from=typed_from)
            with suppress(SessionError):  # said when the answer cannot be saved either
                self._save()
        try:
            yield
        finally:
            self.unanswered = waiting  # lost by an answer only
            if len(self.session.exchanges) > before and self.session.exchanges[-1].message == message:
                last = self.session.exchanges[-1]
                last.files, last.typed_from = list(files), typed_from
                self._answered, self.unanswered = True, None
            with suppress(SessionError):  # said behind the answer
                self._save()

    def waiting(self, longest: int) -> str:
        """The message that has no answer, in words: what was typed, so many letters of it, and the names of files."""
        waiting = self.unanswered
        assert waiting is not None
        # Of a script it is not known where its files end: at its last line at the latest.
        typed = (
            waiting.message.strip().rpartition("\n")[2] if waiting.files and not waiting.typed_from else waiting.typed
        )
        names = file_names([waiting])
        return f"“{escaped(' '.join(typed.split()), longest)}”" + (f", with {', '.join(names)}" if names else "")

    def changed(self) -> None:
        """Save a conversation that was changed otherwise than by a turn, and say where that fails."""
        try:
            self._save()
        except SessionError as error:
            self.tell(str(error), True)

    def _save(self) -> None:
        try:
            self._write()
        except SessionError as error:
            self.failure = error
            raise
        self.failure = None

    def _write(self) -> None:
        if self.kept is None:
            return
        if not self.session.exchanges and self.unanswered is None and self._is_new:
            self.kept.discard()  # of a first message that could not be answered
            return
        created = {"created": self.kept.saved.created} if self.kept.saved else {}
        # Options that let nothing be answered, such as a context that is too small, are not those to go on with.
        run = self.run if self._answered or not self.kept.saved else self.kept.saved.run
        saved = SavedSession(
            name=self.kept.name,
            model=self.model,
            system=self.session.system,
            chat_template=self.chat_template,
            sampling=self.session.sampling,
            run=run,
            turns=self.session.exchanges,
            unanswered=self.unanswered,
            left_out=self.session.left_out,
            summary=self.session.summary,
            template_arguments=self.session.template_arguments,
            began=self.session.began,
            **created,
        )
        with kept_until_return():  # a second Ctrl-C does not cost what the first one left
            note = self.kept.write(saved)
        if note:
            self.tell(note, True)

    def save(self, name: str) -> None:
        """Save the conversation, under a new name where one is given, and go on in that file.

        Raises:
            SessionError: it cannot be written, or the name is taken by another session.
        """
        if self.kept and (not name or file_name(name) == file_name(self.kept.name)):
            self._save()
        else:
            new = KeptSession(sessions_folder(), name or datetime.now().strftime("%Y-%m-%d-%H%M%S"))
            if new.saved is not None:
                new.close()
                raise SessionError(f"there is a session {new.name} already: /load {new.name} goes on with it")
            old, failure, self.kept = self.kept, self.failure, new
            try:
                self._save()
            except SessionError:
                new.close()
                self.kept, self.failure = old, failure  # the old file is as it was
                raise
            if old:
                old.close()
        assert self.kept is not None
        if self.kept.saved is None:
            self.tell(f"there is nothing to save yet: it will be {self.kept.name}, from the first message on", False)
        else:
            self.tell(f"saved as {self.kept.name}, and after every answer from now on", False)

    def load(self, name: str) -> None:
        """Go on with another session.

        Raises:
            SessionError: there is none, it cannot be read, or what was said is not saved.
            ClexError: the model's template refuses it.
        """
        if not name:
            raise SessionError("/load needs the name of a session; /sessions lists them")
        if self.kept and file_name(name) == file_name(self.kept.name):
            raise SessionError(f"this is the session {self.kept.name}")
        if not is_session(sessions_folder(), name):
            raise _missing(name)
        if self.session.exchanges and (self.kept is None or self.failure):
            raise SessionError("this conversation is not saved: /save NAME keeps it, /reset forgets it")
        kept = KeptSession(sessions_folder(), name)
        try:
            if kept.saved is None:  # removed in this moment
                raise _missing(name)
            self._take(kept.saved)
        except BaseException:
            kept.close()
            raise
        self.close()
        self.kept = kept
        self.session.sampling = kept.saved.sampling
        self.describe()

    def resume(self) -> None:
        """Take up what is in the file that the conversation was opened with.

        Raises:
            ClexError: the model's template refuses it.
        """
        if self.kept and self.kept.saved:
            self._take(self.kept.saved)

    def _take(self, saved: SavedSession) -> None:
        if saved.chat_template != self.chat_template:
            raise SessionError(f"the session {saved.name} needs --chat-template {saved.chat_template}")
        before, self.session.template_arguments = self.session.template_arguments, saved.template_arguments
        try:
            self.session.resume(saved.turns, saved.system, saved.began, saved.left_out, saved.summary)
        except BaseException:
            self.session.template_arguments = before
            raise
        self.unanswered = saved.unanswered

    @property
    def sent_files(self) -> list[AttachedFile]:
        """The files that are part of prompts."""
        in_prompts = self.session.exchanges[self.session.left_out :]
        return [file for exchange in in_prompts for file in exchange.files]

    def tell_changes(self, anew: Collection[str] = (), hint: bool = True) -> None:
        """Say once of each file that was sent that it is no more as it was.

        Args:
            anew: paths of those that are about to be sent as they are now.
            hint: say how that is done.
        """
        sent = {file.path: file for file in self.sent_files}  # the last one of each path
        for path, file in sent.items():
            if file not in self._changed and path not in anew and (change := file.change()):
                self._changed.append(file)
                kept = "the conversation has it as it was"
                kept += "; /file sends it anew" if hint and os.path.exists(path) else ""
                self.tell(f"[{escaped(path)} {change} since it was attached: {kept}]", False)

    def describe(self, changes_only: bool = False, anew: Collection[str] = ()) -> None:
        """Say what has been taken up, and what is no more as it was then.

        Args:
            changes_only: nobody is there to talk to.
            anew: paths of files that are about to be sent.
        """
        saved = self.kept and self.kept.saved
        if not saved:
            return
        turns = f"{len(saved.turns)} turn{'s' if len(saved.turns) != 1 else ''}"
        if not changes_only:
            when = f", saved {local_time(saved.saved)}" if saved.saved else ""
            self.tell(f"session {saved.name}: {turns}, {self.session.used:,} tokens{when}", False)
        if saved.turns and saved.model.identity != self.model.identity:
            was, read = saved.model, f"its {self.session.used:,} tokens are read again"
            if was.path == self.model.path:
                self.tell(f"[{saved.name}: the model or its tables are not as they were: {read}]", False)
            else:
                self.tell(f"[{saved.name}: until now with {was.name} ({was.path}): {read}]", False)
        self._changed.clear()
        self.tell_changes(anew, hint=not changes_only)

    def listing(self) -> str:
        """Every session, a line each."""
        lines, items = [], list(listed_sessions())
        width = max((len(item.name) for item in items), default=0)
        for item in items:
            name = f"{'*' if self.name == item.name else ' '} {item.name:{width}}"
            if (session := item.session) is None:
                lines.append(f"{name}  ({item.fault})")
            else:
                turns = f"{len(session.turns):,} turn{'s' if len(session.turns) != 1 else ''}"
                lines.append(f"{name}  {local_time(session.saved)}  {turns:8}  {session.model.name}")
        return "\n".join(lines) or f"no sessions in {sessions_folder()}; /save NAME makes one"

    def forget(self) -> str:
        """Leave the file as it is, because the conversation is forgotten; what there is to say of that."""
        name, self.unanswered = self.name, None
        self.close()
        return f"; session {name} stays as it was saved, /load {name} goes on with it" if name else ""

    def close(self) -> None:
        """Let others have the file."""
        if self.kept:
            self.kept.close()
        self.kept = self.failure = None


def _missing(name: str) -> SessionError:
    """The error of a session that is none, with what is near its name."""
    names = {item.name.lower(): item.name for item in listed_sessions()}
    typed = name.lower()
    close = [other for other in names if typed in other][:1] or difflib.get_close_matches(typed, names, n=1)
    hint = f"did you mean {escaped(names[close[0]])}? " if close else ""
    return SessionError(f"there is no session {escaped(name)}; {hint}/sessions lists them")


def local_time(text: str) -> str:
    """A time as the person's clock shows it."""
    try:
        return datetime.fromisoformat(text).astimezone().strftime("%Y-%m-%d %H:%M")
    except ValueError:  # changed by hand
        return text
