#pragma once

// Contents of messages that stay text: control tokens in a conversation are those of the chat template alone. Somebody's
// <|im_end|> ends no turn. How: clex_local/templates/templates.py, of which this is the same for the server.

#include "chat.h"
#include "llama.h"

#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

class server_clex_text {
public:
    explicit server_clex_text(const llama_vocab * vocab);

    // As common_chat_templates_apply. Where contents have texts of control tokens, tokens are those of the prompt, with
    // those contents as text and with what the model adds to every prompt; otherwise they are empty.
    common_chat_params apply(
            const common_chat_templates * tmpls, const common_chat_templates_inputs & inputs, std::vector<llama_token> & tokens) const;

private:
    struct stripping {
        bool left;
        bool right;
    };

    using span = std::pair<size_t, size_t>; // begin and end, in bytes

    std::vector<span> candidates(const std::string & text) const;
    std::vector<span> controls  (const std::string & text) const;

    std::vector<std::string> control_texts(const std::string & text) const;

    // tokens that llama.cpp finds in any text, and that begin or end turns by this template
    void find_defined(const common_chat_templates * tmpls) const;

    std::string guard      (const std::string & text) const;
    std::string guard_given(const std::string & text) const; // of what no model has answered
    std::string guard_edges(const std::string & text) const;

    bool has_edges(const std::string & text) const;

    std::vector<llama_token> tokenize     (const std::string & text) const;
    std::vector<llama_token> tokenize_text(const std::string & text) const; // with marks, and none of the template's

    const llama_vocab * vocab;

    mutable std::once_flag           defined_found;
    mutable std::vector<std::string> defined; // longest first

    std::unordered_map<std::string, stripping> texts;
    std::vector<size_t> lengths[256]; // of texts, by their first byte, longest first

    bool begins[256] = {}; // first bytes
    bool ends  [256] = {}; // last bytes
};
