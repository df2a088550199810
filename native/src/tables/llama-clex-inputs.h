#pragma once

// What the tables put into a graph.

#include "llama-graph.h"

#include <cstdint>
#include <map>
#include <vector>

struct llama_clex_rope;

class llama_kv_cache;

// The tokens of a ubatch lie side by side that are in one bucket. Each such run is rotated with its own factors, and
// everything else of the graph is common.
class llm_graph_input_clex : public llm_graph_input_i {
public:
    // adds tensors to the graph
    llm_graph_input_clex(const llama_kv_cache & kv, const llm_graph_context & graph);

    void set_input(const llama_ubatch * ubatch) override;

    bool can_reuse(const llm_graph_params & params) override;

    // queries or keys [n_embd_head, n_head, n_tokens], rotated; pos is the model's own input of positions
    ggml_tensor * rotate(const llama_clex_rope & rope, ggml_tensor * cur, ggml_tensor * pos);

    ggml_tensor * q_scale = nullptr; // F32 [1, 1, n_tokens], null where the tables ask for none

private:
    using run_starts = std::vector<int64_t>; // the first token of each run, and behind the last one

    run_starts runs_of(const llama_ubatch & ubatch) const;

    ggml_tensor * positions(const llama_clex_rope & rope, ggml_tensor * pos, size_t run);

    const llama_kv_cache & kv;

    ggml_context * const ctx;

    const run_starts runs;

    ggml_tensor * factors = nullptr; // F32 [n_rot/2, runs]

    std::map<ggml_tensor *, std::vector<ggml_tensor *>> pos_of_runs; // of each input of positions
};
