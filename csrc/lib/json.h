// JSON (RFC 8259) read strictly: UTF-8 without a byte order mark, bounded depth, no key twice in an object; with the words
// NaN, Infinity and -Infinity, which Python writes.
#pragma once
#include <cstdint>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

namespace t2l::lib {

struct Json;
struct Member;
using JsonArray = std::vector<Json>;
using JsonObject = std::vector<Member>;  // in order of key

struct Json {
  // An integer that int64_t does not hold is a double, as is every number with a fraction or an exponent; it may be infinite
  // or NaN.  Half a surrogate pair in a string has become U+FFFD.
  std::variant<std::nullptr_t, bool, int64_t, double, std::string, JsonArray, JsonObject> value = nullptr;

  bool is_null() const { return std::holds_alternative<std::nullptr_t>(value); }
  const bool* boolean() const { return std::get_if<bool>(&value); }
  const int64_t* integer() const { return std::get_if<int64_t>(&value); }
  const std::string* string() const { return std::get_if<std::string>(&value); }
  const JsonArray* array() const { return std::get_if<JsonArray>(&value); }
  const JsonObject* object() const { return std::get_if<JsonObject>(&value); }
  // The value of either kind of number; false where it is none.
  bool number(double* out) const;
  // The member of that key; null where this is no object or has none.
  const Json* find(std::string_view key) const;
};

struct Member {
  std::string key;
  Json value;
};

// Throws Error (T2L_BAD_CHECKPOINT) "<where>: not valid JSON: <what> at byte <n>".
Json parse_json(std::string_view text, const std::string& where);

// For messages: the value, or what kind of thing it is; of bounded length.
std::string shown(const Json& value);

}  // namespace t2l::lib
