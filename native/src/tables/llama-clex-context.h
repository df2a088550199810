#pragma once

// What a context does about the tables of its model; llama_context::clex_* are beside these.

#include "llama.h"

#include <vector>

struct llama_cparams;
struct llama_memory_i;
struct llama_memory_params;
struct llama_model;

class llama_kv_cache;

// throws if rows of these cache types cannot hold the heads of a model with tables; stock aborts or computes NaN
void llama_clex_check_types(const llama_model & model, const llama_memory_params & params);

// layers with a sliding window keep the RoPE of the model, whatever the host asks for
void llama_clex_own_rope(const llama_model & model, llama_context_params & params);

// throws if the memory of the context cannot hold per-bucket keys
void llama_clex_init_context(const llama_model & model, const llama_cparams & cparams, llama_memory_i * memory);

// Forgets the declared lengths of the sequences that lose their last token while it lives: whoever uses their ids next
// means other texts. Only for removals that the host asks for: those after a failed decode are for it to be tried again.
class llama_clex_removal {
public:
    explicit llama_clex_removal(llama_memory_i * memory);
    ~llama_clex_removal();

    llama_clex_removal(const llama_clex_removal &) = delete;

private:
    llama_kv_cache * const kv; // null: nothing is declared in memory of this kind

    std::vector<llama_seq_id> seq_ids; // those with tokens and a declared length
};
