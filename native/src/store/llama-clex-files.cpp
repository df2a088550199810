#include "llama-clex-files.h"

#include "llama-impl.h"
#include "llama-mmap.h"
#include "llama-model-loader.h"

#include "hash/xxhash/xxhash.h"

#include <algorithm>
#include <map>

#ifndef _WIN32

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#ifdef __APPLE__
#define st_mtim st_mtimespec
#define st_ctim st_ctimespec
#endif

llama_clex_files::~llama_clex_files() {
    for (const int fd : files) {
        close(fd);
    }
}

void llama_clex_files::keep(const llama_model_loader & ml) {
    for (const auto & file : ml.files) {
        const int fd = fcntl(file->file_id(), F_DUPFD_CLOEXEC, 0);
        if (fd >= 0) {
            files.push_back(fd);
        }
    }
    if (files.size() != ml.files.size()) {
        for (const int fd : files) {
            close(fd);
        }
        files.clear();
    }
    loaded = fingerprint();

    const std::map<std::string, llama_model_kv_override> sorted(ml.kv_overrides.begin(), ml.kv_overrides.end());
    for (const auto & [key, value] : sorted) {
        given += format("%s=%d:", key.c_str(), (int) value.tag);
        switch (value.tag) {
            case LLAMA_KV_OVERRIDE_TYPE_INT:   given += std::to_string(value.val_i64);  break;
            case LLAMA_KV_OVERRIDE_TYPE_FLOAT: given += format("%a", value.val_f64);    break;
            case LLAMA_KV_OVERRIDE_TYPE_BOOL:  given += value.val_bool ? "1" : "0";     break;
            case LLAMA_KV_OVERRIDE_TYPE_STR:   given += std::string(value.val_str, strnlen(value.val_str, sizeof(value.val_str))); break;
        }
        given += '\n';
    }
}

std::string llama_clex_files::fingerprint() const {
    std::string res;
    for (const int fd : files) {
        struct stat st;
        if (fstat(fd, &st) != 0) {
            return "";
        }
        res += format("%llu %llu %lld %lld.%09ld %lld.%09ld\n", (unsigned long long) st.st_dev, (unsigned long long) st.st_ino,
                (long long) st.st_size, (long long) st.st_mtim.tv_sec, (long) st.st_mtim.tv_nsec,
                (long long) st.st_ctim.tv_sec, (long) st.st_ctim.tv_nsec);
    }
    return res;
}

bool llama_clex_files::unchanged() const {
    return !loaded.empty() && fingerprint() == loaded;
}

std::string llama_clex_files::digest() const {
    XXH3_state_t * state = XXH3_createState();
    XXH3_128bits_reset(state);

    std::vector<uint8_t> buffer(1024*1024);

    bool ok = !files.empty();
    for (const int fd : files) {
        struct stat st;
        ok = ok && fstat(fd, &st) == 0;

        const int64_t size = ok ? (int64_t) st.st_size : 0;
        for (int64_t offset = 0; offset < size;) {
            const ssize_t n = pread(fd, buffer.data(), std::min<int64_t>(buffer.size(), size - offset), offset);
            if (n <= 0) {
                ok = false;
                break;
            }
            XXH3_128bits_update(state, buffer.data(), n);
            offset += n;
        }
        XXH3_128bits_update(state, &size, sizeof(size));
    }

    XXH128_canonical_t value;
    XXH128_canonicalFromHash(&value, XXH3_128bits_digest(state));
    XXH3_freeState(state);

    // a copy that is only linked, renamed or made readable to others changes the last of the times: it is read again, no more
    if (!ok || !unchanged()) {
        return "";
    }
    return std::string(reinterpret_cast<const char *>(value.digest), sizeof(value.digest));
}

#else

llama_clex_files::~llama_clex_files() {}

void llama_clex_files::keep(const llama_model_loader & ml) { GGML_UNUSED(ml); }

std::string llama_clex_files::fingerprint() const { return ""; }

bool llama_clex_files::unchanged() const { return false; }

std::string llama_clex_files::digest() const { return ""; }

#endif
