/* The Qwen-VL engine: images -> features, packed tokens -> logits, logits -> tokens.
 *
 * A C interface without framework types. A caller
 *   1. makes qvl_weights of named tensors or of an exported file, fills a qvl_config, and makes a qvl_engine;
 *   2. encodes images with qvl_encode_images;
 *   3. either calls qvl_generate, or makes a qvl_kv_pool and drives qvl_step (or qvl_forward and qvl_sample).
 *
 * Errors. Functions that can fail return a qvl_status, QVL_OK being 0, and take a qvl_error as their last
 * argument, which may be NULL. On failure it holds a one-line message. No C++ exception leaves the library.
 * After a failure the outputs are unspecified; engine and pool stay usable.
 *
 * Threads. There is no global state: any number of engines live in one process. Every function may be called
 * from any thread. Calls that compute on the same engine run one after another (the engine holds a lock);
 * different engines run at the same time. Freeing a handle while another call uses it is the caller's error.
 *
 * Memory. "Device memory" below means memory of the engine's device; for QVL_DEVICE_CPU that is any memory.
 * "Host memory" is ordinary memory on every device. Structs and arrays of lengths, positions and parameters
 * are in host memory and are read before the call returns.
 *
 * Streams. A NULL qvl_stream means the engine's own stream. On the CPU a call has finished when it returns,
 * whatever the stream. On a GPU qvl_step, qvl_forward, qvl_encode_images, qvl_sample, qvl_copy_async and the
 * block functions of a pool return once their work is enqueued on the stream, and touch no host memory of the
 * caller afterwards, except memory from qvl_host_alloc that was passed to them. Work on one stream runs in
 * order. The scratch memory of an engine belongs to one stream at a time: a call that computes on another
 * stream first waits, on the device, for the work enqueued before. Copies do not, so that a copy on a second
 * stream runs beside a step; use events to order dependent work.
 *
 * Growth. Every struct that a caller fills begins with its size or is passed in an array beside the size of
 * one element (the stride); fields that an older caller's struct does not have are read as zero, which keeps
 * the older meaning, and fields that this library does not know are not read. Set `size` with QVL_INIT:
 * qvl_config config = QVL_INIT(qvl_config); Fields called reserved must be 0.
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
  QVL_INVALID = 1,     /* an argument out of its range; nothing was computed */
  QVL_BAD_WEIGHT = 2,  /* a weight is missing, unknown, or of the wrong shape, type or length */
  QVL_UNSUPPORTED = 3, /* not supported by this build or this machine */
  QVL_NO_MEMORY = 4,
  QVL_STOPPED = 5, /* the callback of qvl_generate requested a stop */
  QVL_INTERNAL = 6
};

typedef struct qvl_error {
  char message[512]; /* one line, zero-terminated */
} qvl_error;

/* ---- types of numbers --------------------------------------------------------------------------------- */

/* Storage type of a weight. Matrices are [out, in], rows contiguous. */
typedef int32_t qvl_dtype;
enum {
  QVL_FLOAT32 = 0,
  QVL_BFLOAT16 = 1,
  /* Made by qvl_pack, see there. */
  QVL_INT8 = 2,      /* a scale for each row */
  QVL_INT4_G64 = 3,  /* a scale for each 64 values of a row */
  QVL_INT4_G128 = 4, /* a scale for each 128 values of a row */
  QVL_FLOAT16 = 5,   /* IEEE half precision */
  /* The integers of a GPTQ or AWQ checkpoint, with a scale and a zero point for each group of 32, 64 or 128
     values of a row. Made by qvl_pack_groups, see there. */
  QVL_UINT4_G32 = 6,
  QVL_UINT4_G64 = 7,
  QVL_UINT4_G128 = 8,
  QVL_UINT8_G32 = 9,
  QVL_UINT8_G64 = 10,
  QVL_UINT8_G128 = 11,
  QVL_INT32 = 12, /* vectors of indices only */
  QVL_DTYPES = 13
};

