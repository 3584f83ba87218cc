/* The Qwen-VL engine: images -> features, tokens -> logits, logits -> tokens.
 *
 * A C interface without framework types. A caller
 *   1. creates qvl_weights from named tensors or an exported file, and a qvl_engine from a qvl_config;
 *   2. encodes images with qvl_encode_images;
 *   3. calls qvl_generate, or creates a qvl_kv_pool and calls qvl_step (or qvl_forward and qvl_sample).
 *
 * Errors. Functions that can fail return a qvl_status, QVL_OK being 0, and take a qvl_error as their last
 * argument, which may be NULL. On failure the qvl_error contains a one-line message. The library throws no
 * C++ exceptions. After a failure other than QVL_STOPPED the outputs are unspecified; engine and pool stay
 * usable.
 *
 * Threads. There is no global state: a process may have any number of engines. Every function may be called
 * from any thread. A lock serialises the calls that compute on the same engine or create an adapter for it;
 * different engines run concurrently. Freeing a handle while another call uses it is undefined behaviour.
 *
 * Memory. "Device memory" below means memory of the engine's device; for QVL_DEVICE_CPU that is any memory.
 * "Host memory" is ordinary memory of the CPU. A GPU engine also accepts it in place of device memory: the
 * call then copies its inputs and waits for its outputs. Structs and arrays of lengths, positions and
 * parameters are in host memory and are read before the call returns. Functions that free something accept
 * NULL.
 *
 * Streams. A NULL qvl_stream selects the engine's default stream. On the CPU every call is synchronous and
 * ignores the stream. On a GPU qvl_step, qvl_forward, qvl_encode_images, qvl_sample, qvl_copy_async and the
 * block functions of a pool return once their work is enqueued on the stream, and afterwards access no host
 * memory of the caller except memory from qvl_host_alloc that was passed to them. Work on one stream runs in
 * order. The scratch memory of an engine belongs to one stream at a time: a call that computes on another
 * stream first waits, on the device, for the work enqueued before. Copies do not wait for work on other
 * streams, so a copy on a second stream overlaps with a step; use events to order dependent work.
 *
 * Compatibility. Every struct that a caller fills begins with its size, or is passed in an array along with
 * the size of one element (the stride). If the caller's struct is older, missing fields are read as zero,
 * which selects the older behaviour; if it is newer, fields unknown to this library are ignored. Set `size`
 * with QVL_INIT, as in `qvl_config config = QVL_INIT(qvl_config);`. Fields called reserved must be 0.
 */
#ifndef QWENVL_H
#define QWENVL_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(_WIN32)
#define QVL_API
#else
#define QVL_API __attribute__((visibility("default")))
#endif

#define QVL_VERSION_MAJOR 0
#define QVL_VERSION_MINOR 2
#define QVL_INIT(type) {sizeof(type)}

/* ---- errors ------------------------------------------------------------------------------------------- */

typedef int32_t qvl_status;
enum {
  QVL_OK = 0,
  QVL_INVALID = 1,     /* an invalid argument; nothing was computed */
  QVL_BAD_WEIGHT = 2,  /* a weight is missing, repeated or wrong in shape, dtype, length, alignment or device;
                          a wrong matrix of an adapter; a damaged parameter file */
  QVL_UNSUPPORTED = 3, /* not supported by this build or this machine */
  QVL_NO_MEMORY = 4,
  QVL_STOPPED = 5, /* the callback of qvl_generate requested a stop */
  QVL_INTERNAL = 6
};

typedef struct qvl_error {
  char message[512]; /* one line, zero-terminated */
} qvl_error;

/* ---- data types --------------------------------------------------------------------------------------- */

/* Storage type of a weight. Matrices are [out, in], row-major. */
typedef int32_t qvl_dtype;
enum {
  QVL_FLOAT32 = 0,
  QVL_BFLOAT16 = 1,
  /* Created by qvl_pack. */
  QVL_INT8 = 2,      /* one scale per row */
  QVL_INT4_G64 = 3,  /* one scale per 64 values of a row */
  QVL_INT4_G128 = 4, /* one scale per 128 values of a row */
  QVL_FLOAT16 = 5,   /* IEEE half precision */
  /* The integers of a GPTQ or AWQ checkpoint, with one scale and one zero point per group of 32, 64 or 128
     values of a row. Created by qvl_pack_groups. */
  QVL_UINT4_G32 = 6,
  QVL_UINT4_G64 = 7,
  QVL_UINT4_G128 = 8,
  QVL_UINT8_G32 = 9,
  QVL_UINT8_G64 = 10,
  QVL_UINT8_G128 = 11,
  QVL_INT32 = 12, /* only for the column order of a matrix, NAME.order; see qvl_tensor */
  QVL_DTYPES = 13
};

