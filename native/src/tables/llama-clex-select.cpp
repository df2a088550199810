#include "llama-clex-cache.h"

#include "llama-batch.h"
#include "llama-impl.h"
#include "llama-kv-cache.h"
#include "llama-model.h"

#include <algorithm>
#include <numeric>

// sequences that must use one table, each group under the first of its members
struct clex_groups {
    std::vector<llama_seq_id> parent = std::vector<llama_seq_id>(LLAMA_MAX_SEQ);

    clex_groups() { std::iota(parent.begin(), parent.end(), 0); }

    llama_seq_id find(llama_seq_id s) {
        while (parent[s] != s) {
            s = parent[s] = parent[parent[s]];
        }
        return s;
    }

    void join(llama_seq_id a, llama_seq_id b) {
        const auto [first, second] = std::minmax({ find(a), find(b) });
        parent[second] = first;
    }

    // the largest value among the sequences of each group, for all of them
    std::vector<int64_t> largest(const std::vector<int64_t> & values) {
        std::vector<int64_t> res(LLAMA_MAX_SEQ, 0);
        for (llama_seq_id s = 0; s < LLAMA_MAX_SEQ; ++s) {
            res[find(s)] = std::max(res[find(s)], values[s]);
        }
        for (llama_seq_id s = 0; s < LLAMA_MAX_SEQ; ++s) {
            res[s] = res[find(s)];
        }
        return res;
    }
};

// Join the sequences that have cells in common. Nothing is remembered between decodes that an operation could make wrong;
// where no cell is shared, which the sizes tell, no cell is looked at.
static void clex_join_sharers(const llama_kv_cells & cells, clex_groups & groups) {
    size_t n = 0;
    for (llama_seq_id s = 0; s < LLAMA_MAX_SEQ; ++s) {
        n += cells.seq_pos_get(s).size();
    }
    if (n == cells.get_used()) {
        return;
    }

    const llama_kv_cells::seq_set_t * last = nullptr;

    for (uint32_t i = cells.used_min(); i < cells.used_max_p1(); ++i) {
        const auto & seqs = cells.seq_get_all(i);

        // neighbours are mostly alike
        if (last && *last == seqs) {
            continue;
        }
        last = &seqs;

        llama_seq_id first = -1;
        for (llama_seq_id s = 0; s < LLAMA_MAX_SEQ && seqs.count() > 1; ++s) {
            if (seqs.test(s)) {
                groups.join(first < 0 ? s : first, s);
                first = s;
            }
        }
    }
}

static const llama_clex_tables LLAMA_CLEX_NO_TABLES;

llama_clex_cache::llama_clex_cache(const llama_model & model, bool windowed) :
    tables(windowed ? LLAMA_CLEX_NO_TABLES : model.clex), seqs(LLAMA_MAX_SEQ) {}

void llama_clex_cache::clear() {
    std::fill(seqs.begin(), seqs.end(), seq_state {});
    kept.clear();
    texts.clear();
}

int32_t llama_clex_cache::choose_bucket(int64_t n_tokens) const {
    const int64_t n_max = tables.n_ctx_max();
    if (n_tokens > n_max && !clamp) {
        return -1;
    }
    return tables.bucket_for(std::min(policy == LLAMA_CLEX_POLICY_FIXED ? n_ctx : n_tokens, n_max));
}

// The lengths of sequences that are not in the batch too: those that share cells with it count, or their next decode would
// take the keys back to their table.
static std::vector<int64_t> clex_with_absent(const llama_clex_cache & clex, const llama_kv_cells & cells, std::vector<int64_t> lengths) {
    for (llama_seq_id s = 0; s < LLAMA_MAX_SEQ; ++s) {
        if (lengths[s] == 0 && cells.seq_pos_max(s) >= 0) {
            lengths[s] = std::max<int64_t>((int64_t) cells.seq_pos_max(s) + 1, clex.seqs[s].n_declared);
        }
    }
    return lengths;
}

