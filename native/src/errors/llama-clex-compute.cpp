#include "llama-clex-compute.h"

#include "llama-context.h"
#include "llama-impl.h"

#include "ggml-backend.h"

#include <cstring>
#include <exception>
#include <new>

// What a thread needs to throw is allocated at its first throw, and glibc ends the process where there is no memory for
// it: throw once while the library is loaded.
static const bool clex_can_throw = [] {
    try {
        throw std::bad_alloc();
    } catch (const std::bad_alloc &) {
        return true;
    }
}();

static ggml_status clex_thrown() {
    GGML_UNUSED(clex_can_throw);

    try {
        throw;
    } catch (const std::bad_alloc &) {
        LLAMA_LOG_ERROR("%s: not enough memory to process the batch\n", __func__);
        return GGML_STATUS_ALLOC_FAILED;
    } catch (const std::exception & err) {
        LLAMA_LOG_ERROR("%s: failed to process the batch: %s\n", __func__, err.what());
        return GGML_STATUS_FAILED;
    }
}

llm_graph_result * llama_clex_compute(ggml_status & status, const std::function<llm_graph_result *()> & compute) {
    try {
        return compute();
    } catch (...) {
        status = clex_thrown();
        return nullptr;
    }
}

// which device cannot be reached any more, null if none; a batch may make the scheduler anew
static const char * clex_lost(ggml_backend_sched_t sched) {
    for (int i = 0; sched && i < ggml_backend_sched_get_n_backends(sched); ++i) {
        ggml_backend_t     backend = ggml_backend_sched_get_backend(sched, i);
        ggml_backend_dev_t dev     = ggml_backend_get_device(backend);
        ggml_backend_reg_t reg     = dev ? ggml_backend_dev_backend_reg(dev) : nullptr;

        auto * lost = reg ? (const char * (*)(ggml_backend_t)) ggml_backend_reg_get_proc_address(reg, "ggml_backend_lost") : nullptr;
        if (const char * name = lost ? lost(backend) : nullptr) {
            return name;
        }
    }
    return nullptr;
}

int32_t llama_clex_process(const llama_context & ctx, const std::function<int32_t()> & process) {
    int32_t ret;
    try {
        ret = process();
    } catch (...) {
        ret = clex_thrown() == GGML_STATUS_ALLOC_FAILED ? -2 : -3;
    }
    // asked for outputs that did not arrive, too
    if (const char * name = clex_lost(ctx.get_sched())) {
        LLAMA_LOG_ERROR("%s: %s, which computes layers of this model, is gone\n", __func__, name);
        return LLAMA_CLEX_DEVICE_LOST;
    }
    return ret;
}

bool llama_clex_finite(const float * values, int64_t n) {
    // -inf is what some models give to tokens that they rule out
    const uint32_t inf = 0x7f800000u;

    uint32_t n_bad = 0;
    for (int64_t i = 0; values && i < n; ++i) {
        uint32_t bits;
        memcpy(&bits, values + i, sizeof(bits));
        n_bad += bits == inf || (bits & 0x7fffffffu) > inf;
    }
    if (n_bad > 0) {
        LLAMA_LOG_ERROR("%s: %u of %lld output values of the last token are no numbers: the model is damaged, or its values are too large"
                " for the types that it is computed with\n", __func__, n_bad, (long long) n);
    }
    return n_bad == 0;
}