typedef int32_t qvl_device;
enum { QVL_DEVICE_CPU = 0, QVL_DEVICE_CUDA = 1 };

typedef void* qvl_stream;

/* ISA of the CPU back end. Values other than QVL_ISA_BEST are for tests and comparisons. */
typedef int32_t qvl_isa;
enum {
  QVL_ISA_BEST = 0, /* the best ISA of this machine */
  QVL_ISA_GENERIC = 1,
  QVL_ISA_AVX2 = 2,       /* with FMA and F16C */
  QVL_ISA_AVX512 = 3,     /* F, BW, VL, DQ and VNNI */
  QVL_ISA_AVX512_BF16 = 4 /* QVL_ISA_AVX512 with BF16 and VBMI */
};

/* Compute type: on a CPU the type in which the matrix products and the attention of prompts and images
 * multiply unless weights are float32 (see qvl_tensor); on a GPU that of all matrix products, and of the
 * activations. */
typedef int32_t qvl_compute;
enum {
  QVL_COMPUTE_BEST = 0,     /* CPU: bfloat16 with QVL_ISA_AVX512_BF16, else float32. GPU: float16 if it
                               lacks bfloat16 instructions or if wte.weight (without a language stage
                               visual.positional_embedding) is float16, else bfloat16 */
  QVL_COMPUTE_FLOAT32 = 1,  /* CPU only: QVL_ISA_AVX512 replaces QVL_ISA_AVX512_BF16; decode steps multiply
                               QVL_UINT* weights with float32 activations, which is slow */
  QVL_COMPUTE_BFLOAT16 = 2, /* QVL_UNSUPPORTED on a CPU with another ISA than QVL_ISA_AVX512_BF16, and on a
                               GPU below compute capability 8.0 */
  QVL_COMPUTE_FLOAT16 = 3   /* GPU only */
};

/* ---- devices ------------------------------------------------------------------------------------------ */

typedef struct qvl_device_info {
  uint32_t size;         /* sizeof(qvl_device_info), set by the caller */
  char name[128];        /* "AMD EPYC 9354", "NVIDIA H200" */
  uint64_t memory_bytes; /* CPU: within the limit of the process's container; GPU: all of its memory */
  uint64_t free_bytes;
  int32_t threads;       /* CPU: default number of threads of an engine; GPU: multiprocessors */
  int32_t compute_major; /* GPU: compute capability; 0 on a CPU */
  int32_t compute_minor;
  char isa[32]; /* CPU: name of QVL_ISA_BEST, such as "avx512_bf16" */
} qvl_device_info;

/* Number of usable devices of a kind. CPU: 1. CUDA: number of GPUs; 0 without the CUDA back end or driver. */
QVL_API int32_t qvl_device_count(qvl_device device);
QVL_API qvl_status qvl_get_device_info(qvl_device device, int32_t index, qvl_device_info* info,
                                       qvl_error* error);

/* ---- config ------------------------------------------------------------------------------------------- */

enum { QVL_STAGE_VISION = 1, QVL_STAGE_LANGUAGE = 2 };

/* Sizes of the model, and the device. Names are those of the model's config.json, shortened; where they
 * differ otherwise, the comment quotes the name in config.json. */
typedef struct qvl_config {
  uint32_t size;   /* sizeof(qvl_config) */
  uint32_t stages; /* QVL_STAGE_VISION, QVL_STAGE_LANGUAGE or both; their weights are required */
  qvl_device device;
  int32_t device_index; /* index of the GPU; 0 on a CPU */
  int32_t n_threads;    /* CPU: number of threads; 0: OMP_NUM_THREADS if it is 1 to 1024, else the number of
                           CPUs available to the process */
  qvl_isa isa;
  int32_t max_tokens; /* maximum number of tokens per pass over the layers, which determines the scratch
                         memory; larger batches are split; 0: 512, on a GPU 2048 */

  /* The language model. hidden = heads * head_dim. */
  int32_t hidden;
  int32_t layers;
  int32_t heads;
  int32_t head_dim;  /* even; "kv_channels" */
  int32_t mlp_width; /* half of "intermediate_size", which is the sum of the widths of w1 and w2 */
  int32_t vocab;
  float norm_epsilon;
  int32_t seq_length;    /* training sequence length, beyond which NTK and logn scaling apply */
  int32_t max_positions; /* longest sequence; "max_position_embeddings" */
  float rotary_base;
  int32_t dynamic_ntk; /* 0 or 1 */
  int32_t logn;        /* 0 or 1 */

  /* The vision tower, and the resampler, whose width is `hidden` and whose head_dim is 128. */
  int32_t image_size; /* height and width in pixels, a multiple of patch_size */
  int32_t patch_size;
  int32_t vision_width;
  int32_t vision_layers;
  int32_t vision_heads;
  int32_t vision_mlp_width; /* vision_width * "mlp_ratio" */
  int32_t n_queries;        /* features per image */

  /* Since 0.2. */
  qvl_compute compute; /* compute type */
} qvl_config;

