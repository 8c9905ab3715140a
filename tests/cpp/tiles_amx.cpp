#include <cstring>

#include "tile_products.h"

#if defined(__x86_64__)
#define T2L_ISA_LEVEL 3
#define T2L_TILES 1
#include "tiles.h"

void product_by_amx(const uint16_t* a, const uint16_t* b, float* c) { multiply<t2l::amx::Tiles>(a, b, c); }

bool configuration_survives() {
  struct {
    uint8_t bytes[64];
  } none{}, theirs{}, after{}, end{};
  theirs.bytes[0] = 1;    // palette
  theirs.bytes[16] = 32;  // bytes of a row of tile 0
  theirs.bytes[48] = 5;   // its rows
  uint16_t operand[512] = {};
  float c[256] = {};
  asm volatile("ldtilecfg %0" : : "m"(theirs));
  product_by_amx(operand, operand, c);
  asm volatile("sttilecfg %0" : "=m"(after));
  asm volatile("ldtilecfg %0" : : "m"(none));
  product_by_amx(operand, operand, c);
  asm volatile("sttilecfg %0" : "=m"(end));
  return std::memcmp(&theirs, &after, 64) == 0 && std::memcmp(&none, &end, 64) == 0;
}

T2L_POP_TARGET
#else
void product_by_amx(const uint16_t*, const uint16_t*, float*) {}
bool configuration_survives() { return true; }
#endif
