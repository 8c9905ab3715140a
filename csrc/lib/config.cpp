#include "config.h"

#include <algorithm>
#include <cmath>
#include <set>

#include "error.h"

namespace t2l::lib {
namespace {

constexpr char kFormat[] = "t2l_engine.hypernetwork.v1";
constexpr size_t kMaxModules = 64, kMaxName = 64, kMaxPath = 256;
constexpr int64_t kMaxSize = int64_t{1} << 31, kMaxRank = int64_t{1} << 16, kMaxLayers = 4096;
constexpr double kMinNumber = 1e-9, kMaxNumber = 1e9;
constexpr char kLayer[] = "{layer}";

bool one_of(const std::string& text, std::initializer_list<const char*> words) {
  return std::any_of(words.begin(), words.end(), [&](const char* word) { return text == word; });
}

// The fields of one JSON object; every failure names the field.
class Fields {
 public:
  Fields(const Json& object, const std::string& where, std::initializer_list<const char*> known)
      : object_(object), where_(where) {
    if (object.object() == nullptr) bad("expected an object, got " + shown(object));
    for (const Member& member : *object.object())
      if (!one_of(member.key, known)) bad("unknown field " + quoted(member.key));
  }

  [[noreturn]] void bad(const std::string& what) const { throw Error(T2L_BAD_CHECKPOINT, where_ + ": " + what); }
  [[noreturn]] void bad(const std::string& name, const std::string& expected, const std::string& got) const {
    bad(name + ": expected " + expected + ", got " + got);
  }
  [[noreturn]] void unsupported(const char* name, const std::string& expected, const std::string& got) const {
    throw Error(T2L_UNSUPPORTED, where_ + ": " + name + ": the C++ library computes " + expected + ", not " + quoted(got));
  }

  const Json* find(const char* name) const { return object_.find(name); }
  const Json& at(const char* name) const {
    const Json* value = find(name);
    if (value == nullptr) bad("missing field '" + std::string(name) + "'");
    return *value;
  }
  const JsonArray& list(const char* name) const {
    const Json& value = at(name);
    if (value.array() == nullptr || value.array()->empty() || value.array()->size() > kMaxModules)
      bad(name, "a list of 1 to " + std::to_string(kMaxModules) + " entries", shown(value));
    return *value.array();
  }
  int64_t size(const char* name, const Json& value) const {
    if (value.integer() == nullptr || *value.integer() < 1 || *value.integer() >= kMaxSize)
      bad(name, "a positive integer below 2^31", shown(value));
    return *value.integer();
  }
  int64_t size(const char* name) const { return size(name, at(name)); }
  double positive(const char* name, const Json& value) const {
    double number = 0;
    if (!value.number(&number) || !(number >= kMinNumber && number <= kMaxNumber))
      bad(name, "a positive number in [1e-09, 1e+09]", shown(value));
    return number;
  }
  // One of two lists of words: what is computed here, and what only the Python package computes.
  std::string choice(const char* name, const Json& value, std::initializer_list<const char*> here,
                     std::initializer_list<const char*> elsewhere) const {
    std::string words;
    for (const char* word : here) words += (words.empty() ? "" : ", ") + std::string(word);
    if (value.string() == nullptr) bad(name, "one of " + words, shown(value));
    if (one_of(*value.string(), elsewhere)) unsupported(name, words, *value.string());
    if (!one_of(*value.string(), here)) bad(name, "one of " + words, shown(value));
    return *value.string();
  }