typedef int32_t qvl_device;
enum { QVL_DEVICE_CPU = 0, QVL_DEVICE_CUDA = 1 };

typedef void* qvl_stream;

/* ISA of the CPU back end. Only tests and comparisons need another than QVL_ISA_BEST. */
typedef int32_t qvl_isa;
enum {
  QVL_ISA_BEST = 0, /* the best ISA of this machine */
  QVL_ISA_GENERIC = 1,
  QVL_ISA_AVX2 = 2,       /* with FMA and F16C */
  QVL_ISA_AVX512 = 3,     /* F, BW, VL, DQ and VNNI */
  QVL_ISA_AVX512_BF16 = 4 /* and BF16, VBMI */
};

/* Compute type of the products of prompts and images. */
typedef int32_t qvl_compute;
enum {
  QVL_COMPUTE_BEST = 0,     /* CPU: bfloat16 if it has instructions for it, else float32 */
  QVL_COMPUTE_FLOAT32 = 1,  /* CPU: without the instructions of QVL_ISA_AVX512_BF16; decode steps multiply
                               QVL_UINT* weights with float32 activations, slowly */
  QVL_COMPUTE_BFLOAT16 = 2, /* QVL_UNSUPPORTED without instructions for it */
  QVL_COMPUTE_FLOAT16 = 3   /* not on a CPU */
};

/* ---- devices ------------------------------------------------------------------------------------------ */

typedef struct qvl_device_info {
  uint32_t size;         /* sizeof(qvl_device_info), set by the caller */
  char name[128];        /* "AMD EPYC 9354", "NVIDIA H200" */
  uint64_t memory_bytes; /* that this process may use: a container's limit counts */
  uint64_t free_bytes;
  int32_t threads;       /* CPU: threads of an engine by default; GPU: multiprocessors */
  int32_t compute_major; /* GPU: compute capability; 0 on a CPU */
  int32_t compute_minor;
  char isa[32]; /* CPU: best of qvl_isa, "avx512_bf16" */
} qvl_device_info;

/* Number of devices of a kind that this library can use: 1 CPU; 0 GPUs without the CUDA back end. */
QVL_API int32_t qvl_device_count(qvl_device device);
QVL_API qvl_status qvl_get_device_info(qvl_device device, int32_t index, qvl_device_info* info,
                                       qvl_error* error);

/* ---- config ------------------------------------------------------------------------------------------- */

enum { QVL_STAGE_VISION = 1, QVL_STAGE_LANGUAGE = 2 };

/* Sizes of the model, and the device. Names and meaning follow the model's config.json. */
typedef struct qvl_config {
  uint32_t size;   /* sizeof(qvl_config) */
  uint32_t stages; /* QVL_STAGE_VISION, QVL_STAGE_LANGUAGE or both: which weights are given */
  qvl_device device;
  int32_t device_index; /* which GPU; 0 on a CPU */
  int32_t n_threads;    /* CPU: 0 for OMP_NUM_THREADS if it is set, else the CPUs this process may use */
  qvl_isa isa;
  int32_t max_tokens; /* tokens in one pass over the layers, which sets the scratch memory; more are split;
                         0: 512, on a GPU 2048 */

  /* The language model. hidden = heads * head_dim. */
  int32_t hidden;
  int32_t layers;
  int32_t heads;
  int32_t head_dim;  /* even; "kv_channels" */
  int32_t mlp_width; /* half of "intermediate_size", which counts gate and value together */
  int32_t vocab;
  float norm_epsilon;
  int32_t seq_length;    /* trained length: where NTK and logn scaling set in */
  int32_t max_positions; /* longest sequence; "max_position_embeddings" */
  float rotary_base;
  int32_t dynamic_ntk; /* 0 or 1 */
  int32_t logn;        /* 0 or 1 */

  /* The vision tower; the resampler's output is `hidden` wide, with heads of 128. */
  int32_t image_size; /* pixels along a side, a multiple of patch_size */
  int32_t patch_size;
  int32_t vision_width;
  int32_t vision_layers;
  int32_t vision_heads;
  int32_t vision_mlp_width;
  int32_t n_queries; /* features of an image */

  /* Since 0.2. */
  qvl_compute compute; /* of the products of prompts and images, and of activations on a GPU */
} qvl_config;

