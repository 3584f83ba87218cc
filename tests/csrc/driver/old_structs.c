/* A program with the structs of version 0.1 of the header, for test_engine_weights.py. Some of them lack
 * later fields, and no readable memory follows any of them. The program must run with every later version of
 * the library.
 *
 *   old_structs FILE < NUMBERS
 *
 * FILE: parameter file of a model. NUMBERS: the values of qvl_config from `stages` on.
 *
 * Prints 8 greedy tokens after the prompt 1 2 3 4 5, with vectors of ones as features at positions 1 and 2.
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

typedef struct {
  uint32_t size, stages;
  int32_t device, device_index, n_threads, isa, max_tokens;
  int32_t hidden, layers, heads, head_dim, mlp_width, vocab;
  float norm_epsilon;
  int32_t seq_length, max_positions;
  float rotary_base;
  int32_t dynamic_ntk, logn;
  int32_t image_size, patch_size, vision_width, vision_layers, vision_heads, vision_mlp_width, n_queries;
} config_0_1;

typedef struct {
  int32_t n_new, n_past, prompt_len, n_blocks;
  const int32_t* blocks;
} sequence_0_1;

typedef struct {
  int32_t start, count;
  const float* features;
} span_0_1;

typedef struct {
  uint32_t size;
  int32_t n_sequences;
  const sequence_0_1* sequences;
  const int32_t* tokens;
  int32_t n_spans, reserved;
  const span_0_1* spans;
} batch_0_1;

typedef struct {
  uint32_t size;
  float temperature, top_p;
  int32_t top_k;
  float repetition_penalty, frequency_penalty, presence_penalty;
  int32_t n_forbidden;
  const int32_t* forbidden;
  uint64_t seed, counter;
} sampling_0_1;

/* Declarations of the library's functions: a handle is a void*, a qvl_error an array of char. */
int32_t qvl_weights_open(const char* path, void** weights, char* error);
void qvl_weights_free(void* weights);
int32_t qvl_engine_create(const config_0_1* config, void* weights, void** engine, char* error);
void qvl_engine_free(void* engine);
int32_t qvl_kv_pool_create(void* engine, int32_t n, int32_t tokens, int32_t dtype, void** pool, char* error);
void qvl_kv_pool_free(void* pool);
int32_t qvl_forward(void* engine, void* pool, const batch_0_1* batch, float* logits, void* stream,
                    char* error);
int32_t qvl_sample(void* engine, int32_t n, const float* logits, const sampling_0_1* sampling, uint32_t size,
                   int32_t* const* counts, int32_t* tokens, void* stream, char* error);
void qvl_sampling_init(sampling_0_1* sampling);

static char error[512];

/* Exit with the error message unless a call has succeeded. */
static void require_ok(int32_t status) {
  if (status == 0) return;
  fprintf(stderr, "%s\n", error);
  exit(1);
}

/* Allocate memory at the end of a page; an access to the next page faults. */
static void* at_page_end(size_t bytes) {
  char* pages = mmap(NULL, 8192, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (pages == MAP_FAILED || bytes > 4096 || mprotect(pages + 4096, 4096, PROT_NONE) != 0) exit(2);
  return pages + 4096 - bytes;
}

int main(int n, char** arguments) {
  config_0_1* config = at_page_end(sizeof *config);
  config->size = sizeof *config;
  for (size_t i = 1; i < sizeof *config / 4; ++i) {
    double value;
    if (scanf("%lf", &value) != 1) return 2;
    const float real = (float)value;
    const int32_t integer = (int32_t)value;
    char* field = (char*)config + 4 * i;
    const int is_real = field == (char*)&config->norm_epsilon || field == (char*)&config->rotary_base;
    memcpy(field, is_real ? (const void*)&real : (const void*)&integer, 4);
  }
  void *weights, *engine, *pool;
  require_ok(n == 2 ? qvl_weights_open(arguments[1], &weights, error) : 1);
  require_ok(qvl_engine_create(config, weights, &engine, error));
  qvl_weights_free(weights);
  require_ok(qvl_kv_pool_create(engine, 2, 32, 0, &pool, error));
  int32_t tokens[5] = {1, 2, 3, 4, 5};
  const int32_t blocks[2] = {1, 0};
  float* ones = malloc((size_t)config->hidden * 2 * sizeof(float));
  for (int32_t i = 0; i < 2 * config->hidden; ++i) ones[i] = 1;
  float* logits = malloc((size_t)config->vocab * sizeof(float));
  sequence_0_1* sequence = at_page_end(sizeof *sequence);
  span_0_1* span = at_page_end(sizeof *span);
  batch_0_1* batch = at_page_end(sizeof *batch);
  sampling_0_1* sampling = at_page_end(sizeof *sampling);
  *sequence = (sequence_0_1){5, 0, 5, 2, blocks};
  *span = (span_0_1){1, 2, ones};
  *batch = (batch_0_1){sizeof *batch, 1, sequence, tokens, 1, 0, span};
  sampling->size = sizeof *sampling;
  qvl_sampling_init(sampling);
  for (int i = 0; i < 8; ++i) {
    require_ok(qvl_forward(engine, pool, batch, logits, NULL, error));
    require_ok(qvl_sample(engine, 1, logits, sampling, sizeof *sampling, NULL, tokens, NULL, error));
    printf("%d ", tokens[0]);
    *sequence = (sequence_0_1){1, 5 + i, 5, 2, blocks};
    batch->n_spans = 0;
  }
  qvl_kv_pool_free(pool);
  qvl_engine_free(engine);
  free(ones);
  free(logits);
  return 0;
}
