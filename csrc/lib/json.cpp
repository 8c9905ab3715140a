#include "json.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <locale>
#include <new>
#include <sstream>

#include "error.h"

namespace t2l::lib {
namespace {

constexpr int kMaxDepth = 128;
constexpr double kInfinity = std::numeric_limits<double>::infinity();

// Length of the UTF-8 sequence at `text`, or 0: overlong forms, surrogates and numbers beyond U+10FFFF are none.
size_t sequence(const unsigned char* text, size_t left) {
  const unsigned char lead = text[0];
  if (lead < 0x80) return 1;
  const size_t length = lead >= 0xc2 && lead <= 0xdf ? 2 : (lead & 0xf0) == 0xe0 ? 3 : lead >= 0xf0 && lead <= 0xf4 ? 4 : 0;
  if (length == 0 || length > left) return 0;
  for (size_t i = 1; i < length; ++i)
    if ((text[i] & 0xc0) != 0x80) return 0;
  const unsigned char next = text[1];
  if ((lead == 0xe0 && next < 0xa0) || (lead == 0xed && next > 0x9f)) return 0;
  if ((lead == 0xf0 && next < 0x90) || (lead == 0xf4 && next > 0x8f)) return 0;
  return length;
}

class Parser {
 public:
  Parser(std::string_view text, const std::string& where) : text_(text), where_(where) {}

  Json document() {
    check_utf8();
    Json value = parse(0);
    skip();
    if (at_ != text_.size()) fail("text after the value");
    return value;
  }

 private:
  [[noreturn]] void fail(const char* what) const {
    throw Error(T2L_BAD_CHECKPOINT, where_ + ": not valid JSON: " + what + " at byte " + std::to_string(at_));
  }

  void check_utf8() {
    const unsigned char* bytes = reinterpret_cast<const unsigned char*>(text_.data());
    for (; at_ < text_.size();) {
      const size_t length = sequence(bytes + at_, text_.size() - at_);
      if (length == 0) fail("no UTF-8 text");
      at_ += length;
    }
    at_ = 0;
  }

  // The next character; a zero byte, which is nowhere allowed, at the end.
  char peek() const { return at_ < text_.size() ? text_[at_] : '\0'; }

  void skip() {
    while (at_ < text_.size() && (text_[at_] == ' ' || text_[at_] == '\t' || text_[at_] == '\n' || text_[at_] == '\r'))
      ++at_;
  }

  bool take(char c) {
    skip();
    if (peek() != c) return false;
    ++at_;
    return true;
  }

  bool take_word(std::string_view word) {
    if (text_.substr(at_, word.size()) != word) return false;
    at_ += word.size();
    return true;
  }

  Json parse(int depth) {
    if (depth > kMaxDepth) fail("too many levels");
    skip();
    switch (peek()) {
      case '{':
        return {object(depth)};
      case '[':
        return {array(depth)};
      case '"':
        return {string()};
      case 't':
        if (take_word("true")) return {true};
        break;
      case 'f':
        if (take_word("false")) return {false};
        break;
      case 'n':
        if (take_word("null")) return {nullptr};
        break;
      case 'N':
        if (take_word("NaN")) return {std::numeric_limits<double>::quiet_NaN()};
        break;
      case 'I':
        if (take_word("Infinity")) return {kInfinity};
        break;
      default:
        if (take_word("-Infinity")) return {-kInfinity};
        if (peek() == '-' || digit()) return number();
    }
    fail("no value");
  }

  JsonObject object(int depth) {
    JsonObject members;
    ++at_;
    if (take('}')) return members;
    do {
      skip();
      if (peek() != '"') fail("no key");
      std::string key = string();
      if (!take(':')) fail("no ':'");
      members.push_back({std::move(key), parse(depth + 1)});
    } while (take(','));
    if (!take('}')) fail("neither ',' nor '}'");
    std::sort(members.begin(), members.end(), [](const Member& a, const Member& b) { return a.key < b.key; });
    const auto same = [](const Member& a, const Member& b) { return a.key == b.key; };
    if (std::adjacent_find(members.begin(), members.end(), same) != members.end())
      fail("a key occurs twice in the object that ends");
    return members;
  }

  JsonArray array(int depth) {
    JsonArray items;
    ++at_;
    if (take(']')) return items;
    do items.push_back(parse(depth + 1));
    while (take(','));
    if (!take(']')) fail("neither ',' nor ']'");
    return items;
  }

  uint32_t hex4() {
    uint32_t code = 0;
    for (int i = 0; i < 4; ++i, ++at_) {
      const char c = peek();
      const int value = c >= '0' && c <= '9'   ? c - '0'
                        : c >= 'a' && c <= 'f' ? c - 'a' + 10
                        : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                               : -1;
      if (value < 0) fail("no hexadecimal digit");
      code = code * 16 + static_cast<uint32_t>(value);
    }
    return code;
  }

