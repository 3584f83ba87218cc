#include "cuda/language.h"

#include <algorithm>
#include <numeric>

#include "core/error.h"
#include "cuda/low_rank.h"
#include "cuda/tensor_map.h"

namespace qvl::cuda {
namespace {

constexpr int kMaxDecodeRows = 256;  // maximum number of rows of linear_decode
constexpr uint64_t kRowUnit = 8;     // the stride of x is a multiple of 8 values

// Bytes per row of a product's result.
uint64_t row_bytes(const Matrix& matrix, Epilogue epilogue) {
  switch (epilogue) {
    case Epilogue::kFloat:
    case Epilogue::kAdd:
      return to_size(matrix.out) * 4;
    case Epilogue::kSiluTimes:
      return to_size(matrix.out);  // H [out / 2]
    default:
      return to_size(matrix.out) * 2;
  }
}

const CudaAdapter* adapter_of(const qvl_sequence& sequence) {
  const qvl_adapter* const adapter = sequence.adapter;
  return adapter != nullptr ? static_cast<const CudaAdapter*>(adapter->matrices.get()) : nullptr;
}

// Memory that is zero before this function returns, since any stream may use it first.
DeviceMemory zeroed_memory(uint64_t n_bytes) {
  DeviceMemory memory(n_bytes);
  check(driver().cuMemsetD8Async(address(memory.get()), 0, n_bytes, nullptr), "clearing GPU memory");
  check(driver().cuStreamSynchronize(nullptr), "clearing GPU memory");
  return memory;
}

char* bytes(void* memory) {
  return static_cast<char*>(memory);
}
const char* bytes(const void* memory) {
  return static_cast<const char*>(memory);
}

}  // namespace

Language::Language(const Gpu& gpu, const qvl_config& config, Weights& weights)
    : gpu_(gpu), config_(config), angles_(config, weights.uploader()) {
  QVL_REQUIRE(config.hidden % 8 == 0, QVL_UNSUPPORTED, "config: hidden is %d; a GPU needs a multiple of 8",
              config.hidden);
  QVL_REQUIRE(config.head_dim <= 256, QVL_UNSUPPORTED, "config: head_dim is %d; a GPU needs at most 256",
              config.head_dim);
  wte_ = weights.matrix("wte.weight");
  for (int i = 0; i < config.layers; ++i) {
    const std::string name = "h." + std::to_string(i) + ".";
    Layer layer;
    layer.ln_1 = weights.floats(name + "ln_1.weight");
    layer.c_attn = weights.linear(name + "attn.c_attn");
    layer.attn_proj = weights.matrix(name + "attn.c_proj.weight");
    layer.ln_2 = weights.floats(name + "ln_2.weight");
    layer.gate_up = weights.interleaved(name + "mlp.w1.weight", name + "mlp.w2.weight");
    layer.mlp_proj = weights.matrix(name + "mlp.c_proj.weight");
    layers_.push_back(layer);
  }
  ln_f_ = weights.floats("ln_f.weight");
  lm_head_ = weights.matrix("lm_head.weight");

  const uint64_t n = to_size(config.max_tokens), hidden = to_size(config.hidden);
  x_ = DeviceMemory(n * hidden * 4);
  normed_ = DeviceMemory(n * hidden * 2);
  qkv_ = DeviceMemory(3 * n * hidden * 2);
  q_ = DeviceMemory(n * hidden * 2);
  attended_ = DeviceMemory(n * hidden * 2);
  mlp_ = DeviceMemory(n * to_size(layers_[0].gate_up.out));  // H [n, gate_up.out / 2]
  uint64_t scratch = 0;
  int max_inputs = lm_head_.order != nullptr ? config.hidden : 0;  // of matrices with an input order
  for (const Layer& layer : layers_) {
    for (const Matrix* matrix : {&layer.c_attn, &layer.attn_proj, &layer.gate_up, &layer.mlp_proj}) {
      scratch = std::max(scratch, linear_prompt_scratch(*matrix));
      if (matrix->order != nullptr) max_inputs = std::max(max_inputs, matrix->in);
    }
  }
  prompt_scratch_ = DeviceMemory(scratch);
  permuted_x_ = DeviceMemory(n * round_up(to_size(max_inputs), kRowUnit) * 2);
}

void Language::reserve(int rows, int max_keys) {
  const uint64_t needed = attention_decode_scratch(rows, config_.heads, config_.head_dim, max_keys);
  if (needed <= decode_scratch_.bytes()) return;
  decode_scratch_ = DeviceMemory();  // cuMemFree waits for the GPU
  decode_scratch_ = zeroed_memory(needed);
  ++graph_version_;
}

void Language::forward(CUstream stream, const CudaKvPool& pool, const qvl_batch& batch, float* logits,
                       StepInput& input) {
  for_each_pass(batch, config_.max_tokens, logits != nullptr,
                [&](std::vector<Part>& parts) { pass(stream, pool, batch, parts, logits, input); });
}

void Language::describe_row(const InputArrays& inputs, int i, const qvl_sequence& sequence, int32_t position,
                            int table) const {
  inputs.features[i] = 0;
  if (inputs.adapters != nullptr) {
    const CudaAdapter* const adapter = adapter_of(sequence);
    inputs.adapters[i] = adapter != nullptr ? adapter->table() : 0;
  }
  inputs.positions[i] = position;
  inputs.angle_tables[i] = angles_.table(sequence.prompt_len);
  inputs.table_of[i] = table;
}

void Language::sort_by_adapter(const InputArrays& inputs, int first, int n) {
  if (inputs.adapters == nullptr) return;
  std::iota(inputs.adapter_order, inputs.adapter_order + n, 0);
  const uint64_t* const adapters = inputs.adapters + first;
  std::stable_sort(inputs.adapter_order, inputs.adapter_order + n,
                   [&](int32_t a, int32_t b) { return adapters[a] > adapters[b]; });
  for (int i = 0; i < n; ++i) inputs.sorted_adapters[i] = adapters[inputs.adapter_order[i]];
}

void Language::pass(CUstream stream, const CudaKvPool& pool, const qvl_batch& batch, std::vector<Part>& parts,
                    float* logits, StepInput& input) {
  PassShape shape;
  InputSizes sizes;
  for (const Part& part : parts) {
    const int32_t keys = part.past + part.n;
    shape.is_adapted = shape.is_adapted || adapter_of(*part.sequence) != nullptr;
    shape.max_blocks = std::max(shape.max_blocks, (keys + pool.block_tokens - 1) / pool.block_tokens);
    if (part.generated) {
      shape.n_decode += part.n;
      shape.max_keys = std::max(shape.max_keys, keys);
    } else {
      shape.n_prompt += part.n;
      shape.tiles += (part.n + kQueryTile - 1) / kQueryTile;
      ++sizes.chunks;
    }
  }
  sizes.rows = shape.rows();
  sizes.tables = static_cast<int>(parts.size());
  sizes.max_blocks = shape.max_blocks;
  sizes.tiles = shape.tiles;
  sizes.adapted = shape.is_adapted ? shape.rows() : 0;
  reserve(std::min(shape.n_decode, kMaxDecodeRows), shape.max_keys);

  const InputArrays host = input.begin(sizes);
  const bool ids_on_host = !is_device_visible(batch.tokens);
  int next_row = 0, chunk = 0, tile = 0;
  adapted_prompts_.clear();
  for (const bool generated : {false, true}) {
    for (size_t table = 0; table < parts.size(); ++table) {
      Part& part = parts[table];
      if (part.generated != generated) continue;
      part.first = next_row;
      next_row += part.n;
      const int32_t n_blocks = (part.past + part.n + pool.block_tokens - 1) / pool.block_tokens;
      std::copy_n(part.sequence->blocks, n_blocks, host.blocks + static_cast<int>(table) * shape.max_blocks);
      for (int32_t i = 0; i < part.n; ++i) {
        describe_row(host, part.first + i, *part.sequence, part.past + i, static_cast<int>(table));
        if (ids_on_host) host.ids[part.first + i] = batch.tokens[part.token + i];
      }
      set_features(stream, batch, part, host);
      if (generated) continue;
      const CudaAdapter* const adapter = adapter_of(*part.sequence);
      if (adapter != nullptr) adapted_prompts_.push_back({adapter, static_cast<int>(part.first), part.n});
      host.chunks[chunk] = {static_cast<int>(part.first), part.n, part.past, static_cast<int>(table)};
      for (int32_t offset = 0; offset < part.n; offset += kQueryTile) host.tiles[tile++] = {chunk, offset};
      ++chunk;
    }
  }
  sort_by_adapter(host, shape.n_prompt, shape.n_decode);
  const InputArrays inputs = input.send(stream);
  if (!ids_on_host) {
    for (const Part& part : parts)
      copy(stream, inputs.ids + part.first, batch.tokens + part.token, to_size(part.n) * 4);
  }
  layers(stream, pool, inputs, shape);

  // Compute the logits of each part that needs them, from its last row. There is one product per run of up
  // to kMaxDecodeRows such rows that are adjacent both in the pass and in the logits.
  for (size_t i = 0; i < parts.size(); ++i) {
    if (parts[i].logits < 0) continue;
    const int first = parts[i].first + parts[i].n - 1, row = parts[i].logits;
    int n = 1;
    for (; i + 1 < parts.size() && n < kMaxDecodeRows; ++i, ++n) {
      const Part& next = parts[i + 1];
      if (next.logits != row + n || next.first + next.n - 1 != first + n) break;
    }
    lm_head(stream, inputs, first, n, logits + int64_t{row} * config_.vocab);
  }
}

void Language::set_features(CUstream stream, const qvl_batch& batch, const Part& part,
                            const InputArrays& host) {
  for (int32_t s = 0; s < batch.n_spans; ++s) {
    const qvl_span& span = batch.spans[s];
    // Tokens first to end - 1 of the batch are in the span and in the part.
    const int64_t first = std::max<int64_t>(span.start, part.token);
    const int64_t end = std::min<int64_t>(int64_t{span.start} + span.count, part.token + part.n);
    if (first >= end) continue;
    const uint64_t row = to_size(config_.hidden) * sizeof(float);  // bytes
    const int to = part.first + static_cast<int>(first - part.token);
    const char* from = bytes(static_cast<const void*>(span.features)) + to_size(first - span.start) * row;
    if (!is_device_visible(span.features)) {
      if (features_.bytes() == 0) features_ = DeviceMemory(to_size(config_.max_tokens) * row);
      char* const on_gpu = features_.get<char>() + to_size(to) * row;
      copy(stream, on_gpu, from, to_size(end - first) * row);
      from = on_gpu;
    }
    for (int i = 0; i < end - first; ++i) {
      host.features[to + i] = address(from + to_size(i) * row);
      host.ids[to + i] = 0;
    }
  }
}

std::unique_ptr<CudaAdapter> Language::make_adapter(CUstream stream,
                                                    const std::vector<AdapterMatrix>& matrices) {
  const int hidden = config_.hidden, gate_up = layers_[0].gate_up.out;
  const std::vector<CudaAdapter::Shape> shapes = {{3 * hidden, hidden},  // in the order of LayerProduct
                                                  {hidden, hidden},
                                                  {gate_up, hidden},
                                                  {hidden, gate_up / 2},
                                                  {config_.vocab, hidden}};  // lm_head
  auto adapter = std::make_unique<CudaAdapter>(gpu_, stream, config_.layers, shapes, matrices);
  const std::vector<int> before = product_ranks_;
  product_ranks_.resize(to_size(config_.layers * kLayerProducts + 1));
  for (size_t i = 0; i < product_ranks_.size(); ++i) {
    const LowRank* const update = adapter->product(static_cast<int>(i));
    if (update != nullptr) product_ranks_[i] = std::max(product_ranks_[i], update->a.out);
  }
  // Captured graphs launch the kernels of adapters only for the products and ranks of `before`.
  if (product_ranks_ != before) ++graph_version_;
  if (adapter->max_rank() <= max_rank_) return adapter;
  const uint64_t rows = to_size(config_.max_tokens), max_out = to_size(std::max(3 * hidden, gate_up));
  low_ = DeviceMemory();  // cuMemFree waits for the GPU
  low_scratch_ = DeviceMemory();
  low_ = DeviceMemory(rows * to_size(adapter->max_rank()) * 2);
  low_scratch_ = zeroed_memory(low_rank_scratch(config_.max_tokens, adapter->max_rank()));
  if (raw_.bytes() == 0) raw_ = DeviceMemory(rows * max_out * 4);
  max_rank_ = adapter->max_rank();
  ++graph_version_;
  return adapter;
}

const void* Language::permuted(CUstream stream, const Matrix& matrix, const void* x, int& x_stride, int n) {
  if (matrix.order == nullptr) return x;
  const auto stride = static_cast<int>(round_up(to_size(matrix.in), kRowUnit));
  gather_columns(gpu_, stream, x, x_stride, matrix.order, n, matrix.in, stride, permuted_x_.get());
  x_stride = stride;
  return permuted_x_.get();
}

void Language::product(CUstream stream, int number, const Matrix& matrix, const void* x, int x_stride,
                       const InputArrays& inputs, const PassShape& shape, Epilogue epilogue, void* y) {
  const int n_prompt = shape.n_prompt;
  const bool adapted = shape.is_adapted && product_ranks_[to_size(number)] > 0;
  const auto decode_offset = to_size(n_prompt) * to_size(x_stride) * 2;  // bytes
  const AdaptedRows rows{inputs.sorted_adapters, inputs.adapter_order, shape.n_decode, number};
  const LowRankMemory memory{bytes(low_.get()) + to_size(n_prompt) * to_size(max_rank_) * 2,  // decode rows
                             low_scratch_.get(), config_.max_tokens, max_rank_};

  // Without adapters the product applies its epilogue. With adapters it writes raw sums, float32, to which
  // the updates are added before the epilogue; kFloat and kAdd need no separate raw sums, since their results
  // are such sums.
  const bool raw = adapted && (epilogue == Epilogue::kHalf || epilogue == Epilogue::kSiluTimes);
  const Epilogue base = raw ? Epilogue::kFloat : epilogue;
  void* const base_y = raw ? raw_.get() : y;
  int stride = x_stride;
  const void* const permuted_x = permuted(stream, matrix, x, stride, shape.rows());
  if (n_prompt > 0) {
    linear_prompt(gpu_, stream, matrix, permuted_x, stride, n_prompt, base, base_y, prompt_scratch_.get());
  }
  for (int first = n_prompt; first < shape.rows(); first += kMaxDecodeRows) {
    const int n = std::min(kMaxDecodeRows, shape.rows() - first);
    linear_decode(gpu_, stream, matrix, bytes(permuted_x) + to_size(first) * to_size(stride) * 2, stride, n,
                  base, bytes(base_y) + to_size(first) * row_bytes(matrix, base), adapted);
  }
  if (!adapted) return;

  if (shape.n_decode > 0) {  // before the prompts' updates: its predecessor must be linear_decode
    low_rank_down(gpu_, stream, rows, bytes(x) + decode_offset, x_stride, x_stride,
                  product_ranks_[to_size(number)], /*x_is_complete=*/has_tensor_maps(gpu_), memory);
  }
  if (n_prompt > 0) {
    for (const AdaptedPrompt& prompt : adapted_prompts_) {
      const LowRank* const update = prompt.adapter->product(number);
      if (update == nullptr) continue;
      linear_prompt(gpu_, stream, update->a, bytes(x) + to_size(prompt.first) * to_size(x_stride) * 2,
                    x_stride, prompt.n, Epilogue::kHalf, low_.get(), nullptr);
      linear_prompt(gpu_, stream, update->b, low_.get(), update->b.in, prompt.n, Epilogue::kAdd,
                    bytes(base_y) + to_size(prompt.first) * to_size(matrix.out) * 4, nullptr);
    }
    if (raw) finish_raw(gpu_, stream, raw_.get<float>(), n_prompt, matrix.out, epilogue, y);
  }
  if (shape.n_decode > 0) {
    low_rank_up(gpu_, stream, rows, memory, matrix.out,
                raw ? raw_.get<float>() + to_size(n_prompt) * to_size(matrix.out) : nullptr, epilogue,
                bytes(y) + to_size(n_prompt) * row_bytes(matrix, epilogue));
  }
}

void Language::attention(CUstream stream, const RowMetadata& metadata, const InputArrays& inputs,
                         const PassShape& shape, const KvLayer& kv) {
  const int n = shape.rows(), hidden = config_.hidden;
  if (shape.is_step) {
    attention_step(gpu_, stream, qkv_.get(), metadata, angles_.angles(), kv, n, shape.max_keys, q_.get(),
                   decode_scratch_.get(), attended_.get());
    return;
  }
  rotate_and_store(gpu_, stream, qkv_.get(), metadata, angles_.angles(), kv, n, q_.get());
  if (shape.n_prompt > 0) {
    attention_prompt(gpu_, stream, q_.get(), inputs.chunks, inputs.tiles, shape.tiles, inputs.blocks,
                     shape.max_blocks, kv, attended_.get());
  }
  for (int first = shape.n_prompt; first < n; first += kMaxDecodeRows) {
    const RowMetadata decode_rows{inputs.positions + first, inputs.angle_tables + first,
                                  inputs.table_of + first, inputs.blocks, shape.max_blocks};
    const uint64_t offset = to_size(first) * to_size(hidden) * 2;
    attention_decode(gpu_, stream, q_.get<char>() + offset, decode_rows, kv,
                     std::min(kMaxDecodeRows, n - first), shape.max_keys, decode_scratch_.get(),
                     attended_.get<char>() + offset);
  }
}

void Language::layers(CUstream stream, const CudaKvPool& pool, const InputArrays& inputs,
                      const PassShape& shape) {
  const int n = shape.rows(), hidden = config_.hidden;
  auto* x = x_.get<float>();
  embed(gpu_, stream, wte_.values, config_.vocab, hidden, inputs.ids, inputs.features, n, x);
  const RowMetadata metadata{inputs.positions, inputs.angle_tables, inputs.table_of, inputs.blocks,
                             shape.max_blocks};
  for (int i = 0; i < config_.layers; ++i) {
    const Layer& layer = layers_[to_size(i)];
    const KvLayer kv = pool.layer(i);
    const int first = i * kLayerProducts;
    rms_norm(gpu_, stream, x, layer.ln_1, config_.norm_epsilon, n, hidden, normed_.get());
    product(stream, first + kAttnProduct, layer.c_attn, normed_.get(), hidden, inputs, shape, Epilogue::kHalf,
            qkv_.get());
    attention(stream, metadata, inputs, shape, kv);
    product(stream, first + kAttnProjProduct, layer.attn_proj, attended_.get(), hidden, inputs, shape,
            Epilogue::kAdd, x);
    rms_norm(gpu_, stream, x, layer.ln_2, config_.norm_epsilon, n, hidden, normed_.get());
    product(stream, first + kGateUpProduct, layer.gate_up, normed_.get(), hidden, inputs, shape,
            Epilogue::kSiluTimes, mlp_.get());
    // gate_up.out / 2: the MLP width, rounded up to a multiple of 8 as strides must be
    // (Weights::interleaved).
    product(stream, first + kMlpProjProduct, layer.mlp_proj, mlp_.get(), layer.gate_up.out / 2, inputs, shape,
            Epilogue::kAdd, x);
  }
}

void Language::lm_head(CUstream stream, const InputArrays& inputs, int first, int n, float* logits) {
  const int hidden = config_.hidden;
  rms_norm(gpu_, stream, x_.get<float>() + to_size(first) * to_size(hidden), ln_f_, config_.norm_epsilon, n,
           hidden, normed_.get());
  InputArrays row_inputs = inputs;
  PassShape shape;
  shape.n_decode = n;
  shape.is_adapted = inputs.adapters != nullptr;
  if (shape.is_adapted) {
    row_inputs.adapter_order = nullptr;  // an order of the decode rows, not of these rows
    row_inputs.sorted_adapters = inputs.adapters + first;
  }
  product(stream, config_.layers * kLayerProducts, lm_head_, normed_.get(), hidden, row_inputs, shape,
          Epilogue::kFloat, logits);
}

}  // namespace qvl::cuda
