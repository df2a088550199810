#include "llama-clex-state.h"

#include "llama-clex-impl.h"

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-io.h"
#include "llama-kv-cache-iswa.h"
#include "llama-kv-cache.h"
#include "llama-mmap.h"
#include "llama-model-loader.h"
#include "llama-model.h"

#include <algorithm>
#include <cstring>
#include <limits>
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
// checksum
//

static constexpr uint64_t CLEX_SUM_FACTOR = 0x9e3779b97f4a7c15ull;

static inline uint64_t clex_sum_step(uint64_t lane, uint64_t word) {
    lane = (lane ^ word)*CLEX_SUM_FACTOR;
    return lane << 29 | lane >> 35;
}

llama_clex_sum::llama_clex_sum(uint64_t seed) {
    for (uint64_t & lane : lanes) {
        lane = seed = clex_sum_step(seed, CLEX_SUM_FACTOR);
    }
}

void llama_clex_sum::blocks(const uint8_t * data, size_t n) {
    uint64_t cur[8];
    memcpy(cur, lanes, sizeof(cur));

    for (; n > 0; --n, data += sizeof(cur)) {
        for (int i = 0; i < 8; ++i) {
            uint64_t word;
            memcpy(&word, data + 8*i, sizeof(word));
            cur[i] = clex_sum_step(cur[i], word);
        }
    }

    memcpy(lanes, cur, sizeof(cur));
}

void llama_clex_sum::update(const void * data, size_t size) {
    const auto * ptr = static_cast<const uint8_t *>(data);

    const size_t n_rest = n_bytes%sizeof(rest);
    n_bytes += size;

    if (n_rest > 0) {
        const size_t n = std::min(size, sizeof(rest) - n_rest);
        memcpy(rest + n_rest, ptr, n);
        ptr  += n;
        size -= n;
        if (n_rest + n < sizeof(rest)) {
            return;
        }
        blocks(rest, 1);
    }

    blocks(ptr, size/sizeof(rest));
    memcpy(rest, ptr + size - size%sizeof(rest), size%sizeof(rest));
}

uint64_t llama_clex_sum::get() const {
    llama_clex_sum end = *this;

    const uint8_t zeros[sizeof(rest)] = {};
    end.update(zeros, sizeof(rest) - n_bytes%sizeof(rest));

    uint64_t res = n_bytes;
    for (const uint64_t lane : end.lanes) {
        res = clex_sum_step(res, lane);
    }
    return res ^ res >> 32;
}

//
// tag of a state, in front of its cells
//