 private:
  const Json& object_;
  const std::string where_;
};

void check_blocks(const Json& json, const std::string& where) {
  const Json* format = json.find("format");
  if (format == nullptr || format->string() == nullptr || *format->string() != kFormat)
    throw Error(T2L_BAD_CHECKPOINT, where + ": format: expected '" + kFormat + "', got " +
                                        (format          ? shown(*format)
                                         : json.object() ? "none"
                                                         : shown(json)));
  const Fields blocks(json, where, {"format", "hypernetwork", "encoder", "base_model", "training", "reference"});
  blocks.at("hypernetwork");
  for (const char* name : {"encoder", "training", "reference"}) {
    const Json* block = blocks.find(name);
    const bool may_be_null = name[0] == 'e';
    if (block && block->object() == nullptr && !(may_be_null && block->is_null()))
      blocks.bad(name, "an object", shown(*block));
  }
  const Json* model = blocks.find("base_model");
  if (model && model->string() == nullptr && !model->is_null()) blocks.bad("base_model", "text", shown(*model));
}

bool plain(char c) { return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '_'; }
bool decimal(char c) { return c >= '0' && c <= '9'; }

// As Python's identifiers, but that every character beyond ASCII counts, except what stands for half a surrogate pair.
bool identifier(const std::string& name) {
  size_t characters = 0;
  for (const char c : name) {
    const unsigned char byte = static_cast<unsigned char>(c);
    if (byte < 0x80 && !plain(c)) return false;
    characters += (byte & 0xc0) != 0x80;
  }
  return characters > 0 && characters <= kMaxName && !decimal(name[0]) && name.find("\xef\xbf\xbd") == std::string::npos;
}

// Names joined by dots, {layer} at most once and never last.
bool sound_path(const std::string& path, bool needs_layer) {
  if (path.size() > kMaxPath) return false;
  int layers = 0;
  for (size_t start = 0; start <= path.size();) {
    const size_t end = std::min(path.find('.', start), path.size());
    const std::string part = path.substr(start, end - start);
    const bool last = end == path.size();
    if (part == kLayer) {
      if (++layers > 1 || last) return false;
    } else if (part.empty() || std::all_of(part.begin(), part.end(), decimal) ||
               !std::all_of(part.begin(), part.end(), [](char c) { return plain(c) || c == '-'; })) {
      return false;
    }
    start = end + 1;
  }
  return layers == 1 || !needs_layer;
}

// Where Llama and its kin keep a module; empty for other names.
std::string default_path(const std::string& name) {
  const std::string layer = std::string("model.layers.") + kLayer;
  if (one_of(name, {"q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj"})) return layer + ".self_attn." + name;
  if (one_of(name, {"gate_proj", "up_proj", "down_proj", "gate_up_proj"})) return layer + ".mlp." + name;
  return "";
}

void read_paths(const Fields& fields, HyperNetConfig& config) {
  const Json* paths = fields.find("paths");
  if (paths == nullptr || paths->is_null()) {
    for (Module& module : config.modules) {
      module.path = default_path(module.name);
      if (module.path.empty())
        fields.bad("paths", "where module " + quoted(module.name) + " lives in the base model", "none");
    }
    return;
  }
  const JsonArray& list = fields.list("paths");
  std::set<std::string> seen;
  if (list.size() != config.modules.size())
    fields.bad("paths", std::to_string(config.modules.size()) + ", one a module", std::to_string(list.size()));
  for (size_t i = 0; i < list.size(); ++i) {
    if (list[i].string() == nullptr || !sound_path(*list[i].string(), config.num_layers != 1))
      fields.bad("paths", "names of letters, digits, '_' and '-' joined by dots, {layer} once and not last", shown(list[i]));
    config.modules[i].path = *list[i].string();
    if (!seen.insert(config.modules[i].path).second) fields.bad("paths", "different ones", shown(list[i]) + " twice");
  }
}

void read_modules(const Fields& fields, HyperNetConfig& config) {
  std::set<std::string> seen;
  for (const Json& item : fields.list("modules")) {
    if (item.string() == nullptr || !identifier(*item.string()))
      fields.bad("modules", "plain module names such as 'q_proj'", shown(item));
    if (!seen.insert(*item.string()).second) fields.bad("modules", "distinct names", shown(item) + " twice");
    config.modules.push_back({*item.string(), "", 0, 0});
  }
  for (const char* name : {"in_features", "out_features"}) {
    const JsonArray& sizes = fields.list(name);
    if (sizes.size() != config.modules.size())
      fields.bad(name, std::to_string(config.modules.size()) + " values, one a module", std::to_string(sizes.size()));
    for (size_t i = 0; i < sizes.size(); ++i)
      (name[0] == 'i' ? config.modules[i].in_features : config.modules[i].out_features) = fields.size(name, sizes[i]);
  }
}

double read_scaling(const Fields& fields, int64_t rank) {
  const double alpha = fields.positive("lora_alpha", fields.at("lora_alpha"));
  const Json* scaling = fields.find("scaling");
  if (scaling == nullptr || (scaling->string() && *scaling->string() == "rslora"))
    return alpha / std::sqrt(static_cast<double>(rank));
  if (scaling->string() && *scaling->string() == "plain") return alpha / static_cast<double>(rank);
  if (scaling->string()) fields.bad("scaling", "'rslora', 'plain' or a positive number", shown(*scaling));
  return fields.positive("scaling", *scaling);
}

}  // namespace

int64_t HyperNetConfig::head_rows(const Module& module) const {
  const int64_t per_latent = rank / num_ranks();
  const int64_t wider = std::max(module.in_features, module.out_features);
  return per_latent * (num_sides() == 2 ? wider : module.in_features + module.out_features);
}

HyperNetConfig read_config(const Json& json, const std::string& where) {
  check_blocks(json, where);
  const Fields fields(*json.find("hypernetwork"), where + ": hypernetwork",
                      {"variant", "modules", "in_features", "out_features", "num_layers", "rank", "embed_dim", "latent_size",
                       "head_in_size", "lora_alpha", "scaling", "head_bias", "output_scale", "task_encoder", "paths"});
  HyperNetConfig config;
  config.variant = fields.choice("variant", fields.at("variant"), {"L", "M", "S-learnable", "S-rotary"},
                                 {"autoregressive-learnable", "autoregressive-rotary"});
  if (const Json* encoder = fields.find("task_encoder"))
    fields.choice("task_encoder", *encoder, {"linear"}, {"vq", "softmax", "discrete"});
  config.num_layers = fields.size("num_layers");
  config.rank = fields.size("rank");
  config.embed_dim = fields.size("embed_dim");
  config.latent_size = fields.size("latent_size");
  config.head_in_size = fields.size("head_in_size");
  if (config.rank > kMaxRank) fields.bad("rank", "at most " + std::to_string(kMaxRank), std::to_string(config.rank));
  if (config.num_layers > kMaxLayers)  // every module takes a table of as many rows when a checkpoint is opened
    fields.bad("num_layers", "at most " + std::to_string(kMaxLayers), std::to_string(config.num_layers));
  if (config.latent_size < 4) fields.bad("latent_size", "at least 4", std::to_string(config.latent_size));
  if (config.rotary() && config.width() % 2)
    fields.bad("latent_size", "an even trunk width for S-rotary", "width " + std::to_string(config.width()));
  read_modules(fields, config);
  read_paths(fields, config);
  config.scaling = read_scaling(fields, config.rank);
  if (const Json* scale = fields.find("output_scale")) config.output_scale = fields.positive("output_scale", *scale);
  if (const Json* bias = fields.find("head_bias")) {
    if (bias->boolean() == nullptr) fields.bad("head_bias", "true or false", shown(*bias));
    config.head_bias = *bias->boolean();
  }
  return config;
}

}  // namespace t2l::lib
