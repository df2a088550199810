#pragma once

#include "llama-io.h"
#include "llama-mmap.h"

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <stdexcept>

// reads a buffer, or a file from where it stands
class clex_state_reader : public llama_io_read_i {
public:
    clex_state_reader(const uint8_t * data, size_t size) : start(data), size(size) {}
    clex_state_reader(llama_file & file, size_t size) : file(&file), size(size) {}

    void read(void * dst, size_t n) override {
        take(n);
        if (file) {
            file->read_raw(dst, n);
        } else {
            memcpy(dst, start + n_read - n, n);
        }
    }

    template <typename T> T get() {
        T res;
        read(&res, sizeof(res));
        return res;
    }

    void skip(size_t n) {
        take(n);
        if (file) {
            file->seek(n, SEEK_CUR);
        }
    }

    void read_tensor(ggml_tensor * /* tensor */, size_t /* offset */, size_t n) override { skip(n); }

    size_t n_bytes() override { return n_read; }

    size_t n_left() const { return size - n_read; }

    bool is_file() const { return file != nullptr; }

    const uint8_t * data() const { return start; }

private:
    void take(size_t n) {
        if (n > n_left()) {
            throw std::runtime_error("the state is incomplete");
        }
        n_read += n;
    }

    const uint8_t * start = nullptr;
    llama_file    * file  = nullptr;

    const size_t size;

    size_t n_read = 0;
};
