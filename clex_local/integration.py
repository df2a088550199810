"""Programs and frameworks that make ``llama_cpp.Llama`` themselves: LangChain, LlamaIndex, Haystack, llm, the server.

On the patched library that class declares the length of a prompt, so that what it computes is right by itself.
``install`` gives such programs our class in its place, with everything that it chooses and checks.
"""

from __future__ import annotations

from typing import Any


def install() -> None:
    """Put ``clex_local.Llama`` in the place of ``llama_cpp.Llama``, for frameworks that make that themselves.

    Works before and after the framework is imported, and for ``from_pretrained`` too; classes that others derive from
    ``llama_cpp.Llama`` stay what they are. Calling it again changes nothing.

    Raises:
        ClexError: llama_cpp has loaded another library.
    """
    import llama_cpp

    from clex_local.runtime.llama import Llama

    original = next(base for base in Llama.__mro__ if base.__module__ == "llama_cpp.llama")

    def new(cls: type, *args: Any, **kwargs: Any) -> Any:
        # Whoever imported the class before holds it still: what it makes is ours.
        return object.__new__(Llama if cls is original else cls)

    original.__new__ = new
    llama_cpp.Llama = llama_cpp.llama.Llama = Llama
