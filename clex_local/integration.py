"""Programs and frameworks that make ``llama_cpp.Llama`` themselves: LangChain, LlamaIndex, Haystack, llm, the server.

On the patched library that class declares the length of a prompt, so that what it computes is right by itself.
``install`` gives such programs our class in its place, with everything that it chooses and checks.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

# This is imported in the middle of the import of llama_cpp, and may be what imports it.
if TYPE_CHECKING:
    from llama_cpp import Llama as BindingsLlama


def declare_lengths(cls: type[BindingsLlama]) -> None:
    """Let ``cls.eval`` declare the length that the sequence will have, for all batches of the tokens to use one table.

    The method as it was is ``cls.eval.__wrapped__``.
    """
    from clex_local import llama_clex

    original = cls.eval

    @functools.wraps(original)
    def eval(self: BindingsLlama, tokens: Sequence[int]) -> None:
        # As the method does itself, too late: the declaration goes with the last token of what was cached.
        self._ctx.kv_cache_seq_rm(-1, self.n_tokens, -1)
        llama_clex.seq_reserve(self.ctx, 0, self.n_tokens + len(tokens))
        original(self, tokens)

    cls.eval = eval


def install() -> None:
    """Put ``clex_local.Llama`` in the place of ``llama_cpp.Llama``, for frameworks that make that themselves.

    Works before and after the framework is imported, and for ``from_pretrained`` too; classes that others derive from
    ``llama_cpp.Llama`` stay what they are. Calling it again changes nothing.

    Raises:
        ClexError: llama_cpp has loaded another library.
    """
    import llama_cpp

    from clex_local.llama import Llama

    original = next(base for base in Llama.__mro__ if base.__module__ == "llama_cpp.llama")

    def new(cls: type, *args: Any, **kwargs: Any) -> Any:
        # Whoever imported the class before holds it still: what it makes is ours.
        return object.__new__(Llama if cls is original else cls)

    original.__new__ = new
    llama_cpp.Llama = llama_cpp.llama.Llama = Llama
