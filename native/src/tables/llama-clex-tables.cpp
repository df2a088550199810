#include "llama-clex-tables.h"

#include "llama-hparams.h"
#include "llama-impl.h"
#include "llama-model-loader.h"
#include "llama-model.h" // llama_rope_scaling_type_name()

#include "gguf.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <stdexcept>

static const uint32_t LLAMA_CLEX_VERSION = 1;
static const size_t   LLAMA_CLEX_MAX_BUCKETS = 4096;
static const uint32_t LLAMA_CLEX_MAX_FREQS   = 32768; // n_rot/2

// Beyond these a value has no use, and angles, factors or scores overflow somewhere; clex_local/model_file/tables.py has the same.
static const float LLAMA_CLEX_MIN_INV_FREQ   = 1.1754944e-38f; // the smallest whose inverse is a number
static const float LLAMA_CLEX_MAX_INV_FREQ   = 1e3f;           // trained tables of the authors' code reach 8.5
static const float LLAMA_CLEX_MIN_ATTN_SCALE = 1e-3f;
static const float LLAMA_CLEX_MAX_ATTN_SCALE = 1e3f;

//
// reading the metadata
//

[[noreturn]] static void clex_fail(const char * key, const std::string & rule) {
    throw std::runtime_error(format("%s %s", key, rule.c_str()));
}

// -1 if the key is absent
static int64_t clex_find(const gguf_context * meta, const char * key, gguf_type type, const char * type_name) {
    const int64_t id = gguf_find_key(meta, key);
    if (id >= 0 && gguf_get_kv_type(meta, id) != type) {
        clex_fail(key, format("must be of type %s", type_name));
    }
    return id;
}

static uint32_t clex_u32(const gguf_context * meta, const char * key) {
    const int64_t id = clex_find(meta, key, GGUF_TYPE_UINT32, "u32");
    if (id < 0) {
        clex_fail(key, "is missing");
    }
    return gguf_get_val_u32(meta, id);
}

// every value is a number between two limits
static std::vector<float> clex_f32s(const gguf_context * meta, const char * key, bool required, float min, float max) {
    const int64_t id = clex_find(meta, key, GGUF_TYPE_ARRAY, "f32 array");
    if (id < 0) {
        if (required) {
            clex_fail(key, "is missing");
        }
        return {};
    }
    if (gguf_get_arr_type(meta, id) != GGUF_TYPE_FLOAT32) {
        clex_fail(key, "must be of type f32 array");
    }

    const float * data = (const float *) gguf_get_arr_data(meta, id);
    const std::vector<float> res(data, data + gguf_get_arr_n(meta, id));

    for (const float v : res) {
        if (!(v >= min && v <= max)) {
            clex_fail(key, format("holds %g, its values are from %g to %g", v, min, max));
        }
    }
    return res;
}

// t of each bucket: ascending from 1, and no position beyond 32 bits
static std::vector<float> clex_scaling_factors(const gguf_context * meta, uint32_t n_ctx_orig) {
    auto res = clex_f32s(meta, "clex.scaling_factors", true,
            std::numeric_limits<float>::min(), std::numeric_limits<float>::max());
    if (res.empty() || res[0] != 1.0f) {
        clex_fail("clex.scaling_factors", "must start with 1.0");
    }
    if (res.size() > LLAMA_CLEX_MAX_BUCKETS) {
        clex_fail("clex.scaling_factors", format("has %zu values, more than %zu", res.size(), LLAMA_CLEX_MAX_BUCKETS));
    }
    for (size_t i = 1; i < res.size(); ++i) {
        if (res[i] <= res[i - 1]) {
            clex_fail("clex.scaling_factors", "must be strictly ascending");
        }
    }
    if ((double) res.back()*n_ctx_orig > (double) std::numeric_limits<int32_t>::max()) {
        clex_fail("clex.scaling_factors", "cover more tokens than a 32-bit position can count");
    }
    return res;
}

static std::vector<float> clex_inv_freq(const gguf_context * meta, size_t n_bucket, uint32_t n_freq) {
    auto res = clex_f32s(meta, "clex.inv_freq", true, LLAMA_CLEX_MIN_INV_FREQ, LLAMA_CLEX_MAX_INV_FREQ);
    if (n_freq == 0 || res.size() != n_bucket*n_freq) {
        clex_fail("clex.inv_freq", format("has %zu values, %zu buckets of %u are needed", res.size(), n_bucket, n_freq));
    }
    return res;
}

// empty if the key is absent
static std::vector<float> clex_attn_scale(const gguf_context * meta, size_t n_bucket) {
    auto res = clex_f32s(meta, "clex.attn_scale", false, LLAMA_CLEX_MIN_ATTN_SCALE, LLAMA_CLEX_MAX_ATTN_SCALE);
    if (gguf_find_key(meta, "clex.attn_scale") >= 0 && res.size() != n_bucket) {
        clex_fail("clex.attn_scale", format("has %zu values for %zu buckets", res.size(), n_bucket));
    }
    return res;
}

