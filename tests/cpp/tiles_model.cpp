#define T2L_ISA_LEVEL 0
#define T2L_TILES 2
#include "tile_products.h"
#include "tiles.h"

void product_by_model(const uint16_t* a, const uint16_t* b, float* c) {
  t2l::amx_model::Tiles tiles;
  tiles.load<0>(a, 64);
  tiles.load<1>(b, 64);
  tiles.load<2>(c, 64);
  tiles.dot<2, 0, 1>();
  tiles.store<2>(c, 64);
}
