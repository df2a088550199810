#pragma once

// Length-aware RoPE tables: the internal side, see llama-clex.h for what it does.

#include "llama-arch.h"
#include "llama-clex.h"

#include "ggml.h"
#include "ggml-cpp.h"

#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <vector>

struct clex_state_tag;

struct llama_cparams;
struct llama_hparams;
struct llama_memory_i;
struct llama_memory_params;
struct llama_model;
struct llama_model_loader;
struct llama_ubatch;
struct llm_graph_context;

class clex_state_reader;
class llama_batch_allocr;
class llama_io_read_i;
class llama_io_write_i;
class llama_kv_cache;
class llm_graph_input_clex_rotate;

// FNV-1a, to be continued from the seed or from an earlier result
static constexpr uint64_t LLAMA_CLEX_HASH_SEED = 0xcbf29ce484222325ull;

void llama_clex_hash(uint64_t & hash, const void * data, size_t size);

//
// tables, owned by the model and constant after loading
//

struct llama_clex_tables {
    uint32_t n_ctx_orig = 0; // L
    uint32_t n_freq     = 0; // n_rot/2
    bool     log_scale  = false;
    float    rope_scale = 1.0f; // of the rotated part of queries and keys, LongRoPE's attention factor
    uint64_t hash       = 0;    // of everything that decides how keys are rotated and queries are scaled
    uint64_t model_hash = 0;    // of parts of the weights, so that a state finds its model again

    std::string method;

    std::vector<float> scaling_factors; // [n_bucket]
    std::vector<float> inv_freq;        // [n_bucket*n_freq], radians per position
    std::vector<float> attn_scale;      // [n_bucket], or empty

    bool enabled() const { return n_ctx_orig > 0; }

    // read and check the clex.* keys, or make the tables from LongRoPE factors; nothing happens if there are neither
    // throws std::runtime_error with the key and the rule that it breaks
    // sets hparams.n_ctx_train to the tokens that the last bucket covers
    void load(const llama_model_loader & ml, llm_arch arch, llama_hparams & hparams);

    void hash_model(llama_model_loader & ml);

    int64_t n_ctx_max() const;

    // -1 beyond the last bucket
    int32_t bucket(int64_t n_tokens) const;

    // the RoPE operator divides pos*base^(-2i/n_rot) by these; with base 1 the angle is pos*inv_freq
    std::vector<float> freq_factors(int32_t bucket) const;

    bool has_q_scale() const { return log_scale || !attn_scale.empty(); }

    // factor on the queries of a sequence of n_tokens
    float q_scale(int32_t bucket, int64_t n_tokens) const;

private:
    void load_longrope(const llama_model_loader & ml, llm_arch arch, const llama_hparams & hparams);

    void set_hash();
};

//
// state of one KV cache: which bucket every sequence uses
// the bucket that each cached key was rotated with is in llama_kv_cell_ext
//

// where the keys to rotate are read
enum llama_clex_source {
    LLAMA_CLEX_FROM_CACHE,      // the cache
    LLAMA_CLEX_FROM_CACHE_KEEP, // the cache, and they are kept as they are
    LLAMA_CLEX_FROM_KEPT,       // those that were kept
};

// keys to bring from one table to another, and from one position to another after a shift
struct llama_clex_rotation {
    int32_t from    = 0;
    int32_t to      = 0;
    bool    still   = false; // neither the table nor the position is another one: to be copied
    bool    crosses = false; // the cells enter another bucket

    llama_clex_source source = LLAMA_CLEX_FROM_CACHE;

    std::vector<int32_t> rows; // cell indices over all streams
    std::vector<int32_t> pos_old;
    std::vector<int32_t> pos_new;

    bool is_like(const llama_clex_rotation & other) const {
        return from == other.from && to == other.to && still == other.still && crosses == other.crosses && source == other.source;
    }
};

// Keys of a quantized cache as they were computed, from the first time that they are rotated on. Every later rotation
// starts from them: however often a sequence changes its table, a key has been rounded twice. Rounding it each time adds
// up: to 40 times the Kullback-Leibler divergence of a q4_0 cache after 46 tables.
struct llama_clex_kept {
    struct key {
        int32_t   bucket = -1; // table of the kept key, -1 where none is kept
        llama_pos pos    =  0;
    };

    std::vector<key>           keys; // of each cell of all streams; empty where keys are not kept
    std::vector<ggml_tensor *> k;    // [n_embd_k, cells] of each layer of the cache, null without RoPE

    // memory as large as the keys of the cache, where they are quantized and the context reaches a second bucket; on a CPU
    // the system provides it when a row is first written
    void init(const llama_kv_cache & kv);

    bool enabled() const { return !keys.empty(); }

    const key * find(int32_t row) const { return enabled() && keys[row].bucket >= 0 ? &keys[row] : nullptr; }

    void clear();

    // the cell gets another key
    void drop(uint32_t row);

    // the cells of a stream were copied to another one
    void copy_stream(uint32_t src, uint32_t dst, uint32_t n_cells);

    void add_memory(std::map<ggml_backend_buffer_type_t, size_t> & memory) const;

private:
    std::vector<std::pair<ggml_context_ptr, ggml_backend_buffer_ptr>> ctxs_bufs;
};

// Forgets the declared lengths of the sequences that lose their last token while it lives: whoever uses their ids next
// means other texts. Only for removals that the host asks for: those after a failed decode are for it to be tried again.
class llama_clex_removal {
public:
    explicit llama_clex_removal(llama_memory_i * memory);
    ~llama_clex_removal();

