#include "llama-clex-store.h"

#include "llama-clex-store-block.h"
#include "llama-clex-store-cells.h"
#include "llama-clex-store-context.h"
#include "llama-clex-store-documents.h"
#include "llama-clex-store-folder.h"
#include "llama-clex-store-name.h"
#include "llama-clex-store-writer.h"

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-kv-cache.h"
#include "llama-model.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <ctime>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <set>
#include <system_error>
#include <thread>

#ifndef _WIN32
#include <unistd.h>
#endif

static constexpr int32_t CLEX_BLOCK = LLAMA_CLEX_STORE_BLOCK;

// blocks that are looked at for one text, whatever ways of computing it the store has
static constexpr size_t CLEX_SEARCH_MAX = 1 << 17;

static int64_t clex_pid() {
#ifdef _WIN32
    return 0;
#else
    return getpid();
#endif
}

struct llama_clex_store {
    llama_clex_store(const std::string & path, int64_t max_bytes) :
        folder(path), max_bytes(max_bytes > 0 ? max_bytes : share_of_disk()), writer(folder, this->max_bytes), pid(clex_pid()) {}

    // of this process: what a fork copied has no thread, and locks that nobody opens
    bool is_ours() const { return pid == clex_pid(); }

    // hash of the content of a model's files, 16 bytes; empty where there is none
    std::string model_digest(const llama_clex_files & files);

    const clex_store_folder folder;
    const int64_t           max_bytes;

    clex_store_writer writer;

    std::atomic<int64_t> n_restored   = { 0 };
    std::atomic<int64_t> n_skipped    = { 0 };
    std::atomic<int64_t> n_damaged    = { 0 };
    std::atomic<int64_t> t_restore_us = { 0 };
    std::atomic<int64_t> t_store_us   = { 0 };

    std::mutex            mutex;
    std::set<clex_digest> known; // blocks that this process has stored or seen: not stored again where they were evicted

private:
    int64_t share_of_disk() const {
        int64_t used = 0;
        for (const auto & file : folder.scan()) {
            used += file.size;
        }
        return std::max<int64_t>(1, (folder.free_bytes() + used)/5);
    }

    std::map<std::string, std::string> digests; // by the fingerprints of files

    const int64_t pid;
};

std::string llama_clex_store::model_digest(const llama_clex_files & files) {
    const std::lock_guard<std::mutex> lock(mutex);

    // of a file that was changed since, the process has what was in it before
    if (!files.unchanged()) {
        return "";
    }
    const std::string fingerprint = files.fingerprint();

    auto it = digests.find(fingerprint);
    if (it != digests.end()) {
        return it->second;
    }

    // what the note says, and a hash of both that it ends with
    const auto note = [&](const std::string & digest) {
        return fingerprint + digest + clex_hex(clex_hasher().add(fingerprint).add(digest).get());
    };

    const std::string name = clex_hex(clex_hasher().add(fingerprint).get());
    const std::string text = folder.note(name);

    std::string digest = text.size() == note(std::string(16, 0)).size() ? text.substr(fingerprint.size(), 16) : "";
    if (digest.empty() || text != note(digest)) {
        digest = files.digest();
        if (!digest.empty()) {
            try {
                folder.set_note(name, note(digest));
            } catch (const std::exception & err) {
                LLAMA_LOG_DEBUG("%s: %s\n", __func__, err.what());
            }
        }
    }
    return digests[fingerprint] = digest;
}

static uint32_t clex_flags(const llama_clex_store_cache::cell * cells) {
    const auto * end = cells + CLEX_BLOCK;
    return (std::all_of(cells, end, [](const auto & c) { return c.as_computed; }) ? CLEX_BLOCK_AS_COMPUTED : 0u) |
           (std::any_of(cells, end, [](const auto & c) { return c.alone; })       ? CLEX_BLOCK_ALONE       : 0u);
}

namespace {

// one call for one sequence of a context
class store_call {
public:
    store_call(llama_clex_store & store, llama_context & lctx, llama_seq_id seq_id, const std::string & digest) :
        store(store), lctx(lctx), context(lctx), seq_id(seq_id), digest(digest),
        model_id(clex_hex(reinterpret_cast<const uint8_t *>(digest.data()), digest.size())),
        config(context.config(digest, seq_id)), cache(*context.caches()[0], seq_id), sizes(cache.section_sizes()) {
        if (context.caches().size() > 1) {
            window = std::make_unique<llama_clex_store_cache>(*context.caches()[1], seq_id);
            window_sizes = window->section_sizes();
        }
    }

