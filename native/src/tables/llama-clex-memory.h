#pragma once

// The cache of the layers that see everything, null where a memory has none: what the tables are about.

struct llama_memory_context_i;
struct llama_memory_i;

class llama_kv_cache;

llama_kv_cache * llama_clex_kv(llama_memory_i * memory);
llama_kv_cache * llama_clex_kv(const llama_memory_context_i * mctx);
