#include "llama-clex-store-cells.h"

#include "llama-clex-store-name.h"

#include "llama-batch.h"
#include "llama-kv-cache.h"
#include "llama-model.h"

#include "ggml-backend.h"

#include <algorithm>

llama_clex_store_cache::llama_clex_store_cache(llama_kv_cache & kv, llama_seq_id seq_id) :
    kv(kv), seq_id(seq_id), stream(kv.seq_to_stream[seq_id]), first_row((size_t) stream*kv.get_size()) {
    const auto & hparams = kv.hparams;

    for (size_t i = 0; i < kv.layers.size(); ++i) {
        const auto & layer = kv.layers[i];

        const size_t row_k = ggml_row_size(layer.k->type, hparams.n_embd_k_gqa(layer.il));
        sections.push_back({ layer.k, kv.clex.kept.enabled() ? kv.clex.kept.k[i] : nullptr, row_k, 0, first_row*row_k });

        if (!layer.v) {
            continue;
        }
        const size_t n_embd_v = hparams.n_embd_v_gqa(layer.il);
        if (kv.v_trans) {
            sections.push_back({ layer.v, nullptr, ggml_type_size(layer.v->type), n_embd_v, stream*layer.v->nb[2] });
        } else {
            sections.push_back({ layer.v, nullptr, ggml_row_size(layer.v->type, n_embd_v), 0, stream*layer.v->nb[2] });
        }
    }
}

const char * llama_clex_store_cache::refusal() const {
    if (kv.other) {
        return "its cache shares the cells of another context";
    }
    if (kv.layers.empty()) {
        return "it caches nothing";
    }
    if (kv.swa_type == LLAMA_SWA_TYPE_SYMMETRIC) {
        return "its tokens see those behind them";
    }
    return nullptr;
}

void llama_clex_store_cache::add_to(clex_hasher & hasher) const {
    hasher.number(kv.v_trans).number(kv.attn_rot_k).number(kv.attn_rot_v).number(kv.n_swa).number((int) kv.swa_type);
    for (const auto & layer : kv.layers) {
        hasher.number(layer.il).number((int) layer.k->type).number(layer.v ? (int) layer.v->type : -1);

        auto * dev = kv.model.dev_layer(layer.il);
        hasher.add(dev ? std::string(ggml_backend_dev_name(dev)) + ggml_backend_dev_description(dev) : std::string());
    }

    const auto & clex = kv.clex;
    hasher.number(clex.tables.enabled()).number(clex.tables.hash).number(clex.tables.log_scale);
    if (clex.tables.log_scale) {
        hasher.number((int) clex.policy).number(clex.clamp).number(clex.policy == LLAMA_CLEX_POLICY_FIXED ? clex.n_ctx : 0);
    }
}

std::vector<uint64_t> llama_clex_store_cache::section_sizes() const {
    std::vector<uint64_t> res;
    for (const auto & s : sections) {
        res.push_back(section_size(s));
    }
    return res;
}

bool llama_clex_store_cache::on_host() const {
    return std::all_of(sections.begin(), sections.end(), [](const section & s) { return ggml_backend_buffer_is_host(s.tensor->buffer); });
}

std::vector<llama_clex_store_cache::cell> llama_clex_store_cache::match(const llama_token * tokens, int32_t n_tokens) const {
    const auto & cells = kv.v_cells[stream];

    std::vector<cell> res;

    uint64_t sum = llama_clex_texts::BEGIN;
    for (const auto & [pos, i] : cells.seq_pos_get(seq_id)) {
        if (pos != (llama_pos) res.size() || pos >= n_tokens) {
            break;
        }

        const auto text = kv.clex.texts.get(first_row + i);
        sum = llama_clex_texts::next(sum, tokens[pos], text.table);
        if (text.sum != sum || cells.get_shift(i) != 0) {
            break;
        }

        cell cur = { i, text.table, cells.ext_get(i).clex, false, true, text.alone };
        if (kv.clex.tables.enabled()) {
            const auto * key = kv.clex.kept.find((int32_t) (first_row + i));
            if (key && key->pos == pos) {
                cur.bucket = key->bucket;
                cur.kept   = true;
            }
            cur.as_computed = cur.bucket == (kv.clex.tables.log_scale ? kv.clex.choose_bucket(text.table) : text.table);
        } else {
            cur.bucket = 0;
        }
        res.push_back(cur);
    }
    return res;
}