/* ---- weights ------------------------------------------------------------------------------------------ */

/* A weight by its canonical name, which is Hugging Face's without the leading "transformer.". Let H = hidden,
 * M = mlp_width, V = vocab, W = vision_width, U = vision_mlp_width, P = patches of an image, Q = n_queries,
 * p = patch_size:
 *
 *   wte.weight [V, H]; ln_f.weight [H]; lm_head.weight [V, H]; and for each layer, h.0. to h.{layers-1}.
 * before ln_1.weight [H]; attn.c_attn.weight [3H, H]; attn.c_attn.bias [3H]; attn.c_proj.weight [H, H];
 *     ln_2.weight [H]; mlp.w1.weight [M, H]; mlp.w2.weight [M, H]; mlp.c_proj.weight [H, M]
 *   visual.conv1.weight [W, 3, p, p]; visual.positional_embedding [P, W]; visual.ln_pre.{weight,bias} [W];
 *   and for each layer, visual.transformer.resblocks.0. and so on before
 *     ln_1.{weight,bias} [W]; attn.in_proj.weight [3W, W], attn.in_proj.bias [3W]; attn.out_proj.weight [W,
 * W], attn.out_proj.bias [W]; ln_2.{weight,bias} [W]; mlp.c_fc.weight [U, W], mlp.c_fc.bias [U];
 *     mlp.c_proj.weight [W, U], mlp.c_proj.bias [W]
 *   visual.attn_pool. before
 *     kv_proj.weight [H, W], absent if W = H; ln_kv.{weight,bias} [H]; query [Q, H]; ln_q.{weight,bias} [H];
 *     pos_embed [Q, H]; key_pos_embed [P, H]; attn.in_proj_weight [3H, H]; attn.in_proj_bias [3H];
 *     attn.out_proj.weight [H, H], attn.out_proj.bias [H]
 *   visual.ln_post.{weight,bias} [H]; visual.proj [H, H]
 *
 * Every matrix is [out, in] here. visual.proj, which checkpoints keep as [in, out], must be transposed, and
 * the two tables positional_embedding and key_pos_embed must be resized to the image's patches.
 *
 * All may be QVL_FLOAT32, QVL_BFLOAT16 or QVL_FLOAT16; the matrices other than wte.weight may be quantised.
 * Types may be mixed. A matrix NAME [out, in] other than wte.weight may come with a vector NAME.order,
 * QVL_INT32 [in], a permutation ("act-order" of GPTQ): stored column j multiplies input order[j], y[o] = sum
 * over j of value[o, j] x[order[j]]. On a GPU mlp.w1 and mlp.w2 of a layer need the same order, and the
 * vision stage none.
 *
 * Products run in float32 where the weight is float32. Elsewhere the products of prompts
 * and images round their activations to bfloat16 if the machine has instructions for it; those of decode
 * steps, and lm_head's, leave them in float32, but on a CPU round them to 8 bits with a scale for each 32
 * values if the weight is quantised (QVL_UINT*: unless `compute` is QVL_COMPUTE_FLOAT32). Everything else is
 * float32.
 */
typedef struct qvl_tensor {
  const char* name;
  const void* data; /* matrices and wte.weight, which are used in place: 16-byte aligned; else 4-byte
                       aligned (QVL_BFLOAT16, QVL_FLOAT16: 2) */
  qvl_dtype dtype;
  qvl_device device; /* where `data` is. On the engine's device it is kept and used in place; else it is
                        copied once */
  int32_t n_dims;
  int64_t shape[4]; /* of the values, for every type */
  uint64_t bytes;   /* length of `data`, as a check */
} qvl_tensor;

