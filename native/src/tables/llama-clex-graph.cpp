#include "llama-clex-graph.h"

#include "llama-clex-inputs.h"
#include "llama-clex-memory.h"
#include "llama-clex-rope.h"

#include "llama-graph.h"
#include "llama-impl.h"
#include "llama-kv-cache.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <unordered_map>

// what is known of a graph while it is built
class llama_clex_rope_notes {
public:
    // what a call of RoPE made
    struct result {
        llama_clex_rope rope;
        bool            by_table;
    };

    explicit llama_clex_rope_notes(const llm_graph_context & graph) :
        graph(graph), hparams(graph.hparams), kv(llama_clex_kv(graph.mctx)) {
        with_tables = kv && kv->clex.tables.enabled();
    }

    // nothing is to be learnt of a model without tables whose layers are known
    bool active() const { return kv && (with_tables || !kv->clex.layers.known); }

    bool is_windowed(int il) const {
        return il >= 0 && il < (int) hparams.n_layer_all && hparams.is_swa(il);
    }

    llm_graph_input_clex & inputs() {
        if (!inp) {
            inp = static_cast<llm_graph_input_clex *>(graph.res->add_input(std::make_unique<llm_graph_input_clex>(*kv, graph)));
        }
        return *inp;
    }

    // with the table; null where the layer or the model has none
    ggml_tensor * rotate(ggml_tensor * a, ggml_tensor * b, const llama_clex_rope & rope) {
        if (!with_tables || is_windowed(il) || refuse_unless_fit(rope, il)) {
            return nullptr;
        }
        if (a->ne[2] != graph.n_tokens || a->ne[3] != 1) {
            refuse(format("layer %d rotates something else than its tokens", il));
            return nullptr;
        }
        return inputs().rotate(rope, a, b);
    }

    ggml_tensor * note(ggml_tensor * cur, const llama_clex_rope & rope) {
        if (active()) {
            results[cur] = { rope, !is_windowed(il) };
        }
        return cur;
    }

    // The rotation that a tensor is the result of. What a rotation commutes with may come behind it: copies, a factor, and a
    // norm over the head without weights.
    const result * find_exact(const ggml_tensor * cur) const {
        for (;;) {
            const auto it = results.find(cur);
            if (it != results.end()) {
                return cur->op_params[15] == 0 ? &it->second : nullptr; // the offset of ggml_rope_set_offset()
            }

            bool passes = false;
            switch (cur->op) {
                case GGML_OP_CONT:
                case GGML_OP_RMS_NORM: passes = true; break;
                case GGML_OP_SCALE:    passes = cur->op_params[1] == 0; break; // no bias
                case GGML_OP_RESHAPE:
                case GGML_OP_VIEW:     passes = ggml_nelements(cur) == ggml_nelements(cur->src[0]) && cur->ne[0] == cur->src[0]->ne[0]; break;
                default: break;
            }
            if (!passes) {
                return nullptr;
            }
            cur = cur->src[0];
        }
    }

    // visits what went into a tensor since the matrices that projected it, until something is found
    template <typename F>
    static auto search(const ggml_tensor * cur, const F & visit) -> decltype(visit(cur)) {
        if (auto found = visit(cur)) {
            return found;
        }
        switch (cur->op) {
            case GGML_OP_NONE:
            case GGML_OP_MUL_MAT:
            case GGML_OP_MUL_MAT_ID:
            case GGML_OP_GET_ROWS:
                return {};
            default:
                break;
        }
        for (const auto * src : cur->src) {
            if (!src) {
                continue;
            }
            if (auto found = search(src, visit)) {
                return found;
            }
        }
        return {};
    }

    const result * find_any(const ggml_tensor * cur) const {
        return search(cur, [&](const ggml_tensor * t) {
            const auto it = results.find(t);
            return it == results.end() ? nullptr : &it->second;
        });
    }

    // none where they have none
    llama_clex_rope rotation_of_keys(const ggml_tensor * k, int il) {
        const auto * res = find_exact(k);
        if (!res) {
            if (search(k, [](const ggml_tensor * t) { return t->op == GGML_OP_ROPE || t->op == GGML_OP_ROPE_BACK; })) {
                refuse(format("its keys are not what RoPE leaves (layer %d)", il));
            }
            return {};
        }
        if (!res->by_table) {
            refuse(format("layer %d sees everything and is rotated as one with a sliding window", il));
        }
        refuse_unless_fit(res->rope, il);
        return res->rope;
    }

    ggml_tensor * attn(ggml_tensor * q, const ggml_tensor * k, int il) {
        if (!active()) {
            return q;
        }

        const auto it = kv->map_layer_ids.find(il);
        if (it == kv->map_layer_ids.end()) {
            // its keys are in the cache of the layers with a window
            const auto * of_q = find_any(q);
            const auto * of_k = k ? find_any(k) : nullptr;
            if ((of_q && of_q->by_table) || (of_k && of_k->by_table)) {
                refuse(format("layer %d has a sliding window and is rotated as one that sees everything", il));
            }
            n_windowed += of_q != nullptr;
            return q;
        }

        if (k) {
            layers[it->second] = rotation_of_keys(k, il);
        }
        const auto & rope = layers[it->second];

        // what comes behind their rotation does not matter: queries are not cached
        const auto * of_q = find_any(q);
        if (!((of_q ? of_q->rope : llama_clex_rope {}) == rope)) {
            refuse(format("layer %d rotates its queries in another way than its keys", il));
        }

        return with_tables && rope.n_dims > 0 && inputs().q_scale ? ggml_mul(graph.ctx0, q, inputs().q_scale) : q;
    }

