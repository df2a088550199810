#include "llama-clex-store-block.h"

#include "llama-clex-store-folder.h"

#include "llama-impl.h"

#include "hash/xxhash/xxhash.h"

#include <cerrno>
#include <cstring>
#include <stdexcept>
#include <system_error>

// a model has so many layers at most, with keys and values in two caches
static constexpr uint32_t CLEX_SECTIONS_MAX = 1 << 14;

size_t clex_block::file_size() const {
    return sizeof(header) + sections.size()*sizeof(clex_block_section) + sizeof(uint64_t) + data.size();
}

std::vector<uint8_t> clex_block::front() {
    memcpy(header.magic, CLEX_BLOCK_MAGIC, sizeof(header.magic));
    header.version    = CLEX_BLOCK_VERSION;
    header.n_sections = (uint32_t) sections.size();
    header.size       = file_size();

    const uint8_t * ptr = data.data();
    for (auto & section : sections) {
        section.sum = XXH3_64bits(ptr, section.size);
        ptr += section.size;
    }

    std::vector<uint8_t> res(header.size - data.size());

    const size_t n = sections.size()*sizeof(clex_block_section);
    memcpy(res.data(), &header, sizeof(header));
    memcpy(res.data() + sizeof(header), sections.data(), n);

    const uint64_t sum = XXH3_64bits(res.data(), sizeof(header) + n);
    memcpy(res.data() + sizeof(header) + n, &sum, sizeof(sum));
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

    read_at(&header, sizeof(header));
    if (memcmp(header.magic, CLEX_BLOCK_MAGIC, sizeof(header.magic)) != 0 || header.version != CLEX_BLOCK_VERSION) {
        throw std::runtime_error("it is no block of this version");
    }
    if (header.size != file_size || header.n_sections > CLEX_SECTIONS_MAX) {
        throw std::runtime_error("it is incomplete");
    }

    sections.resize(header.n_sections);
    read_at(sections.data(), sections.size()*sizeof(clex_block_section));

    uint64_t sum;
    read_at(&sum, sizeof(sum));

    XXH3_state_t * state = XXH3_createState();
    XXH3_64bits_reset(state);
    XXH3_64bits_update(state, &header, sizeof(header));
    XXH3_64bits_update(state, sections.data(), sections.size()*sizeof(clex_block_section));
    const uint64_t found = XXH3_64bits_digest(state);
    XXH3_freeState(state);

    if (sum != found) {
        throw std::runtime_error("its header is damaged");
    }

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

const uint8_t * clex_block_file::read(std::vector<uint8_t> & buffer) {
    const auto & section = sections.at(i_section++);

    buffer.resize(section.size);
    read_at(buffer.data(), section.size);
    if (XXH3_64bits(buffer.data(), section.size) != section.sum) {
        throw std::runtime_error("its data is damaged");
    }
    return buffer.data();
}

#else

clex_block_file::clex_block_file(const std::string & path) : fd(-1) { throw std::runtime_error("no store on this system"); GGML_UNUSED(path); }

clex_block_file::~clex_block_file() {}

const uint8_t * clex_block_file::read(std::vector<uint8_t> & buffer) { return buffer.data(); }

#endif