/* Bytes of an [out, in] matrix stored as `dtype`, 0 for invalid arguments. QVL_INT32: `in` must be 1.
 *
 * QVL_INT8:     int8 [out, padded] and float32 [out] scales; value = scale * integer.
 * QVL_INT4_G*:  uint8 [out, padded / 2] and bfloat16 [out, padded / group] scales; value = scale * (nibble -
 * 8). 128 values of a row are 64 bytes, or 32 little-endian words: value 32 j + i is nibble j, counted from
 * the lowest bits, of word i. padded is `in` rounded up to 128; padding has the value 0.
 * QVL_UINT4_G*, QVL_UINT8_G*: uint8 [out, padded / 2] with nibbles in the order of QVL_INT4_G*, or uint8
 * [out, padded]; float16 [out, padded / group] scales; float16 [out, padded / group] zero points, whole
 * numbers from 0 to 256. value = scale * (integer - zero). Padding: integers, scales and zero points are 0.
 */
QVL_API uint64_t qvl_packed_bytes(qvl_dtype dtype, int64_t out, int64_t in);

/* Round a float32 matrix [out, in] (host memory) to `dtype` at `packed` (host memory), to nearest. Symmetric:
 * the scale of a row follows from its largest magnitude; the scale of a group has the least squared error
 * among a few near its largest magnitude / 8. NaN or infinity in the matrix is QVL_INVALID, and so is a type
 * of qvl_pack_groups.
 */
QVL_API qvl_status qvl_pack(qvl_dtype dtype, int64_t out, int64_t in, const float* values, void* packed,
                            uint64_t packed_bytes, qvl_error* error);

/* Store integers [out, in] with a scale and a zero point for each group, all unchanged, as `dtype`, one of
 * QVL_UINT4_G* and QVL_UINT8_G*, at `packed`; all in host memory. integers: below 16 for 4 bits. scales,
 * zeros: float16 [out, groups], groups = in / group rounded up. QVL_INVALID: an integer out of range, a scale
 * that is not finite, or a zero point that is not an integer from 0 to 256.
 */
QVL_API qvl_status qvl_pack_groups(qvl_dtype dtype, int64_t out, int64_t in, const uint8_t* integers,
                                   const uint16_t* scales, const uint16_t* zeros, void* packed,
                                   uint64_t packed_bytes, qvl_error* error);

/* The float32 values of a packed matrix. */
QVL_API qvl_status qvl_unpack(qvl_dtype dtype, int64_t out, int64_t in, const void* packed,
                              uint64_t packed_bytes, float* values, qvl_error* error);

/* ---- engine ------------------------------------------------------------------------------------------- */

typedef struct qvl_engine qvl_engine;

/* Weights that one or more engines share: one copy in memory.
 *
 * qvl_weights_create: the array and the names are copied, the data is used in place: it must stay unchanged
 * until the weights and the last engine created from them are freed. tensor_size: sizeof(qvl_tensor).
 *
 * qvl_weights_open: maps an exported stage's parameter file (PREFIX.pdiparams), which contains the names of
 * its tensors (paddlemix_qwenvl_plugin/artifact/params_file.py has the format). Data is read on first use,
 * and processes that map the same file share one copy. QVL_INVALID: no such file; QVL_BAD_WEIGHT: damaged, or
 * a file without names, as written by exports before contract version 3.
 *
 * A file must not be shortened or written to while it is mapped; to replace it, rename another over it.
 *
 * qvl_weights_get: tensor i of qvl_weights_count. Its name and data are valid as long as the weights are.
 */
typedef struct qvl_weights qvl_weights;
QVL_API qvl_status qvl_weights_create(const qvl_tensor* tensors, int64_t n_tensors, uint32_t tensor_size,
                                      qvl_weights** weights, qvl_error* error);
QVL_API qvl_status qvl_weights_open(const char* path, qvl_weights** weights, qvl_error* error);
QVL_API int64_t qvl_weights_count(const qvl_weights* weights);
QVL_API qvl_status qvl_weights_get(const qvl_weights* weights, int64_t i, qvl_tensor* tensor,
                                   uint32_t tensor_size, qvl_error* error);