/* ---- weights ------------------------------------------------------------------------------------------ */

/* Weight, identified by its canonical name: Hugging Face's without the leading "transformer.". H = hidden,
 * M = mlp_width, V = vocab, W = vision_width, U = vision_mlp_width, P = patches of an image, Q = n_queries,
 * p = patch_size:
 *
 *   wte.weight [V, H]; ln_f.weight [H]; lm_head.weight [V, H]
 *   for each layer, prefixed with h.0. to h.{layers-1}.
 *     ln_1.weight [H]; attn.c_attn.weight [3H, H]; attn.c_attn.bias [3H]; attn.c_proj.weight [H, H];
 *     ln_2.weight [H]; mlp.w1.weight [M, H]; mlp.w2.weight [M, H]; mlp.c_proj.weight [H, M]
 *   visual.conv1.weight [W, 3, p, p]; visual.positional_embedding [P, W]; visual.ln_pre.{weight,bias} [W]
 *   for each layer, prefixed with visual.transformer.resblocks.0. to {vision_layers-1}.
 *     ln_1.{weight,bias} [W]; attn.in_proj.weight [3W, W], attn.in_proj.bias [3W];
 *     attn.out_proj.weight [W, W], attn.out_proj.bias [W]; ln_2.{weight,bias} [W];
 *     mlp.c_fc.weight [U, W], mlp.c_fc.bias [U]; mlp.c_proj.weight [W, U], mlp.c_proj.bias [W]
 *   prefixed with visual.attn_pool.
 *     kv_proj.weight [H, W], absent if W = H; ln_kv.{weight,bias} [H]; query [Q, H]; ln_q.{weight,bias} [H];
 *     pos_embed [Q, H]; key_pos_embed [P, H]; attn.in_proj_weight [3H, H]; attn.in_proj_bias [3H];
 *     attn.out_proj.weight [H, H], attn.out_proj.bias [H]
 *   visual.ln_post.{weight,bias} [H]; visual.proj [H, H]
 *
 * Below, a matrix is a weight that multiplies activations: all weights above with at least two dimensions but
 * wte.weight, query, positional_embedding, pos_embed and key_pos_embed. Every matrix is [out, in] here.
 * visual.proj, [in, out] in checkpoints, must be transposed; positional_embedding and key_pos_embed must be
 * resized to the image's patches.
 *
 * Every weight may be QVL_FLOAT32, QVL_BFLOAT16 or QVL_FLOAT16, and matrices may be quantized. Types may be
 * mixed. A matrix NAME [out, in] may have a permutation NAME.order, QVL_INT32 [in] ("act-order" of GPTQ):
 * stored column j multiplies input order[j], y[o] = sum over j of value[o, j] * x[order[j]]. On a GPU mlp.w1
 * and mlp.w2 of a layer must have the same order and, if one of them is quantized, the same type; matrices of
 * the vision stage must have no order.
 *
 * On a CPU products with float32 weights run in float32. With other weights the products of prompts and
 * images round the activations to the compute type (qvl_compute). The products of decode steps and of lm_head
 * keep the activations in float32, unless the weight is quantized: then they round the activations to 8 bits,
 * with one scale per 32 values (for QVL_UINT* only if `compute` is not QVL_COMPUTE_FLOAT32). Attention of
 * prompts and images multiplies in the compute type, unless the weights that yield its keys are float32. All
 * other operations are float32. On a GPU all products multiply in the compute type, to which float32 weights
 * are rounded, and add in float32.
 */
typedef struct qvl_tensor {
  const char* name;
  const void* data; /* aligned to 16 bytes for matrices and wte.weight, otherwise to 4 bytes (QVL_BFLOAT16,
                       QVL_FLOAT16: 2) */
  qvl_dtype dtype;
  qvl_device device; /* device of `data`: the CPU, or the engine's GPU. A CPU engine uses matrices and
                        wte.weight in place, a GPU engine those that are on its GPU in the layout of its
                        kernels; other data is copied once. NAME.order: the CPU */
  int32_t n_dims;
  int64_t shape[4]; /* of the unpacked values, for every dtype */
  uint64_t bytes;   /* length of `data`, checked against shape and dtype */
} qvl_tensor;

