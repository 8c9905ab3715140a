// The C API on a checkpoint: what it says of it, bits of generated adapters in every layout and on any threads, errors.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <stdexcept>
#include <thread>

#include "check.h"
#include "pool.h"
#include "t2l/kernels.h"

namespace {

using Floats = std::vector<float>;

bool operator==(const Adapters& one, const Adapters& other) {
  const auto same = [](const std::vector<Floats>& a, const std::vector<Floats>& b) {
    return std::equal(a.begin(), a.end(), b.begin(), b.end(), [](const Floats& x, const Floats& y) {
      return x.size() == y.size() && std::memcmp(x.data(), y.data(), x.size() * sizeof(float)) == 0;
    });
  };
  return same(one.A, other.A) && same(one.B, other.B);
}

Adapters generate(const Net& net, const Floats& task_emb, const t2l_parallel* parallel = nullptr) {
  const int64_t tasks = static_cast<int64_t>(task_emb.size()) / info_of(net).embed_dim;
  Adapters made = adapters_for(net, tasks);
  CHECK_OK(t2l_hypernet_generate(net.get(), task_emb.data(), tasks, made.outputs.data(),
                                 static_cast<int64_t>(made.outputs.size()), parallel, &error));
  return made;
}

void test_names() {
  CHECK(t2l_api_version() == T2L_API_VERSION);
  CHECK(std::string(t2l_status_name(T2L_BAD_CHECKPOINT)) == "bad checkpoint");
  CHECK(std::string(t2l_status_name(99)) == "unknown status");
  CHECK(std::string(t2l_isa_name(T2L_ISA_GENERIC)) == "generic" && std::string(t2l_isa_name(T2L_ISA_AVX2)) == "avx2");
  CHECK(std::string(t2l_isa_name(T2L_ISA_BEST)) == t2l_isa_name(t2l_detected_isa()));
  CHECK(t2l_isa_name(-1) == nullptr && std::string(t2l_isa_name(T2L_ISA_NEON_BF16)) == "neon_bf16");
  CHECK(std::string(t2l_isa_name(T2L_ISA_AVX512_BF16_WIDE)) == "avx512_bf16_wide");
  CHECK(t2l_isa_name(T2L_ISA_AVX512_BF16_WIDE + 1) == nullptr);
  CHECK(t2l_has_isa(T2L_ISA_GENERIC) && t2l_has_isa(T2L_ISA_AMX_MODEL) && t2l_has_isa(t2l_detected_isa()));
  CHECK(!t2l_has_isa(-1) && !t2l_has_isa(T2L_ISA_AVX512_BF16_WIDE + 1));
}

// T2L_ISA, which kernels.h reads and the C API does not: an instruction set of this CPU, or an error.
void test_environment() {
  const auto choose = [](const char* value, t2l::Isa* isa) {
    ::setenv("T2L_ISA", value, 1);
    const char* message = t2l::chosen_isa(isa);
    ::unsetenv("T2L_ISA");
    return std::string(message ? message : "");
  };
  t2l::Isa isa{};
  for (int32_t i = T2L_ISA_GENERIC; t2l_isa_name(i) != nullptr; ++i) {
    const t2l::Isa wanted = static_cast<t2l::Isa>(i - T2L_ISA_GENERIC);
    const bool has = t2l_has_isa(i) != 0;
    const std::string message = choose(t2l_isa_name(i), &isa);
    CHECK_SAYS(has ? message.empty() && isa == wanted : message.find("process or build lacks") != std::string::npos,
               message);
    CHECK(t2l::has_isa(wanted) == has);
  }
  CHECK(choose("", &isa).empty() && isa == t2l::detected_isa());
  CHECK(choose("mmx", &isa).find("T2L_ISA: expected generic, ") == 0);
}

void test_info(const Net& net) {
  const t2l_hypernet_info info = info_of(net);
  CHECK(std::string(info.variant) == "L" && info.embed_dim == 384 && info.num_layers == 30 && info.rank == 8);
  CHECK(info.num_modules == 2 && info.scaling == 2.0f && info.weights_dtype == T2L_BF16);
  CHECK(info.isa == t2l_detected_isa());
  const std::vector<t2l_module_info> modules = modules_of(net);
  CHECK(std::string(modules[0].name) == "q_proj" && modules[0].in_features == 576 && modules[0].out_features == 576);
  CHECK(std::string(modules[1].path) == "model.layers.{layer}.self_attn.v_proj" && modules[1].out_features == 192);
  t2l_hypernet_info other;
  t2l_module_info module;
  CHECK_FAILS(T2L_INVALID_ARGUMENT, "net: expected an address", t2l_hypernet_get_info(nullptr, &other, &error));
  CHECK_FAILS(T2L_INVALID_ARGUMENT, "info: expected an address", t2l_hypernet_get_info(net.get(), nullptr, &error));
  CHECK_FAILS(T2L_INVALID_ARGUMENT, "module: expected an index in [0, 2), got 2",
              t2l_hypernet_get_module(net.get(), 2, &module, &error));
  CHECK_FAILS(T2L_INVALID_ARGUMENT, "got -1", t2l_hypernet_get_module(net.get(), -1, &module, &error));
}

void test_open_errors(const std::string& path) {
  t2l_hypernet* net = reinterpret_cast<t2l_hypernet*>(&failures);
  CHECK_FAILS(T2L_INVALID_ARGUMENT, "t2l_hypernet_open: path: expected an address, got NULL",
              t2l_hypernet_open(nullptr, nullptr, &net, &error));
  CHECK(net == nullptr);
  CHECK_FAILS(T2L_INVALID_ARGUMENT, "out: expected an address", t2l_hypernet_open("", nullptr, nullptr, &error));
  CHECK_FAILS(T2L_IO, "nowhere: No such file", t2l_hypernet_open("nowhere", nullptr, &net, &error));
  const std::string deep(3000, 'x');
  CHECK_FAILS(T2L_IO, "File name too long", t2l_hypernet_open(deep.c_str(), nullptr, &net, &error));
  CHECK(t2l_hypernet_open("nowhere", nullptr, &net, nullptr) == T2L_IO);
  t2l_open_options options{T2L_ISA_AVX512_BF16_WIDE + 1, 0};
  CHECK_FAILS(T2L_INVALID_ARGUMENT, "isa: expected a t2l_isa, got 10",
              t2l_hypernet_open(path.c_str(), &options, &net, &error));
  t2l_hypernet_close(nullptr);
}

// But for roundings to bfloat16 (2^-8) that differ here and there.
bool near(const Floats& values, const Floats& expected) {
  double error = 0, size = 0;
  for (size_t i = 0; i < values.size(); ++i) {
    error += std::pow(values[i] - expected[i], 2);
    size += std::pow(expected[i], 2);
  }
  return error <= size * std::ldexp(1, -14);
}

// The same bits: again, on threads, in one call or in several; close: from another isa.
void test_bits(const std::string& path, const Net& net, const Floats& task_emb) {
  const Adapters expected = generate(net, task_emb);
  for (const Floats& values : expected.A) CHECK(std::all_of(values.begin(), values.end(), [](float v) { return v == v; }));
  for (const Floats& values : expected.B) CHECK(std::all_of(values.begin(), values.end(), [](float v) { return v == v; }));
  Pool pool(3);
  const t2l_parallel parallel = pool.parallel();
  CHECK(generate(net, task_emb, &parallel) == expected);

  const size_t e = static_cast<size_t>(info_of(net).embed_dim);
  const Adapters second = generate(net, Floats(task_emb.begin() + e, task_emb.begin() + 2 * e));
  for (size_t m = 0; m < expected.A.size(); ++m)
    CHECK(std::equal(second.A[m].begin(), second.A[m].end(), expected.A[m].begin() + second.A[m].size()));

  for (const int32_t isa : isas()) {
    const Net other = open_net(path, isa);
    CHECK(info_of(other).isa == isa);
    const Adapters result = generate(other, task_emb);
    for (size_t m = 0; m < expected.A.size(); ++m) {
      CHECK(near(result.A[m], expected.A[m]));
      CHECK(near(result.B[m], expected.B[m]));
    }
  }
}

// [out, rank] storage in slots of a larger buffer, bfloat16, and a scaling in B: the same numbers elsewhere.
void test_layouts(const Net& net, const Floats& task_emb) {
  const t2l_hypernet_info info = info_of(net);
  const int64_t tasks = static_cast<int64_t>(task_emb.size()) / info.embed_dim, n = info.num_layers, r = info.rank;
  const Adapters plain = generate(net, task_emb);
  std::vector<t2l_adapter> outputs;
  std::vector<std::vector<uint16_t>> A, B;
  for (const t2l_module_info& module : modules_of(net)) {
    const int64_t in = module.in_features, out = module.out_features;
    A.emplace_back(static_cast<size_t>(tasks * n * (r * in + 5)), 0xffff);
    B.emplace_back(static_cast<size_t>(n * tasks * out * r), 0xffff);
    outputs.push_back({A.back().data(),
                       B.back().data(),
                       {n * (r * in + 5), r * in + 5, in, 1},
                       {out * r, tasks * out * r, 1, r},
                       T2L_BF16,
                       0.5f});
  }
  CHECK_OK(t2l_hypernet_generate(net.get(), task_emb.data(), tasks, outputs.data(), info.num_modules, nullptr, &error));
  const std::vector<t2l_module_info> modules = modules_of(net);
  for (size_t m = 0; m < modules.size(); ++m) {
    const int64_t in = modules[m].in_features, out = modules[m].out_features;
    for (int64_t task = 0; task < tasks; ++task)
      for (int64_t layer = 0; layer < n; ++layer) {
        const int64_t first = task * n + layer;
        for (int64_t i = 0; i < r * in + 5; ++i)
          CHECK(A[m][first * (r * in + 5) + i] == (i < r * in ? to_bf16(plain.A[m][first * r * in + i]) : 0xffff));
        for (int64_t k = 0; k < r; ++k)
          for (int64_t o = 0; o < out; ++o)
            CHECK(B[m][(layer * tasks + task) * out * r + o * r + k] ==
                  to_bf16(0.5f * plain.B[m][(first * r + k) * out + o]));
      }
  }
}

void test_generate_errors(const Net& net, const Floats& task_emb) {
  Adapters made = adapters_for(net, 1);
  std::vector<t2l_adapter>& outputs = made.outputs;
  const auto refused = [&](const char* text, const auto& change) {
    const std::vector<t2l_adapter> sound = outputs;
    change(outputs[1]);
    CHECK_FAILS(T2L_INVALID_ARGUMENT, text,
                t2l_hypernet_generate(net.get(), task_emb.data(), 1, outputs.data(), 2, nullptr, &error));
    outputs = sound;
  };
  refused("outputs[1].lora_A: expected memory, got NULL", [](t2l_adapter& o) { o.lora_A = nullptr; });
  refused("outputs[1].lora_B: expected an address aligned to its dtype",
          [](t2l_adapter& o) { o.lora_B = static_cast<char*>(o.lora_B) + 1; });
  refused("outputs[1].dtype: expected T2L_F32 or T2L_BF16, got 7", [](t2l_adapter& o) { o.dtype = 7; });
  refused("outputs[1].scale_B: expected a finite number other than 0", [](t2l_adapter& o) { o.scale_B = 0; });
  refused("outputs[1].scale_B: expected", [](t2l_adapter& o) { o.scale_B = std::nanf(""); });
  refused("outputs[1].A_stride: expected positive strides, got -1 at 3", [](t2l_adapter& o) { o.A_stride[3] = -1; });
  refused("outputs[1].A_stride: expected strides of which none falls", [](t2l_adapter& o) { o.A_stride[2] = 575; });
  refused("outputs[1].B_stride: expected strides within the address space",
          [](t2l_adapter& o) { o.B_stride[1] = int64_t{1} << 61; });
  const t2l_adapter* records = outputs.data();
  const float* emb = task_emb.data();
  const auto fails = [&](t2l_status status, const char* text, const float* emb, int64_t tasks, const t2l_adapter* records,
                         int64_t count, const t2l_parallel* parallel = nullptr) {
    CHECK_FAILS(status, text, t2l_hypernet_generate(net.get(), emb, tasks, records, count, parallel, &error));
  };
  fails(T2L_INVALID_ARGUMENT, "num_tasks: expected 0 or more, got -1", emb, -1, records, 2);
  fails(T2L_INVALID_ARGUMENT, "num_outputs: expected 2, one a module, got 1", emb, 1, records, 1);
  fails(T2L_INVALID_ARGUMENT, "task_emb: expected memory, got NULL", nullptr, 1, records, 2);
  fails(T2L_INVALID_ARGUMENT, "outputs: expected one record a module, got NULL", emb, 1, nullptr, 2);
  CHECK_FAILS(T2L_INVALID_ARGUMENT, "net: expected an address",
              t2l_hypernet_generate(nullptr, emb, 1, records, 2, nullptr, &error));
  const t2l_parallel no_run{nullptr, nullptr};
  fails(T2L_INVALID_ARGUMENT, "parallel: expected a function in run, got NULL", emb, 1, records, 2, &no_run);
  CHECK_OK(t2l_hypernet_generate(net.get(), nullptr, 0, records, 2, nullptr, &error));
  for (const auto* all : {&made.A, &made.B})
    for (const Floats& values : *all)
      CHECK(std::all_of(values.begin(), values.end(), [](float v) { return v != v; }));  // all NaN: nothing was written
  t2l_adapter adapter;
  CHECK_FAILS(T2L_INVALID_ARGUMENT, "module: expected an index",
              t2l_adapter_init(net.get(), 5, nullptr, nullptr, T2L_F32, &adapter, &error));
  CHECK_FAILS(T2L_INVALID_ARGUMENT, "dtype: expected T2L_F32 or T2L_BF16, got 7",
              t2l_adapter_init(net.get(), 0, nullptr, nullptr, 7, &adapter, &error));

  // Pools that break their promise.
  const t2l_parallel lazy{
      [](void*, int64_t count, int64_t, t2l_range_body body, void* context) { body(0, count - 1, context); }, nullptr};
  fails(T2L_INTERNAL, "parallel: expected run to cover", emb, 1, records, 2, &lazy);
  const t2l_parallel twice{[](void*, int64_t count, int64_t, t2l_range_body body, void* context) {
                             if (count % 2) return body(0, count, context);
                             for (int i = 0; i < 2; ++i) body(0, count / 2, context);
                           },
                           nullptr};
  fails(T2L_INTERNAL, "parallel: expected run to cover", emb, 1, records, 2, &twice);
  const t2l_parallel wild{
      [](void*, int64_t count, int64_t, t2l_range_body body, void* context) { body(-1, count + 9, context); }, nullptr};
  fails(T2L_INTERNAL, "got ranges of 0 in all", emb, 1, records, 2, &wild);
  const t2l_parallel throwing{[](void*, int64_t, int64_t, t2l_range_body, void*) { throw std::runtime_error("no threads"); },
                              nullptr};
  fails(T2L_INTERNAL, "no threads", emb, 1, records, 2, &throwing);
}

// Eight threads on one handle: half of them by themselves, half through one pool.
void test_threads(const Net& net, const Floats& task_emb) {
  const Floats one(task_emb.begin(), task_emb.begin() + info_of(net).embed_dim);
  const Adapters expected = generate(net, one);
  Pool pool(2);
  const t2l_parallel parallel = pool.parallel();
  std::vector<Adapters> results;
  for (int i = 0; i < 8; ++i) results.push_back(adapters_for(net, 1));
  std::vector<t2l_status> statuses(results.size(), T2L_INTERNAL);
  std::vector<std::thread> threads;
  for (size_t i = 0; i < results.size(); ++i)
    threads.emplace_back([&, i] {
      t2l_error error;
      statuses[i] =
          t2l_hypernet_generate(net.get(), one.data(), 1, results[i].outputs.data(), 2, i % 2 ? &parallel : nullptr, &error);
    });
  for (std::thread& thread : threads) thread.join();
  for (size_t i = 0; i < results.size(); ++i) CHECK(statuses[i] == T2L_OK && results[i] == expected);
}

}  // namespace

int main(int argc, char** argv) {
  const std::string path = argc > 1 ? argv[1] : "";
  test_names();
  test_environment();
  test_open_errors(path);
  const Net net = open_net(path, T2L_ISA_BEST, false);
  if (net == nullptr) return result();
  const Floats task_emb = Random(1).numbers(2 * info_of(net).embed_dim);
  test_info(net);
  test_bits(path, net, task_emb);
  test_layouts(net, task_emb);
  test_generate_errors(net, task_emb);
  test_threads(net, task_emb);
  return result();
}
