#pragma once

// The folder of a store: <root>/<model>/<first two digits of the key>/<key>.<index>.<label>.clexblock, and
// <root>/models/<hash>, which says what the content of a model's files is.

#include "llama-clex-store-name.h"

#include <cstdint>
#include <string>
#include <vector>

struct clex_store_entry {
    std::string path;
    uint64_t    size   = 0;
    int64_t     t_used = 0; // nanoseconds since 1970
    uint32_t    index  = 0;
};

class clex_store_folder {
public:
    // throws std::runtime_error where it cannot be used
    explicit clex_store_folder(const std::string & path);

    static std::string file_name(const clex_digest & key, uint32_t index, const std::string & label);

    // of a block; the folders in which it lies may not be there
    std::string path(const std::string & model_id, const clex_digest & key, uint32_t index, const std::string & label) const;

    // in which ways a block is there
    std::vector<std::string> labels(const std::string & model_id, const clex_digest & key) const;

    static bool exists(const std::string & path);

    // make a file of these parts, whole or not at all; throws
    void write(const std::string & path, const std::vector<uint8_t> & front, const std::vector<uint8_t> & data) const;

    // these were used now, and all at once
    static void touch(const std::vector<std::string> & paths);

    // Remove a file that is ours; returns whether it is gone because of that.
    static bool remove(const std::string & path);

    // All blocks, those used last first, and of those used at once the one with the smallest index; those that were used in
    // the future, by a clock that was set back since, come last. What processes left that were killed while they wrote is
    // removed.
    std::vector<clex_store_entry> scan() const;

    // bytes free on the disk
    int64_t free_bytes() const;

    // what was noted under a name, or nothing
    std::string note(const std::string & name) const;
    void        set_note(const std::string & name, const std::string & text) const;

private:
    std::string root;
};
