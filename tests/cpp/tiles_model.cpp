#define T2L_ISA_LEVEL 0
#define T2L_TILES 2
#include "tile_products.h"
#include "tiles.h"

void product_by_model(const uint16_t* a, const uint16_t* b, float* c) { multiply<t2l::amx_model::Tiles>(a, b, c); }