/* Engines created from them keep the tensors they need. NULL is allowed. */
QVL_API void qvl_weights_free(qvl_weights* weights);

/* Create an engine. The weights must contain every tensor that the config requires; others are ignored.
 * (Vectors, and the tables of the vision tower, are copied as float32.)
 */
QVL_API qvl_status qvl_engine_create(const qvl_config* config, qvl_weights* weights, qvl_engine** engine,
                                     qvl_error* error);

/* Pools, events and adapters of the engine must have been freed before. NULL is allowed. */
QVL_API void qvl_engine_free(qvl_engine* engine);

/* Low-rank adapters (LoRA): y = W x + scale * B (A x), apart from the base weights, which may be quantised
 * and are shared by sequences with different adapters and without one. Any number of adapters may exist.
 *
 * Targets are the matrices of the language model's layers and lm_head; see qvl_tensor for the names. A matrix
 * without an entry is not changed. A and B are copied. The dtype of a product is that of A and B; otherwise
 * the rules for weights apply (qvl_tensor). QVL_BAD_WEIGHT: an unknown or repeated name, another shape, or a
 * value that is not finite. On a GPU A and B are rounded to the compute type.
 */
typedef struct qvl_adapter qvl_adapter;
typedef struct qvl_adapter_matrix {
  const char* name; /* of the base matrix: "h.0.attn.c_attn.weight" */
  const void* a;    /* [rank, in], host memory, aligned as its type */
  const void* b;    /* [out, rank], host memory */
  qvl_dtype dtype;  /* of both: QVL_FLOAT32, QVL_BFLOAT16 or QVL_FLOAT16 */
  float scale;      /* such as alpha / rank */
  int64_t out;
  int64_t in;
  int64_t rank; /* at least 1; may differ between matrices */
} qvl_adapter_matrix;

/* matrix_size: sizeof(qvl_adapter_matrix). */
QVL_API qvl_status qvl_adapter_create(qvl_engine* engine, const qvl_adapter_matrix* matrices,
                                      int64_t n_matrices, uint32_t matrix_size, qvl_adapter** adapter,
                                      qvl_error* error);
/* No step with the adapter may be running. NULL is allowed. */
QVL_API void qvl_adapter_free(qvl_adapter* adapter);

/* Version of the library, such as "0.2"; it may be newer than the header a caller was compiled with. */
QVL_API const char* qvl_version(void);

/* How the engine computes, for logs: "cpu avx512_bf16, 2 threads". Valid as long as the engine is. */
QVL_API const char* qvl_engine_describe(const qvl_engine* engine);

/* Device memory for callers without the device's own library, aligned to 64 bytes; `bytes` may be 0. */
QVL_API qvl_status qvl_alloc(qvl_engine* engine, uint64_t bytes, void** memory, qvl_error* error);
QVL_API void qvl_dealloc(qvl_engine* engine, void* memory);

/* Copy between host and device memory, in any direction, in the order of the stream. */
QVL_API qvl_status qvl_copy(qvl_engine* engine, void* to, const void* from, uint64_t bytes, qvl_stream stream,
                            qvl_error* error);

/* Page-locked host memory, which a GPU reads and writes while it computes; ordinary memory for a CPU. */
QVL_API qvl_status qvl_host_alloc(qvl_engine* engine, uint64_t bytes, void** memory, qvl_error* error);
QVL_API void qvl_host_free(qvl_engine* engine, void* memory);

/* As qvl_copy, but without waiting for the end of the copy; host memory must be from qvl_host_alloc. */
QVL_API qvl_status qvl_copy_async(qvl_engine* engine, void* to, const void* from, uint64_t bytes,
                                  qvl_stream stream, qvl_error* error);

/* Events: points in the work of a stream. A new event is done. query: *done is 1 or 0. wait: blocks the
 * host. */