    int32_t restore(const llama_token * tokens, int32_t n_tokens, int32_t n_total, bool exact);
    int32_t save   (const llama_token * tokens, int32_t n_tokens);

private:
    struct link {
        std::string path;
        clex_digest name;
        bool        wanted; // computed with the table that is wanted
    };

    using chain = std::vector<link>;

    link make_link(const clex_digest & key, uint32_t index, const std::string & label) const {
        return { store.folder.path(model_id, key, index, label), clex_block_name(key, label), label == wanted };
    }

    // the longest chain of a text, and of those the one that has most of the wanted table
    void find(const llama_token * tokens, int32_t n_blocks, bool exact);
    void search(const llama_token * tokens, int32_t n_blocks, bool exact);

    // Blocks from the i0-th on into cells that were placed, and into those of layers with a window from the iw-th on; headers
    // are those of the blocks from i0 on. Returns how many were right.
    size_t load(const llama_token * tokens, size_t i0, size_t iw, std::vector<clex_block_header> & headers);
    bool   load_block(const llama_token * tokens, size_t i, size_t i0, size_t iw, std::vector<uint8_t> & buffer, clex_block_header & header);

    // Shorten the chain until its end has what layers with a window see from there. Returns the first block of which they get
    // their part.
    size_t find_window();

    // find cells for all but the first i0 blocks
    bool place(const llama_token * tokens, size_t i0, size_t iw);

    std::atomic<bool> unreadable = { false }; // the system did not let a block be read, which may be whole

    // one attempt; the tokens that the sequence has then. retry: a block was damaged, and what was found before is not there
    int32_t try_restore(const llama_token * tokens, int32_t n_tokens, bool exact, bool & retry);

    // a block of cells on its way to its file; false where it has to wait
    // windowed: its cells in layers with a window, or null
    bool store_block(const llama_token * tokens, const llama_clex_store_cache::cell * cells, const llama_clex_store_cache::cell * windowed,
            int32_t index, const clex_digest & parent, const link & l);

    void describe(clex_block_header & header, const llama_token * tokens) const;

    llama_clex_store       & store;
    llama_context          & lctx;
    llama_clex_store_context context;

    const llama_seq_id seq_id;
    const std::string  digest;
    const std::string  model_id;
    const clex_digest  config;

    llama_clex_store_cache      cache;
    const std::vector<uint64_t> sizes;

    std::unique_ptr<llama_clex_store_cache> window; // null where no layer has one
    std::vector<uint64_t>                   window_sizes;

    std::string wanted;
    chain       cur;
    chain       best;
    size_t      n_looked = 0;
};

void store_call::search(const llama_token * tokens, int32_t n_blocks, bool exact) {
    const auto n_wanted = [](const chain & c) { return std::count_if(c.begin(), c.end(), [](const link & l) { return l.wanted; }); };
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
        cur.push_back(make_link(key, index, label));
        search(tokens, n_blocks, exact);
        cur.pop_back();
        // there is none longer, and none that has more of the table
        if ((int32_t) best.size() == n_blocks && n_wanted(best) == n_blocks) {
            return;
        }
    }
}

void store_call::find(const llama_token * tokens, int32_t n_blocks, bool exact) {
    cur.clear();
    best.clear();
    n_looked = 0;
    search(tokens, n_blocks, exact);
}

