// Files from strangers: JSON, safetensors, configurations and checkpoint folders that are broken in every way are refused
// with a status and a message.  What is read lies in memory of its exact size, so that a sanitizer sees a step beyond.
#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <limits>
#include <map>

#include "check.h"
#include "lib/checkpoint.h"
#include "lib/error.h"
#include "lib/sha256.h"

namespace {

using t2l::lib::Error;
using t2l::lib::Json;
using t2l::lib::parse_json;
using t2l::lib::Safetensors;
using t2l::lib::shown;

// Message of the Error that `body` throws, after its status; "" where it throws none.
template <class F>
std::string refusal(const F& body) {
  try {
    body();
    return "";
  } catch (const Error& e) {
    return std::string(t2l_status_name(e.status)) + ": " + e.what();
  }
}

#define CHECK_REFUSED(text, call)                                                                    \
  do {                                                                                               \
    const std::string got = refusal([&] { call; });                                                  \
    CHECK_SAYS(got.find(text) != std::string::npos, std::string(text) + " | " + got.substr(0, 400)); \
  } while (false)

// Only a heap block of exactly that size lets a sanitizer see what is read beyond it.
Json json(const std::string& text) {
  const std::vector<char> bytes(text.begin(), text.end());
  return parse_json({bytes.data(), bytes.size()}, "file");
}

void test_json() {
  const Json value = json(" {\"b\": [1, -20, 2.5e-1, true, null], \"a\": \"\\u00e9\\ud83d\\ude00\\n\\\"\", \"\": {}} ");
  CHECK(value.object() && value.object()->size() == 3 && value.find("c") == nullptr);
  CHECK(*value.find("a")->string() == "\xc3\xa9\xf0\x9f\x98\x80\n\"");
  const t2l::lib::JsonArray& list = *value.find("b")->array();
  double number = 0;
  CHECK(*list[0].integer() == 1 && *list[1].integer() == -20 && list[2].integer() == nullptr);
  CHECK(list[2].number(&number) && number == 0.25 && *list[3].boolean() && list[4].is_null() && !list[4].number(&number));
  CHECK(*json("-9223372036854775808").integer() == INT64_MIN && json("9223372036854775808").integer() == nullptr);
  CHECK(json("1" + std::string(400, '0') + "e-400").number(&number) && number == 1);

  // As Python reads and writes what RFC 8259 has no words for.
  const double infinity = std::numeric_limits<double>::infinity(), largest = std::numeric_limits<double>::max();
  CHECK(json("1.7976931348623157e308").number(&number) && number == largest);
  CHECK(json("-1.7976931348623157e+308").number(&number) && number == -largest);
  CHECK(json("5e-324").number(&number) && number > 0 && json("-1e-999").number(&number) && number == 0);
  for (const std::string text : {"Infinity", "1e999", "1.8e308"}) {
    CHECK(json(text).number(&number) && number == infinity && shown(json(text)) == "inf");
    CHECK(json("[-" + text + "]").array()->front().number(&number) && number == -infinity);
  }
  CHECK(json("1" + std::string(400, '0')).number(&number) && number == infinity);
  CHECK(json(" NaN ").number(&number) && std::isnan(number) && json("NaN").integer() == nullptr);
  CHECK(*json("\"\\ud800\"").string() == "\xef\xbf\xbd" && *json("\"\\udc00x\"").string() == "\xef\xbf\xbdx");
  CHECK(*json("\"\\ud800\\u0041\"").string() ==
        "\xef\xbf\xbd"
        "A");
  CHECK(*json("\"\\ud800\\ud83d\\ude00\"").string() == "\xef\xbf\xbd\xf0\x9f\x98\x80");

  const std::string deep(100, '['), too_deep(100000, '[');
  CHECK(refusal([&] { json(deep + std::string(100, ']')); }).empty());
  CHECK_REFUSED("bad checkpoint: file: not valid JSON: too many levels at byte 129", json(too_deep));
  const std::map<std::string, const char*> broken = {
      {"", "no value at byte 0"},
      {"{", "no key"},
      {"[1", "neither ',' nor ']'"},
      {"[1,]", "no value"},
      {"{\"a\":1,}", "no key"},
      {"{\"a\" 1}", "no ':'"},
      {"{\"a\":1 \"b\":2}", "neither ',' nor '}'"},
      {"{\"a\":1,\"\\u0061\":2}", "a key occurs twice"},
      {"{'a':1}", "no key"},
      {"tru", "no value"},
      {"Nan", "no value"},
      {"-NaN", "no digit"},
      {"+Infinity", "no value"},
      {"-Inf", "no digit"},
      {"Infinity0", "text after the value"},
      {"1 2", "text after the value"},
      {"01", "a number that starts with 0"},
      {"-", "no digit"},
      {"1.", "no digit"},
      {"1e", "no digit"},
      {"+1", "no value"},
      {".5", "no value"},
      {"\"abc", "a string without an end"},
      {"\"\\", "an unknown escape"},
      {"\"\\x\"", "an unknown escape"},
      {"\"\\u12g4\"", "no hexadecimal digit"},
      {"\"\\ud800\\u00\"", "no hexadecimal digit"},
      {"\"\n\"", "a control character"},
      {std::string("\"\0\"", 3), "a control character"},
      {std::string("{}\0", 3), "text after the value"},
      {"\xef\xbb\xbf{}", "no value"},
      {"\"\xff\"", "no UTF-8 text at byte 1"},
      {"\"\xc0\xaf\"", "no UTF-8"},
      {"\"\xe0\x9f\xbf\"", "no UTF-8"},
      {"\"\xed\xa0\x80\"", "no UTF-8"},
      {"\"\xf4\x90\x80\x80\"", "no UTF-8"},
      {"\"\xe2\x82", "no UTF-8"},
  };
  for (const auto& [text, what] : broken) CHECK_REFUSED(what, json(text));
}

std::string file_of(const std::string& header, const std::string& data) {
  const uint64_t length = header.size();
  return std::string(reinterpret_cast<const char*>(&length), sizeof length) + header + data;
}

void parse(const std::string& file, bool values = false) {
  const std::vector<unsigned char> bytes(file.begin(), file.end());
  const Safetensors found = t2l::lib::parse_safetensors(bytes.data(), bytes.size(), "file");
  if (values) t2l::lib::check_finite(found, "file");
  if (values) t2l::lib::check_checksum(found, "file");
}

std::string entry(const char* name, const char* dtype, const char* shape, const char* offsets) {
  return std::string("\"") + name + "\":{\"dtype\":\"" + dtype + "\",\"shape\":" + shape + ",\"data_offsets\":" + offsets +
         "}";
}

// Where `more` lies behind `data`.
std::string range(const std::string& data, const std::string& more) {
  return "[" + std::to_string(data.size()) + "," + std::to_string(data.size() + more.size()) + "]";
}

void test_safetensors() {
  const std::string data(12, '\0');
  const std::string a = entry("a", "F32", "[2]", "[0,8]"), b = entry("b", "BF16", "[1,2]", "[8,12]");
  const std::string sound = file_of("{" + b + "," + a + "}  ", data);
  CHECK(refusal([&] { parse(sound, true); }).empty());
  CHECK(refusal([&] {
          parse(file_of("{" + entry("s", "F16", "[]", "[0,2]") + "," + entry("e", "F32", "[0,9]", "[2,2]") + "}",
                        std::string(2, '\0')),
                true);
        }).empty());
  CHECK(refusal([&] { parse(file_of("{}", "")); }).empty());

  for (size_t n = 0; n < sound.size(); ++n) CHECK(!refusal([&] { parse(sound.substr(0, n)); }).empty());
  for (size_t i = 0; i < sound.size() - data.size(); ++i)
    for (int bit = 0; bit < 8; ++bit) {
      std::string flipped = sound;
      flipped[i] = static_cast<char>(flipped[i] ^ (1 << bit));
      refusal([&] { parse(flipped, true); });  // refused or not, within its memory
    }
  for (const uint64_t length : {uint64_t{1} << 20, uint64_t{1} << 63, ~uint64_t{0}, uint64_t{200}}) {
    std::string file = sound;
    std::memcpy(&file[0], &length, sizeof length);
    CHECK_REFUSED("its header claims more", parse(file));
  }
  CHECK_REFUSED("bytes belong to no tensor", parse(sound + "x"));
  CHECK_REFUSED("its header is no object", parse(file_of("[]", "")));

  const auto one = [&](const std::string& header) { parse(file_of("{" + header + "}", data)); };
  CHECK_REFUSED("overlaps another tensor", one(a + "," + entry("b", "F32", "[2]", "[4,12]")));
  CHECK_REFUSED("overlaps another tensor",
                one(entry("a", "F32", "[3]", "[0,12]") + "," + entry("b", "F32", "[3]", "[0,12]")));
  CHECK_REFUSED("leaves a gap before it", one(entry("a", "F32", "[2]", "[4,12]")));
  CHECK_REFUSED("4 bytes belong to no tensor", one(a));
  for (const char* offsets : {"[0,16]", "[8,0]", "[-8,0]", "[0,8.0]", "[\"0\",8]", "[0,8,8]", "[]", "0", "[0,1e300]",
                              "[9223372036854775807,9223372036854775807]", "[0,9223372036854775808]"})
    CHECK_REFUSED("data_offsets", one(entry("a", "F32", "[2]", offsets)));
  for (const char* shape : {"[3]", "[2,2]", "[]", "[4611686018427387904,2]", "[4294967296,4294967296]", "[2,0]"})
    CHECK_REFUSED("its shape does not match its 8 bytes", one(entry("a", "F32", shape, "[0,8]")));
  for (const char* shape : {"[-2]", "[2.0]", "[null]"})
    CHECK_REFUSED("shape: expected sizes", one(entry("a", "F32", shape, "[0,8]")));
  std::string ones = "[2";
  for (int i = 0; i < 1000; ++i) ones += ",1";
  CHECK_REFUSED("shape: expected fewer entries", one(entry("a", "F32", (ones + "]").c_str(), "[0,8]")));
  CHECK_REFUSED("bad checkpoint: file: 'a': expected dtype F32, BF16, F16 or F64, got 'I32'",
                one(entry("a", "I32", "[2]", "[0,8]")));
  CHECK_REFUSED("\\x1b[2J", one(entry("\\u001b[2J", "F32", "[3]", "[0,8]")));
  CHECK_REFUSED("expected a dtype", one("\"a\":{}"));
  CHECK_REFUSED("expected an object", one("\"a\":[1,2]"));
  CHECK_REFUSED("a key occurs twice", one(a + "," + a));
  CHECK_REFUSED("__metadata__: expected an object", one("\"__metadata__\":[]," + a));
  CHECK_REFUSED("__metadata__: 'format': expected text, got 1", one("\"__metadata__\":{\"format\":1}," + a));

  const std::pair<const char*, std::string> infinite[] = {
      {"F32", {"\0\0\x80\xff", 4}}, {"BF16", {"\xc0\x7f", 2}}, {"F16", {"\0\x7c", 2}}, {"F64", {"\0\0\0\0\0\0\xf8\x7f", 8}}};
  for (const auto& [dtype, bits] : infinite) {
    const std::string range = "[0," + std::to_string(bits.size()) + "]";
    CHECK_REFUSED("'a': holds NaN or infinite values",
                  parse(file_of("{" + entry("a", dtype, "[1]", range.c_str()) + "}", bits), true));
  }

  // What t2l_engine.files.weights.content_checksum says of these three tensors.
  const std::string checksum =
      "\"__metadata__\":{\"t2l_engine.sha256\":\"d8124be541f2c1d126f5c50fda330c59f030b869a6b428db0ed945c1413a1d3a\"},";
  const std::string three =
      file_of("{" + checksum + a + "," + b + "," + entry("c", "F64", "[]", "[12,20]") + "}", std::string(20, '\0'));
  CHECK(refusal([&] { parse(three, true); }).empty());
  std::string damaged = three;
  damaged.back() = 1;
  CHECK_REFUSED("the content does not match its checksum", parse(damaged, true));
}

void test_sha256() {
  const std::pair<std::string, const char*> known[] = {
      // FIPS 180-4, and the lengths around a block's end
      {"", "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"},
      {"abc", "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"},
      {"abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq",
       "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1"}};
  for (const auto& [text, digest] : known) {
    t2l::lib::Sha256 whole, parts;
    whole.update(text.data(), text.size());
    for (const char c : text) parts.update(&c, 1);
    CHECK(whole.hex() == digest && parts.hex() == digest);
  }
  const std::string text(200, 'x');
  for (size_t n = 50; n < 135; ++n) {
    t2l::lib::Sha256 whole, parts;
    whole.update(text.data(), n);
    parts.update(text.data(), n / 3);
    parts.update(text.data(), n - n / 3);
    CHECK(whole.hex() == parts.hex());
  }
}

std::string read(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return std::string((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
}

std::string edited(const std::string& text, const std::string& from, const std::string& to) {
  const size_t at = text.find(from);
  CHECK_SAYS(at != std::string::npos, from);
  return at == std::string::npos ? text : text.substr(0, at) + to + text.substr(at + from.size());
}

void test_config(const std::string& folder) {
  const std::string sound = read(folder + "/config.json");
  const auto config = [](const std::string& text) { return t2l::lib::read_config(json(text), "file"); };
  CHECK(config(sound).head_rows(config(sound).modules[1]) == 6144 && config(sound).scaling == 2);
  CHECK(config(edited(sound, "\"plain\"", "\"rslora\"")).scaling > 5.65);
  CHECK(config(edited(sound, "\"plain\"", "0.5")).scaling == 0.5);
  CHECK(config(edited(sound, "\"paths\": null", "\"paths\": [\"a.{layer}.q\", \"b.{layer}.v\"]")).modules[1].path ==
        "b.{layer}.v");
  CHECK(config(edited(sound, "\"num_layers\": 30", "\"num_layers\": 4096")).num_layers == 4096);
  CHECK(config(edited(sound, "\"training\": {", "\"training\": {\"of a stranger\": [NaN, -Infinity],")).rank == 8);
  const struct {
    const char *from, *to, *what;
  } broken[] = {
      {"hypernetwork.v1", "hypernetwork.v2", "file: format: expected 't2l_engine.hypernetwork.v1', got"},
      {"\"encoder\"", "\"encoders\"", "unknown field 'encoders'"},
      {"\"smollm2-135m\"", "7", "base_model: expected text, got 7"},
      {"\"training\": {", "\"training\": [], \"reference\": {", "training: expected an object, got a list of 0"},
      {"\"rank\"", "\"ranks\"", "hypernetwork: unknown field 'ranks'"},
      {"\"rank\": 8,", "", "hypernetwork: missing field 'rank'"},
      {"\"rank\": 8", "\"rank\": 8.0", "rank: expected a positive integer below 2^31, got 8"},
      {"\"rank\": 8", "\"rank\": true", "rank: expected a positive integer below 2^31, got true"},
      {"\"rank\": 8", "\"rank\": 0", "rank: expected a positive integer"},
      {"\"rank\": 8", "\"rank\": 65537", "rank: expected at most 65536, got 65537"},
      {"\"num_layers\": 30", "\"num_layers\": 2147483648", "num_layers: expected a positive integer"},
      {"\"num_layers\": 30", "\"num_layers\": 4097", "num_layers: expected at most 4096, got 4097"},
      {"\"num_layers\": 30", "\"num_layers\": Infinity", "num_layers: expected a positive integer below 2^31, got inf"},
      {"\"lora_alpha\": 16.0", "\"lora_alpha\": NaN", "lora_alpha: expected a positive number in [1e-09, 1e+09], got nan"},
      {"\"plain\"", "Infinity", "scaling: expected a positive number in [1e-09, 1e+09], got inf"},
      {"\"output_scale\": 1.0", "\"output_scale\": -1e999", "output_scale: expected a positive number"},
      {"\"latent_size\": 128", "\"latent_size\": 3", "latent_size: expected at least 4, got 3"},
      {"\"lora_alpha\": 16.0", "\"lora_alpha\": 1e-30", "lora_alpha: expected a positive number"},
      {"\"plain\"", "\"best\"", "scaling: expected 'rslora', 'plain' or a positive number, got 'best'"},
      {"\"head_bias\": true", "\"head_bias\": 1", "head_bias: expected true or false, got 1"},
      {"\"output_scale\": 1.0", "\"output_scale\": 0", "output_scale: expected a positive number"},
      {"\"variant\": \"L\"", "\"variant\": \"X\"", "bad checkpoint: file: hypernetwork: variant: expected one of L, M,"},
      {"\"variant\": \"L\"", "\"variant\": \"autoregressive-rotary\"", "unsupported: file: hypernetwork: variant: the C++"},
      {"\"task_encoder\": \"linear\"", "\"task_encoder\": \"vq\"", "unsupported: file: hypernetwork: task_encoder: the C++"},
      {"\"task_encoder\": \"linear\"", "\"task_encoder\": \"x\"", "task_encoder: expected one of linear, got 'x'"},
      {"\"v_proj\"", "\"q_proj\"", "modules: expected distinct names, got 'q_proj' twice"},
      {"\"v_proj\"", "\"v-proj\"", "modules: expected plain module names such as 'q_proj', got 'v-proj'"},
      {"\"v_proj\"", "\"v\\udc00\"", "modules: expected plain module names such as 'q_proj', got 'v\\xef\\xbf\\xbd'"},
      {"\"v_proj\"", "\"c_attn\"", "paths: expected where module 'c_attn' lives in the base model"},
      {"\"v_proj\"", "\"v_proj\", \"k_proj\"", "in_features: expected 3 values, one a module, got 2"},
      {"\"paths\": null", "\"paths\": [\"a.{layer}.q\"]", "paths: expected 2, one a module, got 1"},
      {"\"paths\": null", "\"paths\": [\"a.{layer}.q\", \"a.{layer}.q\"]", "paths: expected different ones"},
      {"\"paths\": null", "\"paths\": [\"a.{layer}\", \"a.{layer}.q\"]", "paths: expected names of letters"},
      {"\"paths\": null", "\"paths\": [\"a..{layer}.q\", \"a.{layer}.q\"]", "paths: expected names of letters"},
      {"\"paths\": null", "\"paths\": [\"a.7.q\", \"a.{layer}.q\"]", "paths: expected names of letters"},
  };
  for (const auto& edit : broken) CHECK_REFUSED(edit.what, config(edited(sound, edit.from, edit.to)));
  CHECK_REFUSED("format: expected 't2l_engine.hypernetwork.v1', got a list of 0", config("[]"));
}

// A copy of the checkpoint, its header or its tensors edited, must be refused.
void test_checkpoint(const std::string& folder) {
  const std::string whole = read(folder + "/hypernet.safetensors");
  uint64_t length;
  std::memcpy(&length, whole.data(), sizeof length);
  const std::string header = whole.substr(8, length), data = whole.substr(8 + length);
  std::filesystem::create_directories("edited");
  std::ofstream("edited/config.json", std::ios::binary) << read(folder + "/config.json");
  const auto open = [&](const std::string& file, bool skip_checksum = true) {
    std::ofstream("edited/hypernet.safetensors", std::ios::binary) << file;
    return refusal([&] { t2l::lib::Checkpoint("edited", skip_checksum); });
  };
  const auto refused = [&](const char* what, const std::string& got) {
    CHECK_SAYS(got.find(what) != std::string::npos, std::string(what) + " | " + got.substr(0, 400));
  };
  CHECK(open(whole, false).empty());
  const std::string wrong_sum = edited(header, "sha256\":\"", "sha256\":\"0");
  refused("the content does not match its checksum", open(file_of(wrong_sum, data), false));
  CHECK(open(file_of(wrong_sum, data)).empty());
  // Names and shapes come before values, and those before the checksum.
  const std::string no_number(data.size(), '\xff');
  refused("'depth_emb.norm.bias': holds NaN or infinite values", open(file_of(wrong_sum, no_number), false));
  refused("missing keys: 'mixer.linear2.bias'; unexpected keys: 'mixer.linear2.bibs'",
          open(file_of(edited(wrong_sum, "mixer.linear2.bias", "mixer.linear2.bibs"), no_number), false));
  refused("unexpected keys: 'pos_emb.norm.weight'",
          open(file_of(edited(header, "{", "{" + entry("pos_emb.norm.weight", "F32", "[0]", "[0,0]") + ","), data)));
  CHECK(open(file_of(edited(header, "{", "{" + entry("reference.any", "F64", "[0]", "[0,0]") + ","), data)).empty());
  refused("'depth_emb.weight': expected shape [30, 32], got [32, 30]",
          open(file_of(edited(wrong_sum, "[30,32]", "[32,30]"), no_number), false));
  refused("unsupported: edited/hypernet.safetensors: 'heads.q_proj.weight': expected dtype F32 or BF16, got F16",
          open(file_of(edited(header, "BF16", "F16"), std::string(data.size(), '\0'))));
  {
    const std::string bytes(size_t{6144} * 112 * 4, '\0');
    const std::string wide = entry("heads.v_proj.weight", "F32", "[6144,112]", range(data, bytes).c_str());
    const std::string mixed = edited(header, "\"heads.v_proj.weight\"", wide + ",\"reference.other\"");
    refused(
        "unsupported: edited/hypernet.safetensors: 'heads.v_proj.weight': expected matrices of one dtype, got BF16 and F32",
        open(file_of(mixed, data + bytes)));
  }
  refused("'offsets.q_proj.std_A': expected shape [30, 8, 576], got [0]",
          open(file_of(edited(header, "{", "{" + entry("offsets.q_proj.std_A", "F32", "[0]", "[0,0]") + ","), data)));
  // Standard deviations are not negative; another offset may be, also that of a module called std_proj.
  const auto open_with_offset = [&](const std::string& heads, const std::string& key, bool negative) {
    std::string values(size_t{30} * 192 * 8 * 4, '\0');
    values.back() = '\x80';  // -0, which is 0
    if (negative) values[values.size() - 4] = 1;
    const std::string more = entry(key.c_str(), "F32", "[30,192,8]", range(data, values).c_str());
    return open(file_of(edited(heads, "{", "{" + more + ","), data + values));
  };
  CHECK(open_with_offset(header, "offsets.v_proj.std_B", false).empty());
  refused("'offsets.v_proj.std_B': expected standard deviations of 0 or more",
          open_with_offset(header, "offsets.v_proj.std_B", true));
  {
    const std::string paths = "\"paths\": [\"a.{layer}.q\", \"b.{layer}.v\"]";
    const std::string config = edited(read(folder + "/config.json"), "\"paths\": null", paths);
    std::ofstream("edited/config.json", std::ios::binary) << edited(config, "\"v_proj\"", "\"std_proj\"");
    const std::string renamed = edited(header, "heads.v_proj.weight", "heads.std_proj.weight");
    const std::string heads = edited(renamed, "heads.v_proj.bias", "heads.std_proj.bias");
    const std::string got = open_with_offset(heads, "offsets.std_proj.mean_B", true);
    CHECK_SAYS(got.empty(), got);
    refused("'offsets.std_proj.std_B': expected standard deviations of 0 or more",
            open_with_offset(heads, "offsets.std_proj.std_B", true));
  }
  refused("file not readable: nowhere/config.json: ", refusal([] { t2l::lib::Checkpoint("nowhere", true); }));
  std::filesystem::remove("edited/hypernet.safetensors");
  refused("file not readable: edited/hypernet.safetensors: ", refusal([] { t2l::lib::Checkpoint("edited", true); }));
  refused("expected 8 bytes and more, got 0", open(""));
  std::ofstream("edited/config.json", std::ios::binary) << std::string((1 << 20) + 1, ' ');
  refused("expected at most 1048576 bytes, got more", open(whole));
}

}  // namespace

int main(int argc, char** argv) {
  const std::string folder = argc > 1 ? argv[1] : "";
  test_json();
  test_safetensors();
  test_sha256();
  test_config(folder);
  test_checkpoint(folder);
  return result();
}