std::vector<llama_clex_store_cache::cell> llama_clex_store_cache::match_window(const llama_token * tokens, int32_t n_tokens) const {
    const auto & cells = kv.v_cells[stream];

    std::vector<cell> res(n_tokens, { NONE, 0, 0, false, true, false });

    uint64_t  sum  = llama_clex_texts::BEGIN;
    llama_pos next = 0; // position of the sum
    for (const auto & [pos, i] : cells.seq_pos_get(seq_id)) {
        for (; next <= pos && next < n_tokens; ++next) {
            sum = llama_clex_texts::next(sum, tokens[next], 0);
        }
        if (pos >= n_tokens) {
            break;
        }
        const auto text = kv.clex.texts.get(first_row + i);
        if (text.sum == sum && cells.get_shift(i) == 0) {
            res[pos].i     = i;
            res[pos].alone = text.alone;
        }
    }
    return res;
}

// a chunk or a window, and all where the cache has room for all
int32_t llama_clex_store_cache::n_window() const {
    return (int32_t) kv.n_swa;
}

uint32_t llama_clex_store_cache::n_cells() const {
    return kv.get_size();
}

int32_t llama_clex_store_cache::wanted_table(int32_t n_total) const {
    return kv.clex.table_of(n_total, kv.clex.choose_bucket(n_total));
}

bool llama_clex_store_cache::has_bucket(int32_t bucket) const {
    return bucket >= 0 && bucket < (kv.clex.tables.enabled() ? (int32_t) kv.clex.tables.scaling_factors.size() : 1);
}

// neighbouring cells at once; f(token of the block, first cell, number of cells)
template <typename F>
void llama_clex_store_cache::for_each_run(const uint32_t * cells, F f) {
    for (size_t i0 = 0; i0 < LLAMA_CLEX_STORE_BLOCK;) {
        size_t i1 = i0 + 1;
        while (i1 < LLAMA_CLEX_STORE_BLOCK && cells[i1] == cells[i1 - 1] + 1) {
            ++i1;
        }
        f(i0, (size_t) cells[i0], i1 - i0);
        i0 = i1;
    }
}

void llama_clex_store_cache::get(const cell * cells, uint8_t * dst) const {
    uint32_t idx[LLAMA_CLEX_STORE_BLOCK];
    for (size_t i = 0; i < LLAMA_CLEX_STORE_BLOCK; ++i) {
        idx[i] = cells[i].i;
    }

    for (const auto & s : sections) {
        for_each_run(idx, [&](size_t i, size_t cell, size_t n) {
            if (s.n_rows > 0) {
                ggml_backend_tensor_get_2d(s.tensor, dst + i*s.size_row, s.offset + cell*s.size_row, n*s.size_row,
                        s.n_rows, (size_t) kv.get_size()*s.size_row, LLAMA_CLEX_STORE_BLOCK*s.size_row);
            } else {
                ggml_backend_tensor_get(s.tensor, dst + i*s.size_row, s.offset + cell*s.size_row, n*s.size_row);
            }
        });
        for (size_t i = 0; s.kept && i < LLAMA_CLEX_STORE_BLOCK; ++i) {
            if (cells[i].kept) {
                ggml_backend_tensor_get(s.kept, dst + i*s.size_row, (first_row + idx[i])*s.size_row, s.size_row);
            }
        }
        dst += section_size(s);
    }
}

bool llama_clex_store_cache::place(const llama_token * tokens, int32_t n_past, int32_t n_tokens, const std::vector<uint32_t> * wanted) {
    const uint32_t n_pos = kv.hparams.n_pos_per_embd();

    llama_batch_allocr balloc(n_pos);

    llama_ubatch ubatch = balloc.ubatch_reserve(n_tokens, 1);

    llama_seq_id seq = seq_id;
    ubatch.seq_id_unq[0] = seq;
    for (int32_t i = 0; i < n_tokens; ++i) {
        ubatch.token   [i] = tokens[n_past + i];
        ubatch.n_seq_id[i] = 1;
        ubatch.seq_id  [i] = &seq;
        // a text has the same position in all sections of M-RoPE, and 0 in the last
        for (uint32_t k = 0; k < n_pos; ++k) {
            ubatch.pos[k*n_tokens + i] = k < 3 ? n_past + i : 0;
        }
    }

    auto sinfo = kv.find_slot(ubatch, false);
    if (sinfo.empty()) {
        return false;
    }
    const auto & all = kv.v_cells[stream];
    if (wanted && std::all_of(wanted->begin(), wanted->end(), [&](uint32_t i) { return i < all.size() && all.is_empty(i); })) {
        sinfo.idxs[0] = *wanted;
    }
    // of no known text until their tables are known
    kv.clex.adapted = true;
    kv.apply_ubatch(sinfo, ubatch);
    kv.clex.adapted = false; // each batch says it anew

    placed     = sinfo.idxs[0];
    placed_sum = llama_clex_texts::BEGIN;

    const auto & seq_cells = kv.v_cells[stream].seq_pos_get(seq_id);
    if (n_past > 0) {
        const auto it = seq_cells.lower_bound({ n_past - 1, 0 });
        placed_sum = it != seq_cells.end() ? kv.clex.texts.get(first_row + it->second).sum : 0;
    }
    return true;
}

