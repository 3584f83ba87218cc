/* The engine from C: draws a red circle, encodes it, and prints the caption that the model generates.
 *
 *   make -C examples/c run
 *
 * prints, with the engine's instruction set and number of threads in the first line,
 *
 *   cpu avx512_bf16, 2 threads
 *   A large red circle.
 *
 * Sizes and token ids are those of the demo model (paddlemix_qwenvl_plugin/demo/model).
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "qwenvl.h"

enum { SIDE = 128, QUERIES = 256, HIDDEN = 256, MAX_NEW = 32 };
/* Tokens <|endoftext|>, <img> and </img>. */
enum { END_OF_TEXT = 676, IMG = 890, IMG_END = 891 };

/* Token ids of "Picture 1:" and "\nGenerate the caption in English:", from QwenVL.tokenizer.encode. */
static const int32_t before[] = {265, 32, 49, 58};
static const int32_t after[] = {10, 385, 297, 382, 323, 483, 58};
enum { N_BEFORE = sizeof before / sizeof *before, N_AFTER = sizeof after / sizeof *after };

static void check(qvl_status status, const qvl_error* error) {
  if (status == QVL_OK) return;
  fprintf(stderr, "caption: %s\n", error->message);
  exit(1);
}

/* Create an engine for one stage, on the stage's memory-mapped parameter file. */
static qvl_engine* open_stage(const char* prefix, uint32_t stage) {
  qvl_config config = QVL_INIT(qvl_config);
  config.stages = stage;
  config.hidden = HIDDEN;
  config.layers = 4;
  config.heads = 4;
  config.head_dim = 64;
  config.mlp_width = 384;
  config.vocab = 896;
  config.norm_epsilon = 1e-6f;
  config.seq_length = 2048;
  config.max_positions = 8192;
  config.rotary_base = 10000;
  config.dynamic_ntk = config.logn = 1;
  config.image_size = SIDE;
  config.patch_size = 8;
  config.vision_width = 192;
  config.vision_layers = 5;
  config.vision_heads = 6;
  config.vision_mlp_width = 768;
  config.n_queries = QUERIES;

  char path[4096];
  snprintf(path, sizeof path, "%s.pdiparams", prefix);
  qvl_weights* weights;
  qvl_engine* engine;
  qvl_error error;
  check(qvl_weights_open(path, &weights, &error), &error);
  check(qvl_engine_create(&config, weights, &engine, &error), &error);
  qvl_weights_free(weights); /* the engine keeps what it needs */
  return engine;
}

/* Draw a circle with a radius of 18 pixels in the middle of a white image, in the red of the training images:
 * float32 [3, SIDE, SIDE], normalised as in the model's training. */
static void draw(float* pixels) {
  static const float mean[] = {0.48145466f, 0.4578275f, 0.40821073f};
  static const float deviation[] = {0.26862954f, 0.26130258f, 0.27577711f};
  static const float red[] = {216 / 255.0f, 36 / 255.0f, 44 / 255.0f};
  for (int c = 0; c < 3; ++c)
    for (int y = 0; y < SIDE; ++y)
      for (int x = 0; x < SIDE; ++x) {
        const int inside = hypotf(x - 63.5f, y - 63.5f) < 18;
        *pixels++ = ((inside ? red[c] : 1.0f) - mean[c]) / deviation[c];
      }
}

/* Print tokens as text. Line i of the vocabulary, in the folder of the language stage, has the base64 of the
 * bytes of token i, and i. */
static void print_tokens(const char* prefix, int32_t n, const int32_t* tokens) {
  static const char digits[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  static char vocabulary[1024][64];
  char path[4096];
  const char* slash = strrchr(prefix, '/');
  snprintf(path, sizeof path, "%.*sqwen.tiktoken", slash ? (int)(slash - prefix + 1) : 0, prefix);
  FILE* file = fopen(path, "r");
  if (file == NULL) {
    fprintf(stderr, "caption: %s: cannot be opened\n", path);
    exit(1);
  }
  for (int i = 0; i < 1024 && fscanf(file, "%63s %*d", vocabulary[i]) == 1;) ++i;
  fclose(file);
  for (int32_t i = 0; i < n; ++i) {
    unsigned bits = 0, n_bits = 0; /* bits that are not printed yet: the lowest n_bits of `bits` */
    for (const char* c = vocabulary[tokens[i]]; *c != '\0' && *c != '='; ++c) {
      bits = bits << 6 | (unsigned)(strchr(digits, *c) - digits);
      if ((n_bits += 6) >= 8) putchar((int)(bits >> (n_bits -= 8) & 255));
    }
  }
  putchar('\n');
}

int main(int argc, char** argv) {
  if (argc != 3) {
    fprintf(stderr, "usage: caption VISION_PREFIX LANGUAGE_PREFIX\n");
    return 2;
  }
  qvl_engine* vision = open_stage(argv[1], QVL_STAGE_VISION);
  qvl_engine* language = open_stage(argv[2], QVL_STAGE_LANGUAGE);
  puts(qvl_engine_describe(language));

  static float pixels[3 * SIDE * SIDE], features[QUERIES * HIDDEN];
  qvl_error error;
  draw(pixels);
  check(qvl_encode_images(vision, /*n=*/1, pixels, features, /*stream=*/NULL, &error), &error);

  /* Picture 1:<img>, 256 image slots for the features, </img>, the instruction. */
  int32_t prompt[N_BEFORE + 1 + QUERIES + 1 + N_AFTER] = {0};
  memcpy(prompt, before, sizeof before);
  prompt[N_BEFORE] = IMG;
  prompt[N_BEFORE + 1 + QUERIES] = IMG_END;
  memcpy(prompt + N_BEFORE + QUERIES + 2, after, sizeof after);
  const qvl_span span = {.start = N_BEFORE + 1, .count = QUERIES, .features = features};
  const qvl_request request = {.n_tokens = sizeof prompt / sizeof *prompt,
                               .tokens = prompt,
                               .n_spans = 1,
                               .spans = &span,
                               .span_size = sizeof span,
                               .max_new = MAX_NEW}; /* without sampling parameters: greedy */
  const int32_t stop[] = {END_OF_TEXT};
  int32_t tokens[MAX_NEW];
  qvl_result result;
  check(qvl_generate(language, /*pool=*/NULL, /*n=*/1, &request, sizeof request, /*n_end=*/1, stop,
                     /*on_step=*/NULL, /*user=*/NULL, /*stride=*/MAX_NEW, tokens, &result, /*stream=*/NULL,
                     &error),
        &error);
  const int32_t n_stop = result.finish == QVL_FINISH_END; /* the stop token is not printed */
  print_tokens(argv[2], result.n_tokens - n_stop, tokens);
  qvl_engine_free(vision);
  qvl_engine_free(language);
  return 0;
}
