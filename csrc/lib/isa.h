// Instruction sets by their numbers in the C API, which begin with that of the best one.
#pragma once
#include "t2l/kernels.h"
#include "t2l/t2l.h"

namespace t2l::lib {

constexpr int32_t public_isa(Isa isa) { return static_cast<int32_t>(isa) + T2L_ISA_GENERIC; }
// Of a number from T2L_ISA_GENERIC to the last.
constexpr Isa kernel_isa(int32_t isa) { return static_cast<Isa>(isa - T2L_ISA_GENERIC); }
constexpr bool is_isa(int32_t isa) { return isa >= T2L_ISA_BEST && isa <= kNumIsas; }

static_assert(public_isa(Isa::generic) == T2L_ISA_GENERIC && public_isa(Isa::avx2) == T2L_ISA_AVX2 &&
              public_isa(Isa::avx512) == T2L_ISA_AVX512 && public_isa(Isa::avx512_bf16) == T2L_ISA_AVX512_BF16 &&
              public_isa(Isa::amx) == T2L_ISA_AMX && public_isa(Isa::amx_model) == T2L_ISA_AMX_MODEL &&
              public_isa(Isa::neon) == T2L_ISA_NEON && public_isa(Isa::neon_bf16) == T2L_ISA_NEON_BF16 &&
              public_isa(Isa::avx512_bf16_wide) == T2L_ISA_AVX512_BF16_WIDE && kNumIsas == T2L_ISA_AVX512_BF16_WIDE);

}  // namespace t2l::lib
