"""Run quantized models on contexts longer than they were trained for.

Importing this package makes llama-cpp-python use the patched llama.cpp. Where the bindings have a library of their own,
import it before ``llama_cpp``.

``open_model`` loads a file with a context that its tables and the memory hold; ``Llama``, which it gives, is
llama-cpp-python's class with every argument of it, and an ``on_prefill`` that is told of a prompt's progress.
``Session`` is a conversation with a model, ``inspect`` tells what is in a file, and ``install`` gives our class to
frameworks that make ``llama_cpp.Llama`` themselves. ``serve`` answers other programs over HTTP. A ``DocumentStore`` has
what was computed of texts, for later processes. What a person can mend is a ``ClexError``; its kinds are here too.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from clex_local.errors import ClexError, ModelError
from clex_local.library.loading import library_path, use_library

if TYPE_CHECKING:
    from clex_local.documents.document import DocumentError
    from clex_local.grammar.grammar import GrammarError
    from clex_local.inspection.inspection import Inspection, inspect
    from clex_local.integration import install
    from clex_local.library.decoding import DecodeError
    from clex_local.library.devices import WorkerError
    from clex_local.model_file.extension import ExtensionError
    from clex_local.model_file.gguf_file import GGUFError
    from clex_local.model_file.tables import ContextError, NewerVersionError, TablesError
    from clex_local.runtime.arguments import ArgumentError, ContextWarning
    from clex_local.runtime.clex_state import ClexState
    from clex_local.runtime.completion_arguments import CompletionError
    from clex_local.runtime.embedding import EmbeddingError
    from clex_local.runtime.lifetime import ClosedError
    from clex_local.runtime.llama import Llama
    from clex_local.runtime.opening import open_model
    from clex_local.runtime.run_options import RunOptions
    from clex_local.runtime.sampler import SamplingError
    from clex_local.runtime.sampling import Sampling
    from clex_local.runtime.saved_state import StateError
    from clex_local.runtime.settings import Settings
    from clex_local.runtime.turn import StreamError
    from clex_local.runtime.vocabulary import TokenError
    from clex_local.server.options import ServeOptions
    from clex_local.server.process import Server, ServerError
    from clex_local.server.serving import serve
    from clex_local.session.answer import Answer
    from clex_local.session.exchange import AttachedFile, Exchange
    from clex_local.session.saved_session import SessionError
    from clex_local.session.session import PromptTooLong, Session
    from clex_local.store.documents import Document, DocumentStore, StoreError
    from clex_local.templates.chat_template import TemplateError, TextError

# Loading the library takes a while, and reading metadata or `--help` does without: the module of a name is imported
# when the name is first asked for.
_MODULES = {
    "runtime.arguments": ["ArgumentError", "ContextWarning"],
    "runtime.completion_arguments": ["CompletionError"],
    "library.decoding": ["DecodeError"],
    "library.devices": ["WorkerError"],
    "runtime.embedding": ["EmbeddingError"],
    "documents.document": ["DocumentError"],
    "session.exchange": ["AttachedFile", "Exchange"],
    "model_file.extension": ["ExtensionError"],
    "model_file.gguf_file": ["GGUFError"],
    "grammar.grammar": ["GrammarError"],
    "inspection.inspection": ["Inspection", "inspect"],
    "integration": ["install"],
    "runtime.lifetime": ["ClosedError"],
    "runtime.clex_state": ["ClexState"],
    "runtime.llama": ["Llama"],
    "runtime.settings": ["Settings"],
    "runtime.opening": ["open_model"],
    "runtime.run_options": ["RunOptions"],
    "runtime.sampler": ["SamplingError"],
    "runtime.sampling": ["Sampling"],
    "runtime.saved_state": ["StateError"],
    "session.saved_session": ["SessionError"],
    "server.options": ["ServeOptions"],
    "server.process": ["Server", "ServerError"],
    "server.serving": ["serve"],
    "session.answer": ["Answer"],
    "session.session": ["PromptTooLong", "Session"],
    "store.documents": ["Document", "DocumentStore", "StoreError"],
    "model_file.tables": ["ContextError", "NewerVersionError", "TablesError"],
    "templates.chat_template": ["TemplateError", "TextError"],
    "runtime.turn": ["StreamError"],
    "runtime.vocabulary": ["TokenError"],
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "Answer",
    "ArgumentError",
    "AttachedFile",
    "ClexError",
    "ClexState",
    "ClosedError",
    "CompletionError",
    "ContextError",
    "ContextWarning",
    "DecodeError",
    "Document",
    "DocumentError",
    "DocumentStore",
    "EmbeddingError",
    "Exchange",
    "ExtensionError",
    "GGUFError",
    "GrammarError",
    "Inspection",
    "Llama",
    "ModelError",
    "NewerVersionError",
    "PromptTooLong",
    "RunOptions",
    "Sampling",
    "SamplingError",
    "ServeOptions",
    "Server",
    "ServerError",
    "Session",
    "SessionError",
    "Settings",
    "StateError",
    "StoreError",
    "StreamError",
    "TablesError",
    "TemplateError",
    "TextError",
    "TokenError",
    "WorkerError",
    "inspect",
    "install",
    "library_path",
    "open_model",
    "serve",
]

use_library()


def __getattr__(name: str) -> object:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"clex_local.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
