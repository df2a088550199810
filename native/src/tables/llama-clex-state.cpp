#include "llama-clex-state.h"

#include "llama-clex-cache.h"
#include "llama-clex-state-reader.h"
#include "llama-clex-state-tag.h"

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-kv-cache-iswa.h"
#include "llama-kv-cache.h"
#include "llama-memory-hybrid-iswa.h"
#include "llama-memory-hybrid.h"
#include "llama-mmap.h"
#include "llama-model.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

// in front of the state of one sequence in memory, io_magic in llama-context.cpp
static constexpr uint32_t CLEX_SEQ_MAGIC = 0xaf143cd8;

// in front of a file: llama.cpp's magic and version, and the number of tokens that follow
static constexpr size_t CLEX_FILE_HEADER = 3*sizeof(uint32_t);

static void clex_check_sum(const llama_clex_sum & sum, const void * saved) {
    const uint64_t value = sum.get();
    if (memcmp(&value, saved, sizeof(value)) != 0) {
        throw std::runtime_error("the state is damaged or incomplete: its checksum is another one");
    }
}

llama_clex_state::llama_clex_state(llama_context & ctx) :
    ctx(ctx), is_seq(false), seq_id(-1), on_device(false), partial(false), kv(ctx.clex_kv()) {}

llama_clex_state::llama_clex_state(llama_context & ctx, llama_seq_id seq_id, uint32_t flags) :
    ctx(ctx), is_seq(true), seq_id(seq_id), on_device(flags & LLAMA_STATE_SEQ_FLAGS_ON_DEVICE),
    partial(flags & LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY), kv(ctx.clex_kv()) {}

size_t llama_clex_state::sum_size() const {
    return kv ? sizeof(uint64_t) : 0;
}

void llama_clex_state::check_seq() const {
    const int32_t n = ctx.cparams.kv_unified ? LLAMA_MAX_SEQ : ctx.cparams.n_seq_max;
    if (is_seq && (seq_id < -1 || seq_id >= n)) {
        throw std::runtime_error(format("there is no sequence %d, the context has %d", seq_id, n));
    }
}

void llama_clex_state::check_front(clex_state_reader & io) const {
    if (is_seq) {
        if (!io.is_file() && io.get<uint32_t>() != CLEX_SEQ_MAGIC) {
            throw std::runtime_error("this is not the state of one sequence");
        }
        io.skip(io.is_file() ? 0 : sizeof(llama_seq_id));
        return;
    }

    const std::string own = llm_arch_name(ctx.model.arch);

    // llama.cpp allocates as much as the state says
    std::string arch(std::min<size_t>(io.get<uint32_t>(), own.size() + 1), 0);
    io.read(arch.data(), arch.size());
    if (arch != own) {
        throw std::runtime_error("this is not the state of a model of the architecture " + own);
    }
}

struct clex_caches {
    const llama_kv_cache      * plain;
    const llama_kv_cache_iswa * iswa;
    bool                        recurrent; // there are recurrent layers besides
};

static clex_caches clex_caches_of(llama_memory_i * memory) {
    if (const auto * hybrid = dynamic_cast<llama_memory_hybrid *>(memory)) {
        return { hybrid->get_mem_attn(), nullptr, true };
    }
    if (const auto * hybrid = dynamic_cast<llama_memory_hybrid_iswa *>(memory)) {
        return { nullptr, hybrid->get_mem_attn(), true };
    }
    return { dynamic_cast<llama_kv_cache *>(memory), dynamic_cast<llama_kv_cache_iswa *>(memory), false };
}

// a state of windows or of recurrent layers alone has no keys that were rotated with a table
bool llama_clex_state::has_tag() const {
    const auto caches = clex_caches_of(ctx.memory.get());

    return kv && !(partial && (caches.iswa || caches.recurrent));
}

void llama_clex_state::check_version(clex_state_reader && io) const {
    check_front(io);
    io.get<uint32_t>(); // number of streams

    const auto magic = io.get<uint32_t>();
    clex_check_version(magic, magic == clex_state_tag().magic ? io.get<uint32_t>() : 0);
}

void llama_clex_state::check_words(clex_state_reader && io, bool exact) const {
    check_front(io);

    const auto [plain, iswa, recurrent] = clex_caches_of(ctx.memory.get());

    // what is wrong with the states of recurrent layers, which are behind those of the caches, and with the state of another
    // kind of memory llama.cpp finds out while it reads
    if ((!plain && !iswa) || (recurrent && partial)) {
        return;
    }

    size_t n_data = 0;
    if (plain) {
        n_data += llama_clex_cache::state_check(*plain, io, seq_id, !on_device);
    }
    if (iswa && !partial) {
        n_data += llama_clex_cache::state_check(*iswa->get_base(), io, seq_id, !on_device);
    }
    if (iswa) {
        n_data += llama_clex_cache::state_check(*iswa->get_swa(), io, seq_id, !on_device);
    }

    if (recurrent) {
        return;
    }
    if (exact && io.n_left() > 0) {
        throw std::runtime_error(format("the state ends with %zu bytes that do not belong to it", io.n_left()));
    }
    if (on_device && n_data > 0 && n_data != device_size(io.data(), io.n_bytes())) {
        throw std::runtime_error("the keys and values of the state are no longer on the device");
    }
}

// the sequence that the state was saved from: the device's memory is kept for each
static llama_seq_id clex_seq_saved(const uint8_t * data, size_t size) {
    clex_state_reader io(data, size);
    io.get<uint32_t>();
    return io.get<llama_seq_id>();
}

