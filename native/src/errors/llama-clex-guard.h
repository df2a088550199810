#pragma once

struct llama_hparams;

// while one lives, a failed GGML_ASSERT of the same thread throws std::runtime_error instead of ending the process
// for what reads a file that may be damaged or hostile; elsewhere an assert is a defect
struct llama_clex_guard {
    llama_clex_guard();
    ~llama_clex_guard();

    llama_clex_guard(const llama_clex_guard &) = delete;
    llama_clex_guard & operator=(const llama_clex_guard &) = delete;
};

// throws where a hyperparameter would fail an assert of a thread that computes, which no guard reaches
void llama_clex_check_hparams(const llama_hparams & hparams);
