"""The functions of llama-clex-store.h, for ctypes; see that header for what they do."""

from __future__ import annotations

import ctypes

import llama_cpp

from clex_local.library.llama_clex import declare

BLOCK = 256  # tokens, LLAMA_CLEX_STORE_BLOCK
EXACT = 1  # LLAMA_CLEX_STORE_EXACT


class Stats(ctypes.Structure):
    """``llama_clex_store_stats``."""

    _fields_ = (
        ("n_restored", ctypes.c_int64),
        ("n_stored", ctypes.c_int64),
        ("n_skipped", ctypes.c_int64),
        ("n_damaged", ctypes.c_int64),
        ("n_evicted", ctypes.c_int64),
        ("n_bytes", ctypes.c_int64),
        ("max_bytes", ctypes.c_int64),
        ("t_restore_us", ctypes.c_int64),
        ("t_store_us", ctypes.c_int64),
        ("stopped", ctypes.c_bool),
    )


class Document(ctypes.Structure):
    """``llama_clex_store_document``."""

    _fields_ = (
        ("name", ctypes.c_char * 65),
        ("model", ctypes.c_char * 128),
        ("model_id", ctypes.c_char * 33),
        ("begin", ctypes.c_char * 256),
        ("type_k", ctypes.c_int32),
        ("type_v", ctypes.c_int32),
        ("n_tokens", ctypes.c_int64),
        ("n_bytes", ctypes.c_int64),
        ("n_bytes_own", ctypes.c_int64),
        ("t_created", ctypes.c_int64),
        ("t_used", ctypes.c_int64),
    )


class Check(ctypes.Structure):
    """``llama_clex_store_check_result``."""

    _fields_ = (
        ("n_files", ctypes.c_int64),
        ("n_bytes", ctypes.c_int64),
        ("n_damaged", ctypes.c_int64),
        ("n_orphans", ctypes.c_int64),
    )


_store = ctypes.c_void_p
_context = llama_cpp.llama_context_p_ctypes
_tokens = ctypes.POINTER(ctypes.c_int32)

open_ = declare("llama_clex_store_open", ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int64)
close = declare("llama_clex_store_close", None, _store)
_takes = declare("llama_clex_store_takes", ctypes.c_bool, _store, _context, ctypes.c_char_p, ctypes.c_size_t)
restore = declare(
    *("llama_clex_store_restore", ctypes.c_int32, _store, _context, ctypes.c_int32, _tokens),
    *(ctypes.c_int32, ctypes.c_int32, ctypes.c_uint32),
)
save = declare("llama_clex_store_save", ctypes.c_int32, _store, _context, ctypes.c_int32, _tokens, ctypes.c_int32)
flush = declare("llama_clex_store_flush", ctypes.c_bool, _store)
get_stats = declare("llama_clex_store_get_stats", Stats, _store)
list_ = declare("llama_clex_store_list", ctypes.c_int32, _store, ctypes.POINTER(Document), ctypes.c_int32)
remove = declare("llama_clex_store_remove", ctypes.c_int64, _store, ctypes.c_char_p)
clear = declare("llama_clex_store_clear", ctypes.c_int64, _store)
check = declare("llama_clex_store_check", Check, _store)


def refusal(store: object, context: object) -> str | None:
    """Why sequences of a context cannot be stored; None if they can."""
    reason = ctypes.create_string_buffer(512)
    if _takes(store, context, reason, len(reason)):
        return None
    return reason.value.decode("utf-8", errors="replace")