    llama_clex_removal(const llama_clex_removal &) = delete;

private:
    llama_kv_cache * const kv; // null: nothing is declared in memory of this kind

    std::vector<llama_seq_id> seq_ids; // those with tokens and a declared length
};

struct llama_clex_cache {
    struct seq_state {
        int64_t n_declared =  0; // length declared by the host
        int64_t n_tokens   =  0; // length in the current decode
        int32_t bucket     = -1; // bucket in the current decode
    };

    // a state that is being read: its cells are removed and zeroed unless finish() was reached
    class state_guard {
    public:
        state_guard(llama_kv_cache & kv, llama_seq_id seq_id, std::vector<int64_t> declared);
        ~state_guard();

        state_guard(const state_guard &) = delete;

        void finish();

    private:
        llama_kv_cache & kv;

        const llama_seq_id seq_id;

        const std::vector<int64_t> declared;

        bool pending;
    };

    explicit llama_clex_cache(const llama_model & model);

    const llama_clex_tables & tables;

    llama_clex_policy policy = LLAMA_CLEX_POLICY_BY_LENGTH;

    bool    clamp = false;
    int64_t n_ctx = 0; // size of the context for one sequence

    std::vector<seq_state> seqs; // [LLAMA_MAX_SEQ]

    llama_clex_kept kept;

    llama_clex_stats stats = {};

    void clear();

    // bucket of a sequence of n_tokens under the policy, -1 if there is none
    int32_t bucket(int64_t n_tokens) const;

    // choose the bucket of every sequence of the batch, and tell the batch to keep buckets apart
    // Sequences that have cells or tokens in common, or that both have some in common with a third, take the bucket of the
    // longest of them, in the batch or not: a cell has one key.
    // false: a sequence is longer than the last bucket covers
    bool select(const llama_kv_cache & kv, llama_batch_allocr & balloc);

    // a copy of a whole sequence has its declared length too
    void seq_cp(const llama_kv_cache & kv, llama_seq_id src, llama_seq_id dst, llama_pos p0, llama_pos p1);

    // bucket of the sequences of a ubatch, 0 for one that was not selected (a restored state sets its buckets itself)
    int32_t bucket(const llama_ubatch & ubatch) const;

    // cells to rotate: shifted ones where ubatch is null, otherwise those of its sequences that are not as it needs them
    std::vector<llama_clex_rotation> pending(const llama_kv_cache & kv, const llama_ubatch * ubatch) const;

    // cells of a sequence, or of all for -1, to bring back to the keys that were kept of them: a saved state has those
    // and their tables, so that it is rounded no more often than the cache
    std::vector<llama_clex_rotation> pending_restore(const llama_kv_cache & kv, llama_seq_id seq_id) const;

    // carry out the rotations in place, chunk by chunk; each chunk is recorded in its cells when it is complete, so
    // that a failure and an abort, which is asked for before each chunk, leave every cell in a table that is known
    ggml_status rotate(llama_kv_cache & kv, llama_context * lctx, const std::vector<llama_clex_rotation> & rotations,
            const std::function<bool()> & abort);

    // positions cannot be divided without leaving the length that the table was chosen for: logged
    bool refuse_div() const;

    // Saved states name the model, the tables and the layout that they belong to; state_read() throws where they differ.
    void        state_write(const llama_kv_cache & kv, llama_io_write_i & io, llama_seq_id seq_id) const;
    state_guard state_read (      llama_kv_cache & kv, llama_io_read_i  & io, llama_seq_id seq_id) const;

    // Throws unless every word of the state is one that state_write() of the cache could have written and that fits into
    // this cache; nothing is changed. Of any model; one without tables has llama.cpp's format.
    // has_data: keys and values are part of it; returns their size in bytes, whether they are or not
    static size_t state_check(const llama_kv_cache & kv, clex_state_reader & io, llama_seq_id seq_id, bool has_data);

    // states whose keys and values are kept on the device: the serial number of the last one of each sequence
    std::map<llama_seq_id, uint64_t> on_device;
    uint64_t                         n_on_device = 0;

private:
    clex_state_tag state_tag(const llama_kv_cache & kv, llama_seq_id seq_id) const;

    // the part of a state that only models with tables have; throws where it does not belong here
    clex_state_tag read_tag(const llama_kv_cache & kv, llama_io_read_i & io, llama_seq_id seq_id, std::vector<int64_t> & declared) const;

    // rotate the cells of inp in every layer
    void build_rotate(const llama_kv_cache & kv, const llama_clex_rotation & rot,
            llm_graph_input_clex_rotate & inp, ggml_context * ctx, ggml_cgraph * gf) const;
};

// throws if rows of these cache types cannot hold the heads of a model with tables; stock aborts or computes NaN
void llama_clex_check_types(const llama_model & model, const llama_memory_params & params);

// make the whole angle come from the table; throws if the memory of the context cannot hold per-bucket keys
void llama_clex_init_context(const llama_model & model, llama_cparams & cparams, llama_memory_i * memory);

//
// graph
//

// factors of the bucket of the ubatch, and the query scale where the tables ask for one
// both are null for a model without tables
struct llama_clex_inputs {
    ggml_tensor * factors = nullptr; // F32 [n_rot/2]
    ggml_tensor * q_scale = nullptr; // F32 [1, 1, n_tokens]

    explicit llama_clex_inputs(const llm_graph_context & graph);

    // factors of the table, or those that stock would use
    ggml_tensor * rope_factors(ggml_tensor * stock) const { return factors ? factors : stock; }

    ggml_tensor * scale_q(ggml_context * ctx, ggml_tensor * q) const;
};
