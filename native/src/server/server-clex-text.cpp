#include "server-clex-text.h"

#include "common.h"

#include <algorithm>
#include <cctype>
#include <functional>

// No character that texts may have: Unicode keeps it for the insides of programs. One that is in a text all the same is
// doubled there.
static const std::string MARK  = "\xef\xb7\x90";
static const char *      SPACE = " \t\n\v\f\r";

static size_t char_size(const std::string & text, size_t at) {
    size_t end = at + 1;
    while (end < text.size() && ((unsigned char) text[end] & 0xc0) == 0x80) {
        ++end;
    }
    return end - at;
}

static bool has_mark(const std::string & text, size_t at = 0) {
    return text.compare(at, MARK.size(), MARK) == 0;
}

static std::string doubled(const std::string & text) {
    std::string res = text;
    string_replace_all(res, MARK, MARK + MARK);
    return res;
}

// such as <start_of_turn>, and not a line end or a word
static bool is_structure(const std::string & text) {
    const auto plain = [](unsigned char c) { return std::isalnum(c) || std::isspace(c) || c == '_'; };
    return text.size() > 2 && !plain(text.front()) && !plain(text.back()) &&
        std::any_of(text.begin(), text.end(), [](unsigned char c) { return std::isalpha(c); });
}

static std::string with_mark(const std::string & text) {
    const size_t size = char_size(text, 0);
    return text.substr(0, size) + MARK + text.substr(size);
}

// a text without marks, and with one for each that was doubled
static std::string unmarked(const std::string & text) {
    std::string res;
    for (size_t at = 0; at < text.size();) {
        const size_t next = text.find(MARK, at);
        if (next == std::string::npos) {
            return res + text.substr(at);
        }
        res += text.substr(at, next - at);
        at = next + MARK.size();
        if (has_mark(text, at)) {
            res += MARK;
            at += MARK.size();
        }
    }
    return res;
}

server_clex_text::server_clex_text(const llama_vocab * vocab, bool has_media) : vocab(vocab), has_media(has_media) {
    for (llama_token id = 0; id < llama_vocab_n_tokens(vocab); ++id) {
        const auto attr = llama_vocab_get_attr(vocab, id);
        const std::string text = llama_vocab_get_text(vocab, id);
        if (text.empty() || !(attr & (LLAMA_TOKEN_ATTR_CONTROL | LLAMA_TOKEN_ATTR_UNKNOWN))) {
            continue;
        }
        texts[text] = { (attr & LLAMA_TOKEN_ATTR_LSTRIP) != 0, (attr & LLAMA_TOKEN_ATTR_RSTRIP) != 0 };
        lengths[(uint8_t) text.front()].push_back(text.size());

        begins[(uint8_t) text.front()] = true;
        ends  [(uint8_t) text.back()]  = true;
    }
    for (auto & found : lengths) {
        std::sort(found.begin(), found.end(), std::greater<>());
        found.erase(std::unique(found.begin(), found.end()), found.end());
    }
}

std::vector<server_clex_text::span> server_clex_text::candidates(const std::string & text) const {
    std::vector<span> res;
    for (size_t at = 0; at < text.size(); ++at) {
        for (const size_t length : lengths[(uint8_t) text[at]]) {
            if (length <= text.size() - at && texts.count(text.substr(at, length))) {
                res.emplace_back(at, at + length);
                break;
            }
        }
    }
    return res;
}

std::vector<server_clex_text::span> server_clex_text::controls(const std::string & text) const {
    std::vector<span> res;
    size_t end = 0;
    for (const auto & [begin, stop] : candidates(text)) {
        // of a single character, there is no inside to put the mark into
        const bool guarded = stop - begin == char_size(text, begin) && has_mark(text, stop);
        if (begin >= end && !guarded) {
            res.emplace_back(begin, stop);
            end = stop;
        }
    }
    return res;
}

std::vector<std::string> server_clex_text::control_texts(const std::string & text) const {
    std::vector<std::string> res;
    for (const auto & [begin, end] : controls(text)) {
        res.push_back(text.substr(begin, end - begin));
    }
    return res;
}

std::string server_clex_text::guard(const std::string & given) const {
    const std::string text = doubled(given);

    std::string res;
    size_t end = 0;
    for (const auto & found : candidates(text)) {
        const size_t inside = found.first + char_size(text, found.first);
        res += text.substr(end, inside - end) + MARK;
        end = inside;
    }
    return res + text.substr(end);
}

void server_clex_text::find_defined(const common_chat_templates * tmpls) const {
    const std::string source = common_chat_templates_source(tmpls);

    for (llama_token id = 0; id < llama_vocab_n_tokens(vocab); ++id) {
        if (!(llama_vocab_get_attr(vocab, id) & LLAMA_TOKEN_ATTR_USER_DEFINED)) {
            continue;
        }
        const std::string text = llama_vocab_get_text(vocab, id);
        if (!is_structure(text) || texts.count(text)) {
            continue;
        }
        const bool always = string_starts_with(text, "<|") && string_ends_with(text, "|>");
        if (always || llama_vocab_is_eog(vocab, id) || source.find(text) != std::string::npos) {
            defined.push_back(text);
        }
    }
    std::sort(defined.begin(), defined.end(), [](const auto & a, const auto & b) { return a.size() > b.size(); });
}

