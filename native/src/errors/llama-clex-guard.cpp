#include "llama-clex-guard.h"

#include "llama-hparams.h"
#include "llama-impl.h"

#include "ggml.h"

#include <array>
#include <cmath>
#include <cstdio>
#include <mutex>
#include <stdexcept>

static thread_local int clex_guards_here = 0;

static std::mutex clex_mutex;
static int clex_guards = 0; // of all threads
static ggml_abort_callback_t clex_previous = nullptr;

static void clex_on_abort(const char * message) {
    if (clex_guards_here > 0) {
        // the file's name is enough
        const char * text = message;
        for (const char * c = message; *c && *c != ':' && *c != ' '; ++c) {
            text = *c == '/' || *c == '\\' ? c + 1 : text;
        }
        throw std::runtime_error(text);
    }
    if (clex_previous) {
        clex_previous(message);
    } else {
        fprintf(stderr, "%s\n", message);
    }
}

llama_clex_guard::llama_clex_guard() {
    const std::lock_guard<std::mutex> lock(clex_mutex);
    if (clex_guards++ == 0) {
        clex_previous = ggml_set_abort_callback(clex_on_abort);
    }
    ++clex_guards_here;
}

llama_clex_guard::~llama_clex_guard() {
    const std::lock_guard<std::mutex> lock(clex_mutex);
    --clex_guards_here;
    if (--clex_guards == 0) {
        ggml_set_abort_callback(clex_previous);
    }
}

// the dimensions of a head that RoPE rotates
static void clex_check_n_rot(uint32_t n_rot, uint32_t n_embd_head) {
    if (n_embd_head > 0 && (n_rot == 0 || n_rot > n_embd_head || n_rot % 2 != 0)) {
        throw std::runtime_error(format("RoPE cannot rotate %u of the %u dimensions of a head", n_rot, n_embd_head));
    }
}

// M-RoPE: how many pairs of dimensions go by each of its positions; they may be more than there are
static void clex_check_sections(const std::array<int, 4> & sections) {
    const int64_t max = 64*1024;

    int64_t sum = 0;
    for (const int n : sections) {
        if (n < 0) {
            throw std::runtime_error("a section of RoPE's dimensions is negative");
        }
        sum += n;
    }
    if (sum == 0 || sum > max) {
        throw std::runtime_error(format("the sections of RoPE's dimensions have %lld in all, not 1 to %lld", (long long) sum, (long long) max));
    }
}

void llama_clex_check_hparams(const llama_hparams & hparams) {
    for (const float eps : { hparams.f_norm_eps, hparams.f_norm_rms_eps, hparams.f_norm_group_eps }) {
        if (!std::isfinite(eps) || eps < 0.0f) {
            throw std::runtime_error("the epsilon of a norm is negative or not finite");
        }
    }
    if (hparams.rope_type == LLAMA_ROPE_TYPE_NONE) {
        return;
    }
    clex_check_n_rot(hparams.n_rot_full, hparams.n_embd_head_k_full);
    if (hparams.swa_type != LLAMA_SWA_TYPE_NONE) {
        clex_check_n_rot(hparams.n_rot_swa, hparams.n_embd_head_k_swa);
    }
    if (hparams.rope_type == LLAMA_ROPE_TYPE_MROPE || hparams.rope_type == LLAMA_ROPE_TYPE_IMROPE) {
        clex_check_sections(hparams.rope_sections);
    }
}
