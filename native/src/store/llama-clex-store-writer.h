#pragma once

// Writes blocks while the host computes. Its thread begins with the first block.

#include "llama-clex-store-block.h"
#include "llama-clex-store-folder.h"

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <vector>

class clex_store_writer {
public:
    struct counts {
        int64_t n_stored  = 0; // blocks
        int64_t n_evicted = 0;
        int64_t n_bytes   = -1;
        bool    stopped   = false;
    };

    clex_store_writer(const clex_store_folder & folder, int64_t max_bytes);
    ~clex_store_writer(); // writes what waits

    clex_store_writer(const clex_store_writer &) = delete;

    // A block to be filled and pushed; null where so many wait that this one has to wait too, or where writing has stopped.
    std::unique_ptr<clex_block> next(size_t n_data);

    // the files of a text, those of its first blocks first
    using text = std::shared_ptr<const std::vector<std::string>>;

    // a block of a text, which is not let go to make room for it
    void push(std::unique_ptr<clex_block> block, const text & files);

    // these were used, after what was pushed before is written
    void used(std::vector<std::string> paths);

    // whether a file is about to be written
    bool waits(const std::string & path) const;

    // whether there was no room for a file just now: what does not fit is not written again and again
    bool is_crowded(const std::string & path) const;

    bool flush();

    counts get_counts() const;

private:
    struct job {
        std::unique_ptr<clex_block> block; // null: files were used
        text                        files; // of the block's text

        const std::string & path() const { return (*files)[block->header.index]; }
    };

    void push(job && j);
    void run();
    void write(const job & j);

    // false where only files of the same text could be let go
    bool make_room(const job & j);

    void set_crowded(const std::string & path);

    const clex_store_folder & folder;
    const int64_t             max_bytes;

    mutable std::mutex      mutex;
    std::condition_variable changed;

    std::deque<job>                          jobs;
    std::set<std::string>                    waiting; // files of blocks that are not written
    std::map<std::string, int64_t>           crowded; // files that were let go, or not written, and when
    std::vector<std::unique_ptr<clex_block>> spare; // written, with memory that is used again
    size_t                                   n_waiting = 0; // bytes of these blocks
    bool                                     ending    = false;
    bool                                     busy      = false;
    counts                                   n;

    std::thread thread;

    int64_t n_since_scan = 0; // bytes written since the folder was looked at; the thread's
};
