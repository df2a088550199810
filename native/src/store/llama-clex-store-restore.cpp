#include "llama-clex-store-restore.h"

#include "llama-clex-store-block.h"

#include "llama-impl.h"
#include "llama-kv-cache.h"

#include <algorithm>
#include <numeric>
#include <set>
#include <stdexcept>
#include <system_error>
#include <thread>

// blocks that are looked at for one text, whatever ways of computing it the store has
static constexpr size_t CLEX_SEARCH_MAX = 1 << 17;

// that another thread is worth
static constexpr uint64_t CLEX_THREAD_BYTES = 8*1024*1024;

void clex_store_restore::search(const llama_token * tokens, int32_t n_blocks, bool exact) {
    const auto n_wanted = [](const chain & c) { return std::count_if(c.begin(), c.end(), [](const found & l) { return l.wanted; }); };
    if (cur.size() > best.size() || (cur.size() == best.size() && n_wanted(cur) > n_wanted(best))) {
        best = cur;
    }
    if ((int32_t) cur.size() == n_blocks || ++n_looked > CLEX_SEARCH_MAX) {
        return;
    }

    const uint32_t    index  = cur.size();
    const clex_digest parent = cur.empty() ? clex_digest {} : cur.back().name;
    const clex_digest key    = clex_block_key(config, parent, tokens + (size_t) index*CLEX_BLOCK);

    std::vector<std::string> labels = { wanted };
    if (!exact) {
        labels = store.folder.labels(model_id, key);
        std::stable_partition(labels.begin(), labels.end(), [&](const std::string & label) { return label == wanted; });
    } else if (!clex_store_folder::exists(store.folder.path(model_id, key, index, wanted))) {
        return;
    }
    for (const auto & label : labels) {
        cur.push_back({ make_link(key, index, label), label == wanted });
        search(tokens, n_blocks, exact);
        cur.pop_back();
        // there is none longer, and none that has more of the table
        if ((int32_t) best.size() == n_blocks && n_wanted(best) == n_blocks) {
            return;
        }
    }
}

void clex_store_restore::find(const llama_token * tokens, int32_t n_blocks, bool exact) {
    cur.clear();
    best.clear();
    n_looked = 0;
    search(tokens, n_blocks, exact);
}

void clex_store_restore::check(const clex_block_file & file, const llama_token * tokens, size_t i) const {
    const auto & header = file.header;

    std::vector<uint64_t> expected = sizes;
    if (file.sections.size() > sizes.size()) {
        expected.insert(expected.end(), window_sizes.begin(), window_sizes.end());
    }
    const bool right = header.name == best[i].name && header.config == config && header.index == i &&
        std::equal(tokens + i*CLEX_BLOCK, tokens + (i + 1)*CLEX_BLOCK, header.tokens) &&
        file.sections.size() == expected.size() &&
        std::equal(expected.begin(), expected.end(), file.sections.begin(), [](uint64_t size, const clex_block_section & s) { return size == s.size; }) &&
        std::all_of(header.buckets, header.buckets + CLEX_BLOCK, [&](int32_t bucket) { return cache.has_bucket(bucket); });
    if (!right) {
        throw std::runtime_error("it is another block");
    }
}

void clex_store_restore::read(clex_block_file & file, llama_clex_store_cache & to, size_t i_block, std::vector<uint8_t> & buffer) {
    try {
        for (size_t k = 0; k < to.n_sections(); ++k) {
            if (uint8_t * data = to.data(i_block, k)) {
                file.read(data);
            } else {
                to.set(i_block, k, file.read(buffer));
            }
        }
    } catch (const std::exception &) {
        to.wipe(i_block);
        throw;
    }
}

std::unique_ptr<clex_block_file> clex_store_restore::expect(size_t i) const {
    if (i >= best.size()) {
        return nullptr;
    }
    try {
        auto file = std::make_unique<clex_block_file>(best[i].path);
        file->expect();
        return file;
    } catch (const std::exception &) {
        return nullptr; // it is opened again when it is its turn
    }
}

