// Digest of the sources a library was built from, as a string that can be found without loading it (cmake/source_digest.py).
#include "t2l_sources.h"

extern "C" __attribute__((visibility("default"))) const char t2l_sources[] = "t2l_sources:" T2L_SOURCES;
