#pragma once

// Writes blocks while the host computes. Its thread begins with the first block.

#include "llama-clex-store-block.h"
#include "llama-clex-store-folder.h"

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
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

    void push(std::unique_ptr<clex_block> block, std::string path);

    // these were used, after what was pushed before is written
    void used(std::vector<std::string> paths);

    bool flush();

    counts get_counts() const;

private:
    struct job {
        std::unique_ptr<clex_block> block; // null: paths were used
        std::vector<std::string>    paths; // that of the block
    };

    void push(job && j);
    void run();
    void write(job & j);
    void make_room(uint64_t n_bytes);

    const clex_store_folder & folder;
    const int64_t             max_bytes;

    mutable std::mutex      mutex;
    std::condition_variable changed;

    std::deque<job>                          jobs;
    std::vector<std::unique_ptr<clex_block>> spare; // written, with memory that is used again
    size_t                                   n_waiting = 0; // bytes of blocks not written
    bool                                     ending    = false;
    bool                                     busy      = false;
    counts                                   n;

    std::thread thread;

    int64_t n_since_scan = 0; // bytes written since the folder was looked at; the thread's
};