bool clex_store_restore::load_block(const llama_token * tokens, const place_of & at, size_t i, std::unique_ptr<clex_block_file> file,
        std::vector<uint8_t> & buffer, clex_block_header & header) {
    const auto & l = best[i];
    try {
        if (!file) {
            file = std::make_unique<clex_block_file>(l.path);
        }
        check(*file, tokens, i);
        read(*file, cache, i - at.i0, buffer);
        if (window && i >= at.iw) {
            read(*file, *window, i - at.iw, buffer);
        }
        header = file->header;
        return true;
    } catch (const std::system_error & err) {
        // too many open files, say: nothing is wrong with the block
        LLAMA_LOG_DEBUG("%s: %s: %s\n", __func__, l.path.c_str(), err.what());
        unreadable = true;
        return false;
    } catch (const std::exception & err) {
        LLAMA_LOG_DEBUG("%s: %s: %s\n", __func__, l.path.c_str(), err.what());
        store.n_damaged += clex_store_folder::remove(l.path);
        return false;
    }
}

size_t clex_store_restore::load(const llama_token * tokens, const place_of & at, std::vector<clex_block_header> & headers) {
    const size_t n = best.size() - at.i0;

    std::vector<char> right(n, 0);

    std::atomic<size_t> next  = { 0 };
    std::atomic<bool>   wrong = { false };

    const auto work = [&] {
        std::vector<uint8_t> buffer;

        size_t i    = next++;
        auto   file = expect(at.i0 + i);
        while (i < n && !wrong) {
            // the disk reads the one while the other is copied
            const size_t i_next    = next++;
            auto         file_next = expect(at.i0 + i_next);

            right[i] = load_block(tokens, at, at.i0 + i, std::move(file), buffer, headers[i]);
            wrong = wrong || !right[i];

            i    = i_next;
            file = std::move(file_next);
        }
    };

    // one thread reads at half the speed of the memory; another is waited for longer than little takes, where others compute
    const size_t n_worth   = 1 + n*std::accumulate(sizes.begin(), sizes.end(), (uint64_t) 0)/CLEX_THREAD_BYTES;
    const size_t n_threads = cache.on_host() ? std::min<size_t>({ n, n_worth, 4, std::max(1u, std::thread::hardware_concurrency()) }) : 1;

    std::vector<std::thread> others;
    try {
        for (size_t k = 1; k < n_threads; ++k) {
            others.emplace_back(work);
        }
    } catch (const std::system_error &) {
        // as many as there can be
    }
    work();
    for (auto & other : others) {
        other.join();
    }
    return std::find(right.begin(), right.end(), 0) - right.begin();
}

size_t clex_store_restore::find_window() {
    const auto has = [&](const link & l) {
        try {
            return clex_block_file(l.path).sections.size() > sizes.size();
        } catch (const std::exception &) {
            return true; // it is looked at when it is loaded
        }
    };

    const size_t step = context.step()/CLEX_BLOCK;
    // a window is larger than the cells of its cache where the cache has all tokens
    const bool   full = window->n_cells() >= cache.n_cells();

    while (!best.empty()) {
        const int32_t n_end  = (int32_t) best.size()*CLEX_BLOCK;
        const size_t  needed = full ? 0 : std::max(0, n_end - window->n_window() + 1)/CLEX_BLOCK;

        size_t iw = best.size();
        while (iw > 0 && (best.size() - iw + 1)*CLEX_BLOCK <= window->n_cells() && has(best[iw - 1])) {
            --iw;
        }
        if (iw <= needed) {
            return iw;
        }
        best.resize(best.size() - std::min(best.size(), step));
    }
    return 0;
}

bool clex_store_restore::place(const llama_token * tokens, size_t i0, size_t iw) {
    if (!cache.place(tokens, (int32_t) i0*CLEX_BLOCK, (int32_t) (best.size() - i0)*CLEX_BLOCK)) {
        return false;
    }
    if (!window) {
        return true;
    }
    // where they were when they were computed: a sum over cells depends on their order
    std::vector<uint32_t> cells;
    for (size_t i = iw; i < best.size(); ++i) {
        try {
            const clex_block_file file(best[i].path);
            cells.insert(cells.end(), file.header.window, file.header.window + CLEX_BLOCK);
        } catch (const std::exception &) {
            break; // it is looked at when it is loaded
        }
    }
    const bool distinct = std::set<uint32_t>(cells.begin(), cells.end()).size() == (best.size() - iw)*CLEX_BLOCK;
    return window->place(tokens, (int32_t) iw*CLEX_BLOCK, (int32_t) (best.size() - iw)*CLEX_BLOCK, distinct ? &cells : nullptr);
}

