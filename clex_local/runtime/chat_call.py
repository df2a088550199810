"""A chat completion around the completion that its handler makes: what a handler drops, and what it leaves out."""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import llama_cpp
from llama_cpp import LlamaGrammar

from clex_local.grammar.grammar import grammar_of_schema
from clex_local.runtime.completion_arguments import CompletionError
from clex_local.runtime.logprobs import token_bytes


@dataclass
class ChatCall:
    """What a chat handler is not sure to pass on to ``create_completion``, and what it leaves out of its answer."""

    llm: llama_cpp.Llama | None
    seed: int | None
    logit_bias: Mapping[Any, float] | None
    tool: LlamaGrammar | None  # of the chosen tool's arguments
    finish_reason: str | None = None
    usage: dict[str, int] = field(default_factory=dict)


CHAT_CALL: ContextVar[ChatCall | None] = ContextVar("chat call", default=None)


def complete_tools(given: dict[str, Any]) -> LlamaGrammar | None:
    """Complete the tools of a chat, for handlers that ignore what they do not know; the grammar of the one chosen."""
    functions, tools = given.get("functions"), given.get("tools")
    if functions is not None:
        given["functions"] = functions = [_complete_function(function) for function in functions]
    if tools is not None:
        given["tools"] = [{**tool, "function": _complete_function(tool["function"])} for tool in tools]
        functions = [tool["function"] for tool in given["tools"]] if functions is None else functions
    if given.get("tool_choice") == "required" and functions:
        if len(functions) > 1:
            raise CompletionError("tool_choice 'required' is not supported with more than one tool: name one of them")
        given["tool_choice"] = {"type": "function", "function": {"name": functions[0]["name"]}}
    chosen = given.get("function_call") or given.get("tool_choice")
    if isinstance(chosen, Mapping):
        name = chosen.get("function", chosen).get("name")
        for function in functions or []:
            if function["name"] == name:
                return grammar_of_schema(function["parameters"], f"the parameters of the tool {name!r}")
    return None


def _complete_function(function: Mapping[str, Any]) -> dict[str, Any]:
    parameters = function.get("parameters") or {"type": "object", "properties": {}}
    return {**function, "parameters": parameters}


def chat_answer(answer: dict[str, Any], call: ChatCall, n_top: int) -> dict[str, Any]:
    """An answer of a chat handler, or a part of one, as OpenAI's API gives it."""
    for choice in answer["choices"]:
        if choice["finish_reason"] == "tool_calls" and call.finish_reason == "length":
            choice["finish_reason"] = "length"  # the arguments are cut off
        for token in (choice.get("logprobs") or {}).get("content") or ():
            token["top_logprobs"] = token["top_logprobs"][:n_top]
            for entry in (token, *token["top_logprobs"]):
                entry["bytes"] = list(token_bytes(entry["token"]))
        if choice["finish_reason"] is not None and call.usage:
            answer.setdefault("usage", call.usage)
    return answer
