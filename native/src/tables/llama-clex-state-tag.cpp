#include "llama-clex-state-tag.h"

#include "llama-clex-cache.h"

#include "llama-impl.h"
#include "llama-io.h"
#include "llama-kv-cache.h"

#include <algorithm>
#include <limits>
#include <stdexcept>

// the tag of a state that would be saved now
clex_state_tag llama_clex_cache::state_tag(const llama_kv_cache & kv, llama_seq_id seq_id) const {
    clex_state_tag tag;

    tag.model   = tables.model_hash;
    tag.tables  = tables.hash;
    tag.type_k  = kv.type_k();
    tag.type_v  = kv.type_v();
    tag.v_trans = kv.v_trans;

    for (const auto & cells : kv.v_cells) {
        const uint32_t n_cells = seq_id == -1 ? cells.get_used() : cells.seq_pos_get(seq_id).size();

        tag.n_cells = std::max(tag.n_cells, n_cells);
        for (llama_seq_id s = 0; seq_id == -1 && s < (llama_seq_id) kv.n_seq_max; ++s) {
            tag.n_seqs = cells.seq_pos_max(s) >= 0 ? std::max<uint32_t>(tag.n_seqs, s + 1) : tag.n_seqs;
        }
    }
    tag.n_seqs     = seq_id == -1 ? tag.n_seqs : 1;
    tag.n_declared = tag.n_seqs;

    return tag;
}

size_t llama_clex_cache::ext_size() const {
    return tables.enabled() ? sizeof(llama_kv_cell_ext) : offsetof(llama_kv_cell_ext, clex);
}

void llama_clex_cache::state_write(const llama_kv_cache & kv, llama_io_write_i & io, llama_seq_id seq_id) const {
    if (!tables.enabled()) {
        return;
    }
    if (kv.get_has_shift()) {
        throw std::runtime_error("the positions of some cells are shifted and their keys could not be rotated");
    }

    const auto tag = state_tag(kv, seq_id);
    io.write(&tag, sizeof(tag));

    for (uint32_t i = 0; i < tag.n_declared; ++i) {
        const int64_t n_declared = seqs[seq_id == -1 ? i : seq_id].n_declared;
        io.write(&n_declared, sizeof(n_declared));
    }
}

void clex_check_version(uint32_t magic, uint32_t version) {
    const clex_state_tag own;

    if (magic != own.magic) {
        throw std::runtime_error("the state was saved by a library without RoPE tables, or for a model without them");
    }
    if (version != own.version) {
        throw std::runtime_error(format("the state has version %u, this library reads %u", version, own.version));
    }
}

clex_state_tag llama_clex_cache::read_tag(
        const llama_kv_cache & kv, llama_io_read_i & io, llama_seq_id seq_id, std::vector<int64_t> & declared) const {
    const auto own = state_tag(kv, seq_id);

    clex_state_tag tag;
    io.read(&tag, sizeof(tag));
    clex_check_version(tag.magic, tag.version);

    if (tag.model != own.model) {
        throw std::runtime_error("the state belongs to another model");
    }
    if (tag.tables != own.tables) {
        throw std::runtime_error("the state was saved with other RoPE tables");
    }
    if (tag.type_k != own.type_k || tag.type_v != own.type_v) {
        throw std::runtime_error(format("the state was saved from another type of cache, this one is %s for K and %s for V",
                    ggml_type_name(kv.type_k()), ggml_type_name(kv.type_v())));
    }
    if (tag.v_trans != own.v_trans) {
        throw std::runtime_error(format("the state was saved with flash attention %s, this context has it %s",
                    tag.v_trans ? "off" : "on", own.v_trans ? "off" : "on"));
    }
    if (tag.n_cells > kv.get_size()) {
        throw std::runtime_error(format("the state has %u tokens, the context %u", tag.n_cells, kv.get_size()));
    }
    if (tag.n_seqs > (seq_id == -1 ? kv.n_seq_max : 1) || tag.n_declared != tag.n_seqs) {
        throw std::runtime_error(format("the state has %u sequences, the context %u", tag.n_seqs, kv.n_seq_max));
    }

    declared.resize(tag.n_declared);
    for (int64_t & n_declared : declared) {
        io.read(&n_declared, sizeof(n_declared));
        if (n_declared < 0 || n_declared > std::numeric_limits<int32_t>::max()) {
            throw std::runtime_error(format("the state is damaged: it declares %lld tokens", (long long) n_declared));
        }
    }

    return tag;
}

llama_clex_cache::state_guard llama_clex_cache::state_read(llama_kv_cache & kv, llama_io_read_i & io, llama_seq_id seq_id) const {
    std::vector<int64_t> declared;

    if (tables.enabled()) {
        read_tag(kv, io, seq_id, declared);
    }

    return state_guard(kv, seq_id, std::move(declared));
}

llama_clex_cache::state_guard::state_guard(llama_kv_cache & kv, llama_seq_id seq_id, std::vector<int64_t> declared) :
    kv(kv), seq_id(seq_id), declared(std::move(declared)), pending(kv.clex.tables.enabled()) {}

// Only a file that changes or fails while it is read gets here. The bytes are zeroed as well, as llama.cpp does since #27068:
// attention reads the values of free cells, and NaN times 0 is NaN.
llama_clex_cache::state_guard::~state_guard() {
    if (pending) {
        kv.state_clear(seq_id);
    }
}

void llama_clex_cache::state_guard::finish() {
    for (uint32_t s = 0; s < kv.n_stream; ++s) {
        kv.clex.texts.forget(kv.v_cells[s], (size_t) s*kv.get_size(), seq_id);
    }

    if (!pending) {
        return;
    }

    for (size_t i = 0; i < declared.size(); ++i) {
        auto & seq = kv.clex.seqs[seq_id == -1 ? i : seq_id];

        seq = {};
        seq.n_declared = kv.clex.choose_bucket(declared[i]) >= 0 ? declared[i] : 0;
    }

    pending = false;
}
