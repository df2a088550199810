#include "llama-clex-impl.h"

#include "llama-impl.h"
#include "llama-io.h"
#include "llama-kv-cache.h"
#include "llama-model-loader.h"

#include <algorithm>
#include <stdexcept>

//
// which model and tables a saved state belongs to
//

void llama_clex_tables::hash_model(llama_model_loader & ml) {
    if (!enabled()) {
        return;
    }

    model_hash = LLAMA_CLEX_HASH_SEED;

    // A fine-tuned copy differs in its weights only, and reading all of them would take long: the first layer and what
    // belongs to none will do.
    for (const auto & [name, weight] : ml.weights_map) {
        if (name.rfind("blk.", 0) == 0 && name.rfind("blk.0.", 0) != 0) {
            continue;
        }

        llama_clex_hash(model_hash, name.data(), name.size());
        llama_clex_hash(model_hash, weight.tensor->ne, sizeof(weight.tensor->ne));

        if (weight.idx < ml.files.size()) {
            const size_t size = ggml_nbytes(weight.tensor);

            // the middle: a vocabulary starts with tokens that are hardly trained
            std::vector<uint8_t> data(std::min<size_t>(size, 512));
            ml.files[weight.idx]->seek(weight.offs + (size - data.size())/2, SEEK_SET);
            ml.files[weight.idx]->read_raw(data.data(), data.size());

            llama_clex_hash(model_hash, data.data(), data.size());
        }
    }
}

//
// tag of a state, in front of its cells
//

struct clex_state_tag {
    // read as a number of cells by a library that does not know it, which then refuses the state
    uint32_t magic   = 0x58454c43;
    uint32_t version = 1;

    uint64_t model  = 0;
    uint64_t tables = 0;

    int32_t  type_k  = 0;
    int32_t  type_v  = 0;
    uint32_t v_trans = 0;

    uint32_t n_cells    = 0; // of the fullest stream
    uint32_t n_seqs     = 0; // 1 + the largest sequence id; 1 where only one sequence is saved
    uint32_t n_declared = 0; // lengths that follow: one per sequence id, or that of the sequence alone
};

static_assert(sizeof(clex_state_tag) == 48, "written as it is");

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

llama_clex_cache::state_guard llama_clex_cache::state_read(llama_kv_cache & kv, llama_io_read_i & io, llama_seq_id seq_id) const {
    std::vector<int64_t> declared;

    if (tables.enabled()) {
        const auto own = state_tag(kv, seq_id);

        clex_state_tag tag;
        io.read(&tag.magic, sizeof(tag.magic));
        if (tag.magic != own.magic) {
            throw std::runtime_error("the state was saved by a library without RoPE tables, or for a model without them");
        }
        io.read(&tag.version, sizeof(tag) - sizeof(tag.magic));
        if (tag.version != own.version) {
            throw std::runtime_error(format("the state has version %u, this library reads %u", tag.version, own.version));
        }
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
        }
    }

    return state_guard(kv, seq_id, std::move(declared));
}

llama_clex_cache::state_guard::state_guard(llama_kv_cache & kv, llama_seq_id seq_id, std::vector<int64_t> declared) :
    kv(kv), seq_id(seq_id), declared(std::move(declared)), pending(kv.clex.tables.enabled()) {}

llama_clex_cache::state_guard::~state_guard() {
    if (!pending) {
        return;
    }
    if (seq_id == -1) {
        kv.clear(true);
    } else {
        kv.seq_rm(seq_id, -1, -1);
    }
}

void llama_clex_cache::state_guard::finish() {
    if (!pending) {
        return;
    }

    const int32_t n_buckets = kv.clex.tables.scaling_factors.size();

    for (const auto & cells : kv.v_cells) {
        for (uint32_t i = 0; i < cells.used_max_p1(); ++i) {
            if (!cells.is_empty(i) && (cells.ext_get(i).clex < 0 || cells.ext_get(i).clex >= n_buckets)) {
                throw std::runtime_error("the state is damaged: a key was rotated with a table that does not exist");
            }
        }
    }

    for (size_t i = 0; i < declared.size(); ++i) {
        auto & seq = kv.clex.seqs[seq_id == -1 ? i : seq_id];

        seq = {};
        seq.n_declared = kv.clex.bucket(declared[i]) >= 0 ? declared[i] : 0;
    }

    pending = false;
}

//
// operations that are refused
//

bool llama_clex_cache::refuse_div() const {
    if (tables.enabled()) {
        LLAMA_LOG_ERROR("%s: positions cannot be divided with length-aware RoPE tables; nothing was changed\n", __func__);
    }
    return tables.enabled();
}
