#include "llama-clex-store-writer.h"

#include "llama-impl.h"

#include <algorithm>
#include <iterator>
#include <stdexcept>

// memory for blocks that wait for the disk; at least two
static constexpr size_t CLEX_WAITING_MAX = 256*1024*1024;

// other processes write too: look at the folder again after so many bytes
static constexpr int64_t CLEX_SCAN_AFTER = 1024ll*1024*1024;

// what there was no room for is not tried again for so long
static constexpr int64_t CLEX_CROWDED_US = 60*1000*1000;

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
        if (j.block) {
            n_waiting += j.block->data.size();
            waiting.insert(j.path());
        }
        jobs.push_back(std::move(j));
        if (!thread.joinable()) {
            thread = std::thread([this] { run(); });
        }
    }
    changed.notify_all();
}

void clex_store_writer::push(std::unique_ptr<clex_block> block, const text & files) {
    push(job { std::move(block), files });
}

void clex_store_writer::used(std::vector<std::string> paths) {
    push(job { nullptr, std::make_shared<const std::vector<std::string>>(std::move(paths)) });
}

bool clex_store_writer::waits(const std::string & path) const {
    const std::lock_guard<std::mutex> lock(mutex);
    return waiting.count(path) > 0;
}

bool clex_store_writer::is_crowded(const std::string & path) const {
    const std::lock_guard<std::mutex> lock(mutex);

    const auto it = crowded.find(path);
    return it != crowded.end() && ggml_time_us() - it->second < CLEX_CROWDED_US;
}

void clex_store_writer::set_crowded(const std::string & path) {
    const std::lock_guard<std::mutex> lock(mutex);

    const int64_t now = ggml_time_us();
    if (crowded.size() >= 4096) {
        for (auto it = crowded.begin(); it != crowded.end();) {
            it = now - it->second < CLEX_CROWDED_US ? std::next(it) : crowded.erase(it);
        }
    }
    crowded[path] = now;
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
            clex_store_folder::touch(*j.files);
        } else if (!stopped) {
            write(j);
        }
        lock.lock();

        if (j.block) {
            n_waiting -= j.block->data.size();
            waiting.erase(j.path());
            if (spare.size() < 2) {
                spare.push_back(std::move(j.block));
            }
        }
        busy = false;
        changed.notify_all();
    }
}

void clex_store_writer::write(const job & j) {
    const auto & block = *j.block;
    try {
        if (clex_store_folder::exists(j.path())) {
            return; // another process was faster
        }
        if (block.header.index > 0) {
            const std::string & before = (*j.files)[block.header.index - 1];
            if (!waits(before) && !clex_store_folder::exists(before)) {
                return; // nothing would lead to it
            }
        }
        if (!make_room(j)) {
            set_crowded(j.path());
            return;
        }
        folder.write(j.path(), j.block->front(), block.data);

        const std::lock_guard<std::mutex> lock(mutex);
        n.n_stored += 1;
        n.n_bytes  += block.file_size();
        n_since_scan += block.file_size();
    } catch (const std::exception & err) {
        LLAMA_LOG_WARN("%s: nothing more is stored: %s\n", __func__, err.what());

        const std::lock_guard<std::mutex> lock(mutex);
        n.stopped = true;
    }
}

bool clex_store_writer::make_room(const job & j) {
    const int64_t n_bytes = j.block->file_size();
    const int64_t known   = get_counts().n_bytes;
    if (known >= 0 && known + n_bytes <= max_bytes && n_since_scan < CLEX_SCAN_AFTER) {
        return true;
    }
    if (n_bytes > max_bytes) {
        throw std::runtime_error("its limit is smaller than one block");
    }

    const auto files = folder.scan();

    int64_t total = 0;
    for (const auto & file : files) {
        total += file.size;
    }

    int64_t n_evicted = 0;
    if (total + n_bytes > max_bytes) {
        const std::set<std::string> needed(j.files->begin(), j.files->end());

        // some more, so that not every block has to look for another
        const int64_t wanted = std::max<int64_t>(0, max_bytes - max_bytes/16 - n_bytes);
        for (auto file = files.rbegin(); file != files.rend() && total > wanted; ++file) {
            if (needed.count(file->path) == 0 && clex_store_folder::remove(file->path)) {
                total     -= file->size;
                n_evicted += 1;
                set_crowded(file->path);
            }
        }
    }

    const std::lock_guard<std::mutex> lock(mutex);
    n.n_bytes    = total;
    n.n_evicted += n_evicted;
    n_since_scan = 0;
    return total + n_bytes <= max_bytes;
}