size_t llama_clex_state::device_size(const uint8_t * data, size_t size) const {
    const auto it = ctx.mem_storage.find(clex_seq_saved(data, size));
    if (it == ctx.mem_storage.end()) {
        throw std::runtime_error("the device holds no state of this sequence");
    }

    size_t res = 0;
    for (const auto & [_, mbuf] : it->second) {
        res += mbuf.total_size;
    }
    return res;
}

size_t llama_clex_state::size(const std::function<size_t()> & get) const {
    try {
        check_seq();
    } catch (const std::exception & err) {
        LLAMA_LOG_ERROR("%s: error getting state size: %s\n", __func__, err.what());
        return 0;
    }

    const size_t res = get();

    return res > 0 ? res + sum_size() : 0;
}

size_t llama_clex_state::write(uint8_t * dst, size_t size, const std::function<size_t(size_t)> & write) const {
    try {
        check_seq();
    } catch (const std::exception & err) {
        LLAMA_LOG_ERROR("%s: error saving state: %s\n", __func__, err.what());
        return 0;
    }

    // the device's memory changes even where the state cannot be written whole
    uint64_t seed = 0;
    if (kv && on_device) {
        seed = kv->clex.on_device[seq_id] = ++kv->clex.n_on_device;
    }

    size_t res = 0;
    try {
        res = write(size - std::min(size, sum_size()));
    } catch (const std::exception & err) { // cells are read last, from a device that may be gone
        LLAMA_LOG_ERROR("%s: error saving state: %s\n", __func__, err.what());
    }
    if (res == 0 || !kv) {
        return res;
    }

    llama_clex_sum sum(seed);
    sum.update(dst, res);

    const uint64_t value = sum.get();
    memcpy(dst + res, &value, sizeof(value));

    return res + sum_size();
}

size_t llama_clex_state::read(const uint8_t * src, size_t size, const std::function<size_t(size_t)> & read) const {
    try {
        check_seq();

        // deprecated functions do not say how much there is
        bool exact = size != (size_t) -1;

        if (on_device) {
            device_size(src, size);
        }

        if (kv) {
            if (has_tag()) {
                check_version({ src, size });
            }

            if (!exact) {
                if (clex_caches_of(ctx.memory.get()).recurrent) {
                    throw std::runtime_error("the size of the state of a model with recurrent layers has to be given");
                }
                clex_state_reader io(src, size);
                check_words(std::move(io), false);
                size = io.n_bytes() + sum_size();
                exact = true;
            }
            if (size < sum_size()) {
                throw std::runtime_error("the state is incomplete");
            }

            llama_clex_sum sum(on_device ? kv->clex.on_device[clex_seq_saved(src, size)] : 0);
            sum.update(src, size - sum_size());
            clex_check_sum(sum, src + size - sum_size());
        }

        check_words({ src, size - sum_size() }, exact);
    } catch (const std::exception & err) {
        LLAMA_LOG_ERROR("%s: error loading state: %s\n", __func__, err.what());
        return 0;
    }

    size_t res = 0;
    try {
        res = read(size - sum_size());
    } catch (const std::exception & err) { // as in write()
        LLAMA_LOG_ERROR("%s: error loading state: %s\n", __func__, err.what());
    }

    return res > 0 ? res + sum_size() : 0;
}

void llama_clex_state::check_file(const char * path) const {
    check_seq();

    llama_file file(path, "rb");

    uint32_t header[3];
    static_assert(sizeof(header) == CLEX_FILE_HEADER, "as in the file");
    file.read_raw(header, sizeof(header));

    // that it is another kind of file llama.cpp says
    const bool known = is_seq ? header[0] == LLAMA_STATE_SEQ_MAGIC && header[1] == LLAMA_STATE_SEQ_VERSION
                              : header[0] == LLAMA_SESSION_MAGIC   && header[1] == LLAMA_SESSION_VERSION;
    if (!known) {
        return;
    }

    const uint64_t n_tokens = header[2]*(uint64_t) sizeof(llama_token);
    if (n_tokens > file.size() - CLEX_FILE_HEADER || file.size() - CLEX_FILE_HEADER - n_tokens < sum_size()) {
        throw std::runtime_error("the state is incomplete");
    }

    const size_t begin = CLEX_FILE_HEADER + n_tokens;
    const size_t size  = file.size() - begin - sum_size();

    if (kv) {
        if (has_tag()) {
            file.seek(begin, SEEK_SET);
            check_version({ file, size });
        }

        llama_clex_sum sum;
        std::vector<uint8_t> buffer(1024*1024);

        const auto update = [&](size_t from, size_t n) {
            file.seek(from, SEEK_SET);
            while (n > 0) {
                const size_t n_cur = std::min(n, buffer.size());
                file.read_raw(buffer.data(), n_cur);
                sum.update(buffer.data(), n_cur);
                n -= n_cur;
            }
        };

        // in the order in which seal_file() gets to know it
        update(begin, size);
        update(0, begin);

        uint64_t value;
        file.seek(begin + size, SEEK_SET);
        file.read_raw(&value, sizeof(value));
        clex_check_sum(sum, &value);
    }

    file.seek(begin, SEEK_SET);
    check_words({ file, size }, true);
}

size_t llama_clex_state::seal_file(
        const llama_file & file, llama_clex_sum & sum, uint32_t magic, uint32_t version, const llama_token * tokens, size_t n_tokens) const {
    if (!kv) {
        return 0;
    }

    const uint32_t header[3] = { magic, version, (uint32_t) n_tokens };
    sum.update(header, sizeof(header));
    sum.update(tokens, sizeof(llama_token)*n_tokens);

    const uint64_t value = sum.get();
    file.write_raw(&value, sizeof(value));

    return sizeof(value);
}
