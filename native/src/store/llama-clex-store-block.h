#pragma once

// The file of a block: a front, which is the header, sizes and checksums of its sections, and a checksum of all that; then the
// sections, which are the keys and the values of each layer. The front takes whole pages, so that data is copied from pages to
// where it belongs without being shifted by some bytes.

#include "llama-clex-store-name.h"
#include "llama-clex-store.h"

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

struct clex_block_header {
    char     magic[8];
    uint32_t version;
    uint32_t n_sections;
    uint64_t size;         // of the file

    clex_digest config;    // all that is common to the blocks of a context
    clex_digest parent;    // name of the block before, zeros where there is none
    clex_digest name;

    uint8_t  model_id[16];
    int64_t  t_created;    // seconds since 1970
    uint32_t index;        // blocks before it
    int32_t  type_k;
    int32_t  type_v;
    uint32_t flags;        // clex_block_flags

    char model[128];
    char begin[256];       // how the text of the block begins

    int32_t tokens [LLAMA_CLEX_STORE_BLOCK];
    int32_t tables [LLAMA_CLEX_STORE_BLOCK]; // that they were computed with
    int32_t buckets[LLAMA_CLEX_STORE_BLOCK]; // that their keys are in
    int32_t window [LLAMA_CLEX_STORE_BLOCK]; // cells of layers with a sliding window, where sums are taken in their order

    clex_digest key() const { return clex_block_key(config, parent, tokens); }
    std::string label() const { return clex_block_label(tables, buckets, flags); }
};

static constexpr int32_t  CLEX_BLOCK          = LLAMA_CLEX_STORE_BLOCK; // tokens
static constexpr char     CLEX_BLOCK_MAGIC[8] = { 'C', 'L', 'E', 'X', 'B', 'L', 'K', '\n' };
static constexpr uint32_t CLEX_BLOCK_VERSION  = 2;

struct clex_block_section {
    uint64_t size;
    uint64_t sum;
};

// a block in memory, on its way to a file
struct clex_block {
    clex_block_header               header = {};
    std::vector<clex_block_section> sections;
    std::vector<uint8_t>            data;

    size_t file_size() const;

    // header and sections as they are in the file, with all checksums; data is behind them
    std::vector<uint8_t> front();
};

// An open file of a block. What is wrong with it is an exception: std::runtime_error with what is wrong.
class clex_block_file {
public:
    // opens and checks all but the data: that the file is whole, the user's own, and what its name says
    explicit clex_block_file(const std::string & path);
    ~clex_block_file();

    clex_block_file(const clex_block_file &) = delete;

    clex_block_header               header;
    std::vector<clex_block_section> sections;

    // let the disk begin with it
    void expect() const;

    // The next section, into memory of its size. Where its checksum is wrong, that has been written to.
    void read(uint8_t * dst);

    // the same in a buffer that is used again
    const uint8_t * read(std::vector<uint8_t> & buffer);

private:
    void check(const std::string & path);
    void read_at(void * dst, size_t size);

    int      fd;
    uint64_t offset    = 0;
    uint64_t file_size = 0;
    size_t   i_section = 0;
};
