#pragma once

// An open store: its folder, the thread that writes, and what this process knows and has done.

#include "llama-clex-store-folder.h"
#include "llama-clex-store-writer.h"
#include "llama-clex-store.h"

#include <atomic>
#include <cstdint>
#include <map>
#include <mutex>
#include <string>

class llama_clex_files;

struct llama_clex_store {
    // throws std::runtime_error where the folder cannot be used
    llama_clex_store(const std::string & path, int64_t max_bytes);

    // of this process: what a fork copied has no thread, and locks that nobody opens
    bool is_ours() const;

    // hash of the content of a model's files, 16 bytes; empty where there is none
    std::string model_digest(const llama_clex_files & files);

    const clex_store_folder folder;
    const int64_t           max_bytes;

    clex_store_writer writer;

    std::atomic<int64_t> n_restored   = { 0 };
    std::atomic<int64_t> n_skipped    = { 0 };
    std::atomic<int64_t> n_damaged    = { 0 };
    std::atomic<int64_t> t_restore_us = { 0 };
    std::atomic<int64_t> t_store_us   = { 0 };

private:
    int64_t share_of_disk() const;

    std::mutex                         mutex;
    std::map<std::string, std::string> digests; // by the fingerprints of files

    const int64_t pid;
};