// FNV-1a
void llama_clex_hash(uint64_t & hash, const void * data, size_t size) {
    for (size_t i = 0; i < size; ++i) {
        hash = (hash ^ ((const uint8_t *) data)[i])*0x100000001b3ull;
    }
}

// what the file says of another RoPE scaling, empty if it says nothing
static std::string clex_other_scaling(const llama_model_loader & ml, const llama_hparams & hparams) {
    for (const char * name : { "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight" }) {
        if (ml.get_weight(name)) {
            return format("the tensor %s", name);
        }
    }
    if (hparams.rope_scaling_type_train != LLAMA_ROPE_SCALING_TYPE_NONE &&
        hparams.rope_scaling_type_train != LLAMA_ROPE_SCALING_TYPE_LINEAR) {
        return "rope.scaling.type " + llama_rope_scaling_type_name(hparams.rope_scaling_type_train);
    }
    if (hparams.rope_freq_scale_train != 1.0f || hparams.rope_attn_factor != 1.0f) {
        return "a RoPE scaling factor";
    }
    return "";
}

// values of a small F32 tensor, empty if the file has none of this name, type and size
static std::vector<float> clex_read_tensor(const llama_model_loader & ml, const char * name, uint32_t n) {
    const auto * weight = ml.get_weight(name);
    if (!weight || weight->tensor->type != GGML_TYPE_F32 || ggml_nelements(weight->tensor) != n || weight->idx >= ml.files.size()) {
        return {};
    }

    std::vector<float> res(n);
    ml.files[weight->idx]->seek(weight->offs, SEEK_SET);
    ml.files[weight->idx]->read_raw(res.data(), n*sizeof(float));
    return res;
}

// two buckets: the original context with the short factors, everything beyond it with the long ones
// stock chooses between the two by the allocated context, so that a large one changes the answers to short prompts
void llama_clex_tables::load_longrope(const llama_model_loader & ml, const llama_hparams & hparams) {
    const uint32_t orig = hparams.n_ctx_orig_yarn;

    // layers with a window would keep the factors that n_ctx chooses; latent attention can have no tables
    if (getenv("LLAMA_CLEX_LONGROPE_DISABLE") || hparams.swa_type != LLAMA_SWA_TYPE_NONE || hparams.n_lora_kv > 0 ||
        orig == 0 || hparams.n_ctx_train <= orig) {
        return;
    }

    const uint32_t n = hparams.n_rot_full/2;
    if (n > LLAMA_CLEX_MAX_FREQS) {
        return;
    }

    std::vector<float> rows;
    for (const char * name : { "rope_factors_short.weight", "rope_factors_long.weight" }) {
        const auto factors = clex_read_tensor(ml, name, n);
        if (factors.empty()) {
            return;
        }
        for (uint32_t i = 0; i < n; ++i) {
            const double base = std::pow((double) hparams.rope_freq_base_train, -2.0*i/hparams.n_rot_full);

            rows.push_back((float) (base*hparams.rope_freq_scale_train/factors[i]));
            if (!(rows.back() >= LLAMA_CLEX_MIN_INV_FREQ && rows.back() <= LLAMA_CLEX_MAX_INV_FREQ)) {
                LLAMA_LOG_WARN("%s: %s holds a factor that is of no use, the choice of the factors is left to n_ctx\n", __func__, name);
                return;
            }
        }
    }

    // the nearest float may cover one token less
    float t_max = (float) hparams.n_ctx_train/orig;
    while ((double) t_max*orig < (double) hparams.n_ctx_train) {
        t_max = std::nextafter(t_max, std::numeric_limits<float>::infinity());
    }

    method          = "longrope";
    n_ctx_orig      = orig;
    n_freq          = n;
    scaling_factors = { 1.0f, t_max };
    inv_freq        = std::move(rows);
    rope_scale      = hparams.rope_attn_factor;

    set_hash();

    LLAMA_LOG_INFO("%s: LongRoPE by the length of each sequence: short factors up to %u tokens, long factors up to %u"
            " (LLAMA_CLEX_LONGROPE_DISABLE in the environment leaves the choice to n_ctx)\n",
            __func__, n_ctx_orig, hparams.n_ctx_train);
}

void llama_clex_tables::set_hash() {
    hash = LLAMA_CLEX_HASH_SEED;
    llama_clex_hash(hash, &n_ctx_orig, sizeof(n_ctx_orig));
    llama_clex_hash(hash, &rope_scale, sizeof(rope_scale));
    llama_clex_hash(hash, scaling_factors.data(), scaling_factors.size()*sizeof(float));
    llama_clex_hash(hash, inv_freq.data(), inv_freq.size()*sizeof(float));
    llama_clex_hash(hash, attn_scale.data(), attn_scale.size()*sizeof(float));
    llama_clex_hash(hash, &log_scale, sizeof(log_scale));
}

