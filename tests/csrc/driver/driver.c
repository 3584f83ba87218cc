/* A C program that calls the library as an application does, built without and with sanitizers by
 * tests/csrc/test_driver.py.
 *
 *   driver all            a small random model for every ISA and storage type, from memory (images,
 *                         completions, steps, blocks, events) and from a file (images, completions)
 *   driver threads        several engines at the same time, and several threads on each engine
 *   driver fuzz N SEED    N calls, most of them with a corrupted argument
 *   driver limits         an engine with more threads, and a pool with more blocks, than 1 GiB of address
 *                         space has room for
 *   driver soak N         N requests; fails if the process grows by 256 KiB or more after the first tenth
 *
 * Prints one line and returns 0, or prints the failed check and returns 1. Returns 2 for other arguments.
 */
#include <math.h>
#include <pthread.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

#include "qwenvl.h"

#define CHECK(condition)                                              \
  do {                                                                \
    if (!(condition)) {                                               \
      fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition); \
      exit(1);                                                        \
    }                                                                 \
  } while (0)

#define SUCCEED(call)                                                                \
  do {                                                                               \
    qvl_error error_;                                                                \
    if ((call) != QVL_OK) {                                                          \
      fprintf(stderr, "%s:%d: %s: %s\n", __FILE__, __LINE__, #call, error_.message); \
      exit(1);                                                                       \
    }                                                                                \
  } while (0)
#define ERROR &error_ /* last argument of a call within SUCCEED */

/* Random integer of 31 bits from a linear congruential generator. */
static uint64_t next(uint64_t* state) {
  *state = *state * 6364136223846793005u + 1442695040888963407u;
  return *state >> 33;
}

/* Random number from -1 to 1. */
static float uniform(uint64_t* state) {
  return (float)next(state) / 1073741824.0f - 1;
}

/* ---- a small model ------------------------------------------------------------------------------------ */

enum {
  HIDDEN = 128,
  LAYERS = 2,
  MLP = 100,
  VOCAB = 53,
  WIDTH = 48, /* vision_width */
  VISION_MLP = 70,
  PATCHES = 4,
  QUERIES = 5
};
enum { MAX_TENSORS = 128, MAX_POSITIONS = 512 };

typedef struct {
  qvl_config config;
  qvl_tensor tensors[MAX_TENSORS];
  char names[MAX_TENSORS][64];
  int64_t n; /* number of tensors */
  qvl_weights* weights;
  qvl_dtype dtype;
  uint64_t random; /* state of next() */
} model;

static qvl_sampling greedy(void) {
  qvl_sampling sampling = QVL_INIT(qvl_sampling);
  qvl_sampling_init(&sampling);
  return sampling;
}

static int has_zeros(qvl_dtype dtype) {
  return dtype >= QVL_UINT4_G32 && dtype <= QVL_UINT8_G128;
}

/* Pack values of magnitudes up to `limit` in a type with zero points. All groups have the same scale, a power
 * of two. The arrays of scales and zeros have more entries than there are groups. */
static void pack_groups(const qvl_tensor* t, int64_t out, int64_t in, const float* values, float limit,
                        void* packed) {
  const int is_4_bit = t->dtype <= QVL_UINT4_G128, zero = is_4_bit ? 8 : 128;
  const int exponent = (int)ceilf(log2f(limit / (float)(zero - 1)));
  uint8_t* integers = malloc((size_t)(out * in));
  uint16_t* scales = malloc((size_t)(out * in) * 2);
  uint16_t* zeros = malloc((size_t)(out * in) * 2);
  for (int64_t i = 0; i < out * in; ++i) {
    integers[i] = (uint8_t)(lrintf(ldexpf(values[i], -exponent)) + zero);
    scales[i] = (uint16_t)((15 + exponent) << 10); /* 2^exponent as float16 */
    zeros[i] = is_4_bit ? 0x4800 : 0x5800;         /* 8 or 128 as float16 */
  }
  SUCCEED(qvl_pack_groups(t->dtype, out, in, integers, scales, zeros, packed, t->bytes, ERROR));
  free(integers);
  free(scales);
  free(zeros);
}

/* Add a random tensor of shape [a, b, c, d], in which dimensions from the first 0 on are absent. is_matrix:
 * the tensor may be quantized. */
static void add_tensor(model* m, const char* name, int is_matrix, int64_t a, int64_t b, int64_t c,
                       int64_t d) {
  CHECK(m->n < MAX_TENSORS);
  qvl_tensor* t = &m->tensors[m->n];
  snprintf(m->names[m->n], sizeof m->names[0], "%s", name);
  t->name = m->names[m->n++];
  const int is_float = m->dtype == QVL_FLOAT32 || m->dtype == QVL_FLOAT16;
  t->dtype = is_matrix || is_float ? m->dtype : QVL_BFLOAT16;
  t->device = QVL_DEVICE_CPU;
  const int64_t shape[4] = {a, b, c, d};
  memcpy(t->shape, shape, sizeof shape);
  int64_t inner = 1;
  for (t->n_dims = 1; t->n_dims < 4 && shape[t->n_dims]; ++t->n_dims) inner *= shape[t->n_dims];
  float* values = malloc((size_t)(a * inner) * sizeof(float));
  const float limit = inner > 1 ? 1.5f / sqrtf((float)inner) : 1;
  for (int64_t i = 0; i < a * inner; ++i) values[i] = uniform(&m->random) * limit;
  t->bytes = qvl_packed_bytes(t->dtype, a, inner);
  void* packed = malloc(t->bytes);
  if (has_zeros(t->dtype)) {
    pack_groups(t, a, inner, values, limit, packed);
  } else {
    SUCCEED(qvl_pack(t->dtype, a, inner, values, packed, t->bytes, ERROR));
  }
  free(values);
  t->data = packed;
}

static void vector(model* m, const char* name, int64_t n) {
  add_tensor(m, name, /*is_matrix=*/0, n, 0, 0, 0);
}
static void table(model* m, const char* name, int64_t rows, int64_t n) {
  add_tensor(m, name, /*is_matrix=*/0, rows, n, 0, 0);
}
static void matrix(model* m, const char* name, int64_t out, int64_t in) {
  add_tensor(m, name, /*is_matrix=*/1, out, in, 0, 0);
}

static void norm(model* m, const char* name, int64_t n) {
  char full[128];
  snprintf(full, sizeof full, "%s.weight", name);
  vector(m, full, n);
  snprintf(full, sizeof full, "%s.bias", name);
  vector(m, full, n);
}

static void linear(model* m, const char* name, int64_t out, int64_t in) {
  char full[128];
  snprintf(full, sizeof full, "%s.weight", name);
  matrix(m, full, out, in);
  snprintf(full, sizeof full, "%s.bias", name);
  vector(m, full, out);
}

static void add_language_tensors(model* m) {
  char name[64];
  table(m, "wte.weight", VOCAB, HIDDEN);
  for (int i = 0; i < LAYERS; ++i) {
#define NAME(part) (snprintf(name, sizeof name, "h.%d.%s", i, part), name)
    vector(m, NAME("ln_1.weight"), HIDDEN);
    linear(m, NAME("attn.c_attn"), 3 * HIDDEN, HIDDEN);
    matrix(m, NAME("attn.c_proj.weight"), HIDDEN, HIDDEN);
    vector(m, NAME("ln_2.weight"), HIDDEN);
    matrix(m, NAME("mlp.w1.weight"), MLP, HIDDEN);
    matrix(m, NAME("mlp.w2.weight"), MLP, HIDDEN);
    matrix(m, NAME("mlp.c_proj.weight"), HIDDEN, MLP);
#undef NAME
  }
  vector(m, "ln_f.weight", HIDDEN);
  matrix(m, "lm_head.weight", VOCAB, HIDDEN);
}

static void add_vision_tensors(model* m) {
  char name[64];
  add_tensor(m, "visual.conv1.weight", /*is_matrix=*/1, WIDTH, 3, 14, 14);
  table(m, "visual.positional_embedding", PATCHES, WIDTH);
  norm(m, "visual.ln_pre", WIDTH);
  for (int i = 0; i < LAYERS; ++i) {
#define NAME(part) (snprintf(name, sizeof name, "visual.transformer.resblocks.%d.%s", i, part), name)
    norm(m, NAME("ln_1"), WIDTH);
    linear(m, NAME("attn.in_proj"), 3 * WIDTH, WIDTH);
    linear(m, NAME("attn.out_proj"), WIDTH, WIDTH);
    norm(m, NAME("ln_2"), WIDTH);
    linear(m, NAME("mlp.c_fc"), VISION_MLP, WIDTH);
    linear(m, NAME("mlp.c_proj"), WIDTH, VISION_MLP);
#undef NAME
  }
  matrix(m, "visual.attn_pool.kv_proj.weight", HIDDEN, WIDTH);
  norm(m, "visual.attn_pool.ln_kv", HIDDEN);
  norm(m, "visual.attn_pool.ln_q", HIDDEN);
  table(m, "visual.attn_pool.query", QUERIES, HIDDEN);
  table(m, "visual.attn_pool.pos_embed", QUERIES, HIDDEN);
  table(m, "visual.attn_pool.key_pos_embed", PATCHES, HIDDEN);
  matrix(m, "visual.attn_pool.attn.in_proj_weight", 3 * HIDDEN, HIDDEN);
  vector(m, "visual.attn_pool.attn.in_proj_bias", 3 * HIDDEN);
  linear(m, "visual.attn_pool.attn.out_proj", HIDDEN, HIDDEN);
  norm(m, "visual.ln_post", HIDDEN);
  matrix(m, "visual.proj", HIDDEN, HIDDEN);
}

static model* make_model(qvl_dtype dtype, qvl_isa isa, int n_threads) {
  model* m = calloc(1, sizeof *m);
  m->dtype = dtype;
  m->random = 7;
  qvl_config* c = &m->config;
  c->size = sizeof *c;
  c->stages = QVL_STAGE_VISION | QVL_STAGE_LANGUAGE;
  c->n_threads = n_threads;
  c->isa = isa;
  c->max_tokens = 20; /* less than PROMPT, so that a batch takes several passes */
  c->hidden = HIDDEN;
  c->layers = LAYERS;
  c->heads = 2;
  c->head_dim = HIDDEN / 2;
  c->mlp_width = MLP;
  c->vocab = VOCAB;
  c->norm_epsilon = 1e-6f;
  c->seq_length = 64;
  c->max_positions = MAX_POSITIONS;
  c->rotary_base = 10000;
  c->dynamic_ntk = c->logn = 1;
  c->image_size = 28;
  c->patch_size = 14;
  c->vision_width = WIDTH;
  c->vision_layers = LAYERS;
  c->vision_heads = 3;
  c->vision_mlp_width = VISION_MLP;
  c->n_queries = QUERIES;
  add_language_tensors(m);
  add_vision_tensors(m);
  SUCCEED(qvl_weights_create(m->tensors, m->n, sizeof m->tensors[0], &m->weights, ERROR));
  return m;
}

static void free_model(model* m) {
  qvl_weights_free(m->weights);
  for (int64_t i = 0; i < m->n; ++i) free((void*)m->tensors[i].data);
  free(m);
}

static qvl_engine* make_engine(const model* m) {
  qvl_engine* engine;
  SUCCEED(qvl_engine_create(&m->config, m->weights, &engine, ERROR));
  return engine;
}

/* ---- all ---------------------------------------------------------------------------------------------- */

enum { PROMPT = 37, NEW = 9, REQUESTS = 3 };

/* Encode an image and generate completions, tokens [REQUESTS][NEW], of three prompts of different lengths.
 * The first prompt contains the image. Tokens after the end of a completion are -1. */
static void generate_completions(qvl_engine* engine, int32_t* tokens) {
  enum { PIXELS = 3 * 28 * 28 };
  float image[PIXELS], features[QUERIES * HIDDEN];
  uint64_t random = 3;
  for (int i = 0; i < PIXELS; ++i) image[i] = uniform(&random);
  SUCCEED(qvl_encode_images(engine, 1, image, features, NULL, ERROR));
  for (int i = 0; i < QUERIES * HIDDEN; ++i) CHECK(isfinite(features[i]));
  int32_t ids[PROMPT];
  for (int i = 0; i < PROMPT; ++i) ids[i] = (i * 7) % VOCAB;
  qvl_sampling sampling[REQUESTS];
  const qvl_span span = {11, QUERIES, features};
  qvl_request requests[REQUESTS];
  memset(requests, 0, sizeof requests);
  for (int i = 0; i < REQUESTS; ++i) {
    requests[i].n_tokens = i == 0 ? PROMPT : i * 5;
    requests[i].tokens = ids;
    requests[i].max_new = NEW;
    sampling[i] = greedy();
    sampling[i].temperature = (float)i;
    sampling[i].top_p = 0.9f;
    sampling[i].presence_penalty = 0.5f;
    sampling[i].seed = 5;
    requests[i].sampling = &sampling[i];
  }
  requests[0].n_spans = 1;
  requests[0].spans = &span;
  qvl_result results[REQUESTS];
  const int32_t end = 1;
  SUCCEED(qvl_generate(engine, NULL, REQUESTS, requests, sizeof requests[0], 1, &end, NULL, NULL, NEW, tokens,
                       results, NULL, ERROR));
  for (int i = 0; i < REQUESTS; ++i) {
    CHECK(results[i].finish == QVL_FINISH_END || results[i].n_tokens == NEW);
    for (int t = results[i].n_tokens; t < NEW; ++t) tokens[i * NEW + t] = -1;
  }
}

/* ---- a parameter file --------------------------------------------------------------------------------- */

typedef struct {
  char path[64];
  unsigned char* bytes;
  size_t size;
  size_t record_starts[MAX_TENSORS];
} params_file;

/* Append n bytes. */
static void put(params_file* file, const void* from, size_t n) {
  memcpy(file->bytes + file->size, from, n);
  file->size += n;
}

/* Append a varint of at least `min_bytes` bytes. */
static void put_varint(params_file* file, uint64_t value, int min_bytes) {
  for (; value > 127 || min_bytes > 1; value >>= 7, --min_bytes) {
    const unsigned char byte = (unsigned char)(value & 127) | 128;
    put(file, &byte, 1);
  }
  const unsigned char byte = (unsigned char)value;
  put(file, &byte, 1);
}

/* Append the record of a tensor; csrc/core/params_file.cc describes the format. */
static void put_record(params_file* file, const qvl_tensor* t) {
  static const unsigned char zeros[64];
  /* Per qvl_dtype: Paddle's code of the type, and bytes per value. Types other than floats are stored as
   * uint8. */
  const int types[QVL_DTYPES] = {5, 22, 20, 20, 20, 4, 20, 20, 20, 20, 20, 20, 20};
  const size_t sizes[QVL_DTYPES] = {4, 2, 1, 1, 1, 2, 1, 1, 1, 1, 1, 1, 1};
  put(file, zeros, 16);
  const size_t length_at = file->size;
  put(file, zeros, 4);
  const unsigned char type[2] = {8, (unsigned char)types[t->dtype]};
  put(file, type, 2);
  put(file, "\x10", 1);
  put_varint(file, t->bytes / sizes[t->dtype], 1);
  const uint16_t name_length = (uint16_t)strlen(t->name);
  const size_t field = 8 + 8 * (size_t)t->n_dims + name_length;
  /* 4 bytes, the tag and the length of the field, precede the field; the data after it is aligned to 64
   * bytes. */
  const size_t padding = (64 - (file->size + 4 + field) % 64) % 64;
  put(file, "\x7a", 1);
  put_varint(file, field + padding, 3);
  const unsigned char head[6] = {'q', 'v', 'l', '1', (unsigned char)t->dtype, (unsigned char)t->n_dims};
  put(file, head, 6);
  put(file, &name_length, 2);
  put(file, t->shape, 8 * (size_t)t->n_dims);
  put(file, t->name, name_length);
  put(file, zeros, padding);
  const int32_t length = (int32_t)(file->size - length_at - 4);
  memcpy(file->bytes + length_at, &length, 4);
  put(file, t->data, t->bytes);
}

/* Write the first `size` bytes to the file's path. */
static void save(const params_file* file, size_t size) {
  FILE* to = fopen(file->path, "wb");
  CHECK(to != NULL);
  CHECK(fwrite(file->bytes, 1, size, to) == size);
  CHECK(fclose(to) == 0);
}

/* Parameter file in /tmp with the first n tensors of a model. */
static params_file make_params_file(const model* m, int64_t n) {
  params_file file = {"/tmp/qwenvl-driver-XXXXXX", NULL, 0, {0}};
  const int descriptor = mkstemp(file.path);
  CHECK(descriptor >= 0);
  close(descriptor);
  size_t capacity = 0;
  for (int64_t i = 0; i < n; ++i) capacity += m->tensors[i].bytes + 512; /* 512: more than a record's head */
  file.bytes = malloc(capacity);
  for (int64_t i = 0; i < n; ++i) {
    file.record_starts[i] = file.size;
    put_record(&file, &m->tensors[i]);
  }
  save(&file, file.size);
  return file;
}

static void free_params_file(params_file* file) {
  CHECK(unlink(file->path) == 0);
  free(file->bytes);
}

/* ---- steps -------------------------------------------------------------------------------------------- */

/* Compute a prompt in two chunks, the first in a step with other prompts. The second chunk must give the same
 * logits with the blocks of the first chunk, with a copy of these blocks, and with a copy in another pool. */
static void run_steps(qvl_engine* engine) {
  enum { CHUNK = 13, BLOCK = 8, TOP = 5 };
  qvl_kv_pool *pool, *other;
  SUCCEED(qvl_kv_pool_create(engine, 12, BLOCK, QVL_BFLOAT16, &pool, ERROR));
  SUCCEED(qvl_kv_pool_create(engine, 3, BLOCK, QVL_BFLOAT16, &other, ERROR));
  int32_t ids[2 * CHUNK + 3], blocks[9] = {7, 2, 9, 0, 11, 4, 5, 6, 8};
  for (int i = 0; i < 2 * CHUNK + 3; ++i) ids[i] = (i * 5) % VOCAB;
  /* n_new, n_past, prompt_len, n_blocks, blocks, flags, reserved */
  qvl_sequence sequences[3] = {{CHUNK, 0, 20, 3, blocks, QVL_SEQUENCE_NO_LOGITS, 0},
                               {CHUNK, 0, CHUNK, 3, blocks + 3, 0, 0},
                               {3, 0, 3, 3, blocks + 6, 0, 0}};
  qvl_batch batch = {sizeof batch, 3, sequences, ids, 0, 0, NULL, sizeof sequences[0], sizeof(qvl_span)};
  qvl_sampling sampling[2] = {greedy(), greedy()};
  int32_t *tokens, *top;
  float *logprobs, *top_logprobs;
  void* host;
  /* 4-byte values for two rows: tokens, logprobs, top_tokens, top_logprobs. */
  SUCCEED(qvl_host_alloc(engine, 4 * (2 + 2 + 4 * TOP), &host, ERROR));
  tokens = host;
  logprobs = (float*)host + 2;
  top = tokens + 4;
  top_logprobs = (float*)host + 4 + 2 * TOP;
  qvl_step_args args = {sizeof args, sizeof sampling[0], &batch, 2, TOP, sampling, NULL, tokens, logprobs,
                        top,         top_logprobs,       NULL};
  qvl_event* event;
  int32_t done = 0;
  SUCCEED(qvl_event_create(engine, &event, ERROR));
  SUCCEED(qvl_step(engine, pool, &args, NULL, ERROR));
  SUCCEED(qvl_event_record(event, NULL, ERROR));
  SUCCEED(qvl_event_wait(event, ERROR));
  SUCCEED(qvl_event_query(event, &done, ERROR));
  CHECK(done == 1);
  qvl_event_free(event);
  for (int i = 0; i < 2; ++i) {
    CHECK(tokens[i] == top[i * TOP] && logprobs[i] == top_logprobs[i * TOP]);
    for (int t = 1; t < TOP; ++t) CHECK(top_logprobs[i * TOP + t] <= top_logprobs[i * TOP + t - 1]);
  }
  /* Copy the first chunk's blocks, `from`, within the pool and to the other pool. The block tables of the
   * second chunk are blocks, copies and other_blocks. */
  const int32_t from[2] = {7, 2}, to[2] = {10, 3}, copies[3] = {10, 3, 1}, other_blocks[3] = {1, 0, 2};
  const uint64_t bytes = 2 * qvl_kv_pool_bytes(engine, 1, BLOCK, QVL_BFLOAT16);
  void* saved = malloc(bytes);
  SUCCEED(qvl_kv_copy_blocks(pool, 2, from, to, NULL, ERROR));
  SUCCEED(qvl_kv_read_blocks(pool, 2, from, saved, bytes, NULL, ERROR));
  SUCCEED(qvl_kv_write_blocks(other, 2, other_blocks, saved, bytes, NULL, ERROR));
  free(saved);
  sequences[0] = (qvl_sequence){7, CHUNK, 20, 3, blocks, 0, 0};
  batch.n_sequences = args.rows = 1;
  float logits[3][VOCAB];
  for (int i = 0; i < 3; ++i) {
    sequences[0].blocks = i == 0 ? blocks : i == 1 ? copies : other_blocks;
    args.logits = logits[i];
    SUCCEED(qvl_step(engine, i == 2 ? other : pool, &args, NULL, ERROR));
  }
  CHECK(memcmp(logits[0], logits[1], sizeof logits[0]) == 0);
  CHECK(memcmp(logits[0], logits[2], sizeof logits[0]) == 0);
  qvl_host_free(engine, host);
  qvl_kv_pool_free(pool);
  qvl_kv_pool_free(other);
}

static void run_all(void) {
  qvl_device_info info = QVL_INIT(qvl_device_info);
  /* No GPU even if the machine has one: CMake does not build libqwenvl_cuda.so. */
  CHECK(qvl_device_count(QVL_DEVICE_CPU) == 1 && qvl_device_count(QVL_DEVICE_CUDA) == 0);
  SUCCEED(qvl_get_device_info(QVL_DEVICE_CPU, 0, &info, ERROR));
  CHECK(info.name[0] != 0 && info.isa[0] != 0 && info.threads > 0 && info.memory_bytes >= info.free_bytes);
  int engines = 0;
  for (qvl_isa isa = QVL_ISA_GENERIC; isa <= QVL_ISA_AVX512_BF16; ++isa) {
    for (qvl_dtype dtype = 0; dtype < QVL_INT32; ++dtype) {
      model* m = make_model(dtype, isa, 2);
      qvl_engine* engine;
      qvl_error error;
      const qvl_status status = qvl_engine_create(&m->config, m->weights, &engine, &error);
      if (status == QVL_OK) {
        int32_t first[REQUESTS * NEW], second[REQUESTS * NEW];
        generate_completions(engine, first);
        generate_completions(engine, second);
        CHECK(memcmp(first, second, sizeof first) == 0);
        run_steps(engine);
        qvl_engine_free(engine);
        /* Weights from a file, shared by two engines. The handle is freed and the file deleted before the
         * engines run. */
        params_file file = make_params_file(m, m->n);
        qvl_weights* weights;
        qvl_engine* sharing[2];
        SUCCEED(qvl_weights_open(file.path, &weights, ERROR));
        CHECK(qvl_weights_count(weights) == m->n);
        for (int i = 0; i < 2; ++i) SUCCEED(qvl_engine_create(&m->config, weights, &sharing[i], ERROR));
        qvl_weights_free(weights);
        free_params_file(&file);
        for (int i = 0; i < 2; ++i) {
          generate_completions(sharing[i], second);
          CHECK(memcmp(first, second, sizeof first) == 0);
          qvl_engine_free(sharing[i]);
        }
        ++engines;
      }
      CHECK(status == QVL_OK || status == QVL_UNSUPPORTED);
      free_model(m);
    }
  }
  printf("%d engines answered\n", engines);
}

/* ---- threads ------------------------------------------------------------------------------------------ */

typedef struct {
  qvl_engine* engine;
  const int32_t* expected;
} thread_arguments;

static void* generate_repeatedly(void* argument) {
  const thread_arguments* s = argument;
  for (int i = 0; i < 10; ++i) {
    int32_t tokens[REQUESTS * NEW];
    generate_completions(s->engine, tokens);
    CHECK(memcmp(tokens, s->expected, sizeof tokens) == 0);
  }
  return NULL;
}

static void run_threads(void) {
  enum { ENGINES = 2, USERS = 2 };
  model* m[ENGINES];
  qvl_engine* engines[ENGINES];
  int32_t expected[ENGINES][REQUESTS * NEW];
  pthread_t threads[ENGINES * USERS];
  thread_arguments arguments[ENGINES];
  for (int i = 0; i < ENGINES; ++i) {
    m[i] = make_model(i == 0 ? QVL_FLOAT32 : QVL_INT8, QVL_ISA_BEST, 2 + i);
    engines[i] = make_engine(m[i]);
    generate_completions(engines[i], expected[i]);
    arguments[i] = (thread_arguments){engines[i], expected[i]};
  }
  for (int i = 0; i < ENGINES * USERS; ++i) {
    CHECK(pthread_create(&threads[i], NULL, generate_repeatedly, &arguments[i % ENGINES]) == 0);
  }
  for (int i = 0; i < ENGINES * USERS; ++i) CHECK(pthread_join(threads[i], NULL) == 0);
  for (int i = 0; i < ENGINES; ++i) {
    qvl_engine_free(engines[i]);
    free_model(m[i]);
  }
  printf("%d threads on %d engines answered\n", ENGINES * USERS, ENGINES);
}

/* ---- fuzz --------------------------------------------------------------------------------------------- */

/* A fuzz function calls the library, usually with a corrupted argument, checks that a failure has a message,
 * and returns whether the call has failed. */

static uint64_t fuzz_random; /* state of next() */

static int64_t unusual_integer(void) {
  static const int64_t numbers[] = {0, -1, 1, 2, 3, 31, 33, 255, 257, 4097, INT32_MAX, INT32_MIN, 1 << 20};
  return numbers[next(&fuzz_random) % (sizeof numbers / sizeof numbers[0])];
}

static float unusual_float(void) {
  static const float numbers[] = {0, -1, 1, 1e-30f, 1e30f, NAN, INFINITY, -INFINITY, 0.5f, 101};
  return numbers[next(&fuzz_random) % (sizeof numbers / sizeof numbers[0])];
}

/* Set a random 4-byte field within the first `bytes` bytes of a struct to an unusual integer or float. */
static void corrupt(void* memory, size_t bytes) {
  const size_t at = next(&fuzz_random) % (bytes / 4) * 4;
  const int32_t integer = (int32_t)unusual_integer();
  const float real = unusual_float();
  memcpy((char*)memory + at, next(&fuzz_random) % 2 ? (const void*)&integer : (const void*)&real, 4);
}

static int fuzz_create(const model* m) {
  qvl_config config = m->config;
  qvl_tensor tensors[MAX_TENSORS];
  memcpy(tensors, m->tensors, sizeof tensors);
  int64_t n = m->n;
  qvl_tensor* t = &tensors[next(&fuzz_random) % (uint64_t)n];
  switch (next(&fuzz_random) % 9) {
    case 0:
    case 1:
      corrupt((char*)&config + 4, sizeof config - 4);
      break;
    case 2:
      config.size = (uint32_t)unusual_integer() % sizeof config;
      break;
    case 3:
      t->dtype = (qvl_dtype)unusual_integer();
      break;
    case 4:
      t->shape[next(&fuzz_random) % 4] = unusual_integer();
      break;
    case 5:
      t->bytes = (uint64_t)unusual_integer();
      break;
    case 6:
      t->data = NULL;
      break;
    case 7:
      t->name = next(&fuzz_random) % 2 ? NULL : "h.0";
      break;
    default:
      n = (int64_t)(next(&fuzz_random) % (uint64_t)n);
  }
  if (config.n_threads > 4) config.n_threads = 4; /* more threads take only time */
  qvl_error error;
  qvl_weights* weights;
  qvl_engine* engine = NULL;
  qvl_status status = qvl_weights_create(tensors, n, sizeof tensors[0], &weights, &error);
  CHECK((status == QVL_OK) == (weights != NULL));
  if (status == QVL_OK) {
    status = qvl_engine_create(&config, weights, &engine, &error);
    CHECK((status == QVL_OK) == (engine != NULL));
  }
  qvl_weights_free(weights);
  CHECK(status == QVL_OK || error.message[0] != 0);
  qvl_engine_free(engine);
  return status != QVL_OK;
}

static int fuzz_forward(qvl_engine* engine, qvl_kv_pool* pool) {
  /* The arrays have at least the length of the longest read or write that passes the library's checks. */
  static int32_t ids[2 * MAX_POSITIONS], blocks[MAX_POSITIONS];
  static float features[MAX_POSITIONS * HIDDEN], logits[2 * VOCAB];
  for (int i = 0; i < 2 * MAX_POSITIONS; ++i) ids[i] = i % VOCAB;
  for (int i = 0; i < MAX_POSITIONS; ++i) blocks[i] = i % 8;
  qvl_sequence sequences[2] = {{5, 0, 5, 8, blocks, 0, 0}, {1, 17, 18, 8, blocks, 0, 0}};
  qvl_span spans[2] = {{1, 2, features}, {4, 1, features}};
  qvl_batch batch = {sizeof batch, 2, sequences, ids, 2, 0, spans, sizeof sequences[0], sizeof spans[0]};
  qvl_sequence* s = &sequences[next(&fuzz_random) % 2];
  switch (next(&fuzz_random) % 10) {
    case 0:
      s->n_new = (int32_t)unusual_integer();
      break;
    case 1:
      s->n_past = (int32_t)unusual_integer();
      break;
    case 2:
      s->prompt_len = (int32_t)unusual_integer();
      break;
    case 3:
      s->n_blocks = (int32_t)unusual_integer();
      break;
    case 4:
      blocks[next(&fuzz_random) % 2] = (int32_t)unusual_integer();
      break;
    case 5:
      s->blocks = NULL;
      break;
    case 6:
      corrupt(&spans[next(&fuzz_random) % 2], 8);
      break;
    case 7:
      ids[next(&fuzz_random) % 6] = (int32_t)unusual_integer();
      break;
    case 8:
      batch.n_spans = -(int32_t)(next(&fuzz_random) % 3);
      break;
    default:
      if (next(&fuzz_random) % 2)
        batch.spans = NULL;
      else
        batch.tokens = NULL;
  }
  qvl_error error;
  const qvl_status status =
      qvl_forward(engine, pool, &batch, next(&fuzz_random) % 4 ? logits : NULL, NULL, &error);
  CHECK(status == QVL_OK || error.message[0] != 0);
  return status != QVL_OK;
}

static int fuzz_generate(qvl_engine* engine, qvl_kv_pool* pool) {
  static int32_t ids[MAX_POSITIONS], tokens[2 * MAX_POSITIONS];
  static float features[MAX_POSITIONS * HIDDEN];
  for (int i = 0; i < MAX_POSITIONS; ++i) ids[i] = i % VOCAB;
  qvl_span span = {1, 2, features};
  int32_t n = 1;
  qvl_sampling sampling = greedy();
  qvl_request request = {4, 1, ids, &span, 2, 0, &sampling, sizeof span, 0};
  int32_t end = 1;
  qvl_result result;
  int64_t stride = 16;
  switch (next(&fuzz_random) % 10) {
    case 7:
      n = next(&fuzz_random) % 2 ? INT32_MAX : -(int32_t)(next(&fuzz_random) % 3);
      break;
    case 8:
      corrupt(&span, 8);
      break;
    case 9:
      stride = next(&fuzz_random) % 2 ? INT64_MIN : unusual_integer() % 17;
      break;
    case 0:
      request.n_tokens = (int32_t)unusual_integer();
      break;
    case 1:
      request.n_spans = -1;
      break;
    case 2:
      request.tokens = NULL;
      break;
    case 3:
      request.max_new = (int32_t)unusual_integer() % 17;
      break;
    case 4:
      request.min_new = (int32_t)unusual_integer();
      break;
    case 5:
      end = (int32_t)unusual_integer();
      break;
    default: /* do not corrupt n_forbidden, whose pointer is NULL */
      corrupt(&sampling, offsetof(qvl_sampling, n_forbidden));
      if (sampling.size > sizeof sampling) sampling.size = 1; /* else it may be valid: a newer struct's */
  }
  qvl_error error;
  const qvl_status status =
      qvl_generate(engine, next(&fuzz_random) % 2 ? pool : NULL, n, &request, sizeof request, 1, &end, NULL,
                   NULL, stride, tokens, &result, NULL, &error);
  CHECK(status == QVL_OK || error.message[0] != 0);
  return status != QVL_OK;
}

static int fuzz_step(qvl_engine* engine, qvl_kv_pool* pool) {
  static float logits[2 * VOCAB], logprobs[2], top_logprobs[2 * 64];
  static int32_t ids[64], blocks[8] = {0, 1, 2, 3, 4, 5, 6, 7}, tokens[2], top[2 * 64];
  for (int i = 0; i < 64; ++i) ids[i] = i % VOCAB;
  qvl_sequence sequences[2] = {{3, 0, 9, 8, blocks, 0, 0}, {1, 17, 18, 8, blocks, 0, 0}};
  qvl_batch batch = {sizeof batch, 2, sequences, ids, 0, 0, NULL, sizeof sequences[0], sizeof(qvl_span)};
  qvl_sampling sampling[2] = {greedy(), greedy()};
  qvl_step_args args = {sizeof args, sizeof sampling[0], &batch, 2, 3, sampling, NULL, tokens, logprobs,
                        top,         top_logprobs,       logits};
  /* Invalid sizes are those below the sizes of version 0.1 (qvl_sampling 56 bytes, qvl_step_args 80,
   * qvl_sequence 24) and those above 4096. */
  switch (next(&fuzz_random) % 9) {
    case 0:
      args.rows = (int32_t)unusual_integer();
      break;
    case 1:
      args.n_logprobs = (int32_t)unusual_integer();
      break;
    case 2: /* a stride that is too small or too large */
      args.sampling_size = next(&fuzz_random) % 2 ? (uint32_t)unusual_integer() % 56 : 4097;
      break;
    case 3:
      args.size = (uint32_t)unusual_integer() % 80;
      break;
    case 4:
      batch.sequence_size = next(&fuzz_random) % 2 ? 1 + (uint32_t)unusual_integer() % 23 : 5000;
      break;
    case 5:
      sequences[next(&fuzz_random) % 2].flags = (uint32_t)unusual_integer();
      break;
    case 6:
      args.tokens = NULL;
      break;
    case 7:
      batch.size = (uint32_t)unusual_integer() % sizeof batch;
      break;
    default:
      args.top_tokens = NULL;
  }
  qvl_error error;
  const qvl_status status = qvl_step(engine, pool, &args, NULL, &error);
  CHECK(status == QVL_OK || error.message[0] != 0);
  return status != QVL_OK;
}

static int fuzz_blocks(qvl_kv_pool* pool) {
  static unsigned char host[1 << 17];
  int32_t blocks[3] = {0, 5, 7}, to[3] = {1, 2, 3}, n = 3;
  const uint64_t block = 2 * 2 * LAYERS * 16 * HIDDEN; /* keys and values of 16 tokens, 2 bytes per number */
  CHECK(3 * block <= sizeof host);
  uint64_t bytes = 3 * block;
  switch (next(&fuzz_random) % 4) {
    case 0:
      blocks[next(&fuzz_random) % 3] = (int32_t)unusual_integer();
      break;
    case 1:
      to[next(&fuzz_random) % 3] = (int32_t)unusual_integer();
      break;
    case 2:
      n = -(int32_t)(next(&fuzz_random) % 3);
      break;
    default:
      bytes += (uint64_t)unusual_integer();
  }
  qvl_error error;
  qvl_status status;
  switch (next(&fuzz_random) % 3) {
    case 0:
      status = qvl_kv_copy_blocks(pool, n, blocks, to, NULL, &error);
      break;
    case 1:
      status = qvl_kv_read_blocks(pool, n, blocks, host, bytes, NULL, &error);
      break;
    default:
      status = qvl_kv_write_blocks(pool, n, to, host, bytes, NULL, &error);
  }
  CHECK(status == QVL_OK || error.message[0] != 0);
  return status != QVL_OK;
}

/* Open a file with a changed bit or overwritten bytes near the start of a record, or without its end. If the
 * file opens, all its tensors can be read. */
static int fuzz_params_file(params_file* file, int64_t n) {
  unsigned char* at =
      file->bytes + file->record_starts[next(&fuzz_random) % (uint64_t)n] + next(&fuzz_random) % 100;
  unsigned char before[8];
  memcpy(before, at, sizeof before);
  size_t size = file->size;
  const int64_t number = next(&fuzz_random) % 2 ? unusual_integer() : (int64_t)1 << next(&fuzz_random) % 63;
  switch (next(&fuzz_random) % 4) {
    case 0:
      size = next(&fuzz_random) % size;
      break;
    case 1:
      memcpy(at, &number, 1 + next(&fuzz_random) % 8);
      break;
    default:
      *at ^= (unsigned char)(1u << next(&fuzz_random) % 8);
  }
  save(file, size);
  memcpy(at, before, sizeof before);
  qvl_weights* weights;
  qvl_error error;
  const qvl_status status = qvl_weights_open(file->path, &weights, &error);
  CHECK((status == QVL_OK) == (weights != NULL));
  CHECK(status == QVL_OK || (status == QVL_BAD_WEIGHT && error.message[0] != 0));
  uintptr_t begin = 0;
  for (int64_t i = 0; i < qvl_weights_count(weights); ++i) {
    qvl_tensor t;
    SUCCEED(qvl_weights_get(weights, i, &t, sizeof t, ERROR));
    /* The mapped file begins at a page, which contains the first tensor's head and the start of its data. */
    if (i == 0) begin = (uintptr_t)t.data / 4096 * 4096;
    CHECK((uintptr_t)t.data >= begin && t.bytes <= size && (uintptr_t)t.data + t.bytes <= begin + size);
    CHECK((uintptr_t)t.data % 64 == 0 && t.dtype >= 0 && t.dtype < QVL_DTYPES && strlen(t.name) > 0);
    /* Always true: the check is that the reads do not fault. */
    for (uint64_t b = 0; b < t.bytes; b += 64) CHECK(((const volatile unsigned char*)t.data)[b] < 256);
  }
  qvl_weights_free(weights);
  return status != QVL_OK;
}

static int fuzz_sample(qvl_engine* engine) {
  float logits[2 * VOCAB];
  for (int i = 0; i < 2 * VOCAB; ++i) logits[i] = unusual_float();
  int32_t counts[VOCAB] = {0}, tokens[2] = {-1, -1}, forbidden[3] = {1, 2, 3};
  int32_t* rows[2] = {counts, NULL};
  qvl_sampling sampling[2] = {greedy(), greedy()};
  int32_t n = 2;
  for (int i = 0; i < 2; ++i) sampling[i].temperature = (float)(next(&fuzz_random) % 3);
  sampling[0].forbidden = forbidden;
  sampling[0].n_forbidden = 3;
  switch (next(&fuzz_random) % 6) {
    case 0:
      n = -(int32_t)(next(&fuzz_random) % 3);
      break;
    case 1:
      forbidden[next(&fuzz_random) % 3] = (int32_t)unusual_integer();
      break;
    case 2:
      sampling[0].forbidden = NULL;
      break;
    case 3:
      sampling[0].n_forbidden = -1;
      break;
    default:
      corrupt(&sampling[next(&fuzz_random) % 2], offsetof(qvl_sampling, n_forbidden));
  }
  qvl_error error;
  const qvl_status status =
      qvl_sample(engine, n, next(&fuzz_random) % 8 ? logits : NULL, sampling, sizeof sampling[0],
                 next(&fuzz_random) % 2 ? rows : NULL, tokens, NULL, &error);
  CHECK(status == QVL_OK || error.message[0] != 0);
  for (int i = 0; status == QVL_OK && i < n; ++i) CHECK(tokens[i] >= -1 && tokens[i] < VOCAB);
  return status != QVL_OK;
}

static int fuzz_other_calls(qvl_engine* engine) {
  qvl_kv_pool* pool;
  qvl_error error;
  float values[64] = {0};
  char packed[4096];
  const int64_t out = unusual_integer(), in = unusual_integer();
  /* One half of the calls: 0 to 13, of which 13 is no type. */
  const qvl_dtype dtype =
      (qvl_dtype)(next(&fuzz_random) % 2 ? unusual_integer() : (int64_t)(next(&fuzz_random) % 14));
  qvl_status status;
  switch (next(&fuzz_random) % 3) {
    case 0:
      status = qvl_kv_pool_create(engine, (int32_t)unusual_integer(), (int32_t)unusual_integer(), dtype,
                                  &pool, &error);
      CHECK((status == QVL_OK) == (pool != NULL));
      qvl_kv_pool_free(pool);
      break;
    case 1: {
      /* Matrices that fit the arrays get the right number of bytes, all others a wrong one. */
      const uint64_t bytes = qvl_packed_bytes(dtype, out, in);
      const int fits = bytes > 0 && bytes <= sizeof packed && out <= 64 && in <= 64 && out * in <= 64;
      if (has_zeros(dtype)) {
        const uint16_t zeros[4 * 64] = {0}; /* longer than each array of a matrix that fits */
        status = qvl_pack_groups(dtype, out, in, (const uint8_t*)zeros, zeros, zeros, packed,
                                 fits ? bytes : bytes + 1, &error);
      } else {
        status = qvl_pack(dtype, out, in, values, packed, fits ? bytes : bytes + 1, &error);
      }
      CHECK((status == QVL_OK) == (fits && dtype != QVL_INT32));
      break;
    }
    default: /* a negative number of images, 0, or a large number without arrays */
      status = qvl_encode_images(engine, -1 - unusual_integer(), NULL, NULL, NULL, &error);
  }
  CHECK(status == QVL_OK || error.message[0] != 0);
  return status != QVL_OK;
}

static void run_fuzz(int n, uint64_t seed) {
  fuzz_random = seed;
  model* m = make_model(QVL_INT4_G64, QVL_ISA_BEST, 1);
  qvl_engine* engine = make_engine(m);
  qvl_kv_pool* pool;
  SUCCEED(qvl_kv_pool_create(engine, 8, 16, QVL_BFLOAT16, &pool, ERROR));
  int32_t before[REQUESTS * NEW], after[REQUESTS * NEW];
  generate_completions(engine, before);
  params_file file = make_params_file(m, 6);
  int refused = 0;
  for (int i = 0; i < n; ++i) {
    switch (i % 8) {
      case 5:
        refused += fuzz_step(engine, pool);
        break;
      case 6:
        refused += fuzz_blocks(pool);
        break;
      case 7:
        refused += fuzz_params_file(&file, 6);
        break;
      case 0:
        refused += fuzz_create(m);
        break;
      case 3:
        refused += fuzz_sample(engine);
        break;
      case 1:
        refused += fuzz_forward(engine, pool);
        break;
      case 2:
        refused += fuzz_generate(engine, pool);
        break;
      default:
        refused += fuzz_other_calls(engine);
    }
  }
  free_params_file(&file);
  generate_completions(engine, after);
  CHECK(memcmp(before, after, sizeof before) == 0);
  qvl_kv_pool_free(pool);
  qvl_engine_free(engine);
  free_model(m);
  CHECK(refused > n / 4 && refused < n);
  printf("%d of %d calls refused\n", refused, n);
}

/* ---- limits ------------------------------------------------------------------------------------------- */

static void run_limits(void) {
  model* m = make_model(QVL_FLOAT32, QVL_ISA_BEST, 1024);
  const struct rlimit limit = {1u << 30, 1u << 30}; /* a thread's stack takes 8 MiB of addresses */
  CHECK(setrlimit(RLIMIT_AS, &limit) == 0);
  qvl_engine* engine;
  qvl_error error;
  CHECK(qvl_engine_create(&m->config, m->weights, &engine, &error) == QVL_NO_MEMORY);
  CHECK(engine == NULL);
  m->config.n_threads = 2;
  engine = make_engine(m);
  qvl_kv_pool* pool;
  CHECK(qvl_kv_pool_create(engine, INT32_MAX, 256, QVL_FLOAT32, &pool, NULL) == QVL_NO_MEMORY);
  qvl_engine_free(engine);
  free_model(m);
  printf("%s\n", error.message);
}

/* ---- soak --------------------------------------------------------------------------------------------- */

/* Resident memory of this process; 0 if it is unknown. Assumes pages of 4 KiB. */
static long resident_kib(void) {
  long pages = 0, resident = 0;
  FILE* file = fopen("/proc/self/statm", "r");
  if (file == NULL) return 0;
  CHECK(fscanf(file, "%ld %ld", &pages, &resident) == 2);
  fclose(file);
  return resident * 4;
}

static void run_soak(int n) {
  model* m = make_model(QVL_INT8, QVL_ISA_BEST, 2);
  qvl_engine* engine = make_engine(m);
  static int32_t ids[64];
  int32_t tokens[4];
  uint64_t random = 1;
  long begin_kib = 0;
  for (int i = 0; i < n; ++i) {
    if (i == n / 10) begin_kib = resident_kib();
    for (int t = 0; t < 64; ++t) ids[t] = (int32_t)(next(&random) % VOCAB);
    qvl_sampling sampling = greedy();
    sampling.temperature = (float)(i % 2);
    sampling.presence_penalty = (float)(i % 3);
    qvl_request request = {1 + (int32_t)(next(&random) % 64), 0, ids, NULL, 1 + i % 4, 0, &sampling, 0, 0};
    qvl_result result;
    SUCCEED(qvl_generate(engine, NULL, 1, &request, sizeof request, 0, NULL, NULL, NULL, 4, tokens, &result,
                         NULL, ERROR));
    CHECK(result.n_tokens == 1 + i % 4);
  }
  const long grown_kib = resident_kib() - begin_kib;
  qvl_engine_free(engine);
  free_model(m);
  printf("%d requests, memory grew by %ld KiB after the first tenth\n", n, grown_kib);
  CHECK(grown_kib < 256);
}

int main(int n, char** arguments) {
  const char* command = n > 1 ? arguments[1] : "";
  if (strcmp(command, "all") == 0)
    run_all();
  else if (strcmp(command, "threads") == 0)
    run_threads();
  else if (strcmp(command, "fuzz") == 0 && n == 4)
    run_fuzz(atoi(arguments[2]), strtoull(arguments[3], NULL, 10));
  else if (strcmp(command, "limits") == 0)
    run_limits();
  else if (strcmp(command, "soak") == 0 && n == 3)
    run_soak(atoi(arguments[2]));
  else {
    fprintf(stderr, "usage: driver all | threads | fuzz N SEED | limits | soak N\n");
    return 2;
  }
  return 0;
}
