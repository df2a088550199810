#pragma once

// The cells that a sequence has in a KV cache, block by block.

#include "llama-clex-store.h"

#include "llama.h"

#include "ggml.h"

#include <cstddef>
#include <cstdint>
#include <vector>

class clex_hasher;
class llama_kv_cache;

// what the document store looks into a cache with
class llama_clex_store_cache {
public:
    // the token at one position
    struct cell {
        uint32_t i;           // cell of the stream
        int32_t  table;       // that it was computed with
        int32_t  bucket;      // that its key is in: of the kept key where there is one
        bool     kept;
        bool     as_computed; // the key is in its own table
        bool     alone;       // computed by itself
    };

    llama_clex_store_cache(llama_kv_cache & kv, llama_seq_id seq_id);

    // why it cannot be stored, null if it can
    const char * refusal() const;

    // all of it that keys and values depend on
    void add_to(clex_hasher & hasher) const;

    // bytes of each section of a block
    std::vector<uint64_t> section_sizes() const;

    size_t n_sections() const { return sections.size(); }

    bool on_host() const;

    // first tokens of a text that the sequence was computed from
    std::vector<cell> match(const llama_token * tokens, int32_t n_tokens) const;

    // The same of layers with a sliding window, of which a cache has the last tokens: of each position, i = NONE where it is not
    // there.
    std::vector<cell> match_window(const llama_token * tokens, int32_t n_tokens) const;

    static constexpr uint32_t NONE = (uint32_t) -1;

    // tokens before a position that these layers see from there
    int32_t n_window() const;

    uint32_t n_cells() const;

    // the table that a sequence of n_total tokens uses
    int32_t wanted_table(int32_t n_total) const;

    bool has_bucket(int32_t bucket) const;

    // keys and values of a block, section by section
    void get(const cell * cells, uint8_t * dst) const;

    // find cells for tokens from position n_past on; false where there is no room
    // wanted: those to take where they are free, or null
    bool place(const llama_token * tokens, int32_t n_past, int32_t n_tokens, const std::vector<uint32_t> * wanted = nullptr);

    // a section of the i-th block that was placed
    void set(size_t i_block, size_t i_section, const uint8_t * src);

    // where it belongs, if that is memory of the host and in one piece; null otherwise
    uint8_t * data(size_t i_block, size_t i_section) const;

    // zeros in the i-th block that was placed: no product with what is masked may be anything else
    void wipe(size_t i_block);

    // what the cells of the i-th block that was placed are
    void set_tables(size_t i_block, const llama_token * tokens, const int32_t * tables, const int32_t * buckets, bool alone);

    // the same of layers with a window: tokens of the text from n_past on
    void set_texts(const llama_token * tokens, int32_t n_past);

    // what the cells know of their text, by position
    struct origin {
        llama_pos pos;
        int32_t   table;
        uint64_t  sum;
        uint64_t  alone;
    };

    void get_origins(std::vector<origin> & origins) const;
    void set_origins(const origin * origins, size_t n);

    int32_t type_k() const;
    int32_t type_v() const;

private:
    struct section {
        ggml_tensor * tensor;
        ggml_tensor * kept;      // keys as they were computed, or null
        size_t        size_row;  // bytes of a token, or of an element of it where it is transposed
        size_t        n_rows;    // elements of a token where it is transposed, otherwise 0
        size_t        offset;    // of the stream
    };

    size_t section_size(const section & s) const { return s.size_row*(s.n_rows ? s.n_rows : 1)*LLAMA_CLEX_STORE_BLOCK; }

    template <typename F>
    static void for_each_run(const uint32_t * cells, F f);

    llama_kv_cache & kv;

    const llama_seq_id seq_id;
    const uint32_t     stream;
    const size_t       first_row; // of the stream among all

    std::vector<section>  sections;
    std::vector<uint32_t> placed;       // cell of each token
    uint64_t              placed_sum = 0; // of the text up to the tables that are known
};