  void append_escaped_code(std::string& out) {
    uint32_t code = hex4();
    const size_t next = at_;
    if (code >= 0xd800 && code < 0xdc00 && take_word("\\u")) {
      const uint32_t low = hex4();
      if (low >= 0xdc00 && low <= 0xdfff)
        code = 0x10000 + ((code - 0xd800) << 10) + (low - 0xdc00);
      else
        at_ = next;  // a character of its own
    }
    if (code >= 0xd800 && code <= 0xdfff) code = 0xfffd;  // half a pair, which UTF-8 cannot say
    const auto tail = [&](int shift) { out += static_cast<char>(0x80 | ((code >> shift) & 0x3f)); };
    if (code < 0x80) {
      out += static_cast<char>(code);
    } else if (code < 0x800) {
      out += static_cast<char>(0xc0 | (code >> 6));
      tail(0);
    } else if (code < 0x10000) {
      out += static_cast<char>(0xe0 | (code >> 12));
      tail(6), tail(0);
    } else {
      out += static_cast<char>(0xf0 | (code >> 18));
      tail(12), tail(6), tail(0);
    }
  }

  std::string string() {
    std::string out;
    for (++at_;;) {
      if (at_ >= text_.size()) fail("a string without an end");
      const char c = text_[at_];
      if (static_cast<unsigned char>(c) < 0x20) fail("a control character in a string");
      ++at_;
      if (c == '"') return out;
      if (c != '\\') {
        out += c;
        continue;
      }
      static constexpr char kNames[] = "\"\\/bfnrt", kValues[] = "\"\\/\b\f\n\r\t";
      const char name = peek();
      const char* found = std::find(kNames, kNames + 8, name);
      if (name != 'u' && found == kNames + 8) fail("an unknown escape");
      ++at_;
      if (name == 'u')
        append_escaped_code(out);
      else
        out += kValues[found - kNames];
    }
  }

  bool digit() const { return peek() >= '0' && peek() <= '9'; }

  void digits() {
    if (!digit()) fail("no digit");
    while (digit()) ++at_;
  }

  Json number() {
    const size_t start = at_;
    if (peek() == '-') ++at_;
    if (peek() == '0')
      ++at_;
    else
      digits();
    if (digit()) fail("a number that starts with 0");
    bool whole = true;
    if (peek() == '.') {
      whole = false;
      ++at_;
      digits();
    }
    if (peek() == 'e' || peek() == 'E') {
      whole = false;
      ++at_;
      if (peek() == '+' || peek() == '-') ++at_;
      digits();
    }
    const std::string_view text = text_.substr(start, at_ - start);
    int64_t integer = 0;
    if (whole && to_integer(text, &integer)) return {integer};
    return {to_double(std::string(text))};
  }

  static bool to_integer(std::string_view text, int64_t* out) {
    const bool negative = text[0] == '-';
    int64_t value = 0;
    for (const char c : text.substr(negative ? 1 : 0)) {
      const int64_t step = negative ? '0' - c : c - '0';
      if (__builtin_mul_overflow(value, 10, &value) || __builtin_add_overflow(value, step, &value)) return false;
    }
    *out = value;
    return true;
  }

  // Not strtod: its decimal point depends on the program's locale.  Numbers beyond double are infinite, as Python reads
  // them.
  static double to_double(const std::string& text) {
    std::istringstream stream(text);
    stream.imbue(std::locale::classic());
    double value = 0;
    stream >> value;
    // The stream keeps to itself that it lacks memory.
    if (stream.bad()) throw std::bad_alloc();
    // Some libraries say that numbers next to 0 fail, too.
    const bool beyond = stream.fail() && std::abs(value) > 1;
    return beyond ? std::copysign(kInfinity, value) : value;
  }

  const std::string_view text_;
  const std::string& where_;
  size_t at_ = 0;
};

}  // namespace

bool Json::number(double* out) const {
  if (const int64_t* whole = integer())
    *out = static_cast<double>(*whole);
  else if (const double* real = std::get_if<double>(&value))
    *out = *real;
  else
    return false;
  return true;
}

const Json* Json::find(std::string_view key) const {
  const JsonObject* members = object();
  if (members == nullptr) return nullptr;
  const auto less = [](const Member& member, std::string_view wanted) { return member.key < wanted; };
  const auto found = std::lower_bound(members->begin(), members->end(), key, less);
  return found != members->end() && found->key == key ? &found->value : nullptr;
}

Json parse_json(std::string_view text, const std::string& where) { return Parser(text, where).document(); }

std::string shown(const Json& json) {
  if (json.is_null()) return "null";
  if (const bool* truth = json.boolean()) return *truth ? "true" : "false";
  if (const int64_t* whole = json.integer()) return std::to_string(*whole);
  if (const std::string* text = json.string()) return quoted(*text);
  if (const JsonArray* items = json.array()) return "a list of " + std::to_string(items->size());
  if (const JsonObject* members = json.object()) return "an object of " + std::to_string(members->size());
  double number = 0;
  json.number(&number);
  char text[40];
  std::snprintf(text, sizeof text, "%.9g", number);
  return text;
}

}  // namespace t2l::lib