std::string server_clex_text::guard_given(const std::string & text) const {
    std::string res = guard(text);
    for (const auto & name : defined) {
        string_replace_all(res, name, with_mark(name));
    }
    return res;
}

std::string server_clex_text::guard_edges(const std::string & given) const {
    const std::string text = doubled(given);

    std::string res;
    for (size_t at = 0; at < text.size();) {
        const size_t size = char_size(text, at);
        if (has_mark(text, at)) {
            res += MARK;
        } else {
            res += ends[(uint8_t) text[at + size - 1]] ? MARK : "";
            res += text.substr(at, size);
            res += begins[(uint8_t) text[at]] ? MARK : "";
        }
        at += size;
    }
    return res;
}

bool server_clex_text::has_edges(const std::string & text) const {
    return std::any_of(text.begin(), text.end(), [&](char c) { return begins[(uint8_t) c] || ends[(uint8_t) c]; });
}

std::vector<std::string> server_clex_text::cut(const std::string & text) const {
    std::vector<size_t> cuts;
    for (const auto & name : defined) {
        const std::string marked = with_mark(name);
        for (size_t at = text.find(marked); at != std::string::npos; at = text.find(marked, at + 1)) {
            cuts.push_back(at + char_size(text, at));
        }
    }
    std::sort(cuts.begin(), cuts.end());
    cuts.erase(std::unique(cuts.begin(), cuts.end()), cuts.end());
    cuts.push_back(text.size());

    std::vector<std::string> res;
    size_t begin = 0;
    for (const size_t end : cuts) {
        res.push_back(unmarked(text.substr(begin, end - begin)));
        begin = end;
    }
    return res;
}

std::vector<llama_token> server_clex_text::tokenize_text(const std::string & text) const {
    // vocabularies that begin every text with a space do not begin what is behind a cut
    const std::string anchor = "\n";
    const auto before = common_tokenize(vocab, anchor, false, false);

    std::vector<llama_token> res;
    bool first = true;
    for (const auto & part : cut(text)) {
        auto tokens = part.empty() ? llama_tokens() : common_tokenize(vocab, first ? part : anchor + part, false, false);
        if (!first && tokens.size() >= before.size() && std::equal(before.begin(), before.end(), tokens.begin())) {
            tokens.erase(tokens.begin(), tokens.begin() + before.size());
        } else if (!first) {
            tokens = common_tokenize(vocab, part, false, false);
        }
        res.insert(res.end(), tokens.begin(), tokens.end());
        first = false;
    }
    return res;
}

void server_clex_text::each_part(const std::string & text, const part_function & add) const {
    auto found = controls(text);
    found.emplace_back(text.size(), text.size());

    // parts between control tokens are cut by themselves anyhow: llama.cpp takes those out first
    std::string waiting;
    size_t end = 0;
    bool strip = false;
    for (const auto & [begin, stop] : found) {
        std::string part = text.substr(end, begin - end);
        const std::string control = text.substr(begin, stop - begin);

        const auto known = texts.find(control);
        if (part.find(MARK) != std::string::npos) {
            add(waiting, true);
            waiting.clear();

            if (strip) {
                part.erase(0, std::min(part.find_first_not_of(SPACE), part.size()));
            }
            if (known != texts.end() && known->second.left) {
                part.erase(part.find_last_not_of(SPACE) + 1);
            }
            add(part, false);
        } else {
            waiting += part;
        }
        waiting += control;
        end   = stop;
        strip = known != texts.end() && known->second.right;
    }
    add(waiting, true);
}

common_json server_clex_text::parts(const std::string & text) const {
    common_json res = common_json::array();
    each_part(text, [&](const std::string & part, bool special) {
        for (const auto & piece : special ? std::vector<std::string>{ part } : cut(part)) {
            if (!piece.empty()) {
                common_json item = common_json::object();
                item["text"]    = piece;
                item["special"] = special;
                res.push_back(item);
            }
        }
    });
    return res;
}

std::vector<llama_token> server_clex_text::tokenize(const std::string & text) const {
    std::vector<llama_token> res;
    each_part(text, [&](const std::string & part, bool special) {
        const auto tokens = part.empty() ? llama_tokens() : special ? common_tokenize(vocab, part, false, true) : tokenize_text(part);
        res.insert(res.end(), tokens.begin(), tokens.end());
    });

    const auto edges = common_tokenize(vocab, "", true, false);
    const size_t n_begin = llama_vocab_get_add_bos(vocab) && !edges.empty() ? 1 : 0;
    res.insert(res.begin(), edges.begin(), edges.begin() + n_begin);
    res.insert(res.end(), edges.begin() + n_begin, edges.end());
    return res;
}