typedef struct qvl_event qvl_event;
QVL_API qvl_status qvl_event_create(qvl_engine* engine, qvl_event** event, qvl_error* error);
QVL_API qvl_status qvl_event_record(qvl_event* event, qvl_stream stream, qvl_error* error);
QVL_API qvl_status qvl_event_query(qvl_event* event, int32_t* done, qvl_error* error);
QVL_API qvl_status qvl_event_wait(qvl_event* event, qvl_error* error);
QVL_API void qvl_event_free(qvl_event* event);

/* Wait for all work on the stream. */
QVL_API qvl_status qvl_synchronize(qvl_engine* engine, qvl_stream stream, qvl_error* error);

/* ---- vision ------------------------------------------------------------------------------------------- */

/* images float32 [n, 3, image_size, image_size], normalised -> features float32 [n, n_queries, hidden]; both
 * in device memory.
 */
QVL_API qvl_status qvl_encode_images(qvl_engine* engine, int64_t n, const float* images, float* features,
                                     qvl_stream stream, qvl_error* error);

/* ---- paged cache of keys and values ------------------------------------------------------------------- */

typedef struct qvl_kv_pool qvl_kv_pool;

/* Memory for n_blocks blocks of block_tokens tokens (1 to 256; 32 is good) in all layers, stored as
 * QVL_FLOAT32, QVL_BFLOAT16, QVL_FLOAT16 or QVL_INT8 (a float32 scale for each token and head). The caller
 * decides which sequence owns which block: token t of a sequence is in slot t % block_tokens of block
 * table[t / block_tokens]. Blocks may be shared between sequences for reading. Memory of blocks that were
 * never written is not touched.
 */
QVL_API qvl_status qvl_kv_pool_create(qvl_engine* engine, int32_t n_blocks, int32_t block_tokens,
                                      qvl_dtype dtype, qvl_kv_pool** pool, qvl_error* error);
QVL_API void qvl_kv_pool_free(qvl_kv_pool* pool);

/* Bytes of a pool of these sizes; 0 for invalid sizes. */
QVL_API uint64_t qvl_kv_pool_bytes(const qvl_engine* engine, int32_t n_blocks, int32_t block_tokens,
                                   qvl_dtype dtype);

/* Copy whole blocks, all layers, keys and values: block from[i] to block to[i] of the pool, in order of i.
 * For copy-on-write of a shared block. */
QVL_API qvl_status qvl_kv_copy_blocks(qvl_kv_pool* pool, int32_t n, const int32_t* from, const int32_t* to,
                                      qvl_stream stream, qvl_error* error);

/* Move whole blocks to and from host memory of n * qvl_kv_pool_bytes(engine, 1, block_tokens, dtype) bytes,
 * in a private layout: for a pool of the same sizes, version and device. */
QVL_API qvl_status qvl_kv_read_blocks(qvl_kv_pool* pool, int32_t n, const int32_t* blocks, void* host,
                                      uint64_t bytes, qvl_stream stream, qvl_error* error);
QVL_API qvl_status qvl_kv_write_blocks(qvl_kv_pool* pool, int32_t n, const int32_t* blocks, const void* host,
                                       uint64_t bytes, qvl_stream stream, qvl_error* error);

/* ---- forward ------------------------------------------------------------------------------------------ */

/* A sequence's part of a packed batch: a whole prompt, a chunk of a prompt, or one token. */
typedef struct qvl_sequence {
  int32_t n_new;         /* tokens in this batch, at least 1 */
  int32_t n_past;        /* tokens before them, whose keys and values are in the pool */
  int32_t prompt_len;    /* of the whole prompt, at least 1: it fixes the rotary base of all its tokens */
  int32_t n_blocks;      /* length of block_table: n_past + n_new tokens must fit */
  const int32_t* blocks; /* block table, host memory */

  /* Since 0.2. */
  uint32_t flags; /* of QVL_SEQUENCE_* */
  uint32_t reserved;
  const qvl_adapter* adapter; /* of all tokens of the sequence, those in the pool included; NULL: none */
} qvl_sequence;

enum {
  QVL_SEQUENCE_NO_LOGITS = 1, /* a chunk of a prompt without sampling */
  QVL_SEQUENCE_GENERATED = 2  /* tokens within the prompt that were generated: see below */
};

