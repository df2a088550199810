#include "llama-clex-overlay.h"

#include "llama-clex-tables.h"

#include "llama-impl.h"

#include "gguf.h"

#include <cstdio>
#include <cstring>
#include <filesystem>
#include <memory>
#include <sstream>
#include <stdexcept>
#include <system_error>
#include <vector>

static const char * const LLAMA_CLEX_OVERLAY = "clex.overlay";
static const char * const LLAMA_CLEX_REMOVED = "clex.overlay.removed";
static const char * const LLAMA_CLEX_MODEL   = "clex.overlay.model";

static uint64_t overlay_hash(const gguf_context * keys) {
    std::vector<uint8_t> data(gguf_get_meta_size(keys));
    gguf_get_meta_data(keys, data.data());

    uint64_t hash = LLAMA_CLEX_HASH_SEED;
    llama_clex_hash(hash, data.data(), data.size());
    return hash;
}

// takes the name of the model out of the keys, which say the same wherever it is
static bool overlay_is_for(gguf_context * keys, const std::string & fname) {
    const int64_t id = gguf_find_key(keys, LLAMA_CLEX_MODEL);
    if (id < 0 || gguf_get_kv_type(keys, id) != GGUF_TYPE_STRING) {
        return true;
    }
    std::error_code error;
    const bool same = std::filesystem::equivalent(
            std::filesystem::u8path(gguf_get_val_str(keys, id)), std::filesystem::u8path(fname), error);
    gguf_remove_key(keys, LLAMA_CLEX_MODEL);
    return same && !error;
}

void llama_clex_overlay(
        gguf_context * meta, std::unordered_map<std::string, llama_model_kv_override> & overrides, const std::string & fname) {
    const auto it = overrides.find(LLAMA_CLEX_OVERLAY);
    if (it == overrides.end() || it->second.tag != LLAMA_KV_OVERRIDE_TYPE_STR) {
        return;
    }
    auto & value = it->second.val_str;
    const std::string path(value, strnlen(value, sizeof(value)));

    gguf_init_params params = { /*.no_alloc =*/ true, /*.ctx =*/ nullptr };
    const std::unique_ptr<gguf_context, decltype(&gguf_free)> keys(gguf_init_from_file(path.c_str(), params), gguf_free);
    if (!keys) {
        throw std::runtime_error(format("%s: the keys that are to take the place of the file's cannot be read", path.c_str()));
    }
    if (!overlay_is_for(keys.get(), fname)) {
        value[0] = 0;
        return;
    }
    const uint64_t hash = overlay_hash(keys.get());

    const int64_t id = gguf_find_key(keys.get(), LLAMA_CLEX_REMOVED);
    if (id >= 0 && gguf_get_kv_type(keys.get(), id) == GGUF_TYPE_STRING) {
        std::istringstream names(gguf_get_val_str(keys.get(), id));
        for (std::string name; std::getline(names, name);) {
            gguf_remove_key(meta, name.c_str());
        }
    }
    gguf_remove_key(keys.get(), LLAMA_CLEX_REMOVED);
    gguf_set_kv(meta, keys.get());

    snprintf(value, sizeof(value), "%016llx", (unsigned long long) hash);
}
