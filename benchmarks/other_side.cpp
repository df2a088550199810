// A context of another llama.cpp, with whose headers it is compiled and whose library it is linked with.
//
//     other_side MODEL CTX THREADS
//
// It reads orders, one a line, and answers each with the seconds it took: fill DEPTH 0, prefill DEPTH COUNT, decode DEPTH COUNT.

#include "llama.h"

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

static double now() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

struct side {
    llama_context * ctx;
    llama_batch     batch;
    std::vector<llama_token> tokens;
    int n_batch, cached = 0;

    side(llama_model * model, llama_context_params params) : ctx(llama_init_from_model(model, params)), n_batch(params.n_batch) {
        batch = llama_batch_init(n_batch, 0, 1);
        const unsigned n_vocab = llama_n_vocab(model);
        unsigned seed = 1;
        for (unsigned i = 0; i < params.n_ctx; ++i) {
            seed = seed*1664525u + 1013904223u;
            tokens.push_back((seed >> 8) % n_vocab);
        }
    }

    // tokens from `from` to `to`, n at a time; logits of the last of each
    void compute(int from, int to, int n) {
        for (int i = from; i < to; i += n) {
            batch.n_tokens = to - i < n ? to - i : n;
            for (int j = 0; j < batch.n_tokens; ++j) {
                batch.token   [j]    = tokens[i + j];
                batch.pos     [j]    = i + j;
                batch.n_seq_id[j]    = 1;
                batch.seq_id  [j][0] = 0;
                batch.logits  [j]    = j == batch.n_tokens - 1;
            }
            if (llama_decode(ctx, batch)) {
                fprintf(stderr, "failed to decode\n");
                exit(1);
            }
        }
        llama_synchronize(ctx);
        cached = to;
    }

    void fill(int depth) {
        llama_kv_cache_seq_rm(ctx, 0, depth, -1);
        cached = cached < depth ? cached : depth;
        compute(cached, depth, n_batch);
    }

    double order(const char * what, int depth, int count) {
        double start = now();
        fill(depth);
        if (!strcmp(what, "fill")) {
            return now() - start;
        }
        const bool decodes = !strcmp(what, "decode");
        if (decodes) { // the first builds a graph of its own
            compute(depth, depth + 1, 1);
            ++depth;
        }
        start = now();
        compute(depth, depth + count, decodes ? 1 : n_batch);
        return now() - start;
    }
};

int main(int argc, char ** argv) {
    if (argc != 4) {
        fprintf(stderr, "usage: %s MODEL CTX THREADS\n", argv[0]);
        return 1;
    }
    llama_backend_init();
    llama_model_params model_params = llama_model_default_params();
    model_params.use_mmap = false;
    llama_model * model = llama_model_load_from_file(argv[1], model_params);
    if (!model) {
        return 1;
    }
    llama_context_params params = llama_context_default_params();
    params.n_ctx      = atoi(argv[2]);
    params.n_batch    = params.n_ubatch        = 512;
    params.n_threads  = params.n_threads_batch = atoi(argv[3]);
    params.flash_attn = true;
    side one(model, params);
    if (!one.ctx) {
        return 1;
    }
    char what[16];
    int depth, count;
    while (scanf("%15s %d %d", what, &depth, &count) == 3) {
        printf("seconds %.6f\n", one.order(what, depth, count));
        fflush(stdout);
    }
}