/* Bytes of an [out, in] matrix stored as `dtype`, 0 for invalid arguments. `out` and `in` are 1 to 2^31, and
 * the matrix has at most 2^58 values, with padding. QVL_INT32: `in` must be 1.
 *
 * Below, `padded` is `in` rounded up to a multiple of 128, `group` the group size.
 *
 * QVL_INT8: int8 [out, padded] and float32 [out] scales; value = scale * integer. Padding has the value 0.
 *
 * QVL_INT4_G*: uint8 [out, padded / 2] and bfloat16 [out, padded / group] scales;
 * value = scale * (nibble - 8). 128 values of a row occupy 64 bytes, 32 little-endian 16-bit words: value
 * 32 * j + i is nibble j, counted from the lowest bits, of word i. Padding has the value 0.
 *
 * QVL_UINT4_G*, QVL_UINT8_G*: uint8 [out, padded / 2] with nibbles in the order of QVL_INT4_G*, or uint8
 * [out, padded]; float16 [out, padded / group] scales; float16 [out, padded / group] zero points,
 * integers from 0 to 256. value = scale * (integer - zero). Padding: integers, and scales and zero points of
 * groups without values, are 0.
 */
QVL_API uint64_t qvl_packed_bytes(qvl_dtype dtype, int64_t out, int64_t in);

/* Convert a float32 matrix [out, in] to `dtype` at `packed`, rounding to nearest; both in host memory.
 * Quantization is symmetric. The scale of a row (QVL_INT8) is its largest magnitude / 127. The scale of a
 * group (QVL_INT4_G*) is the one with the least squared error among several candidates near -v / 8, where v
 * is the group's value with the largest magnitude: scales may be negative. QVL_INVALID: a NaN or infinity in
 * a matrix to be quantized, QVL_INT32, or a dtype that qvl_pack_groups creates.
 */
QVL_API qvl_status qvl_pack(qvl_dtype dtype, int64_t out, int64_t in, const float* values, void* packed,
                            uint64_t packed_bytes, qvl_error* error);

/* Pack quantized integers [out, in] with one scale and one zero point per group, losslessly, as `dtype`, one
 * of QVL_UINT4_G* and QVL_UINT8_G*, at `packed`; all in host memory. integers: below 16 for 4 bits. scales,
 * zeros: float16 [out, groups], groups = in / group rounded up. QVL_INVALID: an integer out of range, a scale
 * that is not finite, or a zero point that is not an integer from 0 to 256.
 */
QVL_API qvl_status qvl_pack_groups(qvl_dtype dtype, int64_t out, int64_t in, const uint8_t* integers,
                                   const uint16_t* scales, const uint16_t* zeros, void* packed,
                                   uint64_t packed_bytes, qvl_error* error);

/* Unpack a packed matrix to float32 values [out, in]. */
QVL_API qvl_status qvl_unpack(qvl_dtype dtype, int64_t out, int64_t in, const void* packed,
                              uint64_t packed_bytes, float* values, qvl_error* error);

/* ---- engine ------------------------------------------------------------------------------------------- */

typedef struct qvl_engine qvl_engine;

/* Weights, which one or more engines use: CPU engines share a single copy; for GPU engines see qvl_tensor.
 *
 * qvl_weights_create: copies the array and the names, but refers to the data, which must stay unchanged until
 * the weights and the last engine created from them are freed. tensor_size: sizeof(qvl_tensor).
 *
 * qvl_weights_open: maps an exported stage's parameter file (PREFIX.pdiparams), which contains the names of
 * its tensors (paddlemix_qwenvl_plugin/artifact/params_file.py documents the format). Data is read on first
 * use, and processes that map the same file share one copy. QVL_INVALID: the path is no readable file;
 * QVL_BAD_WEIGHT: a damaged file, or a file without names, as written by exports before contract version 3.
 *
 * A mapped file must not be truncated or written to; replace it by renaming another file over it.
 *
 * qvl_weights_get: tensor i of qvl_weights_count. Its name and data are valid until the weights are freed.
 */
typedef struct qvl_weights qvl_weights;
QVL_API qvl_status qvl_weights_create(const qvl_tensor* tensors, int64_t n_tensors, uint32_t tensor_size,
                                      qvl_weights** weights, qvl_error* error);