bool llama_clex_cache::select(const llama_kv_cache & kv, llama_batch_allocr & balloc) {
    const llama_batch & batch = balloc.get_batch();

    if (!batch.token && kv.hparams.n_pos_per_embd() > 1) {
        LLAMA_LOG_ERROR("%s: a model with RoPE tables and M-RoPE takes text only, no images\n", __func__);
        return false;
    }

    std::vector<llama_seq_id> present;
    std::vector<int64_t>      lengths(LLAMA_MAX_SEQ, 0);

    for (llama_seq_id s = 0; s < LLAMA_MAX_SEQ; ++s) {
        const llama_pos pos_max = balloc.seq_pos_max(s);
        if (pos_max >= 0) {
            present.push_back(s);
            lengths[s] = std::max<int64_t>((int64_t) pos_max + 1, seqs[s].n_declared);
        }
    }

    clex_groups groups;

    // the query of a token of several sequences is computed once: they all take the length of the longest
    for (int32_t i = 0; i < batch.n_tokens; ++i) {
        for (int32_t k = 1; k < batch.n_seq_id[i]; ++k) {
            groups.join(batch.seq_id[i][0], batch.seq_id[i][k]);
        }
    }
    lengths = groups.largest(lengths);
    for (const llama_seq_id s : present) {
        seqs[s].n_tokens = lengths[s];
    }

    // so is the key of a cell of several sequences
    if (kv.n_stream == 1) {
        clex_join_sharers(kv.v_cells[0], groups);
        lengths = groups.largest(clex_with_absent(*this, kv.v_cells[0], std::move(lengths)));
    }

    std::vector<int32_t> classes(LLAMA_MAX_SEQ, -1);
    for (const llama_seq_id s : present) {
        classes[s] = choose_bucket(lengths[s]);
        if (classes[s] < 0) {
            LLAMA_LOG_ERROR("%s: sequence %d would have %lld tokens, the tables of the model cover %lld\n", __func__,
                    s, (long long) lengths[s], (long long) tables.n_ctx_max());
            return false;
        }
    }
    for (const llama_seq_id s : present) {
        seqs[s].bucket = classes[s];
    }

    balloc.set_seq_class(std::move(classes));

    return true;
}

int32_t llama_clex_cache::token_bucket(const llama_ubatch & ubatch, uint32_t i_token) const {
    return std::max(seqs[ubatch.seq_id[i_token][0]].bucket, 0);
}

int32_t llama_clex_cache::table_of(int64_t n_tokens, int32_t bucket) const {
    return !tables.enabled() ? 0 : tables.log_scale ? (int32_t) n_tokens : std::max(bucket, 0);
}

uint32_t llama_clex_cache::max_runs(const llama_kv_cache & kv) const {
    return tables.scaling_factors.size() > 1 ? std::min<uint32_t>(kv.n_seq_max, llama_batch_allocr::max_runs) : 1;
}

uint32_t llama_clex_cache::max_nodes(const llama_kv_cache & kv) const {
    const uint32_t n = max_runs(kv);

    // for the queries and keys of each layer: views of them and of the factors, the rotation, and what puts it behind others
    return n > 1 ? 4*n*2*(kv.layers.size() + 1) : 0;
}

void llama_clex_cache::set_key(llama_kv_cells & cells, uint32_t i_cell, uint32_t stream, const llama_ubatch & ubatch, uint32_t i_token) {
    const auto &   seq       = seqs[ubatch.seq_id[i_token][0]];
    const size_t   first_row = (size_t) stream*cells.size();
    if (adapted) {
        texts.set(first_row + i_cell, {});
    } else {
        texts.record(cells, i_cell, first_row, ubatch, i_token, table_of(seq.n_tokens, seq.bucket));
    }

    if (!tables.enabled()) {
        return;
    }

    llama_kv_cell_ext ext = cells.ext_get(i_cell);
    ext.clex = token_bucket(ubatch, i_token);
    cells.ext_set(i_cell, ext);

    kept.drop(stream*cells.size() + i_cell);
}

void llama_clex_cache::seq_cp(const llama_kv_cache & kv, llama_seq_id src, llama_seq_id dst, llama_pos p0, llama_pos p1) {
    if (kv.seq_to_stream[src] != kv.seq_to_stream[dst]) {
        texts.copy_stream(kv.seq_to_stream[src], kv.seq_to_stream[dst], kv.get_size());
    }

    if (tables.enabled() && p0 <= std::max(kv.seq_pos_min(src), 0) && (p1 < 0 || p1 > kv.seq_pos_max(src))) {
        seqs[dst].n_declared = std::max(seqs[dst].n_declared, seqs[src].n_declared);
    }
}

bool llama_clex_cache::refuse_div() const {
    if (tables.enabled()) {
        LLAMA_LOG_ERROR("%s: positions cannot be divided with length-aware RoPE tables; nothing was changed\n", __func__);
    }
    return tables.enabled();
}