    void finish() {
        if (!active()) {
            return;
        }

        llama_clex_layers found;
        found.known      = true;
        found.n_windowed = n_windowed;

        int32_t n_rotated = 0;
        for (size_t i = 0; i < kv->layers.size(); ++i) {
            const auto il = kv->layers[i].il;
            const auto it = layers.find(i);
            if (it == layers.end() && hparams.n_embd_k_gqa(il) > 0) {
                refuse(format("layer %u caches no keys as RoPE leaves them%s", il, hparams.is_mla() ? " (latent attention)" : ""));
            }
            found.ropes.push_back(it == layers.end() ? llama_clex_rope {} : it->second);
            n_rotated += found.ropes.back().n_dims > 0;
        }
        if (n_rotated + n_windowed == 0) {
            refuse("no layer has RoPE");
        } else if (kv->layers.empty()) {
            refuse("all layers have a sliding window");
        }
        found.refusal = refusal;

        auto & clex = kv->clex;

        if (with_tables && !refusal.empty()) {
            throw std::runtime_error(format("RoPE tables cannot be used with the architecture '%s': %s",
                        llm_arch_name(graph.arch), refusal.c_str()));
        }
        if (!clex.layers.known) {
            clex.layers = std::move(found);
            if (!with_tables) {
                return;
            }
            clex.kept.init(*kv);
            if (n_rotated == 0) {
                LLAMA_LOG_WARN("%s: no layer that sees everything has RoPE: the tables change nothing\n", __func__);
            }
        } else if (!(clex.layers.ropes == found.ropes)) {
            throw std::runtime_error(format("the layers of the architecture '%s' are not always rotated alike", llm_arch_name(graph.arch)));
        }
    }

    void refuse(const std::string & reason) {
        refusal = refusal.empty() ? reason : refusal;
    }

    bool refuse_unless_fit(const llama_clex_rope & rope, int il) {
        if (rope.mode == GGML_ROPE_TYPE_VISION) {
            refuse(format("layer %d has the RoPE of images", il));
        } else if (rope.n_dims != (int32_t) hparams.n_rot_full) {
            refuse(format("layer %d rotates %d dimensions of a head, not %u", il, rope.n_dims, hparams.n_rot_full));
        } else {
            return false;
        }
        return true;
    }

    const llm_graph_context & graph;
    const llama_hparams     & hparams;

    llama_kv_cache * const kv; // of the layers that see everything; null where there is none

    bool with_tables = false;
    int  il          = -1;

    llm_graph_input_clex * inp = nullptr; // created when it is first asked for

    std::unordered_map<const ggml_tensor *, result>  results;
    std::unordered_map<int32_t, llama_clex_rope>     layers;  // by their index in the cache

    int32_t     n_windowed = 0; // layers with RoPE that keep that of the model
    std::string refusal;
};

//
// what the graph of a model calls
//

llama_clex_graph::llama_clex_graph() = default;

llama_clex_graph::~llama_clex_graph() = default;

// not before the graph's context is there, of which this is a base
llama_clex_rope_notes & llama_clex_graph::clex_notes() const {
    if (!clex) {
        clex = std::make_unique<llama_clex_rope_notes>(static_cast<const llm_graph_context &>(*this));
    }
    return *clex;
}

ggml_tensor * llama_clex_graph::ggml_rope_ext(ggml_context * ctx, ggml_tensor * a, ggml_tensor * b, ggml_tensor * c,
        int n_dims, int mode, int n_ctx_orig, float freq_base, float freq_scale,
        float ext_factor, float attn_factor, float beta_fast, float beta_slow) const {
    const llama_clex_rope rope = { n_dims, mode, {} };

    ggml_tensor * res = clex_notes().rotate(a, b, rope);
    if (!res) {
        res = ::ggml_rope_ext(ctx, a, b, c, n_dims, mode, n_ctx_orig, freq_base, freq_scale,
                ext_factor, attn_factor, beta_fast, beta_slow);
    }
    return clex_notes().note(res, rope);
}

ggml_tensor * llama_clex_graph::ggml_rope_multi(ggml_context * ctx, ggml_tensor * a, ggml_tensor * b, ggml_tensor * c,
        int n_dims, int sections[GGML_MROPE_SECTIONS], int mode, int n_ctx_orig, float freq_base, float freq_scale,
        float ext_factor, float attn_factor, float beta_fast, float beta_slow) const {
    const llama_clex_rope rope = { n_dims, mode, { sections[0], sections[1], sections[2], sections[3] } };

    ggml_tensor * res = clex_notes().rotate(a, b, rope);
    if (!res) {
        res = ::ggml_rope_multi(ctx, a, b, c, n_dims, sections, mode, n_ctx_orig, freq_base, freq_scale,
                ext_factor, attn_factor, beta_fast, beta_slow);
    }
    return clex_notes().note(res, rope);
}

void llama_clex_graph::clex_enter(int il) const {
    if (il >= 0) {
        clex_notes().il = il;
    }
}

ggml_tensor * llama_clex_graph::clex_attn(ggml_tensor * q, const ggml_tensor * k, int il) const {
    return clex_notes().attn(q, k, il);
}

void llama_clex_graph::clex_finish() const {
    clex_notes().finish();
}
