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

[[noreturn]] static void clex_damaged(const char * what, int64_t value) {
    throw std::runtime_error(format("the state is damaged: %s %lld", what, (long long) value));
}

// Goes through a state as llama_kv_cache::state_write() wrote it:
//
//   number of streams | tag, declared lengths (with tables) | stream | stream | ...
//
//   stream:  number of cells | cell | cell | ... | v_trans, number of layers | keys of each layer | values of each layer
//   cell:    position, number of sequences | llama_kv_cell_ext (where the cache has it) | sequence ids
//   keys:    type, bytes of a row | rows, unless the device has them
//   values:  type, bytes of a row, or of an element and their number where V is transposed | rows, unless the device has them
class llama_clex_cache::state_checker {
public:
    state_checker(const llama_kv_cache & kv, clex_state_reader & io, llama_seq_id seq_id, bool has_data) :
        kv(kv), io(io), seq_id(seq_id), has_data(has_data), tables(kv.clex.tables),
        n_pos(tables.enabled() && !kv.clex.clamp ? tables.n_ctx_max() : CLEX_POS_MAX), n_seqs(whole() ? 0 : 1) {}

    // throws at the first word that does not fit; the size of keys and values
    size_t run() {
        const uint32_t n_stream = io.get<uint32_t>();
        if (n_stream != kv.n_stream) {
            throw std::runtime_error(format("the state has %u separate sequences, the context %u", n_stream, kv.n_stream));
        }

        clex_state_tag tag;
        std::vector<int64_t> declared;
        if (tables.enabled()) {
            tag = kv.clex.read_tag(kv, io, seq_id, declared);
        }

        for (uint32_t s = 0; s < n_stream; ++s) {
            check_stream(s);
        }

        if (tables.enabled() && (tag.n_cells != n_cells || tag.n_seqs != n_seqs)) {
            clex_damaged("its header counts other tokens or sequences than", n_cells);
        }
        return n_data;
    }

private:
    bool whole() const { return seq_id == -1; }

    void check_stream(uint32_t s) {
        const uint32_t n = io.get<uint32_t>();
        if (n == 0) {
            return;
        }

        check_room(s, n);
        if (!whole() && n_cells > 0) {
            clex_damaged("one sequence in several streams:", kv.n_stream);
        }
        n_cells = std::max(n_cells, n);

        for (uint32_t i = 0; i < n; ++i) {
            check_cell(s);
        }
        check_layout();
        for (const auto & layer : kv.layers) {
            check_keys(*layer.k, layer.il, n);
        }
        for (const auto & layer : kv.layers) {
            if (layer.v) {
                check_values(*layer.v, layer.il, n);
            }
        }
    }

    // a sequence can take free cells, and those that it has alone and gives up
    void check_room(uint32_t s, uint32_t n) const {
        const auto & cells = kv.v_cells[whole() ? s : kv.seq_to_stream[seq_id]];

        uint32_t n_free = cells.size();
        if (!whole() && kv.n_swa == 0) {
            n_free -= cells.get_used();
            for (const auto & [pos, i] : cells.seq_pos_get(seq_id)) {
                n_free += cells.seq_count(i) == 1;
            }
        }
        if (n > n_free) {
            throw std::runtime_error(format("the state has %u tokens, the context room for %u", n, n_free));
        }
    }

    void check_cell(uint32_t s) {
        const auto pos = io.get<llama_pos>();
        if (pos < 0 || pos >= n_pos) {
            clex_damaged("a token has position", pos);
        }

        const auto n_seq_id = io.get<uint32_t>();
        if (n_seq_id < 1 || n_seq_id > (whole() ? kv.n_seq_max : 1)) {
            clex_damaged("sequences that share a token:", n_seq_id);
        }

        if (kv.has_cell_ext()) {
            check_ext(pos);
        }

        llama_seq_id last = -1;
        for (uint32_t j = 0; j < n_seq_id; ++j) {
            const auto id = io.get<llama_seq_id>();
            // the id that a single sequence had does not matter where it is read
            const bool valid = !whole() ? id >= 0 && id < LLAMA_MAX_SEQ
                : id > last && id < (llama_seq_id) kv.n_seq_max && kv.seq_to_stream[id] == s;
            if (!valid) {
                clex_damaged("a token belongs to sequence", id);
            }
            last = id;
            n_seqs = whole() ? std::max<uint32_t>(n_seqs, id + 1) : 1;
        }
    }