/* Two kinds of arithmetic. Tokens at positions below prompt_len are computed as prompts; the others, and
 * those of a sequence with QVL_SEQUENCE_GENERATED, as decode steps. Apart from that, a token's results depend
 * on the tokens before it and on the adapter alone, to the bit: not on the rest of the batch or its adapters,
 * not on where a prompt is cut into chunks, not on whether the keys and values before it were computed now or
 * earlier. Several entries of a batch may belong to one sequence, in order of their positions.
 */

/* Tokens [start, start + count) of the packed batch are vectors instead of ids: an image's features, or a
 * part of them. */
typedef struct qvl_span {
  int32_t start;
  int32_t count;
  const float* features; /* float32 [count, hidden], device memory */
} qvl_span;

typedef struct qvl_batch {
  uint32_t size;                 /* sizeof(qvl_batch) */
  int32_t n_sequences;           /* at least 1 */
  const qvl_sequence* sequences; /* host memory */
  const int32_t* tokens; /* ids of all sequences, one after another, device memory; those that a span covers
                            are not read */
  int32_t n_spans;       /* spans do not overlap and are in order of start */
  int32_t reserved;      /* 0 */
  const qvl_span* spans; /* host memory */

  /* Since 0.2: strides of the two arrays in bytes; 0: those of version 0.1, 24 and 16. */
  uint32_t sequence_size; /* sizeof(qvl_sequence) */
  uint32_t span_size;     /* sizeof(qvl_span) */
} qvl_batch;

/* Run the batch through the layers, write its keys and values into the pool, and give the logits of the last
 * token of each sequence without QVL_SEQUENCE_NO_LOGITS, in their order: float32 [rows, vocab], device
 * memory. With logits NULL only the pool is written.
 *
 * An id out of the vocabulary is QVL_INVALID if the ids are in host memory; in GPU memory it is clamped.
 */
QVL_API qvl_status qvl_forward(qvl_engine* engine, qvl_kv_pool* pool, const qvl_batch* batch, float* logits,
                               qvl_stream stream, qvl_error* error);

/* ---- sampling ----------------------------------------------------------------------------------------- */

/* Sampling parameters of a row, applied in this order: forbidden ids, penalties, temperature, top-k, top-p.
 * The token of a row of logits with a NaN, a positive infinity or no finite value is -1, and no count is
 * incremented. The random number of draw c with seed s is splitmix64's output for the state s + (c + 1) *
 * 0x9E3779B97F4A7C15, its upper 53 bits taken as a fraction: the caller owns the state, and the same seed and
 * counter give the same draw on every device.
 */
typedef struct qvl_sampling {
  uint32_t size;     /* sizeof(qvl_sampling) */
  float temperature; /* 0: the likeliest token, the lower id of equals; at most 100 */
  float top_p;       /* the smallest set of tokens that reaches this probability: 0 (the likeliest) to 1 */
  int32_t top_k;     /* among the k likeliest; 0: all */
  float
      repetition_penalty;  /* over 0, up to 100; 1: none. Divides positive logits, multiplies negative ones */
  float frequency_penalty; /* -100 to 100, times how often the token was generated */
  float presence_penalty;  /* -100 to 100, once for a token that was generated */
  int32_t n_forbidden;
  const int32_t* forbidden; /* ids whose logit becomes -1e10, such as stop tokens before the minimum length;
                               host memory */
  uint64_t seed;
  uint64_t counter; /* number of this draw, 0 for a sequence's first */
} qvl_sampling;

/* Set all fields: greedy, no penalties. `size` must be set. */
QVL_API void qvl_sampling_init(qvl_sampling* sampling);

