#pragma once

// The state of one KV cache: which bucket every sequence uses. The bucket that each cached key was rotated with is in
// llama_kv_cell_ext.
//
//   llama-clex-select.cpp       chooses the buckets of a batch
//   llama-clex-stale.cpp        finds the keys that are not as a ubatch needs them
//   llama-clex-rotate.cpp       brings them there
//   llama-clex-state-*.cpp      write and check the part of saved states that comes from here

#include "llama-clex-kept.h"
#include "llama-clex-rope.h"
#include "llama-clex-rotation.h"
#include "llama-clex-tables.h"
#include "llama-clex-texts.h"
#include "llama-clex.h"

#include "ggml.h"

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <vector>

struct clex_state_tag;

struct llama_model;
struct llama_ubatch;

class clex_state_reader;
class llama_batch_allocr;
class llama_io_read_i;
class llama_io_write_i;
class llama_kv_cache;
class llama_kv_cells;
class llm_graph_input_clex_rotate;

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

    // windowed: that of layers with a sliding window, which use no tables
    llama_clex_cache(const llama_model & model, bool windowed);

    const llama_clex_tables & tables;

    llama_clex_layers layers;

    llama_clex_policy policy = LLAMA_CLEX_POLICY_BY_LENGTH;

    bool    clamp = false;
    int64_t n_ctx = 0; // size of the context for one sequence

    std::vector<seq_state> seqs; // [LLAMA_MAX_SEQ]

    llama_clex_kept kept;

    llama_clex_texts texts; // of the cache of layers that see everything

    bool adapted = false; // what is computed now is changed by adapters: no text says what it is

    llama_clex_stats stats = {};

    void clear();

    // bucket of a sequence of n_tokens under the policy, -1 if there is none
    int32_t choose_bucket(int64_t n_tokens) const;

    // choose the bucket of every sequence of the batch, and tell the batch to keep tokens of one bucket side by side
    // Sequences that have cells or tokens in common, or that both have some in common with a third, take the bucket of the
    // longest of them, in the batch or not: a cell has one key.
    // false: a sequence is longer than the last bucket covers
    bool select(const llama_kv_cache & kv, llama_batch_allocr & balloc);

    // a copy of a whole sequence has its declared length too
    void seq_cp(const llama_kv_cache & kv, llama_seq_id src, llama_seq_id dst, llama_pos p0, llama_pos p1);

    // bucket of a token of a ubatch, 0 where none was selected (a restored state sets its buckets itself)
    int32_t token_bucket(const llama_ubatch & ubatch, uint32_t i_token) const;

    // what decides the values computed for a token of a sequence of n_tokens in a bucket: that, or with log scale n_tokens
    int32_t table_of(int64_t n_tokens, int32_t bucket) const;

    // runs of tokens in one bucket that a ubatch can have
    uint32_t max_runs(const llama_kv_cache & kv) const;

    // nodes that they can add to a graph
    uint32_t max_nodes(const llama_kv_cache & kv) const;

    // a cell gets the key of a token
    void set_key(llama_kv_cells & cells, uint32_t i_cell, uint32_t stream, const llama_ubatch & ubatch, uint32_t i_token);

    // bytes of llama_kv_cell_ext in a saved state: without tables as many as stock writes
    size_t ext_size() const;

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
    class state_checker;

    clex_state_tag state_tag(const llama_kv_cache & kv, llama_seq_id seq_id) const;

    // the part of a state that only models with tables have; throws where it does not belong here
    clex_state_tag read_tag(const llama_kv_cache & kv, llama_io_read_i & io, llama_seq_id seq_id, std::vector<int64_t> & declared) const;

    // rotate the cells of inp in every layer
    void build_rotate(const llama_kv_cache & kv, const llama_clex_rotation & rot,
            llm_graph_input_clex_rotate & inp, ggml_context * ctx, ggml_cgraph * gf) const;
};
