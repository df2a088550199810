#pragma once

#include <cstdint>

// In front of the cells of a state of a model with tables: which model, tables and cache it belongs to.
struct clex_state_tag {
    // read as a number of cells by a library that does not know it, which then refuses the state
    uint32_t magic   = 0x58454c43;
    uint32_t version = 3; // 2: with a checksum at the end; 3: buckets in words of their own

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

// throws where the state is none of a model with tables, or of another version
void clex_check_version(uint32_t magic, uint32_t version);
