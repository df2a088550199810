#include "llama-clex-cache.h"

#include "llama-batch.h"
#include "llama-kv-cache.h"

#include <algorithm>

// group the keys that one graph can rotate
static void clex_add(std::vector<llama_clex_rotation> & rotations, const llama_clex_rotation & kind,
        int32_t row, llama_pos pos_old, llama_pos pos_new) {
    auto it = std::find_if(rotations.begin(), rotations.end(), [&](const llama_clex_rotation & r) { return r.is_like(kind); });
    if (it == rotations.end()) {
        it = rotations.insert(rotations.end(), kind);
    }

    it->rows   .push_back(row);
    it->pos_old.push_back(pos_old);
    it->pos_new.push_back(pos_new);
}

// how the key of a cell gets from its bucket to the wanted one, and by a shift to pos_new
static void clex_add_stale(std::vector<llama_clex_rotation> & rotations, const llama_clex_kept & kept,
        int32_t row, int32_t bucket, int32_t wanted, llama_pos pos_new, llama_pos shift) {
    const auto * key = kept.find(row);

    const llama_pos pos_old = key ? key->pos : pos_new - shift;

    llama_clex_rotation kind;
    kind.source  = !kept.enabled() ? LLAMA_CLEX_FROM_CACHE : key ? LLAMA_CLEX_FROM_KEPT : LLAMA_CLEX_FROM_CACHE_KEEP;
    kind.from    = key ? key->bucket : bucket;
    kind.to      = wanted;
    kind.crosses = wanted != bucket;
    kind.still   = kind.from == kind.to && pos_old == pos_new;

    clex_add(rotations, kind, row, pos_old, pos_new);
}

// the bucket of all sequences of a ubatch, -1 where they are in several or there is no ubatch
static int32_t clex_common_bucket(const llama_clex_cache & clex, const llama_ubatch * ubatch) {
    int32_t res = ubatch ? clex.token_bucket(*ubatch, 0) : -1;
    for (uint32_t i = 1; ubatch && i < ubatch->n_tokens; ++i) {
        res = clex.token_bucket(*ubatch, i) == res ? res : -1;
    }
    return res;
}

std::vector<llama_clex_rotation> llama_clex_cache::pending(const llama_kv_cache & kv, const llama_ubatch * ubatch) const {
    std::vector<llama_clex_rotation> res;

    std::vector<bool> streams(kv.n_stream, ubatch == nullptr);
    for (uint32_t k = 0; ubatch && k < ubatch->n_seqs_unq; ++k) {
        streams[kv.seq_to_stream[ubatch->seq_id_unq[k]]] = true;
    }

    const int32_t common = clex_common_bucket(*this, ubatch);

    // of the sequences of the ubatch that have the cell, which are all in one; -1 where none has it
    const auto wanted_by = [&](const llama_kv_cells & cells, uint32_t i) {
        const auto * end = ubatch->seq_id_unq + ubatch->n_seqs_unq;
        const auto * seq = std::find_if(static_cast<const llama_seq_id *>(ubatch->seq_id_unq), end,
                [&](llama_seq_id s) { return cells.seq_has(i, s); });
        return seq == end ? -1 : std::max(seqs[*seq].bucket, 0);
    };

    for (uint32_t s = 0; s < kv.n_stream; ++s) {
        if (!streams[s]) {
            continue;
        }

        const auto & cells = kv.v_cells[s];

        const uint32_t i1 = cells.used_max_p1();

        for (uint32_t i = cells.used_min(); i < i1; ++i) {
            if (cells.is_empty(i)) {
                continue;
            }

            const int32_t   from  = cells.ext_get(i).clex;
            const llama_pos shift = cells.get_shift(i);

            // nearly all cells of nearly all decodes stop here
            if (from == common && shift == 0) {
                continue;
            }

            const int32_t wanted = ubatch ? wanted_by(cells, i) : from;

            if (wanted < 0 || (from == wanted && shift == 0)) {
                continue;
            }

            clex_add_stale(res, kept, s*cells.size() + i, from, wanted, cells.pos_get(i), shift);
        }
    }

    return res;
}

std::vector<llama_clex_rotation> llama_clex_cache::pending_restore(const llama_kv_cache & kv, llama_seq_id seq_id) const {
    std::vector<llama_clex_rotation> res;

    for (uint32_t s = 0; kept.enabled() && s < kv.n_stream; ++s) {
        const auto & cells = kv.v_cells[s];

        for (uint32_t i = cells.used_min(); i < cells.used_max_p1(); ++i) {
            if (cells.is_empty(i) || (seq_id != -1 && !cells.seq_has(i, seq_id))) {
                continue;
            }

            const int32_t   row = s*cells.size() + i;
            const llama_pos pos = cells.pos_get(i);

            const auto * key = kept.find(row);
            if (!key || key->bucket == cells.ext_get(i).clex || key->pos != pos || cells.get_shift(i) != 0) {
                continue;
            }

            llama_clex_rotation kind;
            kind.source = LLAMA_CLEX_FROM_KEPT;
            kind.from   = key->bucket;
            kind.to     = key->bucket;
            kind.still  = true;

            clex_add(res, kind, row, pos, pos);
        }
    }

    return res;
}
