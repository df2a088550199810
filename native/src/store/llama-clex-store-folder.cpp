#include "llama-clex-store-folder.h"

#include "llama-impl.h"

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <filesystem>
#include <stdexcept>

static const std::string CLEX_SUFFIX = ".clexblock";
static const std::string CLEX_PART   = ".clexpart"; // of a file that is being written

std::string clex_store_folder::file_name(const clex_digest & key, uint32_t index, const std::string & label) {
    return clex_hex(key) + "." + std::to_string(index) + "." + label + CLEX_SUFFIX;
}

std::string clex_store_folder::path(const std::string & model_id, const clex_digest & key, uint32_t index, const std::string & label) const {
    return root + "/" + model_id.substr(0, 16) + "/" + clex_hex(key.data(), 1) + "/" + file_name(key, index, label);
}

#ifndef _WIN32

#include <dirent.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#ifdef __APPLE__
#define st_mtim st_mtimespec
#endif

// files that are being written are as old as their last write
static constexpr int64_t CLEX_PART_AGE = 3600;

// seconds that the clocks of machines that share a folder may differ
static constexpr int64_t CLEX_CLOCK_SLACK = 60;

namespace {

struct file_closer {
    int fd;
    ~file_closer() { if (fd >= 0) { close(fd); } }
};

// names in a folder, none where it is not there
template <typename F>
void for_each_name(const std::string & path, F f) {
    DIR * dir = opendir(path.c_str());
    if (!dir) {
        return;
    }
    while (const auto * entry = readdir(dir)) {
        if (entry->d_name[0] != '.') {
            f(std::string(entry->d_name));
        }
    }
    closedir(dir);
}

bool ends_with(const std::string & text, const std::string & end) {
    return text.size() >= end.size() && text.compare(text.size() - end.size(), end.size(), end) == 0;
}

} // namespace

// an own folder that nobody else can write to
static void clex_make_folder(const std::string & path) {
    if (mkdir(path.c_str(), 0700) != 0 && errno != EEXIST) {
        throw std::runtime_error(path + ": " + strerror(errno));
    }

    struct stat st;
    if (lstat(path.c_str(), &st) != 0) {
        throw std::runtime_error(path + ": " + strerror(errno));
    }
    if (!S_ISDIR(st.st_mode)) {
        throw std::runtime_error(path + ": it is no folder");
    }
    if (st.st_uid != geteuid()) {
        throw std::runtime_error(path + ": it belongs to another user");
    }
    if ((st.st_mode & 022) != 0) {
        throw std::runtime_error(path + ": others may write to it; chmod go-w makes it private");
    }
}

clex_store_folder::clex_store_folder(const std::string & path) : root(path) {
    while (root.size() > 1 && root.back() == '/') {
        root.pop_back();
    }
    for (size_t i = root.find('/', 1); i != std::string::npos; i = root.find('/', i + 1)) {
        mkdir(root.substr(0, i).c_str(), 0700); // those that are there are somebody's affair
    }

    // a link of the user's own may lead to another disk
    char * real = realpath(root.c_str(), nullptr);
    if (real) {
        root = real;
        free(real);
    }
    clex_make_folder(root);
}

std::vector<std::string> clex_store_folder::labels(const std::string & model_id, const clex_digest & key) const {
    const std::string first = clex_hex(key) + ".";
    const std::string any   = path(model_id, key, 0, "");

    std::vector<std::string> res;
    for_each_name(any.substr(0, any.rfind('/')), [&](const std::string & name) {
        const size_t dot = name.find('.', first.size());
        if (name.compare(0, first.size(), first) == 0 && dot != std::string::npos && ends_with(name, CLEX_SUFFIX) && name.size() > dot + CLEX_SUFFIX.size()) {
            res.push_back(name.substr(dot + 1, name.size() - CLEX_SUFFIX.size() - dot - 1));
        }
    });
    std::sort(res.begin(), res.end());
    return res;
}

bool clex_store_folder::exists(const std::string & path) {
    struct stat st;
    return lstat(path.c_str(), &st) == 0;
}

static void clex_write_all(int fd, const uint8_t * data, size_t size) {
    while (size > 0) {
        const ssize_t n = ::write(fd, data, size);
        if (n < 0 && errno == EINTR) {
            continue;
        }
        if (n <= 0) {
            throw std::runtime_error(strerror(n < 0 ? errno : ENOSPC));
        }
        data += n;
        size -= n;
    }
}