QVL_API qvl_status qvl_weights_open(const char* path, qvl_weights** weights, qvl_error* error);
QVL_API int64_t qvl_weights_count(const qvl_weights* weights);
QVL_API qvl_status qvl_weights_get(const qvl_weights* weights, int64_t i, qvl_tensor* tensor,
                                   uint32_t tensor_size, qvl_error* error);
/* Engines created from the weights remain valid. */
QVL_API void qvl_weights_free(qvl_weights* weights);

/* Create an engine. The weights must contain every tensor that the config requires; others are ignored.
 * Vectors, and the tables of the vision tower and the resampler, are copied as float32.
 */
QVL_API qvl_status qvl_engine_create(const qvl_config* config, qvl_weights* weights, qvl_engine** engine,
                                     qvl_error* error);

/* Pools, events and adapters of the engine must have been freed before. */
QVL_API void qvl_engine_free(qvl_engine* engine);

/* Low-rank adapters (LoRA): y = W * x + scale * B * (A * x), not merged into the base weights, which may be
 * quantized and are shared by all sequences, with and without an adapter. The number of adapters is not
 * limited.
 *
 * Targets are the matrices of the language model's layers and lm_head; see qvl_tensor for the names. A matrix
 * without an entry is not changed. A and B are copied. Their products follow the rules for weights of their
 * dtype (qvl_tensor). QVL_BAD_WEIGHT: a wrong entry, such as an unknown or repeated name, a wrong shape, or a
 * value that is not finite. On a GPU A and B are rounded to the compute type.
 */
typedef struct qvl_adapter qvl_adapter;
typedef struct qvl_adapter_matrix {
  const char* name; /* of the base matrix: "h.0.attn.c_attn.weight" */
  const void* a;    /* [rank, in], host memory, aligned to the size of its type */
  const void* b;    /* [out, rank], host memory */
  qvl_dtype dtype;  /* of a and b: QVL_FLOAT32, QVL_BFLOAT16 or QVL_FLOAT16 */
  float scale;      /* typically alpha / rank */
  int64_t out;
  int64_t in;
  int64_t rank; /* at least 1; may differ between matrices */
} qvl_adapter_matrix;

/* matrix_size: sizeof(qvl_adapter_matrix). */
QVL_API qvl_status qvl_adapter_create(qvl_engine* engine, const qvl_adapter_matrix* matrices,
                                      int64_t n_matrices, uint32_t matrix_size, qvl_adapter** adapter,
                                      qvl_error* error);
/* No step with the adapter may be running. */
QVL_API void qvl_adapter_free(qvl_adapter* adapter);

/* Version of the library, such as "0.2"; it may be newer than the header used by the caller. */
QVL_API const char* qvl_version(void);

/* Description of the back end for logs: "cpu avx512_bf16, 2 threads". Valid until the engine is freed. */
QVL_API const char* qvl_engine_describe(const qvl_engine* engine);

/* Allocate device memory, aligned to 64 bytes, for callers without the CUDA runtime. `bytes` may be 0. */
QVL_API qvl_status qvl_alloc(qvl_engine* engine, uint64_t bytes, void** memory, qvl_error* error);
QVL_API void qvl_dealloc(qvl_engine* engine, void* memory);

/* Copy between host and device memory, in any direction, in stream order; returns when the copy is done. */
QVL_API qvl_status qvl_copy(qvl_engine* engine, void* to, const void* from, uint64_t bytes, qvl_stream stream,
                            qvl_error* error);

/* Allocate page-locked host memory, which a GPU can access asynchronously; ordinary memory on a CPU. */
QVL_API qvl_status qvl_host_alloc(qvl_engine* engine, uint64_t bytes, void** memory, qvl_error* error);
QVL_API void qvl_host_free(qvl_engine* engine, void* memory);

/* qvl_copy without waiting for the copy to finish; host memory must be from qvl_host_alloc. */
QVL_API qvl_status qvl_copy_async(qvl_engine* engine, void* to, const void* from, uint64_t bytes,
                                  qvl_stream stream, qvl_error* error);

/* Events: points in the work of a stream. An event is done when the work enqueued before its last record is
 * done, or if it was never recorded. qvl_event_query sets *done to 1 or 0. qvl_event_wait blocks the calling
 * thread. */
typedef struct qvl_event qvl_event;
QVL_API qvl_status qvl_event_create(qvl_engine* engine, qvl_event** event, qvl_error* error);
QVL_API qvl_status qvl_event_record(qvl_event* event, qvl_stream stream, qvl_error* error);
QVL_API qvl_status qvl_event_query(qvl_event* event, int32_t* done, qvl_error* error);
QVL_API qvl_status qvl_event_wait(qvl_event* event, qvl_error* error);
QVL_API void qvl_event_free(qvl_event* event);