bool store_call::load_block(
        const llama_token * tokens, size_t i, size_t i0, size_t iw, std::vector<uint8_t> & buffer, clex_block_header & header) {
    const auto & l = best[i];
    try {
        clex_block_file file(l.path);
        header = file.header;

        std::vector<uint64_t> expected = sizes;
        if (file.sections.size() > sizes.size()) {
            expected.insert(expected.end(), window_sizes.begin(), window_sizes.end());
        }
        const bool right = header.name == l.name && header.config == config && header.index == i &&
            std::equal(tokens + i*CLEX_BLOCK, tokens + (i + 1)*CLEX_BLOCK, header.tokens) &&
            file.sections.size() == expected.size() &&
            std::equal(expected.begin(), expected.end(), file.sections.begin(), [](uint64_t size, const clex_block_section & s) { return size == s.size; }) &&
            std::all_of(header.buckets, header.buckets + CLEX_BLOCK, [&](int32_t bucket) { return cache.has_bucket(bucket); });
        if (!right) {
            throw std::runtime_error("it is another block");
        }
        for (size_t k = 0; k < sizes.size(); ++k) {
            cache.set(i - i0, k, file.read(buffer));
        }
        for (size_t k = 0; i >= iw && k < window_sizes.size(); ++k) {
            window->set(i - iw, k, file.read(buffer));
        }
        return true;
    } catch (const std::system_error & err) {
        // too many open files, say: nothing is wrong with the block
        LLAMA_LOG_DEBUG("%s: %s: %s\n", __func__, l.path.c_str(), err.what());
        unreadable = true;
        return false;
    } catch (const std::exception & err) {
        LLAMA_LOG_DEBUG("%s: %s: %s\n", __func__, l.path.c_str(), err.what());
        store.n_damaged += clex_store_folder::remove(l.path);

        const std::lock_guard<std::mutex> lock(store.mutex);
        store.known.erase(l.name);
        return false;
    }
}

