// C API of t2l: LoRA adapters from a task embedding, and many adapters applied in one batch, on the CPU.  C99 and C++.
//
// Units: sizes and strides count elements, not bytes; strides may be of any layout that the text allows.  All arrays are the
// caller's, before, during and after a call; the library keeps no pointer to them.  Nothing is printed, no environment
// variable is read, there is no global state but this CPU's instruction sets, and no C++ exception leaves a function.
//
// Errors: a function that can fail returns a t2l_status and, where `error` is not NULL, writes a message of the form
// "function: argument: expected ..., got ..." (empty on success).  All arguments are checked before anything is written: on
// T2L_INVALID_ARGUMENT every output is as it was.  Only T2L_OUT_OF_MEMORY and T2L_INTERNAL can leave outputs part written.
//
// Threads: functions may be called at the same time from any threads, also on one handle, except t2l_hypernet_close, which
// must be the handle's last call.  Outputs of simultaneous calls must not overlap.  A thread must not be cancelled
// (pthread_cancel) inside a call.
#pragma once
#include <stdint.h>

#if defined(T2L_SHARED) && defined(__GNUC__)
#define T2L_API __attribute__((visibility("default")))
#else
#define T2L_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

// Of this header; it changes when a record or a function does.  The library's own is t2l_api_version().
#define T2L_API_VERSION 2
T2L_API int32_t t2l_api_version(void);

typedef enum t2l_status {
  T2L_OK = 0,
  T2L_INVALID_ARGUMENT = 1,  // the caller passed something that the text of the function excludes
  T2L_IO = 2,                // a file is absent or cannot be read
  T2L_BAD_CHECKPOINT = 3,    // a file can be read, and is damaged or not one that `t2l export` wrote
  T2L_UNSUPPORTED = 4,       // a file of another version of the format; an instruction set that the CPU lacks
  T2L_OUT_OF_MEMORY = 5,
  T2L_INTERNAL = 6  // the caller's t2l_parallel threw or left out a part; or a fault of the library
} t2l_status;

// "ok", "invalid argument", ...; "unknown status" for other values.
T2L_API const char* t2l_status_name(int32_t status);

// Zero-terminated; longer messages lose their middle.
typedef struct t2l_error {
  char message[512];
} t2l_error;

typedef enum t2l_dtype { T2L_F32 = 0, T2L_BF16 = 1 } t2l_dtype;

// Instruction sets; records hold them as int32_t.  All give the same numbers up to rounding; one of them gives the same
// bits at every call, with any number of threads.
typedef enum t2l_isa {
  T2L_ISA_BEST = 0,  // the fastest one of this CPU
  T2L_ISA_GENERIC = 1,
  T2L_ISA_AVX2 = 2,
  T2L_ISA_AVX512 = 3,
  T2L_ISA_AVX512_BF16 = 4,
  T2L_ISA_AMX = 5,
  T2L_ISA_AMX_MODEL = 6,  // the kernels of amx in plain C++: for tests
  T2L_ISA_NEON = 7,
  T2L_ISA_NEON_BF16 = 8,
  T2L_ISA_AVX512_BF16_WIDE = 9  // avx512_bf16 with the hypernetwork's weights widened to float32
} t2l_isa;

// The fastest instruction set of this CPU; never T2L_ISA_BEST.  The first call of any function that takes or tells
// T2L_ISA_BEST or T2L_ISA_AMX asks the system for the matrix tiles of AMX, which Linux grants to a process as a whole and
// for good, and where they are not to be had times dot products of bfloat16, 0.2 ms.
T2L_API int32_t t2l_detected_isa(void);
// 1: this CPU has it and this process may use it (always so for T2L_ISA_BEST); 0: not, or another value.
T2L_API int32_t t2l_has_isa(int32_t isa);
// "generic", "avx2", ..., the names in lower case; for T2L_ISA_BEST the name of the one it stands for; NULL
// for other values.
T2L_API const char* t2l_isa_name(int32_t isa);

// The caller's threads.  run(pool, count, grain, body, context) must call body(begin, end, context) for ranges that cover
// [0, count) once, on whichever threads it likes, and return when all of them are done; ranges shorter than `grain` are not
// worth a thread.  It may throw, but only where no body runs or will run any more: bodies use the stack of the call.  The
// library never calls it inside itself, but two simultaneous calls of the library do so at the same time.  NULL in place of
// a t2l_parallel: the calling thread does everything.
typedef void (*t2l_range_body)(int64_t begin, int64_t end, void* context);
typedef struct t2l_parallel {
  void (*run)(void* pool, int64_t count, int64_t grain, t2l_range_body body, void* context);
  void* pool;
} t2l_parallel;

// ---- hypernetwork --------------------------------------------------------------------------------------------------------

typedef struct t2l_hypernet t2l_hypernet;

// All zero, or NULL in its place: the defaults.
typedef struct t2l_open_options {
  int32_t isa;            // t2l_isa of the handle
  int32_t skip_checksum;  // 0: the CRC-32 of the file is computed and compared with the one it states
} t2l_open_options;

// Opens a file that `t2l export` wrote (UTF-8 path).  Magic, version and length are checked first, then every byte is read
// once for the checksum, and once, with the sizes, to refuse NaN and infinite values.  Weights stay mapped from the file
// and nothing is copied: it must not change while it is opened or the handle is open.  Where it is cut short, the process
// ends with SIGBUS, as with any mapped file: replace it by writing another file and renaming it, as `t2l export` does; on a
// network file system, where the old one may vanish, by a file of another name.  Names of modules are ASCII letters, digits
// and underscores.  On failure *out is NULL.  Errors: T2L_IO, T2L_BAD_CHECKPOINT (names the file and the field),
// T2L_UNSUPPORTED, T2L_INVALID_ARGUMENT, T2L_OUT_OF_MEMORY.
T2L_API t2l_status t2l_hypernet_open(const char* path, const t2l_open_options* options, t2l_hypernet** out,
                                     t2l_error* error);

