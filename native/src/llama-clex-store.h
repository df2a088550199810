#pragma once

// The document store: what was computed of a text, kept on disk for every later process that begins with the same text.
//
// A text is cut into blocks of 256 tokens. The file of a block has the keys and values of its tokens in all layers. It is
// found by a hash of everything that they depend on: the tokens of the block and, through the name of the block before it,
// of all before; the content of the model's files; the tables; the types of K and V and how V lies; this library and the
// devices that computed. A file that is incomplete, damaged, or not what its name says is as if it were not there, and is
// removed. A cell of the cache knows which text it was computed from, so that nothing is stored under the name of another
// text, whatever was copied, shifted or removed before.
//
// Blocks are copied out of the cache while a prompt is read and written by a thread. The folder is private to its user. Any
// number of processes can use it at once. Beyond its size limit the blocks that were not used for the longest time go first.
//
// A store can be used by all contexts of a process; functions that get a context are called by the thread that decodes
// with it. After a fork the child's store does nothing.

#include "llama.h"

#ifdef __cplusplus
extern "C" {
#endif

#define LLAMA_CLEX_STORE_BLOCK 256 // tokens

struct llama_clex_store;

struct llama_clex_store_stats {
    int64_t n_restored; // tokens
    int64_t n_stored;   // tokens written by this process
    int64_t n_skipped;  // blocks that were not copied because the disk was behind; a later call does
    int64_t n_damaged;  // files removed because they were not what their name says
    int64_t n_evicted;  // files removed because of the limit
    int64_t n_bytes;    // of all files, as far as this process knows; -1 before it has looked
    int64_t max_bytes;  // the limit
    int64_t t_restore_us;
    int64_t t_store_us; // time that the decoding thread was held up
    bool    stopped;    // a file could not be written: nothing more is stored by this process
};

enum llama_clex_store_flags {
    // restore only what was computed with the table that a sequence of n_total tokens uses, and as a prompt is, many tokens
    // at once
    LLAMA_CLEX_STORE_EXACT = 1,
};

// A block that no other one goes on from: the end of a text.
struct llama_clex_store_document {
    char    name[65];     // of its last block, hexadecimal
    char    model[128];   // what the model's file calls it
    char    model_id[33]; // hash of the files' content, hexadecimal
    char    begin[256];   // how the text begins, UTF-8, cut at a character
    int32_t type_k;       // ggml_type
    int32_t type_v;
    int64_t n_tokens;
    int64_t n_bytes;      // files of all its blocks
    int64_t n_bytes_own;  // of those that no other document has: what removing it frees
    int64_t t_created;    // of the last block, seconds since 1970
    int64_t t_used;
};

struct llama_clex_store_check_result {
    int64_t n_files;
    int64_t n_bytes;
    int64_t n_damaged; // removed
    int64_t n_orphans; // removed: the block before is not there
};

// Open a folder, which is made where there is none. max_bytes: limit of all files; 0 takes a fifth of what is free on its
// disk and used by the store. Returns NULL and logs why where the folder cannot be used: it is no folder, belongs to another
// user, or others may write to it.
LLAMA_API struct llama_clex_store * llama_clex_store_open(const char * path, int64_t max_bytes);

// Write what is waiting, and free it.
LLAMA_API void llama_clex_store_close(struct llama_clex_store * store);

// Whether sequences of a context can be stored. Those of recurrent models cannot, nor can what adapters change or what is
// computed for embeddings. reason: why not, cut to size bytes with its 0; may be NULL
LLAMA_API bool llama_clex_store_takes(
        struct llama_clex_store * store, const struct llama_context * ctx, char * reason, size_t size);

// Give a sequence the longest beginning of a text that is stored. The sequence has the first tokens of the text already, or
// none; cells of it are replaced only where the stored part is longer. At least one token is left to be computed. The end of
// what is restored is a multiple of the context's ubatch, so that the rest is divided as if all of it were computed.
// n_total: tokens that the sequence will have, which choose the table; n_tokens or more
// Returns the tokens that the sequence has now.
LLAMA_API int32_t llama_clex_store_restore(struct llama_clex_store * store, struct llama_context * ctx, llama_seq_id seq_id,
        const llama_token * tokens, int32_t n_tokens, int32_t n_total, uint32_t flags);

// Store the whole blocks of a sequence that are not there yet, tokens being its text. Returns at once when they are copied;
// what the disk cannot keep up with is left to a later call.
// Returns the tokens that are stored or about to be.
LLAMA_API int32_t llama_clex_store_save(struct llama_clex_store * store, struct llama_context * ctx, llama_seq_id seq_id,
        const llama_token * tokens, int32_t n_tokens);

// What the cells of a sequence know of their text does not go with a state that is saved. A process that loads a state which
// it has saved itself gives it back. get returns the bytes that there are, of which size are copied at most; set is for the
// same sequence of the same tokens, right after they were loaded.
LLAMA_API size_t llama_clex_store_origin_get(const struct llama_context * ctx, llama_seq_id seq_id, uint8_t * dst, size_t size);
LLAMA_API void   llama_clex_store_origin_set(struct llama_context * ctx, llama_seq_id seq_id, const uint8_t * src, size_t size);

// Wait until everything is written. Returns false where a file could not be.
LLAMA_API bool llama_clex_store_flush(struct llama_clex_store * store);

LLAMA_API struct llama_clex_store_stats llama_clex_store_get_stats(const struct llama_clex_store * store);

// Documents, those used last first. Returns how many there are, of which the first n are copied; docs may be NULL where n is 0.
LLAMA_API int32_t llama_clex_store_list(struct llama_clex_store * store, struct llama_clex_store_document * docs, int32_t n);

// Remove a document: the blocks that no other one needs. Returns the bytes freed, -1 where no document has the name.
LLAMA_API int64_t llama_clex_store_remove(struct llama_clex_store * store, const char * name);

// Remove all blocks. Returns the bytes freed.
LLAMA_API int64_t llama_clex_store_clear(struct llama_clex_store * store);

// Read every file, and remove those that are damaged or that nothing leads to.
LLAMA_API struct llama_clex_store_check_result llama_clex_store_check(struct llama_clex_store * store);

#ifdef __cplusplus
}
#endif