    void check_ext(llama_pos pos) const {
        llama_kv_cell_ext ext;
        io.read(&ext, kv.clex.ext_size());

        if (!tables.enabled()) {
            return;
        }
        if (ext.clex < 0 || ext.clex >= (int32_t) tables.scaling_factors.size()) {
            clex_damaged("a key was rotated with a table that does not exist:", ext.clex);
        }
        // a text has the same position in all sections of M-RoPE
        const llama_pos pos_2d = kv.hparams.n_pos_per_embd() > 1 ? pos : 0;
        if (ext.x != pos_2d || ext.y != pos_2d) {
            clex_damaged("a token has the position of a part of an image:", ext.x);
        }
        if (ext.tok < LLAMA_TOKEN_NULL || ext.tok >= (int32_t) kv.model.vocab.n_tokens()) {
            clex_damaged("a cell has the token", ext.tok);
        }
    }

    void check_layout() {
        const auto v_trans = io.get<uint32_t>();
        const auto n_layer = io.get<uint32_t>();
        if (v_trans != (kv.v_trans ? 1 : 0)) {
            throw std::runtime_error(format("the state was saved with flash attention %s, this context has it %s",
                        v_trans ? "off" : "on", kv.v_trans ? "off" : "on"));
        }
        if (n_layer != kv.layers.size()) {
            throw std::runtime_error(format("the state has %u layers, the model %zu", n_layer, kv.layers.size()));
        }
    }

    void check_keys(const ggml_tensor & k, uint32_t il, uint32_t n) {
        const auto     type = io.get<int32_t>();
        const uint64_t row  = io.get<uint64_t>();
        if (type != k.type || row != ggml_row_size(k.type, kv.hparams.n_embd_k_gqa(il))) {
            throw std::runtime_error(format("the state was saved from another type of cache, keys are %s here",
                        ggml_type_name(k.type)));
        }
        pass(row*n);
    }

    void check_values(const ggml_tensor & v, uint32_t il, uint32_t n) {
        const uint32_t n_embd = kv.hparams.n_embd_v_gqa(il);

        bool ok = io.get<int32_t>() == v.type;
        if (kv.v_trans) {
            ok = io.get<uint32_t>() == ggml_type_size(v.type) && ok;
            ok = io.get<uint32_t>() == n_embd && ok;
        } else {
            ok = io.get<uint64_t>() == ggml_row_size(v.type, n_embd) && ok;
        }
        if (!ok) {
            throw std::runtime_error(format("the state was saved from another type of cache, values are %s here",
                        ggml_type_name(v.type)));
        }
        pass(kv.v_trans ? ggml_type_size(v.type)*n_embd*n : ggml_row_size(v.type, n_embd)*n);
    }

    // keys or values, which can be anything
    void pass(size_t size) {
        n_data += size;
        if (has_data) {
            io.skip(size);
        }
    }

    const llama_kv_cache & kv;
    clex_state_reader    & io;

    const llama_seq_id seq_id; // -1: all sequences
    const bool         has_data;

    const llama_clex_tables & tables;
    const int64_t             n_pos; // positions are below it

    size_t   n_data  = 0; // bytes of keys and values
    uint32_t n_cells = 0; // of the fullest stream
    uint32_t n_seqs;      // 1 + the largest sequence id; 1 where only one sequence is saved
};

size_t llama_clex_cache::state_check(const llama_kv_cache & kv, clex_state_reader & io, llama_seq_id seq_id, bool has_data) {
    // llama.cpp writes nothing of a cache that uses the cells of another
    return kv.other ? 0 : state_checker(kv, io, seq_id, has_data).run();
}
