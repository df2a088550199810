#include "llama-clex-store-open.h"

#include "llama-clex-files.h"
#include "llama-clex-store-name.h"

#include "llama-impl.h"

#include <algorithm>

#ifndef _WIN32
#include <unistd.h>
#endif

static int64_t clex_pid() {
#ifdef _WIN32
    return 0;
#else
    return getpid();
#endif
}

llama_clex_store::llama_clex_store(const std::string & path, int64_t max_bytes) :
    folder(path), max_bytes(max_bytes > 0 ? max_bytes : share_of_disk()), writer(folder, this->max_bytes), pid(clex_pid()) {}

bool llama_clex_store::is_ours() const {
    return pid == clex_pid();
}

int64_t llama_clex_store::share_of_disk() const {
    int64_t used = 0;
    for (const auto & file : folder.scan()) {
        used += file.size;
    }
    return std::max<int64_t>(1, (folder.free_bytes() + used)/5);
}

std::string llama_clex_store::model_digest(const llama_clex_files & files) {
    const std::lock_guard<std::mutex> lock(mutex);

    // of a file that was changed since, the process has what was in it before
    if (!files.unchanged()) {
        return "";
    }
    const std::string fingerprint = files.fingerprint();

    auto it = digests.find(fingerprint);
    if (it != digests.end()) {
        return it->second;
    }

    // what the note says, and a hash of both that it ends with
    const auto note = [&](const std::string & digest) {
        return fingerprint + digest + clex_hex(clex_hasher().add(fingerprint).add(digest).get());
    };

    const std::string name = clex_hex(clex_hasher().add(fingerprint).get());
    const std::string text = folder.note(name);

    std::string digest = text.size() == note(std::string(16, 0)).size() ? text.substr(fingerprint.size(), 16) : "";
    if (digest.empty() || text != note(digest)) {
        digest = files.digest();
        if (!digest.empty()) {
            try {
                folder.set_note(name, note(digest));
            } catch (const std::exception & err) {
                LLAMA_LOG_DEBUG("%s: %s\n", __func__, err.what());
            }
        }
    }
    return digests[fingerprint] = digest;
}
