#pragma once

struct ggml_tensor;

// Whether the CPU has a kernel for the types of the sources of an operation that weights take part in. ggml answers yes
// to nearly all and aborts when it gets there, which is at the first token of a model that was loaded.
bool ggml_clex_has_kernel(const struct ggml_tensor * op);
