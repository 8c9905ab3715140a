// Adapters from task embeddings, applied to a mixed batch in a decode-like loop, with the program's own threads.
//
//   t2l_example NETWORK TASK_EMB OUT [THREADS]
//
// NETWORK: the file of `t2l export <checkpoint> -o NETWORK`.  TASK_EMB: raw float32 [tasks, embed_dim].  OUT: a folder for
// raw float32 files: <module>.A [tasks, layers, rank, in] and <module>.B [tasks, layers, rank, out] of every module, and,
// one after the other for every step, layer and module, x [rows, in], base [rows, out] and y [rows, out].
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "pool.h"
#include "t2l/t2l.h"

namespace {

constexpr int64_t kSteps = 3, kRows = 5;

void check(t2l_status status, const t2l_error& error) {
  if (status != T2L_OK) throw std::runtime_error(std::string(t2l_status_name(status)) + ": " + error.message);
}

// The adapters of one module: slot 0 is empty, slot 1 + i holds those of task i.
struct Slots {
  std::string name;
  int64_t in, out;
  std::vector<float> lora_A;  // [slots, layers, rank, in]
  std::vector<float> lora_B;  // [slots, layers, rank, out]
};

std::vector<float> read_floats(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error(path + ": cannot be read");
  const std::string bytes((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  std::vector<float> values(bytes.size() / sizeof(float));
  std::copy_n(bytes.data(), values.size() * sizeof(float), reinterpret_cast<char*>(values.data()));
  return values;
}

void write_floats(std::ofstream& file, const float* values, int64_t count) {
  file.write(reinterpret_cast<const char*>(values), static_cast<std::streamsize>(count * sizeof(float)));
  if (!file) throw std::runtime_error("output: cannot be written");
}

void finish(std::ofstream& file) {
  file.close();  // writes what is still in its buffer: a full disk shows here at the latest
  if (!file) throw std::runtime_error("output: cannot be written");
}

// Stands for what a model computes.
void fill(std::vector<float>& values, uint64_t& state) {
  for (float& value : values) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    value = static_cast<float>(state >> 40) / 16777216.0f - 0.5f;
  }
}

std::vector<Slots> generate(const t2l_hypernet* net, const t2l_hypernet_info& info, const std::vector<float>& task_emb,
                            const t2l_parallel& parallel) {
  t2l_error error;
  const int64_t num_tasks = static_cast<int64_t>(task_emb.size()) / info.embed_dim;
  std::vector<Slots> slots;
  std::vector<t2l_adapter> outputs;
  for (int64_t m = 0; m < info.num_modules; ++m) {
    t2l_module_info module;
    check(t2l_hypernet_get_module(net, m, &module, &error), error);
    const int64_t size_A = info.num_layers * info.rank * module.in_features;
    const int64_t size_B = info.num_layers * info.rank * module.out_features;
    Slots slot{module.name, module.in_features, module.out_features, {}, {}};
    slot.lora_A.resize(static_cast<size_t>((1 + num_tasks) * size_A));
    slot.lora_B.resize(static_cast<size_t>((1 + num_tasks) * size_B));
    t2l_adapter output;  // written where the batch will read it: from slot 1 on
    check(t2l_adapter_init(net, m, slot.lora_A.data() + size_A, slot.lora_B.data() + size_B, T2L_F32, &output, &error),
          error);
    outputs.push_back(output);
    slots.push_back(std::move(slot));
  }
  check(t2l_hypernet_generate(net, task_emb.data(), num_tasks, outputs.data(), info.num_modules, &parallel, &error), error);
  return slots;
}

// y += the adapters of one module and layer, a row of the batch each its own.
void apply(const Slots& slots, const t2l_hypernet_info& info, int64_t layer, const std::vector<int32_t>& ids,
           const std::vector<int32_t>& ranks, const std::vector<float>& x, std::vector<float>& y,
           const t2l_parallel& parallel) {
  std::vector<int32_t> seg_indptr(ids.size() + 1);  // one token a row: a segment each
  for (size_t i = 0; i < seg_indptr.size(); ++i) seg_indptr[i] = static_cast<int32_t>(i);
  const std::vector<float> scaling(ranks.size(), info.scaling);
  t2l_lora lora = {};
  lora.y = y.data();
  lora.x = x.data();
  lora.lora_A = slots.lora_A.data() + layer * info.rank * slots.in;
  lora.lora_B = slots.lora_B.data() + layer * info.rank * slots.out;
  lora.scaling = scaling.data();
  lora.seg_indptr = seg_indptr.data();
  lora.seg_adapters = ids.data();
  lora.ranks = ranks.data();
  lora.num_tokens = lora.num_segments = static_cast<int64_t>(ids.size());
  lora.in_features = lora.x_stride = slots.in;
  lora.out_features = lora.y_stride = slots.out;
  lora.num_adapters = static_cast<int64_t>(ranks.size());
  lora.rank = info.rank;
  lora.A_stride[0] = info.num_layers * info.rank * slots.in;
  lora.A_stride[1] = slots.in;
  lora.B_stride[0] = info.num_layers * info.rank * slots.out;
  lora.B_stride[1] = 1;  // B lies as [rank, out]
  lora.B_stride[2] = slots.out;
  t2l_error error;
  check(t2l_lora_add(&lora, &parallel, &error), error);
}

void run(const std::string& network, const std::string& input, const std::string& out, int threads) {
  t2l_error error;
  t2l_hypernet* opened = nullptr;
  check(t2l_hypernet_open(network.c_str(), nullptr, &opened, &error), error);
  const std::unique_ptr<t2l_hypernet, decltype(&t2l_hypernet_close)> net(opened, t2l_hypernet_close);
  t2l_hypernet_info info;
  check(t2l_hypernet_get_info(net.get(), &info, &error), error);

  const std::vector<float> task_emb = read_floats(input);
  if (task_emb.empty() || static_cast<int64_t>(task_emb.size()) % info.embed_dim != 0)
    throw std::runtime_error(input + ": expected rows of " + std::to_string(info.embed_dim) + " float32 values");
  Pool pool(threads);
  const t2l_parallel parallel = pool.parallel();
  const std::vector<Slots> modules = generate(net.get(), info, task_emb, parallel);

  const int64_t num_slots = 1 + static_cast<int64_t>(task_emb.size()) / info.embed_dim;
  for (const Slots& slots : modules)
    for (const bool is_B : {false, true}) {
      std::ofstream file(out + "/" + slots.name + (is_B ? ".B" : ".A"), std::ios::binary);
      const std::vector<float>& values = is_B ? slots.lora_B : slots.lora_A;
      const int64_t all = static_cast<int64_t>(values.size()), one = all / num_slots;
      write_floats(file, values.data() + one, all - one);
      finish(file);
    }

  std::vector<int32_t> ranks(static_cast<size_t>(num_slots), static_cast<int32_t>(info.rank));
  ranks[0] = 0;  // the empty slot
  std::ofstream xs(out + "/x", std::ios::binary), bases(out + "/base", std::ios::binary), ys(out + "/y", std::ios::binary);
  uint64_t state = 1;
  for (int64_t step = 0; step < kSteps; ++step) {
    std::vector<int32_t> ids;  // -1: the base model
    for (int64_t row = 0; row < kRows; ++row) ids.push_back(static_cast<int32_t>((row + step) % (num_slots + 1) - 1));
    for (int64_t layer = 0; layer < info.num_layers; ++layer)
      for (const Slots& slots : modules) {
        std::vector<float> x(static_cast<size_t>(kRows * slots.in)), y(static_cast<size_t>(kRows * slots.out));
        fill(x, state);
        fill(y, state);  // the base linear's output
        write_floats(xs, x.data(), kRows * slots.in);
        write_floats(bases, y.data(), kRows * slots.out);
        apply(slots, info, layer, ids, ranks, x, y, parallel);
        write_floats(ys, y.data(), kRows * slots.out);
      }
  }
  for (std::ofstream* file : {&xs, &bases, &ys}) finish(*file);
  std::printf("variant %s, %s: %lld tasks, %lld layers, %lld modules, rank %lld; %lld steps of %lld rows\n", info.variant,
              t2l_isa_name(info.isa), static_cast<long long>(num_slots - 1), static_cast<long long>(info.num_layers),
              static_cast<long long>(info.num_modules), static_cast<long long>(info.rank), static_cast<long long>(kSteps),
              static_cast<long long>(kRows));
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4 && argc != 5) {
    std::fprintf(stderr, "usage: %s NETWORK TASK_EMB OUT [THREADS]\n", argv[0]);
    return 2;
  }
  try {
    run(argv[1], argv[2], argv[3], argc == 5 ? std::atoi(argv[4]) : 2);
    return 0;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