void llama_clex_store_cache::set(size_t i_block, size_t i_section, const uint8_t * src) {
    const auto & s = sections[i_section];

    for_each_run(placed.data() + i_block*LLAMA_CLEX_STORE_BLOCK, [&](size_t i, size_t cell, size_t n) {
        if (s.n_rows > 0) {
            ggml_backend_tensor_set_2d(s.tensor, src + i*s.size_row, s.offset + cell*s.size_row, n*s.size_row,
                    s.n_rows, (size_t) kv.get_size()*s.size_row, LLAMA_CLEX_STORE_BLOCK*s.size_row);
        } else {
            ggml_backend_tensor_set(s.tensor, src + i*s.size_row, s.offset + cell*s.size_row, n*s.size_row);
        }
    });
}

uint8_t * llama_clex_store_cache::data(size_t i_block, size_t i_section) const {
    const auto & s     = sections[i_section];
    const auto * cells = placed.data() + i_block*LLAMA_CLEX_STORE_BLOCK;

    for (uint32_t i = 1; i < LLAMA_CLEX_STORE_BLOCK; ++i) {
        if (cells[i] != cells[0] + i) {
            return nullptr;
        }
    }
    if (s.n_rows > 0 || !ggml_backend_buffer_is_host(s.tensor->buffer)) {
        return nullptr;
    }
    return static_cast<uint8_t *>(s.tensor->data) + s.offset + cells[0]*s.size_row;
}

void llama_clex_store_cache::wipe(size_t i_block) {
    for (size_t i = 0; i < sections.size(); ++i) {
        const std::vector<uint8_t> zeros(section_size(sections[i]));
        set(i_block, i, zeros.data());
    }
}

void llama_clex_store_cache::set_tables(size_t i_block, const llama_token * tokens, const int32_t * tables, const int32_t * buckets, bool alone) {
    auto & cells = kv.v_cells[stream];

    for (size_t i = 0; i < LLAMA_CLEX_STORE_BLOCK; ++i) {
        const uint32_t idx = placed[i_block*LLAMA_CLEX_STORE_BLOCK + i];

        if (kv.clex.tables.enabled()) {
            auto ext = cells.ext_get(idx);
            ext.clex = buckets[i];
            cells.ext_set(idx, ext);
        }
        if (placed_sum != 0) {
            placed_sum = llama_clex_texts::next(placed_sum, tokens[i], tables[i]);
            kv.clex.texts.set(first_row + idx, { placed_sum, tables[i], alone });
        }
    }
}

void llama_clex_store_cache::set_texts(const llama_token * tokens, int32_t n_past) {
    uint64_t sum = llama_clex_texts::BEGIN;
    for (int32_t i = 0; i < n_past + (int32_t) placed.size(); ++i) {
        sum = llama_clex_texts::next(sum, tokens[i], 0);
        if (i >= n_past) {
            kv.clex.texts.set(first_row + placed[i - n_past], { sum, 0, false });
        }
    }
}

void llama_clex_store_cache::get_origins(std::vector<origin> & origins) const {
    for (const auto & [pos, i] : kv.v_cells[stream].seq_pos_get(seq_id)) {
        const auto text = kv.clex.texts.get(first_row + i);
        origins.push_back({ pos, text.table, text.sum, text.alone });
    }
}

void llama_clex_store_cache::set_origins(const origin * origins, size_t n) {
    const auto * cur = origins;
    for (const auto & [pos, i] : kv.v_cells[stream].seq_pos_get(seq_id)) {
        while (cur != origins + n && cur->pos < pos) {
            ++cur;
        }
        if (cur != origins + n && cur->pos == pos) {
            kv.clex.texts.set(first_row + i, { cur->sum, cur->table, cur->alone != 0 });
        }
    }
}

int32_t llama_clex_store_cache::type_k() const { return kv.layers.front().k->type; }
int32_t llama_clex_store_cache::type_v() const { return kv.layers.front().v ? kv.layers.front().v->type : -1; }
