#include "llama-clex.h"

#include "ggml-backend.h"
#include "ggml.h"
#include "gguf.h"

#include <cstring>
#include <map>
#include <string>
#include <vector>

//
// importance matrix: what llama.cpp's tools/imatrix collects, for hosts that have no tools
//

struct clex_activations {
    int64_t n_col = 0;

    std::vector<double>  sums;   // of squares, [n_expert*n_col]
    std::vector<int64_t> counts; // of rows, [n_expert]; one for a matrix without experts
};

struct llama_clex_imatrix {
    std::map<std::string, clex_activations> entries; // in the order of their names, so that files are reproducible

    std::vector<uint8_t> input; // copies of what lies on a device
    std::vector<uint8_t> ids;
};

// name of the weights of a multiplication; the scheduler calls a copy of them DEVICE#name#n
static std::string clex_weight_name(const ggml_tensor * weights) {
    const char * name  = weights->name;
    const char * start = strchr(name, '#');
    if (!start) {
        return name;
    }

    const char * end = strchr(++start, '#');
    return end ? std::string(start, end) : std::string(start);
}

static const uint8_t * clex_host_data(const ggml_tensor * t, std::vector<uint8_t> & copy) {
    if (ggml_backend_buffer_is_host(t->buffer)) {
        return (const uint8_t *) t->data;
    }

    copy.resize(ggml_nbytes(t));
    ggml_backend_tensor_get(t, copy.data(), 0, copy.size());
    return copy.data();
}

static void clex_add_row(clex_activations & entry, const uint8_t * row, int64_t i_matrix, int64_t i_count) {
    const float * x   = (const float *) row;
    double      * sum = entry.sums.data() + i_matrix*entry.n_col;
    for (int64_t i = 0; i < entry.n_col; ++i) {
        sum[i] += (double) x[i]*x[i];
    }
    entry.counts[i_count]++;
}

struct llama_clex_imatrix * llama_clex_imatrix_init(void) {
    return new llama_clex_imatrix();
}

void llama_clex_imatrix_free(struct llama_clex_imatrix * imatrix) {
    delete imatrix;
}

bool llama_clex_imatrix_collect(struct ggml_tensor * t, bool ask, void * imatrix) {
    const bool by_expert = t->op == GGML_OP_MUL_MAT_ID;
    if (t->op != GGML_OP_MUL_MAT && !by_expert) {
        return !ask;
    }

    const ggml_tensor * weights = t->src[0];
    const ggml_tensor * x       = t->src[1];

    const std::string name = clex_weight_name(weights);
    if (name.rfind("blk.", 0) != 0 || x->type != GGML_TYPE_F32 || x->nb[0] != sizeof(float)) {
        return !ask;
    }
    if (ask) {
        return true;
    }

    auto & self  = *(llama_clex_imatrix *) imatrix;
    auto & entry = self.entries[name];

    const int64_t n_matrix = weights->ne[2]*weights->ne[3];
    if (entry.sums.empty()) {
        entry.n_col = x->ne[0];
        entry.sums.resize(n_matrix*entry.n_col);
        entry.counts.resize(by_expert ? n_matrix : 1);
    }

    const uint8_t * data = clex_host_data(x, self.input);

    if (!by_expert) {
        for (int64_t i3 = 0; i3 < x->ne[3]; ++i3) {
            for (int64_t i2 = 0; i2 < x->ne[2]; ++i2) {
                // a matrix for each head, or one for all
                const int64_t i_matrix = (i3 % weights->ne[3])*weights->ne[2] + i2 % weights->ne[2];
                for (int64_t i1 = 0; i1 < x->ne[1]; ++i1) {
                    clex_add_row(entry, data + i1*x->nb[1] + i2*x->nb[2] + i3*x->nb[3], i_matrix, 0);
                }
            }
        }
        return true;
    }

    // x is [n_col, 1 or n_used, n_tokens], ids is [n_used, n_tokens] and a view of all experts in order
    const ggml_tensor * ids      = t->src[2];
    const uint8_t     * ids_data = clex_host_data(ids, self.ids);

    for (int64_t i_token = 0; i_token < ids->ne[1]; ++i_token) {
        for (int64_t i_used = 0; i_used < ids->ne[0]; ++i_used) {
            const int32_t expert = *(const int32_t *) (ids_data + i_used*ids->nb[0] + i_token*ids->nb[1]);
            GGML_ASSERT(expert >= 0 && expert < n_matrix);
            clex_add_row(entry, data + (i_used % x->ne[1])*x->nb[1] + i_token*x->nb[2], expert, expert);
        }
    }
    return true;
}

bool llama_clex_imatrix_save(
        const struct llama_clex_imatrix * imatrix, const char * path, const char * dataset, uint32_t n_chunks, uint32_t chunk_size) {
    size_t size = 0;
    for (const auto & [name, entry] : imatrix->entries) {
        size += 2*ggml_tensor_overhead() + (entry.sums.size() + entry.counts.size())*sizeof(float) + 2*GGML_MEM_ALIGN;
    }

    ggml_context * ctx  = ggml_init({ size, nullptr, false });
    gguf_context * gguf = gguf_init_empty();

    gguf_set_val_str(gguf, "general.type", "imatrix");
    gguf_set_arr_str(gguf, "imatrix.datasets", &dataset, 1);
    gguf_set_val_u32(gguf, "imatrix.chunk_count", n_chunks);
    gguf_set_val_u32(gguf, "imatrix.chunk_size", chunk_size);

    for (const auto & [name, entry] : imatrix->entries) {
        // each matrix of a tensor without experts has seen the same number of rows
        const int64_t n_count = entry.counts.size();
        const int64_t n_share = entry.sums.size()/entry.n_col/n_count;

        ggml_tensor * sums   = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, entry.n_col*n_share, n_count);
        ggml_tensor * counts = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, 1, n_count);
        ggml_format_name(sums,   "%s.in_sum2", name.c_str());
        ggml_format_name(counts, "%s.counts",  name.c_str());

        for (size_t i = 0; i < entry.sums.size(); ++i) {
            ((float *) sums->data)[i] = (float) entry.sums[i];
        }
        for (int64_t i = 0; i < n_count; ++i) {
            ((float *) counts->data)[i] = (float) entry.counts[i]/n_share;
        }

        gguf_add_tensor(gguf, sums);
        gguf_add_tensor(gguf, counts);
    }

    const bool saved = gguf_write_to_file(gguf, path, false);
    gguf_free(gguf);
    ggml_free(ctx);
    return saved;
}