// NULL is allowed.
T2L_API void t2l_hypernet_close(t2l_hypernet* net);

// Texts belong to the handle and live as long as it does.
typedef struct t2l_hypernet_info {
  const char* variant;  // "L", "M", "S-learnable", "S-rotary"
  int64_t embed_dim;    // width of a task embedding
  int64_t num_layers, rank, num_modules;
  float scaling;          // the LoRA scaling that the adapters are made for: y += scaling * B (A x)
  int32_t weights_dtype;  // t2l_dtype of the weight matrices
  int32_t isa;            // t2l_isa in use; never T2L_ISA_BEST
} t2l_hypernet_info;
T2L_API t2l_status t2l_hypernet_get_info(const t2l_hypernet* net, t2l_hypernet_info* info, t2l_error* error);

typedef struct t2l_module_info {
  const char* name;  // "q_proj"
  const char* path;  // "model.layers.{layer}.self_attn.q_proj": where the base model keeps it
  int64_t in_features, out_features;
} t2l_module_info;
// Modules in the order of the file, `module` in [0, num_modules).
T2L_API t2l_status t2l_hypernet_get_module(const t2l_hypernet* net, int64_t module, t2l_module_info* info, t2l_error* error);

// Where the adapters of one module go.  Element (task, layer, k, column) of A [tasks, layers, rank, in_features] lies at
// lora_A + task * A_stride[0] + layer * A_stride[1] + k * A_stride[2] + column * A_stride[3], and so for B, whose columns
// are its out_features: B_stride {..., out, 1} stores B as [rank, out], {..., 1, rank} as [out, rank].  Of dimensions of
// more than one entry strides are positive, each reaches over all that those with smaller strides span (so no two elements
// share a place), and together they reach over at most 2^60 elements.  Pointers are aligned to the dtype; they may be NULL
// where there is no element.
typedef struct t2l_adapter {
  void* lora_A;
  void* lora_B;
  int64_t A_stride[4];
  int64_t B_stride[4];  // task, layer, rank, out: in another order than that of t2l_lora
  int32_t dtype;        // t2l_dtype of A and B
  float scale_B;        // B is multiplied with it: 1, or the scaling to fold that into B; finite and not 0
} t2l_adapter;

// Fills `adapter` for module `module`: A contiguous as [tasks, layers, rank, in], B as [tasks, layers, rank, out],
// scale_B 1.
T2L_API t2l_status t2l_adapter_init(const t2l_hypernet* net, int64_t module, void* lora_A, void* lora_B, int32_t dtype,
                                    t2l_adapter* adapter, t2l_error* error);

// Adapters of `task_emb` [num_tasks, embed_dim], contiguous float32, as the checkpoint's text encoder gives them.
// `outputs`: one record a module, num_outputs = num_modules of them, which must not overlap one another.  num_tasks may
// be 0.  Adapters are unscaled but for scale_B, summed in float32 and rounded once to their dtype.  NaN or infinite values
// in the embedding of a task are not refused: they spoil the adapters of that task, and no other.
T2L_API t2l_status t2l_hypernet_generate(const t2l_hypernet* net, const float* task_emb, int64_t num_tasks,
                                         const t2l_adapter* outputs, int64_t num_outputs, const t2l_parallel* parallel,
                                         t2l_error* error);

// ---- batched LoRA --------------------------------------------------------------------------------------------------------

// y[t] += scaling[a] * B[a] (A[a] x[t]) for every token t, where a is the adapter of the segment of t.  Segment s holds
// tokens [seg_indptr[s], seg_indptr[s + 1]) and uses adapter seg_adapters[s]; of adapter -1 (the base model) y keeps its
// bits. Rows of x, of y and of A are contiguous; other strides are positive where their dimension has more than one entry,
// and those of x and y reach over a row.  No array may reach over more than 2^60 elements.  Sizes are below 2^31,
// and rank is at most 65,536.  Neither y and the inputs nor the rows of y may overlap.  Arrays may be NULL where they have
// no element; seg_indptr always has one.
typedef struct t2l_lora {
  void* y;                      // [num_tokens, out_features], dtype x_dtype
  const void* x;                // [num_tokens, in_features]
  const void* lora_A;           // [num_adapters, rank, in_features], dtype w_dtype
  const void* lora_B;           // [num_adapters, out_features, rank], any order in memory
  const float* scaling;         // [num_adapters]
  const int32_t* seg_indptr;    // [num_segments + 1]: 0 first, rising, num_tokens last
  const int32_t* seg_adapters;  // [num_segments], in [-1, num_adapters)
  const int32_t* ranks;         // [num_adapters], in [0, rank], or NULL: all `rank`; memory beyond a rank is not read
  int64_t num_tokens, in_features, out_features, num_adapters, rank, num_segments;
  int64_t x_stride, y_stride;
  int64_t A_stride[2];  // adapter, rank
  int64_t B_stride[3];  // adapter, out, rank: in another order than that of t2l_adapter
  int32_t x_dtype;      // t2l_dtype of x and y
  int32_t w_dtype;      // t2l_dtype of A and B
  int32_t isa;          // t2l_isa
} t2l_lora;

// Sums are float32; each element of y is rounded once.  Errors: T2L_INVALID_ARGUMENT, T2L_UNSUPPORTED (isa),
// T2L_OUT_OF_MEMORY.  A token's result does not depend on the other tokens.
T2L_API t2l_status t2l_lora_add(const t2l_lora* lora, const t2l_parallel* parallel, t2l_error* error);

#ifdef __cplusplus
}  // extern "C"
#endif
