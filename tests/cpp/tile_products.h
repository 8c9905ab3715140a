// One product of tiles, by the instructions of AMX and by plain C++ (csrc/cpu/tiles.h), which must agree to the last bit.
#pragma once
#include <cstdint>

template <class Tiles>
void multiply(const uint16_t* a, const uint16_t* b, float* c) {
  Tiles tiles;
  tiles.template load<0>(a, 64);
  tiles.template load_once<1>(b, 64);
  tiles.template load<2>(c, 64);
  tiles.template dot<2, 0, 1>();
  tiles.template store<2>(c, 64);
}

// c[16, 16] += a[16, 32] times b, where b[p, 2 j] and b[p, 2 j + 1] are features 2 p and 2 p + 1 of column j; contiguous.
void product_by_model(const uint16_t* a, const uint16_t* b, float* c);
// Only where t2l_has_isa(T2L_ISA_AMX).
void product_by_amx(const uint16_t* a, const uint16_t* b, float* c);
// Whether a configuration that this thread had before a product is there after it.
bool configuration_survives();
