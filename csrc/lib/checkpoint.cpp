#include "checkpoint.h"

#include <unistd.h>

#include <cstring>

#include "error.h"

namespace t2l::lib {
namespace {

constexpr char kUnused[] = "reference.";
constexpr size_t kMaxConfig = size_t{1} << 20;

using Shape = std::vector<int64_t>;

std::string joined(const std::string& folder, const char* name) {
  return folder + (folder.empty() || folder.back() == '/' ? "" : "/") + name;
}

bool exists(const std::string& path) { return ::access(path.c_str(), F_OK) == 0; }

HyperNetConfig open_config(const std::string& folder) {
  const std::string config = joined(folder, "config.json");
  const bool whole = exists(config) && exists(joined(folder, "hypernet.safetensors"));
  if (!whole && exists(joined(folder, "hypermod.pt")))
    throw Error(T2L_UNSUPPORTED, folder + ": a checkpoint in the reference's form; convert it first: t2l convert");
  return read_config(parse_json(read_file(config, kMaxConfig), config), config);
}

struct Wanted {
  Shape shape;
  bool matrix;
};

void add_linear(std::map<std::string, Wanted>& keys, const std::string& name, int64_t out, int64_t in, bool bias = true) {
  keys[name + ".weight"] = {{out, in}, true};
  if (bias) keys[name + ".bias"] = {{out}, false};
}

void add_norm(std::map<std::string, Wanted>& keys, const std::string& name, int64_t width) {
  keys[name + ".norm.weight"] = {{width}, false};
  keys[name + ".norm.bias"] = {{width}, false};
}

void add_embedding(std::map<std::string, Wanted>& keys, const std::string& name, Shape shape) {
  add_norm(keys, name, shape.back());
  keys[name + ".weight"] = {std::move(shape), false};
}

// The parameters of t2l_engine.HyperNetwork, by name.
std::map<std::string, Wanted> wanted_keys(const HyperNetConfig& c) {
  std::map<std::string, Wanted> keys;
  const int64_t m = c.width(), count = static_cast<int64_t>(c.modules.size());
  add_linear(keys, "task_encoder.linear", c.task_width(), c.embed_dim);
  add_norm(keys, "task_encoder", c.task_width());
  add_embedding(keys, "depth_emb", {c.num_layers, c.part_width()});
  add_embedding(keys, "module_emb", {count, c.part_width()});
  for (const std::string block : {"mixer", "mlp1", "mlp2", "mlp3"}) {
    if (block != "mixer") add_norm(keys, block, m);
    add_linear(keys, block + ".linear1", 4 * m, m);
    add_linear(keys, block + ".linear2", block == "mlp3" ? c.head_in_size : m, 4 * m);
  }
  if (c.num_sides() == 2) add_embedding(keys, "side_emb", {count, 2, m});
  if (c.learnable()) add_embedding(keys, "pos_emb", {c.rank, m});
  for (const Module& module : c.modules)
    add_linear(keys, "heads." + module.name, c.head_rows(module), c.head_in_size, c.head_bias);
  return keys;
}

std::map<std::string, Wanted> optional_keys(const HyperNetConfig& c) {
  std::map<std::string, Wanted> keys;
  for (const Module& module : c.modules)
    for (const std::string name : kOffsetNames) {
      const std::string prefix = "offsets." + module.name + "." + name;
      keys[prefix + "_A"] = {{c.num_layers, c.rank, module.in_features}, false};
      keys[prefix + "_B"] = {{c.num_layers, module.out_features, c.rank}, false};
    }
  return keys;
}

std::string text(const Shape& shape) {
  std::string out = "[";
  for (size_t i = 0; i < shape.size() && i < 8; ++i) out += (i ? ", " : "") + std::to_string(shape[i]);
  return out + (shape.size() > 8 ? ", ...]" : "]");
}

// "none", or the first few and how many more.
std::string listed(const std::vector<std::string>& keys) {
  constexpr size_t kShown = 3;
  std::string out;
  for (size_t i = 0; i < keys.size() && i < kShown; ++i) out += (i ? ", " : "") + quoted(keys[i]);
  if (keys.size() > kShown) out += " and " + std::to_string(keys.size() - kShown) + " more";
  return keys.empty() ? "none" : out;
}

void check_shape(const std::string& where, const std::string& key, const Tensor& tensor, const Shape& wanted) {
  if (tensor.shape != wanted)
    throw Error(T2L_BAD_CHECKPOINT,
                where + ": " + quoted(key) + ": expected shape " + text(wanted) + ", got " + text(tensor.shape));
}

void check_type(const std::string& where, const std::string& key, const Tensor& tensor) {
  if (tensor.type != FileType::f32 && tensor.type != FileType::bf16)
    throw Error(T2L_UNSUPPORTED, where + ": " + quoted(key) + ": expected dtype F32 or BF16, got " + type_name(tensor.type));
}

// Of an offset: "offsets.<module>.std_A" or "..._B", whatever the module is called.
bool holds_deviations(const std::string& key) { return key.compare(key.rfind('.') + 1, 4, "std_") == 0; }

bool any_negative(const Tensor& tensor) {
  const size_t size = type_size(tensor.type);
  for (int64_t i = 0; i < tensor.count(); ++i) {
    const unsigned char* value = tensor.data + static_cast<size_t>(i) * size;
    bool zero = (value[size - 1] & 0x7f) == 0;
    for (size_t b = 0; b + 1 < size; ++b) zero = zero && value[b] == 0;
    if ((value[size - 1] & 0x80) != 0 && !zero) return true;  // -0 is 0
  }
  return false;
}

}  // namespace

Checkpoint::Checkpoint(const std::string& folder, bool skip_checksum) : config(open_config(folder)) {
  const std::string where = joined(folder, "hypernet.safetensors");
  file_ = MappedFile(where);
  contents_ = parse_safetensors(file_.data(), file_.size(), where);
  // From the header alone to every byte: a file of another network is refused at once.
  check_keys(where);
  check_types(where);
  check_finite(contents_, where);
  check_deviations(where);
  if (!skip_checksum) check_checksum(contents_, where);
}

const Tensor* Checkpoint::find(const std::string& key) const {
  const auto found = contents_.tensors.find(key);
  return found == contents_.tensors.end() ? nullptr : &found->second;
}

void Checkpoint::check_keys(const std::string& where) {
  const std::map<std::string, Wanted> wanted = wanted_keys(config), optional = optional_keys(config);
  std::vector<std::string> missing, extra;
  for (const auto& [key, unused] : wanted)
    if (find(key) == nullptr) missing.push_back(key);
  for (const auto& [key, unused] : contents_.tensors)
    if (!wanted.count(key) && !optional.count(key) && key.rfind(kUnused, 0) != 0) extra.push_back(key);
  if (!missing.empty() || !extra.empty())
    throw Error(T2L_BAD_CHECKPOINT, where + ": missing keys: " + listed(missing) + "; unexpected keys: " + listed(extra));
  for (const auto* rules : {&wanted, &optional})
    for (const auto& [key, rule] : *rules)
      if (const Tensor* tensor = find(key)) check_shape(where, key, *tensor, rule.shape);
}

// What the Python package reads and this library does not; of a checkpoint that is sound so far.
void Checkpoint::check_types(const std::string& where) {
  const FileType type = at("mixer.linear1.weight").type;
  const std::map<std::string, Wanted> wanted = wanted_keys(config);
  for (const auto& [key, tensor] : contents_.tensors)
    if (key.rfind(kUnused, 0) != 0) check_type(where, key, tensor);
  for (const auto& [key, rule] : wanted)
    if (rule.matrix && at(key).type != type)
      throw Error(T2L_UNSUPPORTED, where + ": " + quoted(key) + ": expected matrices of one dtype, got " + type_name(type) +
                                       " and " + type_name(at(key).type));
  matrix_type_ = type == FileType::bf16 ? DType::bf16 : DType::f32;
}

void Checkpoint::check_deviations(const std::string& where) const {
  for (const auto& [key, unused] : optional_keys(config)) {
    const Tensor* tensor = find(key);
    if (tensor != nullptr && holds_deviations(key) && any_negative(*tensor))
      throw Error(T2L_BAD_CHECKPOINT, where + ": " + quoted(key) + ": expected standard deviations of 0 or more");
  }
}

}  // namespace t2l::lib