void clex_store_folder::write(const std::string & path, const std::vector<uint8_t> & front, const std::vector<uint8_t> & data) const {
    static std::atomic<uint64_t> n_written = { 0 };

    const std::string folder = path.substr(0, path.rfind('/'));

    // a process that was killed, or one on another machine or in another container, may have had the same number; and
    // clex-cache removes folders that are empty
    std::string part;
    file_closer file = { -1 };
    int n_tries = 0;
    do {
        clex_make_folder(folder.substr(0, folder.rfind('/')));
        clex_make_folder(folder);
        part = path + "." + std::to_string(getpid()) + "-" + std::to_string(n_written++) + CLEX_PART;
        file.fd = open(part.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600);
    } while (file.fd < 0 && (errno == EEXIST || (errno == ENOENT && ++n_tries < 10)));

    if (file.fd < 0) {
        throw std::runtime_error(part + ": " + strerror(errno));
    }
    try {
        clex_write_all(file.fd, front.data(), front.size());
        clex_write_all(file.fd, data.data(),  data.size());
        if (rename(part.c_str(), path.c_str()) != 0) {
            throw std::runtime_error(strerror(errno));
        }
    } catch (const std::exception & err) {
        unlink(part.c_str());
        throw std::runtime_error(path + ": " + err.what());
    }
}

void clex_store_folder::touch(const std::vector<std::string> & paths) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);

    const struct timespec times[2] = { now, now };
    for (const auto & path : paths) {
        utimensat(AT_FDCWD, path.c_str(), times, AT_SYMLINK_NOFOLLOW);
    }
}

bool clex_store_folder::remove(const std::string & path) {
    struct stat st;
    return lstat(path.c_str(), &st) == 0 && st.st_uid == geteuid() && !S_ISDIR(st.st_mode) && unlink(path.c_str()) == 0;
}

std::vector<clex_store_entry> clex_store_folder::scan() const {
    std::vector<clex_store_entry> res;

    const auto file = [&](const std::string & path) {
        struct stat st;
        if (lstat(path.c_str(), &st) != 0 || !S_ISREG(st.st_mode)) {
            return;
        }
        if (ends_with(path, CLEX_PART) && std::abs((int64_t) st.st_mtim.tv_sec - (int64_t) time(nullptr)) > CLEX_PART_AGE) {
            remove(path);
        }
        if (ends_with(path, CLEX_SUFFIX)) {
            const size_t dot = path.find('.', path.rfind('/'));
            res.push_back({ path, (uint64_t) st.st_size, st.st_mtim.tv_sec*1000000000ll + st.st_mtim.tv_nsec,
                    (uint32_t) strtoul(path.c_str() + dot + 1, nullptr, 10) });
        }
    };
    for_each_name(root, [&](const std::string & model) {
        for_each_name(root + "/" + model, [&](const std::string & part) {
            for_each_name(root + "/" + model + "/" + part, [&](const std::string & name) { file(root + "/" + model + "/" + part + "/" + name); });
        });
    });

    // used in the future: before the clock was set back
    const int64_t end  = (time(nullptr) + CLEX_CLOCK_SLACK)*1000000000ll;
    const auto    late = [&](const clex_store_entry & file) { return file.t_used > end; };

    std::sort(res.begin(), res.end(), [&](const auto & a, const auto & b) {
        if (late(a) != late(b)) {
            return late(b);
        }
        return a.t_used != b.t_used ? a.t_used > b.t_used : a.index < b.index;
    });
    return res;
}

int64_t clex_store_folder::free_bytes() const {
    struct statvfs st;
    return statvfs(root.c_str(), &st) == 0 ? (int64_t) st.f_bavail*st.f_frsize : 0;
}

std::string clex_store_folder::note(const std::string & name) const {
    const file_closer file = { open((root + "/models/" + name).c_str(), O_RDONLY | O_NOFOLLOW | O_CLOEXEC | O_NONBLOCK) };

    struct stat st;
    if (file.fd < 0 || fstat(file.fd, &st) != 0 || !S_ISREG(st.st_mode) || st.st_uid != geteuid() || (st.st_mode & 022) != 0) {
        return "";
    }
    char text[4096];
    const ssize_t n = ::read(file.fd, text, sizeof(text));
    return n > 0 ? std::string(text, n) : "";
}

void clex_store_folder::set_note(const std::string & name, const std::string & text) const {
    const std::vector<uint8_t> bytes(text.begin(), text.end());
    clex_make_folder(root + "/models");
    write(root + "/models/" + name, bytes, {});
}

#else

clex_store_folder::clex_store_folder(const std::string & path) : root(path) {
    throw std::runtime_error(path + ": there is no document store on this system");
}

std::vector<std::string> clex_store_folder::labels(const std::string &, const clex_digest &) const { return {}; }

bool clex_store_folder::exists(const std::string &) { return false; }

void clex_store_folder::write(const std::string &, const std::vector<uint8_t> &, const std::vector<uint8_t> &) const {}

void clex_store_folder::touch(const std::vector<std::string> &) {}

bool clex_store_folder::remove(const std::string &) { return false; }

std::vector<clex_store_entry> clex_store_folder::scan() const { return {}; }

int64_t clex_store_folder::free_bytes() const { return 0; }

std::string clex_store_folder::note(const std::string &) const { return ""; }

void clex_store_folder::set_note(const std::string &, const std::string &) const {}

#endif