/* Wait for all work on the stream. */
QVL_API qvl_status qvl_synchronize(qvl_engine* engine, qvl_stream stream, qvl_error* error);

/* ---- vision ------------------------------------------------------------------------------------------- */

/* Encode images float32 [n, 3, image_size, image_size], RGB, normalised with the mean and standard deviation
 * of CLIP -> features float32 [n, n_queries, hidden]; both in device memory.
 */
QVL_API qvl_status qvl_encode_images(qvl_engine* engine, int64_t n, const float* images, float* features,
                                     qvl_stream stream, qvl_error* error);

/* ---- paged KV cache ----------------------------------------------------------------------------------- */

typedef struct qvl_kv_pool qvl_kv_pool;

/* Create a KV pool: n_blocks blocks of block_tokens tokens (1 to 256; 32 is recommended) in all layers,
 * stored as QVL_FLOAT32, QVL_BFLOAT16, QVL_FLOAT16 or QVL_INT8 (a float32 scale per token and head). The
 * caller assigns blocks to sequences: token t of a sequence is in slot t % block_tokens of block
 * blocks[t / block_tokens] of its block table. Sequences may share blocks for reading. On a CPU the memory
 * of a block is not touched before the block is written.
 */
QVL_API qvl_status qvl_kv_pool_create(qvl_engine* engine, int32_t n_blocks, int32_t block_tokens,
                                      qvl_dtype dtype, qvl_kv_pool** pool, qvl_error* error);
QVL_API void qvl_kv_pool_free(qvl_kv_pool* pool);

/* Size in bytes of a pool with these parameters; 0 if they are invalid. A pool on a GPU occupies one block
 * more, for rows that pad a decode step. */
QVL_API uint64_t qvl_kv_pool_bytes(const qvl_engine* engine, int32_t n_blocks, int32_t block_tokens,
                                   qvl_dtype dtype);

/* Copy blocks, with keys and values of all layers: block from[i] to block to[i] of the pool, in order of i.
 * For copy-on-write of a shared block. */
QVL_API qvl_status qvl_kv_copy_blocks(qvl_kv_pool* pool, int32_t n, const int32_t* from, const int32_t* to,
                                      qvl_stream stream, qvl_error* error);

/* Copy blocks to and from host memory of n * qvl_kv_pool_bytes(engine, 1, block_tokens, dtype) bytes.
 * The layout is private: it is valid only for pools with the same model sizes, block_tokens, dtype, library
 * version and device. */
QVL_API qvl_status qvl_kv_read_blocks(qvl_kv_pool* pool, int32_t n, const int32_t* blocks, void* host,
                                      uint64_t bytes, qvl_stream stream, qvl_error* error);
QVL_API qvl_status qvl_kv_write_blocks(qvl_kv_pool* pool, int32_t n, const int32_t* blocks, const void* host,
                                       uint64_t bytes, qvl_stream stream, qvl_error* error);

/* ---- forward ------------------------------------------------------------------------------------------ */

/* A sequence's tokens in a batch: a prompt, a chunk of a prompt, or generated tokens, of which a decode step
 * has one. */
typedef struct qvl_sequence {
  int32_t n_new;      /* tokens in this batch, at least 1 */
  int32_t n_past;     /* tokens of the sequence before these, whose keys and values are in the pool */
  int32_t prompt_len; /* length of the entire prompt, at least 1; determines the rotary base of all tokens */
  int32_t n_blocks;   /* length of `blocks`: n_past + n_new tokens must fit */
  const int32_t* blocks; /* block table, host memory */

  /* Since 0.2. */
  uint32_t flags; /* QVL_SEQUENCE_* */
  uint32_t reserved;
  const qvl_adapter* adapter; /* adapter of all tokens, also of those in the pool; NULL: none */
} qvl_sequence;

enum {
  QVL_SEQUENCE_NO_LOGITS = 1, /* compute no logits, as for all chunks of a prompt but the last */
  QVL_SEQUENCE_GENERATED = 2 /* compute all tokens as decode steps, also those within the prompt: see below */
};

/* Reproducibility. Tokens at positions below prompt_len are computed as prompts; the others, and those of a
 * sequence with QVL_SEQUENCE_GENERATED, as decode steps, whose arithmetic differs. With this flag, an earlier
 * answer in the prompt of a conversation gets the same keys and values as when it was generated. Apart from
 * this, a token's results depend only on the token, the preceding ones, prompt_len and the adapter, bit for
 * bit. They do not depend on other entries of the batch, on the division of a prompt into chunks, or on
 * whether the preceding keys and values were computed in this call or an earlier one. Several entries of a
 * batch may belong to one sequence, in order of position.
 */

