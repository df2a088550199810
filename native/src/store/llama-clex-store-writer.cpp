#include "llama-clex-store-writer.h"

#include "llama-impl.h"

#include <algorithm>
#include <stdexcept>

// memory for blocks that wait for the disk; at least two
static constexpr size_t CLEX_WAITING_MAX = 256*1024*1024;

// other processes write too: look at the folder again after so many bytes
static constexpr int64_t CLEX_SCAN_AFTER = 1024ll*1024*1024;

clex_store_writer::clex_store_writer(const clex_store_folder & folder, int64_t max_bytes) : folder(folder), max_bytes(max_bytes) {}

clex_store_writer::~clex_store_writer() {
    {
        const std::lock_guard<std::mutex> lock(mutex);
        ending = true;
    }
    changed.notify_all();
    if (thread.joinable()) {
        thread.join();
    }
}

std::unique_ptr<clex_block> clex_store_writer::next(size_t n_data) {
    std::unique_ptr<clex_block> res;
    {
        const std::lock_guard<std::mutex> lock(mutex);
        if (n.stopped || (n_waiting + n_data > CLEX_WAITING_MAX && n_waiting > n_data)) {
            return nullptr;
        }
        if (!spare.empty()) {
            res = std::move(spare.back());
            spare.pop_back();
        }
    }
    if (!res) {
        res = std::make_unique<clex_block>();
    }
    res->header = {};
    res->data.resize(n_data);
    return res;
}

void clex_store_writer::push(job && j) {
    {
        const std::lock_guard<std::mutex> lock(mutex);
        n_waiting += j.block ? j.block->data.size() : 0;
        jobs.push_back(std::move(j));
        if (!thread.joinable()) {
            thread = std::thread([this] { run(); });
        }
    }
    changed.notify_all();
}

void clex_store_writer::push(std::unique_ptr<clex_block> block, std::string path) {
    push(job { std::move(block), { std::move(path) } });
}

void clex_store_writer::used(std::vector<std::string> paths) {
    push(job { nullptr, std::move(paths) });
}

bool clex_store_writer::flush() {
    std::unique_lock<std::mutex> lock(mutex);
    changed.wait(lock, [this] { return jobs.empty() && !busy; });
    return !n.stopped;
}

clex_store_writer::counts clex_store_writer::get_counts() const {
    const std::lock_guard<std::mutex> lock(mutex);
    return n;
}

void clex_store_writer::run() {
    std::unique_lock<std::mutex> lock(mutex);

    while (true) {
        changed.wait(lock, [this] { return ending || !jobs.empty(); });
        if (jobs.empty()) {
            return;
        }

        job j = std::move(jobs.front());
        jobs.pop_front();
        busy = true;
        const bool stopped = n.stopped;

        lock.unlock();
        if (!j.block) {
            clex_store_folder::touch(j.paths);
        } else if (!stopped) {
            write(j);
        }
        lock.lock();

        if (j.block) {
            n_waiting -= j.block->data.size();
            if (spare.size() < 2) {
                spare.push_back(std::move(j.block));
            }
        }
        busy = false;
        changed.notify_all();
    }
}

void clex_store_writer::write(job & j) {
    try {
        if (clex_store_folder::exists(j.paths[0])) {
            return; // another process was faster
        }
        make_room(j.block->file_size());
        folder.write(j.paths[0], j.block->front(), j.block->data);

        const std::lock_guard<std::mutex> lock(mutex);
        n.n_stored += 1;
        n.n_bytes  += j.block->file_size();
        n_since_scan += j.block->file_size();
    } catch (const std::exception & err) {
        LLAMA_LOG_WARN("%s: nothing more is stored: %s\n", __func__, err.what());

        const std::lock_guard<std::mutex> lock(mutex);
        n.stopped = true;
    }
}

void clex_store_writer::make_room(uint64_t n_bytes) {
    const int64_t known = get_counts().n_bytes;
    if (known >= 0 && known + (int64_t) n_bytes <= max_bytes && n_since_scan < CLEX_SCAN_AFTER) {
        return;
    }

    auto files = folder.scan();

    int64_t total = 0;
    for (const auto & file : files) {
        total += file.size;
    }

    int64_t n_evicted = 0;
    if (total + (int64_t) n_bytes > max_bytes) {
        // some more, so that not every block has to look for another
        const int64_t wanted = std::max<int64_t>(0, max_bytes - max_bytes/16 - (int64_t) n_bytes);
        for (; total > wanted && !files.empty(); files.pop_back()) {
            total -= files.back().size;
            n_evicted += clex_store_folder::remove(files.back().path);
        }
    }
    if (n_bytes > (uint64_t) max_bytes) {
        throw std::runtime_error("its limit is smaller than one block");
    }

    const std::lock_guard<std::mutex> lock(mutex);
    n.n_bytes    = total;
    n.n_evicted += n_evicted;
    n_since_scan = 0;
}