void llama_clex_tables::load(const llama_model_loader & ml, llama_hparams & hparams) {
    const gguf_context * meta = ml.metadata;

    bool present = false;
    for (int64_t i = 0; i < gguf_get_n_kv(meta); ++i) {
        present = present || strncmp(gguf_get_key(meta, i), "clex.", 5) == 0;
    }
    if (!present) {
        load_longrope(ml, hparams);
        return;
    }

    const uint32_t version = clex_u32(meta, "clex.version");
    if (version != LLAMA_CLEX_VERSION) {
        clex_fail("clex.version", format("is %u, this library reads version %u", version, LLAMA_CLEX_VERSION));
    }

    const int64_t id_method = clex_find(meta, "clex.method", GGUF_TYPE_STRING, "string");
    if (id_method < 0) {
        clex_fail("clex.method", "is missing");
    }
    method = gguf_get_val_str(meta, id_method);
    clex_find(meta, "clex.provenance", GGUF_TYPE_STRING, "string");

    const uint32_t orig = clex_u32(meta, "clex.original_context_length");
    if (orig == 0) {
        clex_fail("clex.original_context_length", "must be above 0");
    }

    n_freq          = hparams.n_rot_full/2;
    scaling_factors = clex_scaling_factors(meta, orig);
    inv_freq        = clex_inv_freq(meta, scaling_factors.size(), n_freq);
    attn_scale      = clex_attn_scale(meta, scaling_factors.size());

    const int64_t id_log = clex_find(meta, "clex.log_scale", GGUF_TYPE_BOOL, "bool");
    log_scale = id_log >= 0 && gguf_get_val_bool(meta, id_log);
    if (log_scale && orig == 1) {
        clex_fail("clex.log_scale", "needs an original context above 1");
    }

    n_ctx_orig = orig;

    set_hash();

    hparams.n_ctx_train = (uint32_t) n_ctx_max();

    const std::string other = clex_other_scaling(ml, hparams);
    if (!other.empty()) {
        LLAMA_LOG_WARN("%s: the clex.* tables take the place of %s in the same file\n", __func__, other.c_str());
    }

    LLAMA_LOG_INFO("%s: RoPE tables for %zu buckets, original context %u, maximum %u\n",
            __func__, scaling_factors.size(), n_ctx_orig, hparams.n_ctx_train);
}

int64_t llama_clex_tables::n_ctx_max() const {
    return enabled() ? (int64_t) ((double) scaling_factors.back()*n_ctx_orig) : 0;
}

int32_t llama_clex_tables::bucket_for(int64_t n_tokens) const {
    for (size_t i = 0; i < scaling_factors.size(); ++i) {
        if ((double) scaling_factors[i]*n_ctx_orig >= (double) n_tokens) {
            return (int32_t) i;
        }
    }
    return -1;
}

std::vector<float> llama_clex_tables::freq_factors(int32_t bucket) const {
    GGML_ASSERT(bucket >= 0 && (size_t) bucket < scaling_factors.size());

    std::vector<float> res(n_freq);
    for (uint32_t i = 0; i < n_freq; ++i) {
        res[i] = 1.0f/inv_freq[(size_t) bucket*n_freq + i];
    }
    return res;
}

float llama_clex_tables::q_scale(int32_t bucket, int64_t n_tokens) const {
    const double scale = attn_scale.empty() ? 1.0 : attn_scale[bucket];

    return (float) (log_scale ? scale*std::log((double) n_tokens)/std::log((double) n_ctx_orig) : scale);
}

//
// which model a saved state belongs to
//

void llama_clex_tables::hash_model(llama_model_loader & ml) {
    if (!enabled()) {
        return;
    }

    model_hash = LLAMA_CLEX_HASH_SEED;

    // A fine-tuned copy differs in its weights only, and reading all of them would take long: the first layer and what
    // belongs to none will do.
    for (const auto & [name, weight] : ml.weights_map) {
        if (name.rfind("blk.", 0) == 0 && name.rfind("blk.0.", 0) != 0) {
            continue;
        }

        llama_clex_hash(model_hash, name.data(), name.size());
        llama_clex_hash(model_hash, weight.tensor->ne, sizeof(weight.tensor->ne));

        if (weight.idx < ml.files.size()) {
            const size_t size = ggml_nbytes(weight.tensor);

            // the middle: a vocabulary starts with tokens that are hardly trained
            std::vector<uint8_t> data(std::min<size_t>(size, 512));
            ml.files[weight.idx]->seek(weight.offs + (size - data.size())/2, SEEK_SET);
            ml.files[weight.idx]->read_raw(data.data(), data.size());

            llama_clex_hash(model_hash, data.data(), data.size());
        }
    }
}