size_t store_call::load(const llama_token * tokens, size_t i0, size_t iw, std::vector<clex_block_header> & headers) {
    const size_t n = best.size() - i0;

    std::vector<char> right(n, 0);

    std::atomic<size_t> next  = { 0 };
    std::atomic<bool>   wrong = { false };

    const auto work = [&] {
        std::vector<uint8_t> buffer;
        for (size_t i = next++; i < n && !wrong; i = next++) {
            right[i] = load_block(tokens, i0 + i, i0, iw, buffer, headers[i]);
            wrong = wrong || !right[i];
        }
    };

    // one thread reads at half the speed of the memory
    std::vector<std::thread> others;
    const size_t n_threads = cache.on_host() ? std::min<size_t>({ n, 4, std::max(1u, std::thread::hardware_concurrency()) }) : 1;
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

size_t store_call::find_window() {
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

bool store_call::place(const llama_token * tokens, size_t i0, size_t iw) {
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

int32_t store_call::try_restore(const llama_token * tokens, int32_t n_tokens, bool exact, bool & retry) {
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
    const auto own = cache.match(tokens, n_tokens);
    size_t i0 = 0;
    while (!window && i0 < std::min(best.size(), own.size()/CLEX_BLOCK)) {
        const auto * cell = own.data() + i0*CLEX_BLOCK;
        if (exact && !std::all_of(cell, cell + CLEX_BLOCK, [&](const auto & c) { return c.as_computed && !c.alone && std::to_string(c.table) == wanted; })) {
            break;
        }
        ++i0;
    }

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
        n_right = load(tokens, i0, iw, headers);
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

    std::vector<std::string> paths;
    for (size_t i = 0; i < best.size(); ++i) {
        if (i >= i0) {
            const auto & header = headers[i - i0];
            cache.set_tables(i - i0, header.tokens, header.tables, header.buckets, header.flags & CLEX_BLOCK_ALONE);
        }
        paths.push_back(best[i].path);
    }
    if (window && !best.empty()) {
        window->set_texts(tokens, (int32_t) iw*CLEX_BLOCK);
    }
    // all at once, so that a text is never older than what goes on from it
    clex_store_folder::touch(paths);

    const std::lock_guard<std::mutex> lock(store.mutex);
    for (const auto & l : best) {
        store.known.insert(l.name);
    }
    return (int32_t) best.size()*CLEX_BLOCK;
}

int32_t store_call::restore(const llama_token * tokens, int32_t n_tokens, int32_t n_total, bool exact) {
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

void store_call::describe(clex_block_header & header, const llama_token * tokens) const {
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

bool store_call::store_block(const llama_token * tokens, const llama_clex_store_cache::cell * cells,
        const llama_clex_store_cache::cell * windowed, int32_t index, const clex_digest & parent, const link & l) {
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
    header.parent    = parent;
    header.name      = l.name;
    header.t_created = time(nullptr);
    header.index     = index;
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

    store.writer.push(std::move(block), l.path);
    return true;
}

int32_t store_call::save(const llama_token * tokens, int32_t n_tokens) {
    const int64_t t_start_us = ggml_time_us();

    context.settle();

    const auto cells = cache.match(tokens, n_tokens);

    std::vector<llama_clex_store_cache::cell> windowed;
    if (window) {
        windowed = window->match_window(tokens, (int32_t) cells.size());
    }

    std::vector<std::string> paths;

    int32_t n_new = 0;
    clex_digest parent = {};
    for (int32_t i = 0; (i + 1)*CLEX_BLOCK <= (int32_t) cells.size(); ++i) {
        const auto * block_tokens = tokens + (size_t) i*CLEX_BLOCK;
        const auto * block_cells  = cells.data() + (size_t) i*CLEX_BLOCK;

        int32_t tables [CLEX_BLOCK];
        int32_t buckets[CLEX_BLOCK];
        for (int32_t k = 0; k < CLEX_BLOCK; ++k) {
            tables [k] = block_cells[k].table;
            buckets[k] = block_cells[k].bucket;
        }

        const clex_digest key = clex_block_key(config, parent, block_tokens);
        const link l = make_link(key, i, clex_block_label(tables, buckets, clex_flags(block_cells)));

        bool known;
        {
            const std::lock_guard<std::mutex> lock(store.mutex);
            known = store.known.count(l.name) > 0;
        }
        if (!known && !clex_store_folder::exists(l.path)) {
            // what layers with a window do not have any more is not needed, but at the end of a text
            const auto * part = window ? windowed.data() + (size_t) i*CLEX_BLOCK : nullptr;
            if (part && std::any_of(part, part + CLEX_BLOCK, [](const auto & c) { return c.i == llama_clex_store_cache::NONE; })) {
                part = nullptr;
            }
            if (!store_block(block_tokens, block_cells, part, i, parent, l)) {
                store.n_skipped += 1;
                break;
            }
            ++n_new;
        }
        if (!known) {
            const std::lock_guard<std::mutex> lock(store.mutex);
            store.known.insert(l.name);
        }
        paths.push_back(l.path);
        parent = l.name;
    }

    const auto n_stored = (int32_t) paths.size()*CLEX_BLOCK;
    if (n_new > 0) {
        store.writer.used(std::move(paths));
    }
    store.t_store_us += ggml_time_us() - t_start_us;

    return n_stored;
}

} // namespace

// f() where the store and the context can be used; what is not caught here would end the host
template <typename F>
static int32_t clex_store_call(llama_clex_store * store, llama_context * ctx, llama_seq_id seq_id, int32_t otherwise, F f) {
    if (!store || !store->is_ours() || seq_id < 0 || !llama_clex_store_takes(store, ctx, nullptr, 0)) {
        return otherwise;
    }
    if (seq_id >= llama_clex_store_context(*ctx).n_seq_max()) {
        return otherwise;
    }
    try {
        const std::string digest = store->model_digest(ctx->get_model().clex_files);
        if (digest.empty()) {
            return otherwise;
        }
        return f(store_call(*store, *ctx, seq_id, digest));
    } catch (const std::exception & err) {
        LLAMA_LOG_WARN("%s: %s\n", __func__, err.what());
        return otherwise;
    }
}

//
// C API
//

llama_clex_store * llama_clex_store_open(const char * path, int64_t max_bytes) {
    try {
        return new llama_clex_store(path, max_bytes);
    } catch (const std::exception & err) {
        LLAMA_LOG_ERROR("%s: %s\n", __func__, err.what());
        return nullptr;
    }
}

void llama_clex_store_close(llama_clex_store * store) {
    // in a forked process there is no thread to wait for
    if (store && store->is_ours()) {
        delete store;
    }
}

bool llama_clex_store_takes(llama_clex_store * store, const llama_context * ctx, char * reason, size_t size) {
    GGML_UNUSED(store);

    const std::string refusal = llama_clex_store_context(*const_cast<llama_context *>(ctx)).refusal();
    if (reason && size > 0) {
        snprintf(reason, size, "%s", refusal.c_str());
    }
    return refusal.empty();
}

int32_t llama_clex_store_restore(llama_clex_store * store, llama_context * ctx, llama_seq_id seq_id,
        const llama_token * tokens, int32_t n_tokens, int32_t n_total, uint32_t flags) {
    auto * memory = ctx->get_memory();
    const int32_t n_has = memory && seq_id >= 0 ? memory->seq_pos_max(seq_id) + 1 : 0;

    if (n_tokens <= n_has) {
        return n_has;
    }
    return clex_store_call(store, ctx, seq_id, n_has, [&](store_call && call) {
        return call.restore(tokens, n_tokens, std::max(n_tokens, n_total), flags & LLAMA_CLEX_STORE_EXACT);
    });
}

int32_t llama_clex_store_save(llama_clex_store * store, llama_context * ctx, llama_seq_id seq_id, const llama_token * tokens, int32_t n_tokens) {
    if (n_tokens < CLEX_BLOCK) {
        return 0;
    }
    return clex_store_call(store, ctx, seq_id, 0, [&](store_call && call) { return call.save(tokens, n_tokens); });
}

// of each cache: how many, and they
size_t llama_clex_store_origin_get(const llama_context * ctx, llama_seq_id seq_id, uint8_t * dst, size_t size) {
    llama_clex_store_context context(*const_cast<llama_context *>(ctx));
    if (seq_id < 0 || seq_id >= context.n_seq_max() || !context.refusal().empty()) {
        return 0;
    }

    std::vector<uint8_t> res;
    for (auto * kv : context.caches()) {
        std::vector<llama_clex_store_cache::origin> origins;
        llama_clex_store_cache(*kv, seq_id).get_origins(origins);

        const uint64_t n = origins.size();
        const auto *   p = reinterpret_cast<const uint8_t *>(&n);
        res.insert(res.end(), p, p + sizeof(n));
        p = reinterpret_cast<const uint8_t *>(origins.data());
        res.insert(res.end(), p, p + n*sizeof(origins[0]));
    }
    std::copy_n(res.data(), std::min(size, res.size()), dst);
    return res.size();
}

void llama_clex_store_origin_set(llama_context * ctx, llama_seq_id seq_id, const uint8_t * src, size_t size) {
    llama_clex_store_context context(*ctx);
    if (seq_id < 0 || seq_id >= context.n_seq_max() || !context.refusal().empty()) {
        return;
    }
    for (auto * kv : context.caches()) {
        uint64_t n;
        if (size < sizeof(n)) {
            return;
        }
        memcpy(&n, src, sizeof(n));
        src  += sizeof(n);
        size -= sizeof(n);

        if (n > size/sizeof(llama_clex_store_cache::origin)) {
            return;
        }
        std::vector<llama_clex_store_cache::origin> origins(n);
        if (n > 0) {
            memcpy(origins.data(), src, n*sizeof(origins[0]));
        }
        src  += n*sizeof(origins[0]);
        size -= n*sizeof(origins[0]);

        llama_clex_store_cache(*kv, seq_id).set_origins(origins.data(), n);
    }
}

bool llama_clex_store_flush(llama_clex_store * store) {
    return store->is_ours() && store->writer.flush();
}

llama_clex_store_stats llama_clex_store_get_stats(const llama_clex_store * store) {
    if (!store->is_ours()) {
        return {};
    }
    const auto counts = store->writer.get_counts();

    llama_clex_store_stats res = {};
    res.n_restored   = store->n_restored;
    res.n_stored     = counts.n_stored*CLEX_BLOCK;
    res.n_skipped    = store->n_skipped;
    res.n_damaged    = store->n_damaged;
    res.n_evicted    = counts.n_evicted;
    res.n_bytes      = counts.n_bytes;
    res.max_bytes    = store->max_bytes;
    res.t_restore_us = store->t_restore_us;
    res.t_store_us   = store->t_store_us;
    res.stopped      = counts.stopped;
    return res;
}

int32_t llama_clex_store_list(llama_clex_store * store, llama_clex_store_document * docs, int32_t n) {
    const auto found = clex_store_documents(store->folder).list();
    std::copy_n(found.begin(), std::min<size_t>(found.size(), std::max(0, n)), docs);
    return (int32_t) found.size();
}

int64_t llama_clex_store_remove(llama_clex_store * store, const char * name) {
    return clex_store_documents(store->folder).remove(name);
}

int64_t llama_clex_store_clear(llama_clex_store * store) {
    int64_t res = 0;
    for (const auto & file : store->folder.scan()) {
        res += clex_store_folder::remove(file.path) ? file.size : 0;
    }
    return res;
}

llama_clex_store_check_result llama_clex_store_check(llama_clex_store * store) {
    return clex_store_documents(store->folder).check();
}
