// The C boundary: nothing is thrown across it.
#include <cstdio>
#include <cstring>
#include <exception>
#include <new>
#include <stdexcept>

#include "error.h"
#include "hypernet.h"
#include "isa.h"
#include "lora.h"

struct t2l_hypernet {
  t2l::lib::HyperNet net;
};

namespace {

using t2l::lib::Error;
using t2l::lib::invalid;
using t2l::lib::is_isa;
using t2l::lib::kernel_isa;
using t2l::lib::Module;
using t2l::lib::public_isa;

// A message that is too long loses its middle, in whole characters: paths stand at its start, and the reason at its end.
t2l_status report(t2l_error* error, t2l_status status, const char* function, const char* message) noexcept {
  constexpr size_t kHead = 150, kTail = 250;
  if (error == nullptr) return status;
  const size_t length = std::strlen(message);
  if (length <= kHead + kTail) {
    std::snprintf(error->message, sizeof error->message, "%s: %s", function, message);
    return status;
  }
  const auto continues = [](char c) { return (c & 0xC0) == 0x80; };  // a character of UTF-8
  size_t head = kHead;
  while (head > 0 && continues(message[head])) --head;
  const char* tail = message + length - kTail;
  while (continues(*tail)) ++tail;
  std::snprintf(error->message, sizeof error->message, "%s: %.*s ... %s", function, static_cast<int>(head), message, tail);
  return status;
}

template <class F>
t2l_status guarded(const char* function, t2l_error* error, const F& body) noexcept {
  if (error != nullptr) error->message[0] = '\0';
  try {
    body();
    return T2L_OK;
  } catch (const Error& e) {
    return report(error, e.status, function, e.what());
  } catch (const std::bad_alloc&) {
    return report(error, T2L_OUT_OF_MEMORY, function, "out of memory");
  } catch (const std::length_error&) {  // what a container says of a size that no memory holds
    return report(error, T2L_OUT_OF_MEMORY, function, "out of memory");
  } catch (const std::exception& e) {
    return report(error, T2L_INTERNAL, function, e.what());
  } catch (...) {
    return report(error, T2L_INTERNAL, function, "an exception that is no std::exception");
  }
}

template <class T>
T& given(const char* argument, T* pointer) {
  if (pointer == nullptr) invalid(argument, "an address", "NULL");
  return *pointer;
}

const Module& module_of(const t2l_hypernet& net, int64_t index) {
  const int64_t count = net.net.header().num_modules;
  if (index < 0 || index >= count)
    invalid("module", "an index in [0, " + std::to_string(count) + ")", std::to_string(index));
  return net.net.modules()[index];
}

}  // namespace

int32_t t2l_api_version(void) { return T2L_API_VERSION; }

const char* t2l_status_name(int32_t status) {
  static constexpr const char* kNames[] = {"ok",          "invalid argument", "file not readable", "bad checkpoint",
                                           "unsupported", "out of memory",    "internal error"};
  return status >= T2L_OK && status <= T2L_INTERNAL ? kNames[status] : "unknown status";
}

int32_t t2l_detected_isa(void) { return public_isa(t2l::detected_isa()); }

int32_t t2l_has_isa(int32_t isa) { return is_isa(isa) && (isa == T2L_ISA_BEST || t2l::has_isa(kernel_isa(isa))); }

const char* t2l_isa_name(int32_t isa) {
  if (!is_isa(isa)) return nullptr;
  return t2l::isa_name(isa == T2L_ISA_BEST ? t2l::detected_isa() : kernel_isa(isa));
}

t2l_status t2l_hypernet_open(const char* path, const t2l_open_options* options, t2l_hypernet** out, t2l_error* error) {
  if (out != nullptr) *out = nullptr;
  return guarded("t2l_hypernet_open", error, [&] {
    given("out", out);
    given("path", path);
    const t2l_open_options chosen = options ? *options : t2l_open_options{};
    *out = new t2l_hypernet{{path, t2l::lib::isa_of(chosen.isa), chosen.skip_checksum != 0}};
  });
}

void t2l_hypernet_close(t2l_hypernet* net) { delete net; }

t2l_status t2l_hypernet_get_info(const t2l_hypernet* net, t2l_hypernet_info* info, t2l_error* error) {
  return guarded("t2l_hypernet_get_info", error, [&] {
    const auto& handle = given("net", net).net;
    const auto& h = handle.header();
    given("info", info) = {h.variant,
                           h.embed_dim,
                           h.num_layers,
                           h.rank,
                           h.num_modules,
                           static_cast<float>(h.scaling),
                           handle.weights_type() == t2l::DType::bf16 ? T2L_BF16 : T2L_F32,
                           public_isa(handle.isa())};
  });
}

t2l_status t2l_hypernet_get_module(const t2l_hypernet* net, int64_t module, t2l_module_info* info, t2l_error* error) {
  return guarded("t2l_hypernet_get_module", error, [&] {
    const Module& found = module_of(given("net", net), module);
    given("info", info) = {found.name, found.path, found.in_features, found.out_features};
  });
}

t2l_status t2l_adapter_init(const t2l_hypernet* net, int64_t module, void* lora_A, void* lora_B, int32_t dtype,
                            t2l_adapter* adapter, t2l_error* error) {
  return guarded("t2l_adapter_init", error, [&] {
    const Module& found = module_of(given("net", net), module);
    t2l::lib::type_of("dtype", dtype);
    const int64_t rank = net->net.header().rank, layers = net->net.header().num_layers;
    const int64_t in = found.in_features, out = found.out_features;
    given("adapter", adapter) = {
        lora_A, lora_B, {layers * rank * in, rank * in, in, 1}, {layers * rank * out, rank * out, out, 1}, dtype, 1.0f};
  });
}

t2l_status t2l_hypernet_generate(const t2l_hypernet* net, const float* task_emb, int64_t num_tasks,
                                 const t2l_adapter* outputs, int64_t num_outputs, const t2l_parallel* parallel,
                                 t2l_error* error) {
  return guarded("t2l_hypernet_generate", error,
                 [&] { given("net", net).net.generate(task_emb, num_tasks, outputs, num_outputs, parallel); });
}

t2l_status t2l_lora_add(const t2l_lora* lora, const t2l_parallel* parallel, t2l_error* error) {
  return guarded("t2l_lora_add", error, [&] { t2l::lib::lora_add(given("lora", lora), parallel); });
}