/* Sample a token for each of n rows.
 *
 * logits: float32 [n, vocab], device memory; not changed.
 * sampling: n of them, host memory. sampling_size: sizeof(qvl_sampling).
 * counts: how often each row has generated each token, n pointers in host memory to int32 [vocab] in device
 * memory; the count of the sampled token is incremented. NULL, or NULL for a row: no counts, and the row may
 * have no penalties. tokens: int32 [n], device memory.
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
  /* Of each sequence without QVL_SEQUENCE_NO_LOGITS, in their order: `rows` of them. */
  int32_t rows;                 /* as a check */
  int32_t n_logprobs;           /* 0 to 64: number of the likeliest tokens to return */
  const qvl_sampling* sampling; /* [rows], host memory */
  int32_t* const* counts;       /* as for qvl_sample */
  int32_t* tokens;              /* int32 [rows] */
  float* logprobs;     /* float32 [rows]: natural logarithm of the chosen token's probability under the
                          unchanged logits; may be NULL */
  int32_t* top_tokens; /* int32 [rows, n_logprobs], the likeliest under the unchanged logits first, the lower
                          id of equals; NULL if n_logprobs is 0 */
  float* top_logprobs; /* float32 [rows, n_logprobs] */
  float* logits;       /* float32 [rows, vocab], device memory; NULL: scratch memory of the engine */
} qvl_step_args;

/* tokens, logprobs, top_tokens and top_logprobs are in device memory or from qvl_host_alloc. A row with the
 * token -1 has top_tokens -1 and log-probabilities NaN. rows may be 0: only the pool is written.
 */
QVL_API qvl_status qvl_step(qvl_engine* engine, qvl_kv_pool* pool, const qvl_step_args* args,
                            qvl_stream stream, qvl_error* error);

/* ---- generate ----------------------------------------------------------------------------------------- */

typedef struct qvl_request {
  int32_t n_tokens;             /* of the prompt, at least 1 */
  int32_t n_spans;              /* images */
  const int32_t* tokens;        /* [n_tokens], host memory */
  const qvl_span* spans;        /* starts count from the beginning of this prompt */
  int32_t max_new;              /* at least 1; n_tokens + max_new is at most max_positions */
  int32_t min_new;              /* stop tokens are forbidden before */
  const qvl_sampling* sampling; /* one; `forbidden` and `counter` are for the first token; the counter goes
                                   up by one per token. NULL: greedy */
  uint32_t span_size;           /* sizeof(qvl_span); 0: 16 */
  uint32_t reserved;
} qvl_request;

enum { QVL_FINISH_END = 1, QVL_FINISH_LENGTH = 2 };

/* Callback with the tokens of a step. Called from the thread that called qvl_generate, in the order of steps;
 * a GPU may be some steps ahead. Return 0 to continue, else qvl_generate returns QVL_STOPPED.
 *
 * n: number of requests with a token in this step; requests, tokens: their indices and tokens [n].
 */
typedef int32_t (*qvl_on_step)(void* user, int32_t step, int32_t n, const int32_t* requests,
                               const int32_t* tokens);

typedef struct qvl_result {
  int32_t n_tokens; /* generated, including a final stop token */
  int32_t finish;   /* QVL_FINISH_END, QVL_FINISH_LENGTH; 0: stopped by the callback */
  int32_t reserved[2];
} qvl_result;

/* Generate for n requests at once.
 *
 * end_ids: stop tokens, int32 [n_end], host memory.
 * pool: NULL for a pool created for this call, float32 for weights of that type, else bfloat16. A given pool
 * is overwritten. tokens: int32 [n, stride], host memory; row i receives the tokens of request i. stride is
 * at least the largest max_new. results: [n]. request_size: sizeof(qvl_request). on_step: may be NULL. The
 * lock of the engine is taken for each step, so that several calls can run at the same time.
 */
QVL_API qvl_status qvl_generate(qvl_engine* engine, qvl_kv_pool* pool, int32_t n, const qvl_request* requests,
                                uint32_t request_size, int32_t n_end, const int32_t* end_ids,
                                qvl_on_step on_step, void* user, int64_t stride, int32_t* tokens,
                                qvl_result* results, qvl_stream stream, qvl_error* error);

#ifdef __cplusplus
}
#endif

#endif
