#pragma once

#include <cstdint>
#include <string>
#include <vector>

struct llama_model_loader;

// The files that a model was loaded from, kept open for their content to be its identity in the document store: a hash of
// gigabytes is computed only once somebody asks for it, and then of the files that were loaded, not of others with their names.
class llama_clex_files {
public:
    llama_clex_files() = default;
    ~llama_clex_files();

    llama_clex_files(const llama_clex_files &) = delete;

    void keep(const llama_model_loader & ml);

    bool empty() const { return files.empty(); }

    // of each file, what changes when its content does: device, number, size, times; empty where the system has none of it
    std::string fingerprint() const;

    // whether they are as they were when they were loaded
    bool unchanged() const;

    // hash of the content of all files, 16 bytes; empty where they cannot be read or have changed since they were loaded
    std::string digest() const;

    // what the host overrode when it loaded them
    std::string overrides() const { return given; }

private:
    std::vector<int>  files; // descriptors
    std::string       loaded; // the fingerprint then
    std::string       given;
};
