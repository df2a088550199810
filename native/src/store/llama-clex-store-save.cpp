#include "llama-clex-store-save.h"

#include "llama-clex-store-block.h"

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-model.h"

#include <algorithm>
#include <ctime>
#include <numeric>

static uint32_t clex_flags(const llama_clex_store_cache::cell * cells) {
    const auto * end = cells + CLEX_BLOCK;
    return (std::all_of(cells, end, [](const auto & c) { return c.as_computed; }) ? CLEX_BLOCK_AS_COMPUTED : 0u) |
           (std::any_of(cells, end, [](const auto & c) { return c.alone; })       ? CLEX_BLOCK_ALONE       : 0u);
}

void clex_store_save::describe(clex_block_header & header, const llama_token * tokens) const {
    const auto & model = lctx.get_model();

    const std::string name = model.name.empty() || model.name == "n/a" ? model.desc() : model.name;
    snprintf(header.model, sizeof(header.model), "%s", name.c_str());

    if (header.index > 0) {
        return;
    }
    int32_t n = llama_detokenize(&model.vocab, tokens, CLEX_BLOCK, nullptr, 0, false, true);
    std::string text(std::max(1, -n), 0);
    n = llama_detokenize(&model.vocab, tokens, CLEX_BLOCK, text.data(), text.size(), false, true);
    text.resize(std::max(0, n));

    size_t size = std::min(text.size(), sizeof(header.begin) - 1);
    while (size < text.size() && size > 0 && ((uint8_t) text[size] & 0xc0) == 0x80) {
        --size;
    }
    std::copy_n(text.data(), size, header.begin);
}

bool clex_store_save::store_block(const llama_token * tokens, size_t index, const std::vector<llama_clex_store_cache::cell> & all_cells,
        const llama_clex_store_cache::cell * windowed, const part & p, const clex_store_writer::text & files) {
    const auto * cells = all_cells.data() + index*CLEX_BLOCK;
    tokens += index*CLEX_BLOCK;

    std::vector<uint64_t> all = sizes;
    if (windowed) {
        all.insert(all.end(), window_sizes.begin(), window_sizes.end());
    }
    auto block = store.writer.next(std::accumulate(all.begin(), all.end(), (uint64_t) 0));
    if (!block) {
        return false;
    }

    auto & header = block->header;
    header.config    = config;
    header.parent    = p.parent;
    header.name      = p.name;
    header.t_created = time(nullptr);
    header.index     = (uint32_t) index;
    header.type_k    = cache.type_k();
    header.type_v    = cache.type_v();
    header.flags     = clex_flags(cells);
    std::copy_n(digest.data(), sizeof(header.model_id), header.model_id);
    std::copy_n(tokens, CLEX_BLOCK, header.tokens);
    for (int32_t i = 0; i < CLEX_BLOCK; ++i) {
        header.tables [i] = cells[i].table;
        header.buckets[i] = cells[i].bucket;
        header.window [i] = windowed ? (int32_t) windowed[i].i : -1;
    }
    describe(header, tokens);

    block->sections.clear();
    for (const auto size : all) {
        block->sections.push_back({ size, 0 });
    }
    cache.get(cells, block->data.data());
    if (windowed) {
        window->get(windowed, block->data.data() + std::accumulate(sizes.begin(), sizes.end(), (uint64_t) 0));
    }

    store.writer.push(std::move(block), files);
    return true;
}

std::vector<clex_store_save::part> clex_store_save::name_blocks(const llama_token * tokens, const std::vector<llama_clex_store_cache::cell> & cells) const {
    std::vector<part> res;

    clex_digest parent = {};
    for (size_t i = 0; (i + 1)*CLEX_BLOCK <= cells.size(); ++i) {
        const auto * block_cells = cells.data() + i*CLEX_BLOCK;

        int32_t tables [CLEX_BLOCK];
        int32_t buckets[CLEX_BLOCK];
        for (int32_t k = 0; k < CLEX_BLOCK; ++k) {
            tables [k] = block_cells[k].table;
            buckets[k] = block_cells[k].bucket;
        }
        const clex_digest key = clex_block_key(config, parent, tokens + i*CLEX_BLOCK);

        res.push_back({ make_link(key, (uint32_t) i, clex_block_label(tables, buckets, clex_flags(block_cells))), parent });
        parent = res.back().name;
    }
    return res;
}

int32_t clex_store_save::save(const llama_token * tokens, int32_t n_tokens) {
    const int64_t t_start_us = ggml_time_us();

    context.settle();

    const auto cells = cache.match(tokens, n_tokens);

    std::vector<llama_clex_store_cache::cell> windowed;
    if (window) {
        windowed = window->match_window(tokens, (int32_t) cells.size());
    }

    const auto blocks = name_blocks(tokens, cells);

    std::vector<std::string> paths;
    for (const auto & block : blocks) {
        paths.push_back(block.path);
    }
    const auto files = std::make_shared<const std::vector<std::string>>(paths);

    bool   any = false;
    size_t n   = 0;
    for (; n < blocks.size(); ++n) {
        // in this order: it is there before it does not wait any more
        if (store.writer.waits(paths[n]) || clex_store_folder::exists(paths[n])) {
            continue;
        }
        if (store.writer.is_crowded(paths[n])) {
            break;
        }
        // what layers with a window do not have any more is not needed, but at the end of a text
        const auto * seen = window ? windowed.data() + n*CLEX_BLOCK : nullptr;
        if (seen && std::any_of(seen, seen + CLEX_BLOCK, [](const auto & c) { return c.i == llama_clex_store_cache::NONE; })) {
            seen = nullptr;
        }
        if (!store_block(tokens, n, cells, seen, blocks[n], files)) {
            store.n_skipped += 1;
            break;
        }
        any = true;
    }
    if (any) {
        paths.resize(n);
        store.writer.used(std::move(paths));
    }
    store.t_store_us += ggml_time_us() - t_start_us;

    return (int32_t) n*CLEX_BLOCK;
}
