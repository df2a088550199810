#pragma once

// What llama-server does for models with tables by length, see llama-clex.h. Nothing here has an effect on others.

#include "llama-clex.h"

#include "json.h"

#include <cstdint>
#include <vector>

// Declare how many tokens a sequence is about to have, in both contexts; ctx_dft may be null. Every prompt does, once what
// it does not reuse is removed: what was declared before, or came with a restored state, would count on.
void server_clex_declare(llama_context * ctx_tgt, llama_context * ctx_dft, llama_seq_id seq_id, int32_t n_tokens);

// How many of n_draft guesses may follow the sampled token of a sequence of n_tokens. A rejected guess beyond the end of
// the bucket would have all keys rotated there and back; where the length scales queries, each guess changes the others.
int32_t server_clex_n_draft_max(
        llama_context * ctx_tgt, llama_context * ctx_dft, llama_seq_id seq_id, int32_t n_tokens, int32_t n_draft);

// n_ctx, or the tokens that the draft model's tables cover where they are fewer; ctx_dft may be null
int32_t server_clex_n_ctx(llama_context * ctx_dft, int32_t n_ctx);

// the tables of a model as /props has them, null where there are none
common_json server_clex_props(const llama_model * model);

// the table that a conversation uses, and what was re-rotated since its request began, by the others of the context too
struct server_clex_use {
    int32_t bucket = -1; // -1 without a request
    float   t      = 0;
    int64_t covers = 0;  // tokens of the bucket

    llama_clex_stats stats = {};

    // with the table that a prompt of n_tokens will have
    const server_clex_use & start(llama_context * ctx, int32_t n_tokens);

    // after each decode
    void update(llama_context * ctx, llama_seq_id seq_id);

    common_json to_json() const;

private:
    void show(const llama_model * model, int32_t in_use);

    llama_clex_stats stats_start = {};
};

// With which table each token of a sequence was computed, by its position. Values and keys of a token depend on those before
// it, so that a prefix is what a prompt alone would give only as far as it was computed with the prompt's table.
class server_clex_history {
public:
    void clear() { tables.clear(); }

    // a decode has computed a token of a sequence that has, or was declared to have, n_tokens
    void record(llama_context * ctx, llama_seq_id seq_id, llama_pos pos, int32_t n_tokens);

    // tokens from n_past on, n in all, came from the document store; exact: they are what a prompt of n_tokens alone gives
    void restored(llama_context * ctx, int32_t n_past, int32_t n, int32_t n_tokens, bool exact);

    // how many of n_past tokens a prompt of n_tokens may reuse: all, or with LLAMA_CLEX_PREFIX_REUSE=exact in the environment
    // those that were computed with its table
    int32_t reusable(llama_context * ctx, int32_t n_past, int32_t n_tokens) const;

    // What the cells of a sequence know of their text, which the document store asks for: kept while its state is in memory.
    void keep_origin(llama_context * ctx, llama_seq_id seq_id);
    void give_origin(llama_context * ctx, llama_seq_id seq_id);

    // Behind the tokens of a saved slot.
    void append_to(std::vector<char> & packed) const;
    void take_from(std::vector<llama_token> & packed);

private:
    std::vector<int32_t> tables;
    std::vector<uint8_t> origin;
};

// whether only exact prefixes are reused; chunks that are shifted to another position never are
bool server_clex_exact(llama_context * ctx);

// Remove the items for which gone() holds from off on. Returns where each item is now, -1 for those that are gone.
template <typename T, typename F>
std::vector<int32_t> server_clex_remove(std::vector<T> & items, size_t off, F gone) {
    std::vector<int32_t> moved(items.size());

    size_t n = 0;
    for (size_t i = 0; i < items.size(); ++i) {
        moved[i] = i >= off && gone(items[i]) ? -1 : (int32_t) n;
        if (moved[i] >= 0) {
            items[n++] = items[i];
        }
    }
    items.resize(n);

    return moved;
}