struct clex_state_tag {
    // read as a number of cells by a library that does not know it, which then refuses the state
    uint32_t magic   = 0x58454c43;
    uint32_t version = 2; // 2: with a checksum at the end

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

static void clex_check_version(uint32_t magic, uint32_t version) {
    const clex_state_tag own;

    if (magic != own.magic) {
        throw std::runtime_error("the state was saved by a library without RoPE tables, or for a model without them");
    }
    if (version != own.version) {
        throw std::runtime_error(format("the state has version %u, this library reads %u", version, own.version));
    }
}

static void clex_check_sum(const llama_clex_sum & sum, const void * saved) {
    const uint64_t value = sum.get();
    if (memcmp(&value, saved, sizeof(value)) != 0) {
        throw std::runtime_error("the state is damaged or incomplete: its checksum is another one");
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
    if (!pending) {
        return;
    }

    for (size_t i = 0; i < declared.size(); ++i) {
        auto & seq = kv.clex.seqs[seq_id == -1 ? i : seq_id];

        seq = {};
        seq.n_declared = kv.clex.bucket(declared[i]) >= 0 ? declared[i] : 0;
    }

    pending = false;
}

//
// a state is looked at whole before anything changes
//

// reads a buffer, or a file from where it stands
class clex_state_reader : public llama_io_read_i {
public:
    clex_state_reader(const uint8_t * data, size_t size) : start(data), size(size) {}
    clex_state_reader(llama_file & file, size_t size) : file(&file), size(size) {}

    void read(void * dst, size_t n) override {
        take(n);
        if (file) {
            file->read_raw(dst, n);
        } else {
            memcpy(dst, start + n_read - n, n);
        }
    }

    template <typename T> T get() {
        T res;
        read(&res, sizeof(res));
        return res;
    }

    void skip(size_t n) {
        take(n);
        if (file) {
            file->seek(n, SEEK_CUR);
        }
    }

    void read_tensor(ggml_tensor * /* tensor */, size_t /* offset */, size_t n) override { skip(n); }

    size_t n_bytes() override { return n_read; }

    size_t n_left() const { return size - n_read; }

    bool is_file() const { return file != nullptr; }

    const uint8_t * data() const { return start; }

private:
    void take(size_t n) {
        if (n > n_left()) {
            throw std::runtime_error("the state is incomplete");
        }
        n_read += n;
    }

    const uint8_t * start = nullptr;
    llama_file    * file  = nullptr;

    const size_t size;

    size_t n_read = 0;
};

// no sequence of any model is longer; positions are added to and compared as 32-bit numbers
static constexpr int64_t CLEX_POS_MAX = 1 << 30;

size_t llama_clex_cache::state_check(const llama_kv_cache & kv, clex_state_reader & io, llama_seq_id seq_id, bool has_data) {
    const auto fail = [](const char * what, int64_t value) {
        throw std::runtime_error(format("the state is damaged: %s %lld", what, (long long) value));
    };

    // llama.cpp writes nothing of a cache that uses the cells of another
    if (kv.other) {
        return 0;
    }

    const auto & tables = kv.clex.tables;

    const uint32_t n_stream = io.get<uint32_t>();
    if (n_stream != kv.n_stream) {
        throw std::runtime_error(format("the state has %u separate sequences, the context %u", n_stream, kv.n_stream));
    }

    clex_state_tag tag;
    std::vector<int64_t> declared;
    if (tables.enabled()) {
        tag = kv.clex.read_tag(kv, io, seq_id, declared);
    }

    const int64_t n_pos = tables.enabled() && !kv.clex.clamp ? tables.n_ctx_max() : CLEX_POS_MAX;

    size_t   n_data  = 0; // bytes of keys and values
    uint32_t n_cells = 0; // of the fullest stream
    uint32_t n_seqs  = seq_id == -1 ? 0 : 1;

    const auto data = [&](size_t size) {
        n_data += size;
        if (has_data) {
            io.skip(size);
        }
    };

    for (uint32_t s = 0; s < n_stream; ++s) {
        const uint32_t n = io.get<uint32_t>();
        if (n == 0) {
            continue;
        }

        const auto & cells = kv.v_cells[seq_id == -1 ? s : kv.seq_to_stream[seq_id]];

        // cells that a sequence can take: free ones, and those that it has alone and gives up
        uint32_t n_free = cells.size();
        if (seq_id != -1 && kv.n_swa == 0) {
            n_free -= cells.get_used();
            for (const auto & [pos, i] : cells.seq_pos_get(seq_id)) {
                n_free += cells.seq_count(i) == 1;
            }
        }
        if (n > n_free) {
            throw std::runtime_error(format("the state has %u tokens, the context room for %u", n, n_free));
        }
        if (seq_id != -1 && n_cells > 0) {
            fail("one sequence in several streams:", n_stream);
        }
        n_cells = std::max(n_cells, n);

        for (uint32_t i = 0; i < n; ++i) {
            const auto pos = io.get<llama_pos>();
            if (pos < 0 || pos >= n_pos) {
                fail("a token has position", pos);
            }

            const auto n_seq_id = io.get<uint32_t>();
            if (n_seq_id < 1 || n_seq_id > (seq_id == -1 ? kv.n_seq_max : 1)) {
                fail("sequences that share a token:", n_seq_id);
            }

            if (kv.has_cell_ext()) {
                const auto ext = io.get<llama_kv_cell_ext>();
                if (tables.enabled()) {
                    if (ext.clex < 0 || ext.clex >= (int32_t) tables.scaling_factors.size()) {
                        fail("a key was rotated with a table that does not exist:", ext.clex);
                    }
                    if (ext.y != 0 || ext.tok < LLAMA_TOKEN_NULL || ext.tok >= (int32_t) kv.model.vocab.n_tokens()) {
                        fail("a cell has the token", ext.tok);
                    }
                }
            }

            llama_seq_id last = -1;
            for (uint32_t j = 0; j < n_seq_id; ++j) {
                const auto id = io.get<llama_seq_id>();
                // the id that a single sequence had does not matter where it is read
                const bool valid = seq_id != -1 ? id >= 0 && id < LLAMA_MAX_SEQ
                    : id > last && id < (llama_seq_id) kv.n_seq_max && kv.seq_to_stream[id] == s;
                if (!valid) {
                    fail("a token belongs to sequence", id);
                }
                last = id;
                n_seqs = seq_id == -1 ? std::max<uint32_t>(n_seqs, id + 1) : 1;
            }
        }

        const auto v_trans = io.get<uint32_t>();
        const auto n_layer = io.get<uint32_t>();
        if (v_trans != (kv.v_trans ? 1 : 0)) {
            throw std::runtime_error(format("the state was saved with flash attention %s, this context has it %s",
                        v_trans ? "off" : "on", kv.v_trans ? "off" : "on"));
        }
        if (n_layer != kv.layers.size()) {
            throw std::runtime_error(format("the state has %u layers, the model %zu", n_layer, kv.layers.size()));
        }

        for (const auto & layer : kv.layers) {
            const auto     type = io.get<int32_t>();
            const uint64_t row  = io.get<uint64_t>();
            if (type != layer.k->type || row != ggml_row_size(layer.k->type, kv.hparams.n_embd_k_gqa(layer.il))) {
                throw std::runtime_error(format("the state was saved from another type of cache, keys are %s here",
                            ggml_type_name(layer.k->type)));
            }
            data(row*n);
        }

        for (const auto & layer : kv.layers) {
            if (!layer.v) {
                continue;
            }

            const uint32_t n_embd = kv.hparams.n_embd_v_gqa(layer.il);

            const auto type = io.get<int32_t>();

            bool ok = type == layer.v->type;
            if (kv.v_trans) {
                ok = io.get<uint32_t>() == ggml_type_size(layer.v->type) && ok;
                ok = io.get<uint32_t>() == n_embd && ok;
            } else {
                ok = io.get<uint64_t>() == ggml_row_size(layer.v->type, n_embd) && ok;
            }
            if (!ok) {
                throw std::runtime_error(format("the state was saved from another type of cache, values are %s here",
                            ggml_type_name(layer.v->type)));
            }
            data(kv.v_trans ? ggml_type_size(layer.v->type)*n_embd*n : ggml_row_size(layer.v->type, n_embd)*n);
        }
    }

    if (tables.enabled() && (tag.n_cells != n_cells || tag.n_seqs != n_seqs)) {
        fail("its header counts other tokens or sequences than", n_cells);
    }

    return n_data;
}

//
// states as the C API hands them out and takes them
//

// in front of the state of one sequence in memory, io_magic in llama-context.cpp
static constexpr uint32_t CLEX_SEQ_MAGIC = 0xaf143cd8;

// in front of a file: llama.cpp's magic and version, and the number of tokens that follow
static constexpr size_t CLEX_FILE_HEADER = 3*sizeof(uint32_t);

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

void llama_clex_state::check_version(clex_state_reader && io) const {
    check_front(io);
    io.get<uint32_t>(); // number of streams

    const auto magic = io.get<uint32_t>();
    clex_check_version(magic, magic == clex_state_tag().magic ? io.get<uint32_t>() : 0);
}

void llama_clex_state::check_words(clex_state_reader && io, bool exact) const {
    check_front(io);

    const auto * plain = dynamic_cast<llama_kv_cache      *>(ctx.memory.get());
    const auto * iswa  = dynamic_cast<llama_kv_cache_iswa *>(ctx.memory.get());

    // what else is wrong with the state of another kind of memory llama.cpp finds out while it reads
    if (!plain && !iswa) {
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

    const size_t res = write(size - std::min(size, sum_size()));
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
            check_version({ src, size });

            if (!exact) {
                clex_state_reader io(src, size);
                check_front(io);
                llama_clex_cache::state_check(*kv, io, seq_id, !on_device);
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

    const size_t res = read(size - sum_size());

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
        file.seek(begin, SEEK_SET);
        check_version({ file, size });

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

//
// operations that are refused
//

bool llama_clex_cache::refuse_div() const {
    if (tables.enabled()) {
        LLAMA_LOG_ERROR("%s: positions cannot be divided with length-aware RoPE tables; nothing was changed\n", __func__);
    }
    return tables.enabled();
}
