#include "llama-clex-store-name.h"

#include "llama-clex-store.h"

#include "ggml-backend.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

extern "C" {
#include "hash/sha256/sha256.h"
}

static_assert(sizeof(sha256_t) == 32 + 8 + 64, "clex_hasher keeps one");

std::string clex_hex(const uint8_t * data, size_t size) {
    static const char digits[] = "0123456789abcdef";

    std::string res;
    for (size_t i = 0; i < size; ++i) {
        res += digits[data[i] >> 4];
        res += digits[data[i] & 15];
    }
    return res;
}

clex_hasher::clex_hasher() {
    sha256_init(reinterpret_cast<sha256_t *>(&sha));
}

clex_hasher & clex_hasher::add(const void * data, size_t size) {
    sha256_update(reinterpret_cast<sha256_t *>(&sha), static_cast<const unsigned char *>(data), size);
    return *this;
}

clex_hasher & clex_hasher::add(const std::string & text) {
    const uint64_t size = text.size();
    return add(&size, sizeof(size)).add(text.data(), text.size());
}

clex_digest clex_hasher::get() const {
    state end = sha;

    clex_digest res;
    sha256_final(reinterpret_cast<sha256_t *>(&end), res.data());
    return res;
}

std::string clex_store_build() {
    std::string res = CLEX_BUILD;
#ifdef __VERSION__
    res += __VERSION__;
#endif
    return res;
}

std::string clex_store_devices() {
    std::string res;

    for (size_t i = 0; i < ggml_backend_reg_count(); ++i) {
        auto * reg = ggml_backend_reg_get(i);
        res += ggml_backend_reg_name(reg);
        res += '\n';

        auto * get_features = (ggml_backend_get_features_t) ggml_backend_reg_get_proc_address(reg, "ggml_backend_get_features");
        for (auto * feature = get_features ? get_features(reg) : nullptr; feature && feature->name; ++feature) {
            res += std::string(feature->name) + '=' + feature->value + '\n';
        }
    }
    for (const char * name : { "GGML_CLEX_ATTN_DISABLE", "GGML_CLEX_ATTN_F32", "GGML_CLEX_MATMUL_DISABLE", "GGML_CLEX_TILES", "GGML_AMX_DISABLE" }) {
        const char * value = std::getenv(name);
        res += value ? std::string("=") + value + '\n' : "\n";
    }
    return res;
}

clex_digest clex_block_key(const clex_digest & config, const clex_digest & parent, const llama_token * tokens) {
    return clex_hasher().add(config).add(parent).add(tokens, LLAMA_CLEX_STORE_BLOCK*sizeof(llama_token)).get();
}

std::string clex_block_label(const int32_t * tables, const int32_t * buckets, uint32_t flags) {
    const std::string alone = flags & CLEX_BLOCK_ALONE ? "a" : "";

    const bool uniform = std::all_of(tables, tables + LLAMA_CLEX_STORE_BLOCK, [&](int32_t table) { return table == tables[0]; });
    if (uniform && (flags & CLEX_BLOCK_AS_COMPUTED)) {
        return std::to_string(tables[0]) + alone;
    }

    const clex_digest digest = clex_hasher()
        .add(tables,  LLAMA_CLEX_STORE_BLOCK*sizeof(int32_t))
        .add(buckets, LLAMA_CLEX_STORE_BLOCK*sizeof(int32_t)).get();
    return "m" + clex_hex(digest.data(), 16) + alone;
}

clex_digest clex_block_name(const clex_digest & key, const std::string & label) {
    return clex_hasher().add(key).add(label).get();
}
