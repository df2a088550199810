#include "llama-clex-store-block.h"

#include "llama-clex-store-folder.h"
#include "llama-clex-store-sum.h"

#include "llama-impl.h"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <stdexcept>
#include <system_error>

// a model has so many layers at most, with keys and values in two caches
static constexpr uint32_t CLEX_SECTIONS_MAX = 1 << 14;

static constexpr size_t CLEX_PAGE = 4096;

// read at once, and summed while it is still in the core's cache
static constexpr size_t CLEX_PIECE = 256*1024;

static size_t clex_front_size(size_t n_sections) {
    const size_t n = sizeof(clex_block_header) + n_sections*sizeof(clex_block_section) + sizeof(uint64_t);
    return (n + CLEX_PAGE - 1)/CLEX_PAGE*CLEX_PAGE;
}

size_t clex_block::file_size() const {
    return clex_front_size(sections.size()) + data.size();
}

std::vector<uint8_t> clex_block::front() {
    memcpy(header.magic, CLEX_BLOCK_MAGIC, sizeof(header.magic));
    header.version    = CLEX_BLOCK_VERSION;
    header.n_sections = (uint32_t) sections.size();
    header.size       = file_size();

    const uint8_t * ptr = data.data();
    for (auto & section : sections) {
        section.sum = 0;
        for (uint64_t i = 0; i < section.size; i += CLEX_PIECE) {
            section.sum = clex_sum(ptr + i, std::min<uint64_t>(CLEX_PIECE, section.size - i), section.sum);
        }
        ptr += section.size;
    }

    std::vector<uint8_t> res(header.size - data.size());

    memcpy(res.data(), &header, sizeof(header));
    memcpy(res.data() + sizeof(header), sections.data(), sections.size()*sizeof(clex_block_section));

    const size_t   n   = res.size() - sizeof(uint64_t);
    const uint64_t sum = clex_sum(res.data(), n);
    memcpy(res.data() + n, &sum, sizeof(sum));
    return res;
}

#ifndef _WIN32

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

clex_block_file::clex_block_file(const std::string & path) : fd(open(path.c_str(), O_RDONLY | O_NOFOLLOW | O_CLOEXEC | O_NONBLOCK)) {
    if (fd < 0) {
        if (errno == ELOOP || errno == ENOENT) {
            throw std::runtime_error(strerror(errno)); // a link, or removed
        }
        throw std::system_error(errno, std::generic_category());
    }
    try {
        check(path);
    } catch (...) {
        close(fd);
        throw;
    }
}

clex_block_file::~clex_block_file() {
    close(fd);
}

void clex_block_file::read_at(void * dst, size_t size) {
    auto * ptr = static_cast<uint8_t *>(dst);
    while (size > 0) {
        const ssize_t n = pread(fd, ptr, size, (off_t) offset);
        if (n < 0 && errno == EINTR) {
            continue;
        }
        if (n < 0) {
            throw std::system_error(errno, std::generic_category());
        }
        if (n == 0) {
            throw std::runtime_error("it is incomplete");
        }
        ptr    += n;
        size   -= n;
        offset += n;
    }
}

void clex_block_file::check(const std::string & path) {
    struct stat st;
    if (fstat(fd, &st) != 0 || !S_ISREG(st.st_mode) || st.st_uid != geteuid() || (st.st_mode & 022) != 0) {
        throw std::runtime_error("it is no file that only this user can have written");
    }
    file_size = st.st_size;

    // of most models all of it
    std::vector<uint8_t> front(2*CLEX_PAGE);
    if (file_size < front.size()) {
        throw std::runtime_error("it is incomplete");
    }
    read_at(front.data(), front.size());
    memcpy(&header, front.data(), sizeof(header));

    if (memcmp(header.magic, CLEX_BLOCK_MAGIC, sizeof(header.magic)) != 0 || header.version != CLEX_BLOCK_VERSION) {
        throw std::runtime_error("it is no block of this version");
    }
    const size_t n_front = header.n_sections > CLEX_SECTIONS_MAX ? 0 : clex_front_size(header.n_sections);
    if (header.size != file_size || n_front < front.size() || n_front > file_size) {
        throw std::runtime_error("it is incomplete");
    }
    const size_t n_read = front.size();
    front.resize(n_front);
    read_at(front.data() + n_read, n_front - n_read);

    uint64_t sum;
    memcpy(&sum, front.data() + n_front - sizeof(sum), sizeof(sum));
    if (sum != clex_sum(front.data(), n_front - sizeof(sum))) {
        throw std::runtime_error("its header is damaged");
    }
    sections.resize(header.n_sections);
    memcpy(sections.data(), front.data() + sizeof(header), sections.size()*sizeof(clex_block_section));

    uint64_t end = offset;
    for (const auto & section : sections) {
        if (section.size > file_size - end) {
            throw std::runtime_error("it is incomplete");
        }
        end += section.size;
    }
    if (end != file_size) {
        throw std::runtime_error("it is incomplete");
    }

    const clex_digest key = header.key();
    if (header.name != clex_block_name(key, header.label()) || clex_store_folder::file_name(key, header.index, header.label()) != path.substr(path.rfind('/') + 1)) {
        throw std::runtime_error("it is not the block that its name says");
    }
}

void clex_block_file::expect() const {
#ifdef POSIX_FADV_WILLNEED
    posix_fadvise(fd, 0, 0, POSIX_FADV_WILLNEED);
#endif
}

void clex_block_file::read(uint8_t * dst) {
    const auto & section = sections.at(i_section++);

    uint64_t sum = 0;
    for (uint64_t i = 0; i < section.size; i += CLEX_PIECE) {
        const size_t n = std::min<uint64_t>(CLEX_PIECE, section.size - i);
        read_at(dst + i, n);
        sum = clex_sum(dst + i, n, sum);
    }
    if (sum != section.sum) {
        throw std::runtime_error("its data is damaged");
    }
}

const uint8_t * clex_block_file::read(std::vector<uint8_t> & buffer) {
    buffer.resize(sections.at(i_section).size);
    read(buffer.data());
    return buffer.data();
}

#else

clex_block_file::clex_block_file(const std::string & path) : fd(-1) { throw std::runtime_error("no store on this system"); GGML_UNUSED(path); }

clex_block_file::~clex_block_file() {}

void clex_block_file::expect() const {}

void clex_block_file::read(uint8_t * dst) { GGML_UNUSED(dst); }

const uint8_t * clex_block_file::read(std::vector<uint8_t> & buffer) { return buffer.data(); }

#endif
