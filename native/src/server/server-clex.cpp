#include "server-clex.h"

#include "llama-clex-store.h"
#include "llama.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

// behind the history of a saved slot: tokens are never negative
static constexpr int32_t HISTORY_MAGIC = -0x636c6578;

static bool has_tables(const llama_context * ctx) {
    return ctx && llama_clex_n_buckets(llama_get_model(ctx)) > 0;
}

// tokens of a bucket
static int64_t covered(const llama_model * model, int32_t bucket) {
    return (int64_t) ((double) llama_clex_scaling_factor(model, bucket) * llama_clex_original_context(model));
}

// with which a prompt of n_tokens alone is computed; where the length scales queries, each length is a table
static int32_t table_of(const llama_model * model, int32_t n_tokens) {
    return llama_clex_log_scale(model) ? n_tokens : llama_clex_bucket(model, n_tokens);
}

void server_clex_declare(llama_context * ctx_tgt, llama_context * ctx_dft, llama_seq_id seq_id, int32_t n_tokens) {
    for (llama_context * ctx : { ctx_tgt, ctx_dft }) {
        if (has_tables(ctx)) {
            llama_clex_seq_reserve(ctx, seq_id, n_tokens);
        }
    }
}

int32_t server_clex_n_draft_max(
        llama_context * ctx_tgt, llama_context * ctx_dft, llama_seq_id seq_id, int32_t n_tokens, int32_t n_draft) {
    int64_t res = n_draft;
    for (llama_context * ctx : { ctx_tgt, ctx_dft }) {
        if (!has_tables(ctx)) {
            continue;
        }
        const llama_model * model = llama_get_model(ctx);
        if (llama_clex_log_scale(model)) {
            return 0;
        }
        // the sampled token may itself enter the next bucket
        const int32_t bucket = std::max(llama_clex_seq_bucket(ctx, seq_id), llama_clex_bucket(model, (int64_t) n_tokens + 1));
        res = std::min(res, covered(model, bucket) - (n_tokens + 1));
    }
    return (int32_t) std::max<int64_t>(res, 0);
}

int32_t server_clex_n_ctx(llama_context * ctx_dft, int32_t n_ctx) {
    return has_tables(ctx_dft) ? std::min(n_ctx, llama_clex_max_context(llama_get_model(ctx_dft))) : n_ctx;
}

common_json server_clex_props(const llama_model * model) {
    const int32_t n_buckets = llama_clex_n_buckets(model);
    if (n_buckets == 0) {
        return nullptr;
    }

    common_json factors = common_json::array();
    common_json buckets = common_json::array();
    for (int32_t i = 0; i < n_buckets; ++i) {
        factors.push_back(llama_clex_scaling_factor(model, i));
        buckets.push_back(covered(model, i));
    }

    return {
        {"method",           llama_clex_method(model)},
        {"original_context", llama_clex_original_context(model)},
        {"max_context",      llama_clex_max_context(model)},
        {"scaling_factors",  factors},
        {"buckets",          buckets},
        {"log_scale",        llama_clex_log_scale(model)},
    };
}

const server_clex_use & server_clex_use::start(llama_context * ctx, int32_t n_tokens) {
    *this = {};
    if (has_tables(ctx)) {
        show(llama_get_model(ctx), llama_clex_bucket(llama_get_model(ctx), n_tokens));
    }
    stats_start = llama_clex_get_stats(ctx);
    return *this;
}

void server_clex_use::show(const llama_model * model, int32_t in_use) {
    bucket = in_use;
    t      = llama_clex_scaling_factor(model, bucket);
    covers = covered(model, bucket);
}

void server_clex_use::update(llama_context * ctx, llama_seq_id seq_id) {
    if (!has_tables(ctx)) {
        return;
    }
    show(llama_get_model(ctx), llama_clex_seq_bucket(ctx, seq_id));

    const llama_clex_stats now = llama_clex_get_stats(ctx);
    stats.n_rerotations = now.n_rerotations - stats_start.n_rerotations;
    stats.n_cells       = now.n_cells       - stats_start.n_cells;
    stats.t_us          = now.t_us          - stats_start.t_us;
}

common_json server_clex_use::to_json() const {
    return {
        {"bucket",          bucket},
        {"t",               t},
        {"covers",          covers},
        {"rerotations",     stats.n_rerotations},
        {"rerotated_cells", stats.n_cells},
        {"rerotation_ms",   stats.t_us / 1000.0},
    };
}

bool server_clex_exact(llama_context * ctx) {
    static const bool exact = [] {
        const char * value = std::getenv("LLAMA_CLEX_PREFIX_REUSE");
        return value && std::strcmp(value, "exact") == 0;
    }();
    return exact && has_tables(ctx);
}

void server_clex_history::record(llama_context * ctx, llama_seq_id seq_id, llama_pos pos, int32_t n_tokens) {
    if (!has_tables(ctx)) {
        return;
    }
    if (tables.size() <= (size_t) pos) {
        tables.resize(pos + 1, -1);
    }
    tables[pos] = llama_clex_log_scale(llama_get_model(ctx)) ? n_tokens : llama_clex_seq_bucket(ctx, seq_id);
}

void server_clex_history::restored(llama_context * ctx, int32_t n_past, int32_t n, int32_t n_tokens, bool exact) {
    if (!has_tables(ctx)) {
        return;
    }
    tables.resize(std::min(n_past, n), -1);
    tables.resize(n, exact ? table_of(llama_get_model(ctx), n_tokens) : -1);
}

int32_t server_clex_history::reusable(llama_context * ctx, int32_t n_past, int32_t n_tokens) const {
    if (!server_clex_exact(ctx)) {
        return n_past;
    }
    const int32_t table = table_of(llama_get_model(ctx), n_tokens);

    const auto end = tables.begin() + std::min<size_t>(tables.size(), n_past);
    return (int32_t) (std::find_if(tables.begin(), end, [&](int32_t used) { return used != table; }) - tables.begin());
}

void server_clex_history::keep_origin(llama_context * ctx, llama_seq_id seq_id) {
    origin.resize(llama_clex_store_origin_get(ctx, seq_id, nullptr, 0));
    llama_clex_store_origin_get(ctx, seq_id, origin.data(), origin.size());
}

void server_clex_history::give_origin(llama_context * ctx, llama_seq_id seq_id) {
    llama_clex_store_origin_set(ctx, seq_id, origin.data(), origin.size());
    origin.clear();
}

void server_clex_history::append_to(std::vector<char> & packed) const {
    if (tables.empty()) {
        return;
    }
    std::vector<int32_t> words = tables;
    words.push_back((int32_t) tables.size());
    words.push_back(HISTORY_MAGIC);

    const char * bytes = reinterpret_cast<const char *>(words.data());
    packed.insert(packed.end(), bytes, bytes + words.size()*sizeof(int32_t));
}

void server_clex_history::take_from(std::vector<llama_token> & packed) {
    static_assert(sizeof(llama_token) == sizeof(int32_t));

    clear();

    const size_t n_packed = packed.size();
    if (n_packed < 2 || packed[n_packed - 1] != HISTORY_MAGIC) {
        return; // of a model without tables, or of a server that kept none
    }
    const int64_t n = packed[n_packed - 2];
    if (n < 0 || (uint64_t) n > n_packed - 2) {
        return; // the server says that the tokens are damaged
    }
    tables.assign(packed.end() - 2 - n, packed.end() - 2);
    packed.resize(n_packed - 2 - n);
}
