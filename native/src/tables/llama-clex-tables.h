#pragma once

// The RoPE tables of a model, by length; see llama-clex.h for what they are. Owned by the model and constant after loading.

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

struct llama_hparams;
struct llama_model_loader;

// FNV-1a, to be continued from the seed or from an earlier result
static constexpr uint64_t LLAMA_CLEX_HASH_SEED = 0xcbf29ce484222325ull;

void llama_clex_hash(uint64_t & hash, const void * data, size_t size);

struct llama_clex_tables {
    uint32_t n_ctx_orig = 0; // L
    uint32_t n_freq     = 0; // n_rot/2
    bool     log_scale  = false;
    float    rope_scale = 1.0f; // of the rotated part of queries and keys, LongRoPE's attention factor
    uint64_t hash       = 0;    // of everything that decides how keys are rotated and queries are scaled
    uint64_t model_hash = 0;    // of parts of the weights, so that a state finds its model again

    std::string method;

    std::vector<float> scaling_factors; // [n_bucket]
    std::vector<float> inv_freq;        // [n_bucket*n_freq], radians per position
    std::vector<float> attn_scale;      // [n_bucket], or empty

    bool enabled() const { return n_ctx_orig > 0; }

    // read and check the clex.* keys, or make the tables from LongRoPE factors; nothing happens if there are neither
    // throws std::runtime_error with the key and the rule that it breaks
    // sets hparams.n_ctx_train to the tokens that the last bucket covers
    void load(const llama_model_loader & ml, llama_hparams & hparams);

    void hash_model(llama_model_loader & ml);

    int64_t n_ctx_max() const;

    // the first bucket that covers so many tokens, -1 beyond the last one
    int32_t bucket_for(int64_t n_tokens) const;

    // the RoPE operator divides pos*base^(-2i/n_rot) by these; with base 1 the angle is pos*inv_freq
    std::vector<float> freq_factors(int32_t bucket) const;

    bool has_q_scale() const { return log_scale || !attn_scale.empty(); }

    // factor on the queries of a sequence of n_tokens
    float q_scale(int32_t bucket, int64_t n_tokens) const;

private:
    void load_longrope(const llama_model_loader & ml, const llama_hparams & hparams);

    void set_hash();
};
