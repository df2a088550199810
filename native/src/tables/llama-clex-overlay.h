#pragma once

#include "llama.h"

#include <string>
#include <unordered_map>

struct gguf_context;

// Keys that a host has made for a file, such as tables, in the place of the file's own: as though it had been converted.
// They come in a small GGUF file without tensors, which an override of the key clex.overlay names. Its key
// clex.overlay.removed has the names of keys that go, one a line, and clex.overlay.model the file that they are for: other
// models that are loaded with the same overrides, such as a draft model, keep their own.
// What stays in the overrides is a hash of the keys, since overrides are a part of a model's identity.
// throws std::runtime_error where that file cannot be read
void llama_clex_overlay(
        gguf_context * meta, std::unordered_map<std::string, llama_model_kv_override> & overrides, const std::string & fname);
