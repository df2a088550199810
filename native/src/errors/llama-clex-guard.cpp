#include "llama-clex-guard.h"

#include "llama-hparams.h"

#include "ggml.h"

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

void llama_clex_check_hparams(const llama_hparams & hparams) {
    for (const float eps : { hparams.f_norm_eps, hparams.f_norm_rms_eps, hparams.f_norm_group_eps }) {
        if (!std::isfinite(eps) || eps < 0.0f) {
            throw std::runtime_error("the epsilon of a norm is negative or not finite");
        }
    }
}