using text_change = std::function<void(std::string & text, bool answered)>;

// what of a request somebody has written: texts, and JSON and words that templates compare, where a mark may be in control
// tokens only
static void each_text(common_chat_templates_inputs & inputs, const text_change & change, const text_change & change_word) {
    for (auto & msg : inputs.messages) {
        const bool answered = msg.role == "assistant";
        change(msg.content, answered);
        change(msg.reasoning_content, answered);
        change(msg.tool_name, answered);
        change_word(msg.tool_call_id, answered);
        change_word(msg.role, answered);
        for (auto & part : msg.content_parts) {
            if (part.type == "text") {
                change(part.text, answered);
            }
        }
        for (auto & call : msg.tool_calls) {
            change(call.name, answered);
            change_word(call.id, true);
            change_word(call.arguments, true);
        }
    }
    for (auto & tool : inputs.tools) {
        change(tool.name, false);
        change(tool.description, false);
        change_word(tool.parameters, false);
    }
    for (auto & item : inputs.chat_template_kwargs) {
        change_word(item.second, true);
    }
}

// JSON with its characters as they are: what is written \u003c is a < for a template that reads it
static void unescape(std::string & arguments) {
    if (arguments.find("\\u") == std::string::npos) {
        return;
    }
    try {
        arguments = common_json::parse(arguments).dump();
    } catch (const std::exception &) { // no JSON: templates take it as a text
    }
}

common_chat_params server_clex_text::apply(
        const common_chat_templates * tmpls, common_chat_templates_inputs inputs, common_json & prompt) const {
    std::call_once(defined_found, [&] { find_defined(tmpls); });

    for (auto & msg : inputs.messages) {
        for (auto & call : msg.tool_calls) {
            unescape(call.arguments);
        }
    }

    bool edges = false;
    const auto guarding = [&](std::string & text, bool answered) {
        edges = edges || has_edges(text);
        text  = answered ? guard(text) : guard_given(text);
    };
    common_chat_templates_inputs guarded = inputs;
    each_text(guarded, guarding, guarding);
    auto res = common_chat_templates_apply(tmpls, guarded);

    if (edges) {
        // what a template puts together of parts without a mark
        common_chat_templates_inputs others = inputs;
        each_text(others, [&](std::string & text, bool) { text = guard_edges(text); }, guarding);

        auto other = common_chat_templates_apply(tmpls, others);
        if (control_texts(res.prompt) != control_texts(other.prompt)) {
            res = std::move(other);
        }
    }
    if (res.prompt.find(MARK) != std::string::npos) {
        prompt = has_media ? parts(res.prompt) : common_json(tokenize(res.prompt));
    }
    const std::string written = unmarked(res.prompt);
    if (!inputs.tools.empty()) {
        // names and parameters of tools decide how an answer is read and which there can be
        res = common_chat_templates_apply(tmpls, inputs);
    }
    res.prompt            = written;
    res.generation_prompt = unmarked(res.generation_prompt);
    return res;
}

int32_t server_clex_tokenize_media(
        mtmd_context * mctx, mtmd_input_chunks * chunks, const common_json & prompt, const std::string & marker,
        const std::vector<const mtmd_bitmap *> & media) {
    if (prompt.is_string()) {
        const std::string text = prompt.get<std::string>();
        const mtmd_input_text input = { text.data(), text.size(), /* add_special */ true, /* parse_special */ true };
        return mtmd_tokenize(mctx, chunks, &input, media.data(), media.size());
    }

    std::vector<std::pair<std::string, bool>> texts; // one that is empty is a medium
    for (const auto & part : prompt) {
        const std::string text    = part.at("text").get<std::string>();
        const bool        special = part.at("special").get<bool>();
        size_t begin = 0;
        for (size_t at; (at = text.find(marker, begin)) != std::string::npos; begin = at + marker.size()) {
            if (at > begin) {
                texts.emplace_back(text.substr(begin, at - begin), special);
            }
            texts.emplace_back("", true);
        }
        if (begin < text.size()) {
            texts.emplace_back(text.substr(begin), special);
        }
    }

    std::vector<mtmd_input_text> inputs(texts.size());
    std::vector<mtmd_input_part> parts(texts.size());
    std::vector<const mtmd_input_part *> pointers;
    size_t n_media = 0;
    for (size_t i = 0; i < texts.size(); ++i) {
        const auto & [text, special] = texts[i];
        if (text.empty() && n_media == media.size()) {
            return 1;
        }
        inputs[i] = { text.data(), text.size(), false, special };
        parts[i]  = text.empty() ? mtmd_input_part { nullptr, media[n_media++] } : mtmd_input_part { &inputs[i], nullptr };
        pointers.push_back(&parts[i]);
    }
    return n_media == media.size() ? mtmd_tokenize_from_parts(mctx, chunks, pointers.data(), pointers.size(), true) : 1;
}
