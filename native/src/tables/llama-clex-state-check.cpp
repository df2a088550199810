#include "llama-clex-cache.h"
#include "llama-clex-state-reader.h"
#include "llama-clex-state-tag.h"

#include "llama-impl.h"
#include "llama-kv-cache.h"
#include "llama-model.h"

#include <algorithm>
#include <stdexcept>

// no sequence of any model is longer; positions are added to and compared as 32-bit numbers
static constexpr int64_t CLEX_POS_MAX = 1 << 30;

size_t llama_clex_cache::state_check(const llama_kv_cache & kv, clex_state_reader & io, llama_seq_id seq_id, bool has_data) {
    const auto fail = [](const char * what, int64_t value) {
        throw std::runtime_error(format("the state is damaged: %s %lld", what, (long long) value));
    };

    // llama.cpp writes nothing of a cache that uses the cells of another
    if (kv.other) {
        return 0;
    }

    const auto & tables = kv.clex.tables;

    const uint32_t n_stream = io.get<uint32_t>();
    if (n_stream != kv.n_stream) {
        throw std::runtime_error(format("the state has %u separate sequences, the context %u", n_stream, kv.n_stream));
    }

    clex_state_tag tag;
    std::vector<int64_t> declared;
    if (tables.enabled()) {
        tag = kv.clex.read_tag(kv, io, seq_id, declared);
    }

    const int64_t n_pos = tables.enabled() && !kv.clex.clamp ? tables.n_ctx_max() : CLEX_POS_MAX;

    size_t   n_data  = 0; // bytes of keys and values
    uint32_t n_cells = 0; // of the fullest stream
    uint32_t n_seqs  = seq_id == -1 ? 0 : 1;

    const auto data = [&](size_t size) {
        n_data += size;
        if (has_data) {
            io.skip(size);
        }
    };

    for (uint32_t s = 0; s < n_stream; ++s) {
        const uint32_t n = io.get<uint32_t>();
        if (n == 0) {
            continue;
        }

        const auto & cells = kv.v_cells[seq_id == -1 ? s : kv.seq_to_stream[seq_id]];

        // cells that a sequence can take: free ones, and those that it has alone and gives up
        uint32_t n_free = cells.size();
        if (seq_id != -1 && kv.n_swa == 0) {
            n_free -= cells.get_used();
            for (const auto & [pos, i] : cells.seq_pos_get(seq_id)) {
                n_free += cells.seq_count(i) == 1;
            }
        }
        if (n > n_free) {
            throw std::runtime_error(format("the state has %u tokens, the context room for %u", n, n_free));
        }
        if (seq_id != -1 && n_cells > 0) {
            fail("one sequence in several streams:", n_stream);
        }
        n_cells = std::max(n_cells, n);

        for (uint32_t i = 0; i < n; ++i) {
            const auto pos = io.get<llama_pos>();
            if (pos < 0 || pos >= n_pos) {
                fail("a token has position", pos);
            }

            const auto n_seq_id = io.get<uint32_t>();
            if (n_seq_id < 1 || n_seq_id > (seq_id == -1 ? kv.n_seq_max : 1)) {
                fail("sequences that share a token:", n_seq_id);
            }

            if (kv.has_cell_ext()) {
                const auto ext = io.get<llama_kv_cell_ext>();
                if (tables.enabled()) {
                    if (ext.clex < 0 || ext.clex >= (int32_t) tables.scaling_factors.size()) {
                        fail("a key was rotated with a table that does not exist:", ext.clex);
                    }
                    if (ext.y != 0 || ext.tok < LLAMA_TOKEN_NULL || ext.tok >= (int32_t) kv.model.vocab.n_tokens()) {
                        fail("a cell has the token", ext.tok);
                    }
                }
            }

            llama_seq_id last = -1;
            for (uint32_t j = 0; j < n_seq_id; ++j) {
                const auto id = io.get<llama_seq_id>();
                // the id that a single sequence had does not matter where it is read
                const bool valid = seq_id != -1 ? id >= 0 && id < LLAMA_MAX_SEQ
                    : id > last && id < (llama_seq_id) kv.n_seq_max && kv.seq_to_stream[id] == s;
                if (!valid) {
                    fail("a token belongs to sequence", id);
                }
                last = id;
                n_seqs = seq_id == -1 ? std::max<uint32_t>(n_seqs, id + 1) : 1;
            }
        }

        const auto v_trans = io.get<uint32_t>();
        const auto n_layer = io.get<uint32_t>();
        if (v_trans != (kv.v_trans ? 1 : 0)) {
            throw std::runtime_error(format("the state was saved with flash attention %s, this context has it %s",
                        v_trans ? "off" : "on", kv.v_trans ? "off" : "on"));
        }
        if (n_layer != kv.layers.size()) {
            throw std::runtime_error(format("the state has %u layers, the model %zu", n_layer, kv.layers.size()));
        }

        for (const auto & layer : kv.layers) {
            const auto     type = io.get<int32_t>();
            const uint64_t row  = io.get<uint64_t>();
            if (type != layer.k->type || row != ggml_row_size(layer.k->type, kv.hparams.n_embd_k_gqa(layer.il))) {
                throw std::runtime_error(format("the state was saved from another type of cache, keys are %s here",
                            ggml_type_name(layer.k->type)));
            }
            data(row*n);
        }

        for (const auto & layer : kv.layers) {
            if (!layer.v) {
                continue;
            }

            const uint32_t n_embd = kv.hparams.n_embd_v_gqa(layer.il);

            const auto type = io.get<int32_t>();

            bool ok = type == layer.v->type;
            if (kv.v_trans) {
                ok = io.get<uint32_t>() == ggml_type_size(layer.v->type) && ok;
                ok = io.get<uint32_t>() == n_embd && ok;
            } else {
                ok = io.get<uint64_t>() == ggml_row_size(layer.v->type, n_embd) && ok;
            }
            if (!ok) {
                throw std::runtime_error(format("the state was saved from another type of cache, values are %s here",
                            ggml_type_name(layer.v->type)));
            }
            data(kv.v_trans ? ggml_type_size(layer.v->type)*n_embd*n : ggml_row_size(layer.v->type, n_embd)*n);
        }
    }

    if (tables.enabled() && (tag.n_cells != n_cells || tag.n_seqs != n_seqs)) {
        fail("its header counts other tokens or sequences than", n_cells);
    }

    return n_data;
}