size_t clex_store_restore::n_own(const llama_token * tokens, int32_t n_tokens, bool exact) const {
    const auto as_wanted = [&](const llama_clex_store_cache::cell & c) {
        return !exact || (c.as_computed && !c.alone && std::to_string(c.table) == wanted);
    };
    const auto own = cache.match(tokens, n_tokens);

    size_t n = 0;
    while (n < std::min(best.size(), own.size()/CLEX_BLOCK) && std::all_of(&own[n*CLEX_BLOCK], &own[n*CLEX_BLOCK] + CLEX_BLOCK, as_wanted)) {
        ++n;
    }
    return n;
}

void clex_store_restore::describe(const llama_token * tokens, const place_of & at, const std::vector<clex_block_header> & headers) {
    std::vector<std::string> paths;
    for (size_t i = 0; i < best.size(); ++i) {
        if (i >= at.i0) {
            const auto & header = headers[i - at.i0];
            cache.set_tables(i - at.i0, header.tokens, header.tables, header.buckets, header.flags & CLEX_BLOCK_ALONE);
        }
        paths.push_back(best[i].path);
    }
    if (window && !best.empty()) {
        window->set_texts(tokens, (int32_t) at.iw*CLEX_BLOCK);
    }
    // all at once, so that a text is never older than what goes on from it
    clex_store_folder::touch(paths);
}

int32_t clex_store_restore::try_restore(const llama_token * tokens, int32_t n_tokens, bool exact, bool & retry) {
    const int32_t step  = context.step();
    const int32_t n_has = context.caches()[0]->seq_pos_max(seq_id) + 1;

    const auto whole = [&](size_t n_blocks) { return n_blocks*CLEX_BLOCK/step*step/CLEX_BLOCK; };

    find(tokens, (n_tokens - 1)/CLEX_BLOCK, exact);
    best.resize(whole(best.size()));

    const size_t iw = window ? find_window() : best.size();
    if ((int32_t) best.size()*CLEX_BLOCK <= n_has) {
        return n_has;
    }

    // what the sequence has of the same text stays; with a window, all of it is taken anew
    const size_t i0 = window ? 0 : n_own(tokens, n_tokens, exact);

    context.settle();
    context.truncate(seq_id, (llama_pos) i0*CLEX_BLOCK);
    if (!place(tokens, i0, iw)) {
        context.truncate(seq_id, (llama_pos) i0*CLEX_BLOCK);
        return (int32_t) i0*CLEX_BLOCK;
    }

    std::vector<clex_block_header> headers;
    size_t n_right = 0;
    try {
        headers.resize(best.size() - i0);
        n_right = load(tokens, { i0, iw }, headers);
    } catch (const std::exception & err) {
        // the cells that were placed have no data
        LLAMA_LOG_WARN("%s: %s\n", __func__, err.what());
        context.truncate(seq_id, (llama_pos) i0*CLEX_BLOCK);
        return (int32_t) i0*CLEX_BLOCK;
    }

    // with a window the end is what counts
    const bool all = i0 + n_right == best.size();
    retry = !all && !unreadable;
    best.resize(all ? best.size() : window ? 0 : std::max(i0, whole(i0 + n_right)));
    context.truncate(seq_id, (llama_pos) best.size()*CLEX_BLOCK);
    describe(tokens, { i0, iw }, headers);

    return (int32_t) best.size()*CLEX_BLOCK;
}

int32_t clex_store_restore::restore(const llama_token * tokens, int32_t n_tokens, int32_t n_total, bool exact) {
    const int64_t t_start_us = ggml_time_us();

    const int32_t n_has = context.caches()[0]->seq_pos_max(seq_id) + 1;

    wanted = std::to_string(cache.wanted_table(n_total));

    // each time a damaged file is gone
    int32_t res   = n_has;
    bool    retry = true;
    for (int i = 0; i < 16 && retry; ++i) {
        retry = false;
        res   = try_restore(tokens, n_tokens, exact, retry);
    }

    store.n_restored   += std::max(0, res - n_has);
    store.t_restore_us += ggml_time_us() - t_start_us;

    return res;
}
