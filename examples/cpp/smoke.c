/* The C API from C99: versions, an error, and one product. */
#include <stdio.h>
#include <string.h>

#include "t2l/t2l.h"

static int expect(int truth, const char* what) {
  if (!truth) fprintf(stderr, "not so: %s\n", what);
  return truth ? 0 : 1;
}

static int open_fails(void) {
  t2l_error error;
  t2l_hypernet* net;
  const t2l_status status = t2l_hypernet_open("no such file", NULL, &net, &error);
  if (status != T2L_OK) printf("%s: %s\n", t2l_status_name(status), error.message);
  return expect(status == T2L_IO && net == NULL, "a file that is not there is T2L_IO") +
         expect(strstr(error.message, "no such file") != NULL, "the message names the file");
}

/* One token, one adapter of rank 1: y = 1 + 2 * 5 * (3 * 4). */
static int one_product(void) {
  const float x = 4.0f, a = 3.0f, b = 5.0f, scaling = 2.0f;
  const int32_t seg_indptr[] = {0, 1}, seg_adapters[] = {0};
  float y = 1.0f;
  t2l_error error;
  t2l_lora lora;
  memset(&lora, 0, sizeof lora);
  lora.y = &y;
  lora.x = &x;
  lora.lora_A = &a;
  lora.lora_B = &b;
  lora.scaling = &scaling;
  lora.seg_indptr = seg_indptr;
  lora.seg_adapters = seg_adapters;
  lora.num_tokens = lora.in_features = lora.out_features = lora.num_adapters = lora.rank = lora.num_segments = 1;
  if (t2l_lora_add(&lora, NULL, &error) != T2L_OK) return expect(0, error.message);
  return expect(y == 121.0f, "y is 121");
}

int main(void) {
  int wrong = expect(t2l_api_version() == T2L_API_VERSION, "header and library are of one version");
  wrong += expect(t2l_isa_name(t2l_detected_isa()) != NULL, "the instruction set has a name");
  wrong += open_fails() + one_product();
  t2l_hypernet_close(NULL);
  return wrong ? 1 : 0;
}
