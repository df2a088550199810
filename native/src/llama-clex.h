#pragma once

// Length-aware RoPE tables: what a host can ask and tell.
//
// A model whose GGUF holds clex.* keys carries one table of inverse frequencies per bucket. A sequence of n tokens uses
// the first bucket whose scaling factor t satisfies t*L >= n, L being the original context length. The library picks
// the table at every decode and re-rotates the cached keys of a sequence that enters another bucket.
//
// A cell of the cache has one key, so sequences that share cells (llama_memory_seq_cp in a unified cache, tokens of
// several sequences) use one bucket: that of the longest of them, in the batch or not, and also where two share with a
// third only. A short prompt that shares a system prompt with a long conversation thus gets the table of that
// conversation, as if its length had been declared, until one of them has none of those cells any more. Copies between
// streams (kv_unified = false) have cells of their own, and so has a state that is loaded: each goes by its own length.
//
// Keys of a quantized cache are kept as they were computed from the first re-rotation or shift on, where the context
// reaches a second bucket: every later one starts from them, so that a key has been rounded twice however often it is
// moved. They take as much memory as the keys of the cache, on a CPU only for cells that were re-rotated.
//
// A model with LongRoPE factors and without clex.* keys gets two buckets: the original context with the short factors,
// everything up to the model's context with the long ones. With LLAMA_CLEX_LONGROPE_DISABLE in the environment the size
// of the context decides, as in stock llama.cpp.

#include "llama.h"

#ifdef __cplusplus
extern "C" {
#endif

struct llama_clex_stats {
    int64_t n_rerotations; // times that cached keys were brought to another table
    int64_t n_cells;       // cells re-rotated, all layers of a cell counted once
    int64_t t_us;          // time spent on it, microseconds
};

// which table a sequence uses
enum llama_clex_policy {
    LLAMA_CLEX_POLICY_BY_LENGTH = 0, // that of its own length
    LLAMA_CLEX_POLICY_FIXED     = 1, // that of the context's size, whatever its length: nothing is ever re-rotated
};

//
// what a model takes
//

struct llama_clex_layers_info {
    int32_t n_table;     // layers that see everything and have RoPE: tables take its place
    int32_t n_windowed;  // layers with RoPE and a sliding window: they keep that of the model, whatever the length
    int32_t n_unrotated; // layers that see everything and have no RoPE
};

// Whether RoPE tables can be used with a model, with tables or without, read from the graph that it builds: a small context
// is made and freed again. No weights are needed: no_alloc and LLAMA_LOAD_MODE_NONE load a file without them. The keys of
// each layer must be cached as RoPE leaves them; what is behind it may only be what a rotation passes through. Layers with
// no RoPE are left alone.
// reason: why they cannot, cut to size bytes with its 0, empty if they can; both may be NULL
LLAMA_API bool llama_clex_takes_tables(struct llama_model * model, struct llama_clex_layers_info * layers, char * reason, size_t size);

//
// the tables of a model
//

// what made the tables ("clex", "ntk", ...); empty for a model without tables
LLAMA_API const char * llama_clex_method(const struct llama_model * model);

// number of buckets, 0 for a model without tables
LLAMA_API int32_t llama_clex_n_buckets(const struct llama_model * model);

// L, tokens covered at t = 1; 0 for a model without tables
LLAMA_API int32_t llama_clex_original_context(const struct llama_model * model);

// tokens covered by the last bucket; 0 for a model without tables
LLAMA_API int32_t llama_clex_max_context(const struct llama_model * model);

// scaling factor t of a bucket; 0 if there is no such bucket
LLAMA_API float llama_clex_scaling_factor(const struct llama_model * model, int32_t bucket);

// Copy the first n inverse frequencies of a bucket, in radians per position, to dst.
// Returns how many the bucket has, 0 if there is no such bucket; dst may be NULL where n is 0.
LLAMA_API int32_t llama_clex_inv_freq(const struct llama_model * model, int32_t bucket, float * dst, int32_t n);

// factor on the attention logits in a bucket, 1 where the tables name none; 0 if there is no such bucket
LLAMA_API float llama_clex_attn_scale(const struct llama_model * model, int32_t bucket);

// whether queries are multiplied by log(n_tokens)/log(L)
LLAMA_API bool llama_clex_log_scale(const struct llama_model * model);

// bucket of a sequence of n_tokens; -1 without tables or beyond the last bucket
LLAMA_API int32_t llama_clex_bucket(const struct llama_model * model, int64_t n_tokens);

// What llama_decode returns where an output is no number: the model is damaged, or its values are too large for the types
// that it is computed with. The last row of the logits is looked at, or of the embeddings. What is in the cache then is
// to be cleared with its data, since values that are no numbers reach every later token.
#define LLAMA_CLEX_NOT_FINITE (-4)

// What it returns when an RPC server is gone that computes layers: nothing can be computed until the model is loaded anew.
#define LLAMA_CLEX_DEVICE_LOST (-5)

//
// the sequences of a context
//

// Choose the policy; the default is BY_LENGTH and no clamping. clamp: sequences longer than the last bucket covers use
// its table (as the authors' code does) instead of being refused. Keys in the cache follow at the next decode.
// Returns false for a context without tables and for an unknown policy.
LLAMA_API bool llama_clex_set_policy(struct llama_context * ctx, enum llama_clex_policy policy, bool clamp);

// Declare the length that a sequence will have once its prompt is processed, so that every batch of a long prompt uses
// the table of the whole prompt. The longer of this and the actual length counts. 0 forgets it, and so does clearing
// the memory or removing the last token of the sequence (declare after that); removing a part of its tokens does not,
// nor does removing those of a sequence that has none. A copy of a whole sequence has the longer of both lengths, a copy
// of a part has its own. Returns false without tables, for an invalid sequence and for a length beyond the last bucket,
// unless clamped. A saved state carries it.
LLAMA_API bool llama_clex_seq_reserve(struct llama_context * ctx, llama_seq_id seq_id, int32_t n_tokens);

// bucket that the sequence used in the last decode that held it; -1 if there was none since its state was loaded
LLAMA_API int32_t llama_clex_seq_bucket(const struct llama_context * ctx, llama_seq_id seq_id);

LLAMA_API struct llama_clex_stats llama_clex_get_stats(const struct llama_context * ctx);

// whether a token sees only those before it; if not, all tokens of a sequence have to be in one ubatch
LLAMA_API bool llama_clex_causal(const struct llama_context * ctx);

//
// importance matrix for the quantizer
//

// of each matrix of the layers, the sums of squares of its inputs, for each expert apart
struct llama_clex_imatrix;

LLAMA_API struct llama_clex_imatrix * llama_clex_imatrix_init(void);
LLAMA_API void llama_clex_imatrix_free(struct llama_clex_imatrix * imatrix);

// llama_context_params.cb_eval, with the importance matrix as its user data: every later decode adds to it. Tokens
// whose logits are not asked for are missing from the last layer.
LLAMA_API bool llama_clex_imatrix_collect(struct ggml_tensor * t, bool ask, void * imatrix);

// Write it as llama.cpp's llama-imatrix does. n_chunks of chunk_size tokens were decoded of a text called dataset.
// Returns false if the file cannot be written.
LLAMA_API bool llama_clex_imatrix_save(const struct llama_clex_imatrix * imatrix, const char * path,
        const char * dataset, uint32_t n_chunks, uint32_t chunk_size);

#ifdef __cplusplus
}
#endif