/* Tokens [start, start + count) of the batch, counted over all sequences, are vectors instead of ids: the
 * features of an image, or a part of them. */
typedef struct qvl_span {
  int32_t start;
  int32_t count;
  const float* features; /* float32 [count, hidden], device memory */
} qvl_span;

typedef struct qvl_batch {
  uint32_t size;                 /* sizeof(qvl_batch) */
  int32_t n_sequences;           /* at least 1 */
  const qvl_sequence* sequences; /* host memory */
  const int32_t* tokens; /* concatenated ids of all sequences, host or device memory; ids covered by a span
                            are not read */
  int32_t n_spans;       /* spans do not overlap and are in order of start */
  int32_t reserved;      /* 0 */
  const qvl_span* spans; /* host memory */

  /* Since 0.2: strides of the two arrays in bytes; 0 selects those of version 0.1, 24 and 16. */
  uint32_t sequence_size; /* sizeof(qvl_sequence) */
  uint32_t span_size;     /* sizeof(qvl_span) */
} qvl_batch;

/* Run the batch through the layers, write its keys and values into the pool, and compute the logits of the
 * last token of each sequence without QVL_SEQUENCE_NO_LOGITS, in the order of the batch: float32 [rows,
 * vocab], device memory. With logits NULL only the pool is written.
 *
 * An id outside the vocabulary is QVL_INVALID if the ids are in ordinary host memory; in GPU or page-locked
 * memory it is clamped.
 */
QVL_API qvl_status qvl_forward(qvl_engine* engine, qvl_kv_pool* pool, const qvl_batch* batch, float* logits,
                               qvl_stream stream, qvl_error* error);

/* ---- sampling ----------------------------------------------------------------------------------------- */

/* Sampling parameters of a row of logits. They are applied in this order: forbidden ids, penalties,
 * temperature, top-k, top-p. A row with a NaN, a positive infinity or no finite value yields the token -1 and
 * increments no count. The random number of a draw is splitmix64's output for the state
 * seed + (counter + 1) * 0x9E3779B97F4A7C15, with its upper 53 bits taken as a fraction. The library has no
 * random state: the same seed and counter give the same random number on every device.
 */
typedef struct qvl_sampling {
  uint32_t size;     /* sizeof(qvl_sampling) */
  float temperature; /* 0 to 100; 0: greedy, with the lowest id in a tie */
  float top_p;       /* 0 (the most likely token) to 1: the smallest set with at least this probability */
  int32_t top_k;     /* sample from the k most likely tokens; 0: all */
  float repetition_penalty; /* 1e-6 to 100; 1: none. Divides the positive logits of generated tokens and
                               multiplies their negative ones */
  float frequency_penalty;  /* -100 to 100; subtracted from a token's logit for each time it was generated */
  float presence_penalty;   /* -100 to 100; subtracted once from the logit of each generated token */
  int32_t n_forbidden;
  const int32_t* forbidden; /* ids whose logit is set to -1e10, such as stop tokens before the minimum length;
                               host memory */
  uint64_t seed;
  uint64_t counter; /* index of this draw; 0 for the first of a sequence */
} qvl_sampling;

/* Initialise all fields but `size`, which must be set before: greedy sampling without penalties. */
QVL_API void qvl_sampling_init(qvl_sampling* sampling);

/* Sample a token for each of n rows.
 *
 * logits: float32 [n, vocab], device memory; not changed.
 * sampling: [n], host memory. sampling_size: sizeof(qvl_sampling).
 * counts: occurrences of each generated token per row, n pointers in host memory to int32 [vocab] in device
 * memory; the count of the sampled token is incremented. NULL, or NULL for a row: no counts, and the row must
 * not have penalties. tokens: int32 [n], device memory.
 */
QVL_API qvl_status qvl_sample(qvl_engine* engine, int32_t n, const float* logits,
                              const qvl_sampling* sampling, uint32_t sampling_size, int32_t* const* counts,
                              int32_t* tokens, qvl_stream stream, qvl_error* error);

/* ---- step --------------------------------------------------------------------------------------------- */

