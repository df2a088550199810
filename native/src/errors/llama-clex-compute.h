#pragma once

#include "llama-clex.h"

#include "ggml.h"

#include <cstdint>
#include <functional>

class llm_graph_result;
struct llama_context;

// What can go wrong with a batch that was accepted. Errors are logged; none leaves the C API as an exception.

// Compute a ubatch: null and a status where that threw, so that the caller takes the ubatch back.
llm_graph_result * llama_clex_compute(ggml_status & status, const std::function<llm_graph_result *()> & compute);

// Process a batch: -2 where memory is short, LLAMA_CLEX_DEVICE_LOST where a device of the context is gone, -3 where something
// else was thrown.
int32_t llama_clex_process(const llama_context & ctx, const std::function<int32_t()> & process);

// Whether all values are numbers, or there are none (null). A model that computes something else is damaged, or its numbers are too large for the
// types that it computes with; samplers would make a token of it.
bool llama_clex_finite(const float * values, int64_t n);
