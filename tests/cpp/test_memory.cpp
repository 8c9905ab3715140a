// Every allocation may fail: whichever one does, by itself or with all that follow, also on a thread of the caller's pool,
// the call ends with T2L_OUT_OF_MEMORY, and the next one works.
#include <atomic>
#include <cstddef>
#include <cstdlib>
#include <new>

#include "check.h"
#include "pool.h"

namespace {

constexpr int64_t kNever = INT64_MAX;
std::atomic<int64_t> allocations_left{kNever};
std::atomic<bool> only_one{false}, failed{false};

// Once the countdown has run out one fails, or all do.
void* allocate(std::size_t size, std::size_t alignment) {
  if (allocations_left != kNever) {
    const int64_t left = allocations_left.fetch_sub(1);
    if (left == 0 || (left < 0 && !only_one)) {
      failed = true;
      throw std::bad_alloc();
    }
  }
  void* memory = nullptr;
  if (posix_memalign(&memory, alignment < sizeof(void*) ? sizeof(void*) : alignment, size ? size : 1) != 0)
    throw std::bad_alloc();
  return memory;
}

}  // namespace

void* operator new(std::size_t size) { return allocate(size, alignof(std::max_align_t)); }
void* operator new[](std::size_t size) { return allocate(size, alignof(std::max_align_t)); }
void* operator new(std::size_t size, std::align_val_t alignment) {
  return allocate(size, static_cast<std::size_t>(alignment));
}
void* operator new[](std::size_t size, std::align_val_t alignment) {
  return allocate(size, static_cast<std::size_t>(alignment));
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete[](void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }
void operator delete[](void* memory, std::size_t) noexcept { std::free(memory); }
void operator delete(void* memory, std::align_val_t) noexcept { std::free(memory); }
void operator delete[](void* memory, std::align_val_t) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t, std::align_val_t) noexcept { std::free(memory); }
void operator delete[](void* memory, std::size_t, std::align_val_t) noexcept { std::free(memory); }

namespace {

// `call` with one allocation, or all of them, failing after the first n, for n from 0 on in growing steps, until it needs no
// more than n.
template <class F>
void starve(const std::string& what, bool one, const F& call) {
  int64_t tries = 0;
  only_one = one;
  for (int64_t n = 0;; n += 1 + n / 16) {
    t2l_error error;
    failed = false;
    allocations_left = n;
    const t2l_status status = call(&error);
    allocations_left = kNever;
    if (!failed) {
      CHECK_SAYS(status == T2L_OK, error.message);
      break;
    }
    ++tries;
    CHECK_SAYS(status == T2L_OUT_OF_MEMORY && std::strstr(error.message, "out of memory"),
               what + (one ? ", only allocation " : ", from allocation ") + std::to_string(n) + ": " + error.message);
  }
  CHECK_SAYS(tries > 0, what);
}

template <class F>
void starve(const std::string& what, const F& call) {
  for (const bool one : {false, true}) starve(what, one, call);
}

}  // namespace

int main(int argc, char** argv) {
  const char* path = argc > 1 ? argv[1] : "";
  const t2l_open_options options{T2L_ISA_BEST, 1};
  starve("open", [&](t2l_error* error) {
    t2l_hypernet* net = nullptr;
    const t2l_status status = t2l_hypernet_open(path, &options, &net, error);
    const bool consistent = (net != nullptr) == (status == T2L_OK);
    t2l_hypernet_close(net);
    return consistent ? status : T2L_INTERNAL;
  });

  const Net net = open_net(path);
  const t2l_hypernet_info info = info_of(net);
  Pool pool(3);
  const t2l_parallel parallel = pool.parallel();
  const std::vector<float> task_emb = Random(1).numbers(info.embed_dim);
  const Adapters made = adapters_for(net, 1);
  for (const t2l_parallel* threads : {static_cast<const t2l_parallel*>(nullptr), &parallel})
    starve(threads ? "generate on a pool" : "generate", [&](t2l_error* error) {
      return t2l_hypernet_generate(net.get(), task_emb.data(), 1, made.outputs.data(), info.num_modules, threads, error);
    });

  // More tokens, and with [out, rank] storage a larger rank, than a kernel has on its stack: it allocates on the thread that
  // calls, and in every range that the pool runs.
  const int64_t tokens = 300, in = 96, out = 576, rank = 32;
  const std::vector<float> x = Random(2).numbers(tokens * in);
  const std::vector<float> lora_A = Random(3).numbers(rank * in), lora_B = Random(4).numbers(out * rank);
  std::vector<float> y(static_cast<size_t>(tokens * out));
  const float scaling = 2;
  const int32_t indptr[] = {0, static_cast<int32_t>(tokens)}, ids[] = {0};
  t2l_lora lora{};
  lora.y = y.data(), lora.x = x.data(), lora.lora_A = lora_A.data(), lora.lora_B = lora_B.data();
  lora.scaling = &scaling, lora.seg_indptr = indptr, lora.seg_adapters = ids;
  lora.num_tokens = tokens, lora.in_features = in, lora.out_features = out, lora.rank = rank;
  lora.num_adapters = lora.num_segments = 1, lora.x_stride = in, lora.y_stride = out;
  lora.A_stride[0] = rank * in, lora.A_stride[1] = in;
  lora.B_stride[0] = out * rank, lora.B_stride[1] = rank, lora.B_stride[2] = 1;
  lora.x_dtype = lora.w_dtype = T2L_F32, lora.isa = T2L_ISA_BEST;
  for (const t2l_parallel* threads : {static_cast<const t2l_parallel*>(nullptr), &parallel})
    starve(threads ? "lora on a pool" : "lora", [&](t2l_error* error) { return t2l_lora_add(&lora, threads, error); });
  return result();
}
