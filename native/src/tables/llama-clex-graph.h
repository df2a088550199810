#pragma once

// The one place through which every RoPE of every architecture goes: a base of llm_graph_context whose members hide the
// functions of ggml that have their names.

#include "ggml.h"

#include <memory>

class llama_clex_rope_notes;

class llama_clex_graph {
public:
    // Layers that see everything are rotated with the table of their tokens. Layers with a sliding window, which never see
    // farther than it, and models without tables get what they ask for.
    ggml_tensor * ggml_rope_ext(ggml_context * ctx, ggml_tensor * a, ggml_tensor * b, ggml_tensor * c,
            int n_dims, int mode, int n_ctx_orig, float freq_base, float freq_scale,
            float ext_factor, float attn_factor, float beta_fast, float beta_slow) const;

    ggml_tensor * ggml_rope_multi(ggml_context * ctx, ggml_tensor * a, ggml_tensor * b, ggml_tensor * c,
            int n_dims, int sections[GGML_MROPE_SECTIONS], int mode, int n_ctx_orig, float freq_base, float freq_scale,
            float ext_factor, float attn_factor, float beta_fast, float beta_slow) const;

    // the layer whose nodes are being built; negative where they belong to none
    void clex_enter(int il) const;

    // Note how the keys of a layer are rotated that go into the cache; k is null where the layer reads those of another.
    // Returns the queries, multiplied where the tables ask for it.
    ggml_tensor * clex_attn(ggml_tensor * q, const ggml_tensor * k, int il) const;

    // The notes of the first graph tell the cache what to re-rotate. With tables, throws where the cache of the model holds
    // anything but keys as RoPE leaves them.
    void clex_finish() const;

protected:
    llama_clex_graph();
    ~llama_clex_graph();

private:
    llama_clex_rope_notes & clex_notes() const;

    mutable std::unique_ptr<llama_clex_rope_notes> clex;
};
