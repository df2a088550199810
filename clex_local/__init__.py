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

from clex_local._library import library_path, use_library
from clex_local.errors import ClexError, ModelError

if TYPE_CHECKING:
    from clex_local.arguments import ArgumentError, ContextWarning
    from clex_local.clex_state import ClexState
    from clex_local.completion import CompletionError
    from clex_local.decoding import DecodeError
    from clex_local.devices import WorkerError
    from clex_local.documents.document import DocumentError
    from clex_local.embedding import EmbeddingError
    from clex_local.exchange import AttachedFile, Exchange
    from clex_local.extension import ExtensionError
    from clex_local.gguf_file import GGUFError
    from clex_local.grammar import GrammarError
    from clex_local.inspection import Inspection, inspect
    from clex_local.integration import install
    from clex_local.lifetime import ClosedError
    from clex_local.llama import Llama, StateError
    from clex_local.opening import open_model
    from clex_local.run_options import RunOptions
    from clex_local.sampler import SamplingError
    from clex_local.sampling import Sampling
    from clex_local.saved_session import SessionError
    from clex_local.serve_options import ServeOptions
    from clex_local.server import Server, ServerError
    from clex_local.serving import serve
    from clex_local.session import Answer, PromptTooLong, Session
    from clex_local.settings import Settings
    from clex_local.store import Document, DocumentStore, StoreError
    from clex_local.tables import ContextError, NewerVersionError, TablesError
    from clex_local.templates import TemplateError, TextError
    from clex_local.turn import StreamError
    from clex_local.vocabulary import TokenError

# Loading the library takes a while, and reading metadata or `--help` does without: the module of a name is imported
# when the name is first asked for.
_MODULES = {
    "arguments": ["ArgumentError", "ContextWarning"],
    "completion": ["CompletionError"],
    "decoding": ["DecodeError"],
    "devices": ["WorkerError"],
    "embedding": ["EmbeddingError"],
    "documents.document": ["DocumentError"],
    "exchange": ["AttachedFile", "Exchange"],
    "extension": ["ExtensionError"],
    "gguf_file": ["GGUFError"],
    "grammar": ["GrammarError"],
    "inspection": ["Inspection", "inspect"],
    "integration": ["install"],
    "lifetime": ["ClosedError"],
    "clex_state": ["ClexState"],
    "llama": ["Llama", "StateError"],
    "settings": ["Settings"],
    "opening": ["open_model"],
    "run_options": ["RunOptions"],
    "sampler": ["SamplingError"],
    "sampling": ["Sampling"],
    "saved_session": ["SessionError"],
    "serve_options": ["ServeOptions"],
    "server": ["Server", "ServerError"],
    "serving": ["serve"],
    "session": ["Answer", "PromptTooLong", "Session"],
    "store": ["Document", "DocumentStore", "StoreError"],
    "tables": ["ContextError", "NewerVersionError", "TablesError"],
    "templates": ["TemplateError", "TextError"],
    "turn": ["StreamError"],
    "vocabulary": ["TokenError"],
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
