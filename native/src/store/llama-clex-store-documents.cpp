#include "llama-clex-store-documents.h"

#include "llama-impl.h"

#include <algorithm>
#include <set>
#include <stdexcept>

clex_store_documents::clex_store_documents(const clex_store_folder & folder) {
    for (const auto & entry : folder.scan()) {
        try {
            const clex_block_file file(entry.path);
            blocks[file.header.name] = { entry, file.header };
        } catch (const std::exception & err) {
            LLAMA_LOG_DEBUG("%s: %s: %s\n", __func__, entry.path.c_str(), err.what());
            damaged.push_back(entry);
        }
    }
    for (const auto & [name, block] : blocks) {
        const auto it = blocks.find(block.header.parent);
        if (it != blocks.end() && block.header.index > 0) {
            it->second.n_children += 1;
        }
    }
}

std::vector<const clex_store_documents::block *> clex_store_documents::chain(const block & last) const {
    std::vector<const block *> res = { &last };
    while (res.back()->header.index > 0) {
        const auto it = blocks.find(res.back()->header.parent);
        if (it == blocks.end() || it->second.header.index + 1 != res.back()->header.index) {
            break;
        }
        res.push_back(&it->second);
    }
    return res;
}

std::vector<llama_clex_store_document> clex_store_documents::list() const {
    std::vector<llama_clex_store_document> res;

    for (const auto & [name, last] : blocks) {
        if (last.n_children > 0) {
            continue;
        }
        const auto all = chain(last);
        if (!is_whole(all)) {
            continue;
        }
        const auto & first = all.back()->header;

        llama_clex_store_document doc = {};
        snprintf(doc.name,     sizeof(doc.name),     "%s", clex_hex(name).c_str());
        snprintf(doc.model,    sizeof(doc.model),    "%.*s", (int) sizeof(first.model) - 1, first.model);
        snprintf(doc.model_id, sizeof(doc.model_id), "%s", clex_hex(first.model_id, sizeof(first.model_id)).c_str());
        snprintf(doc.begin,    sizeof(doc.begin),    "%.*s", (int) sizeof(first.begin) - 1, first.begin);
        doc.type_k    = first.type_k;
        doc.type_v    = first.type_v;
        doc.n_tokens  = (int64_t) all.size()*LLAMA_CLEX_STORE_BLOCK;
        doc.t_created = last.header.t_created;
        doc.t_used    = last.entry.t_used/1000000000;

        bool own = true;
        for (const auto * block : all) {
            own = own && block->n_children <= 1;
            doc.n_bytes     += block->entry.size;
            doc.n_bytes_own += own ? block->entry.size : 0;
        }
        res.push_back(doc);
    }

    std::sort(res.begin(), res.end(), [](const auto & a, const auto & b) {
        return a.t_used != b.t_used ? a.t_used > b.t_used : std::string(a.name) < b.name;
    });
    return res;
}

int64_t clex_store_documents::remove(const std::string & name) const {
    const auto it = std::find_if(blocks.begin(), blocks.end(), [&](const auto & b) { return clex_hex(b.first) == name; });
    if (it == blocks.end() || it->second.n_children > 0) {
        return -1;
    }

    int64_t res = 0;
    for (const auto * block : chain(it->second)) {
        if (block->n_children > 1) {
            break;
        }
        res += clex_store_folder::remove(block->entry.path) ? block->entry.size : 0;
    }
    return res;
}

llama_clex_store_check_result clex_store_documents::check() const {
    llama_clex_store_check_result res = {};

    for (const auto & entry : damaged) {
        res.n_files   += 1;
        res.n_bytes   += entry.size;
        res.n_damaged += clex_store_folder::remove(entry.path);
    }

    std::set<clex_digest> gone;
    std::vector<uint8_t>  buffer;
    for (const auto & [name, block] : blocks) {
        res.n_files += 1;
        res.n_bytes += block.entry.size;
        try {
            clex_block_file file(block.entry.path);
            for (size_t i = 0; i < file.sections.size(); ++i) {
                file.read(buffer);
            }
        } catch (const std::exception & err) {
            LLAMA_LOG_DEBUG("%s: %s: %s\n", __func__, block.entry.path.c_str(), err.what());
            res.n_damaged += clex_store_folder::remove(block.entry.path);
            gone.insert(name);
        }
    }
    for (const auto & [name, block] : blocks) {
        const auto all = chain(block);
        const bool whole = is_whole(all) && std::none_of(all.begin(), all.end(), [&](const auto * b) { return gone.count(b->header.name) > 0; });
        if (!whole && gone.count(name) == 0) {
            res.n_orphans += clex_store_folder::remove(block.entry.path);
        }
    }
    return res;
}
