#pragma once

// Contents of messages that stay text: control tokens in a conversation are those of the chat template alone. Somebody's
// <|im_end|> ends no turn. How: clex_local/templates/control_tokens.py, of which this is the same for the server.

#include "chat.h"
#include "llama.h"
#include "mtmd.h"

#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

class server_clex_text {
public:
    server_clex_text(const llama_vocab * vocab, bool has_media);

    // As common_chat_templates_apply. Where contents have texts of control tokens, `prompt` becomes the prompt with those
    // contents as text: its tokens with what the model adds to every prompt, or for a model that takes media the parts of
    // server_clex_tokenize_media; otherwise it is left alone.
    common_chat_params apply(
            const common_chat_templates * tmpls, common_chat_templates_inputs inputs, common_json & prompt) const;

private:
    struct stripping {
        bool left;
        bool right;
    };

    using span          = std::pair<size_t, size_t>; // begin and end, in bytes
    using part_function = std::function<void(const std::string & part, bool special)>;

    std::vector<span> candidates(const std::string & text) const;
    std::vector<span> controls  (const std::string & text) const;

    std::vector<std::string> control_texts(const std::string & text) const;

    // tokens that llama.cpp finds in any text, and that begin or end turns by this template
    void find_defined(const common_chat_templates * tmpls) const;

    std::string guard      (const std::string & text) const;
    std::string guard_given(const std::string & text) const; // of what no model has answered
    std::string guard_edges(const std::string & text) const;

    bool has_edges(const std::string & text) const;

    // parts of a prompt with marks: with control tokens of the template, and without
    void each_part(const std::string & text, const part_function & add) const;

    // a text with marks without them, cut where tokens that llama.cpp finds in any text would be
    std::vector<std::string> cut(const std::string & text) const;

    common_json parts(const std::string & text) const;

    std::vector<llama_token> tokenize     (const std::string & text) const;
    std::vector<llama_token> tokenize_text(const std::string & text) const; // with marks, and none of the template's

    const llama_vocab * vocab;
    const bool          has_media;

    mutable std::once_flag           defined_found;
    mutable std::vector<std::string> defined; // longest first

    std::unordered_map<std::string, stripping> texts;
    std::vector<size_t> lengths[256]; // of texts, by their first byte, longest first

    bool begins[256] = {}; // first bytes
    bool ends  [256] = {}; // last bytes
};

// As mtmd_tokenize. A prompt is a text, or a list of {"text", "special"}: only where special is true control tokens are
// looked for.
int32_t server_clex_tokenize_media(
        mtmd_context * mctx, mtmd_input_chunks * chunks, const common_json & prompt, const std::string & marker,
        const std::vector<const mtmd_bitmap *> & media);