/* A step of a serving loop: qvl_forward and qvl_sample in one call. */
typedef struct qvl_step_args {
  uint32_t size;          /* sizeof(qvl_step_args) */
  uint32_t sampling_size; /* sizeof(qvl_sampling) */
  const qvl_batch* batch;
  /* The arrays have one row per sequence without QVL_SEQUENCE_NO_LOGITS, in the order of the batch. */
  int32_t rows;                 /* number of rows, checked against the batch */
  int32_t n_logprobs;           /* 0 to 64, at most vocab: number of the most likely tokens to return */
  const qvl_sampling* sampling; /* [rows], host memory */
  int32_t* const* counts;       /* as for qvl_sample */
  int32_t* tokens;              /* int32 [rows] */
  float* logprobs;     /* float32 [rows]: natural logarithm of the chosen token's probability under the
                          unchanged logits; may be NULL */
  int32_t* top_tokens; /* int32 [rows, n_logprobs], in descending order under the unchanged logits, the lower
                          id first in a tie; NULL if n_logprobs is 0 */
  float* top_logprobs; /* float32 [rows, n_logprobs] */
  float* logits;       /* float32 [rows, vocab], device memory; NULL: scratch memory of the engine */
} qvl_step_args;

/* Run one step. tokens, logprobs, top_tokens and top_logprobs are in device memory, or in host memory, for
 * which the call waits unless it is from qvl_host_alloc. A row with the token -1 has top_tokens -1 and
 * log-probabilities NaN. With rows 0 only the pool is written.
 */
QVL_API qvl_status qvl_step(qvl_engine* engine, qvl_kv_pool* pool, const qvl_step_args* args,
                            qvl_stream stream, qvl_error* error);

/* ---- generate ----------------------------------------------------------------------------------------- */

typedef struct qvl_request {
  int32_t n_tokens;             /* tokens of the prompt, at least 1 */
  int32_t n_spans;              /* length of `spans`: one per image, or per part of one */
  const int32_t* tokens;        /* [n_tokens], host memory */
  const qvl_span* spans;        /* `start` is relative to the beginning of this prompt */
  int32_t max_new;              /* at least 1; n_tokens + max_new is at most max_positions */
  int32_t min_new;              /* stop tokens are forbidden before this number of tokens */
  const qvl_sampling* sampling; /* a single struct. `counter`: counter of the first token, one more for each
                                   next token. `forbidden`: only for the first token. NULL: greedy */
  uint32_t span_size;           /* sizeof(qvl_span); 0: 16, the size in version 0.1 */
  uint32_t reserved;
  const qvl_adapter* adapter; /* adapter of all tokens; NULL: none */
} qvl_request;

enum { QVL_FINISH_END = 1, QVL_FINISH_LENGTH = 2 };

/* Callback with the tokens of a step. Called on the thread that called qvl_generate, in the order of steps,
 * while a GPU may already compute the next step. Return 0 to continue; any other value makes qvl_generate
 * return QVL_STOPPED, with the tokens and results of the steps so far.
 *
 * user: the argument of qvl_generate. step: number of the step, from 0. n: number of requests with a token in
 * this step; requests, tokens: their indices and tokens [n].
 */
typedef int32_t (*qvl_on_step)(void* user, int32_t step, int32_t n, const int32_t* requests,
                               const int32_t* tokens);

typedef struct qvl_result {
  int32_t n_tokens; /* number of generated tokens, including a final stop token */
  int32_t finish;   /* QVL_FINISH_END (stop token) or QVL_FINISH_LENGTH; 0: stopped by the callback */
  int32_t reserved[2];
} qvl_result;

/* Generate completions for a batch of n requests, 1 to 65536.
 *
 * end_ids: stop tokens, int32 [n_end], host memory; ids outside the vocabulary are ignored.
 * pool: NULL to create a pool for this call, float32 if h.0.attn.c_attn.weight is float32, else bfloat16. A
 * given pool needs (n_tokens + max_new) / block_tokens blocks for each request, rounded up, and is
 * overwritten. tokens: int32 [n, stride], host memory; row i receives the tokens of request i. stride: at
 * least the largest max_new. results: [n]. request_size: sizeof(qvl_request). on_step: may be NULL. Each step
 * takes and releases the engine's lock, so that steps of concurrent calls alternate. QVL_INTERNAL: a row of
 * logits yields the token -1 (qvl_sampling).
 */
QVL_API qvl_status qvl_generate(qvl_engine* engine, qvl_kv_pool* pool, int32_t n, const qvl_request* requests,
                                uint32_t request_size, int32_t n_end, const int32_t* end_ids,
                                qvl_on_step on_step, void* user, int64_t stride, int32_t* tokens,
                                qvl_result* results, qvl_stream stream, qvl_error* error);

#ifdef __cplusplus
}
#endif

#endif
