#include "ggml-clex-types.h"

#include "ggml-cpu.h"
#include "ggml.h"

static bool is_float(ggml_type type) {
    return type == GGML_TYPE_F32 || type == GGML_TYPE_F16 || type == GGML_TYPE_BF16;
}

// as binary_op() in ggml-cpu/binary-ops.cpp
static bool has_binary_kernel(ggml_type a, ggml_type b, ggml_type res) {
    return (is_float(a) && a == b && a == res) || (is_float(a) && b == GGML_TYPE_F32 && (res == a || res == GGML_TYPE_F32));
}

bool ggml_clex_has_kernel(const ggml_tensor * op) {
    const ggml_tensor * a = op->src[0];
    const ggml_tensor * b = op->src[1];

    const auto can_convert = [](ggml_type type) { return ggml_is_quantized(type) && ggml_get_type_traits(type)->to_float; };

    switch (op->op) {
        case GGML_OP_MUL_MAT:
        case GGML_OP_MUL_MAT_ID:
            return ggml_get_type_traits_cpu(a->type)->vec_dot != nullptr;
        case GGML_OP_GET_ROWS:
            return is_float(a->type) || a->type == GGML_TYPE_I32 || can_convert(a->type);
        case GGML_OP_ADD:
            if (can_convert(a->type)) {
                return b->type == GGML_TYPE_F32;
            }
            return has_binary_kernel(a->type, b->type, op->type);
        case GGML_OP_SUB:
        case GGML_OP_MUL:
        case GGML_OP_DIV:
            return has_binary_kernel(a->type, b->type, op->type);
        case GGML_OP_ADD_ID:
            return a->type == GGML_TYPE_F32 && b->type == GGML_TYPE_F32;
        case GGML_OP_ROPE:
            return !op->src[2] || op->src[2]->type == GGML_TYPE_F32;
        case GGML_OP_SSM_CONV:
            return a->type == GGML_TYPE_F32 && b->type == GGML_TYPE_F32;
        default:
            return true;
    }
}
