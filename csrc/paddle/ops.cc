// The engine as Paddle's custom operators. Each takes the weights as its last input and describes them in
// attributes:
//   sizes    stages, hidden, layers, heads, head_dim, mlp_width, vocab, seq_length, max_positions,
//            dynamic_ntk, logn, image_size, patch_size, vision_width, vision_layers, vision_heads,
//            vision_mlp_width, n_queries
//   norm_epsilon, rotary_base
//   names, dtypes, shapes  of the weights, in the order of the input; dtypes are qvl_dtype, shapes four each
//
// Tensors are on the CPU: where the engine computes is its own affair.
#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

#include "paddle/phi/api/include/api.h"
#include "paddle/phi/core/generator.h"
#include "paddle/session.h"

namespace {

using paddle::Tensor;
using qvl::paddle_ops::check;
using qvl::paddle_ops::Description;
using qvl::paddle_ops::fail;
using qvl::paddle_ops::HIDDEN;
using qvl::paddle_ops::N_QUERIES;
using qvl::paddle_ops::session;
using qvl::paddle_ops::VOCAB;

using Shape = std::vector<int64_t>;
using Ints = std::vector<int>;
using Names = std::vector<std::string>;

void require(bool condition, const char* message) {
  if (!condition) fail(message);
}

Tensor make(const Shape& shape, paddle::DataType dtype) {
  return paddle::experimental::empty(shape, dtype, paddle::CPUPlace());
}

Tensor integers(const Shape& shape) {
  return make(shape, paddle::DataType::INT64);
}

// ---- pictures ------------------------------------------------------------------------------------------

std::vector<Tensor> encode_images(const Tensor& images, const std::vector<Tensor>& weights, const Ints& sizes,
                                  float norm_epsilon, float rotary_base, const Names& names,
                                  const Ints& dtypes, const Ints& shapes) {
  const auto engine = session({sizes, norm_epsilon, rotary_base, names, dtypes, shapes}, weights);
  const int64_t n = images.shape()[0], n_queries = sizes[N_QUERIES], hidden = sizes[HIDDEN];
  Tensor features = make({n, n_queries, hidden}, paddle::DataType::FLOAT32);
  qvl_error error;
  check(qvl_encode_images(engine->engine(), n, images.data<float>(), features.data<float>(), nullptr, &error),
        error);
  return {features};
}

std::vector<Shape> encode_images_shape(const Shape& images, const std::vector<Shape>&, const Ints& sizes,
                                       float, float, const Names&, const Ints&, const Ints&) {
  return {{images[0], sizes[N_QUERIES], sizes[HIDDEN]}};
}

std::vector<paddle::DataType> encode_images_dtype(const paddle::DataType&,
                                                  const std::vector<paddle::DataType>&) {
  return {paddle::DataType::FLOAT32};
}

// ---- one pass over the layers ---------------------------------------------------------------------------

// tokens int32 [T], of all sequences one after another; features float32 [N, n_queries, hidden];
// spans int32 [S, 2]: position in `tokens` and which picture, -1: none; sequences int32 [B, 4]: n_new,
// n_past, prompt_len, n_blocks; blocks int32 [sum of n_blocks]; pool int64 [4]: id, n_blocks, block_tokens,
// qvl_dtype.
// -> logits float32 [B, vocab] of each sequence's last token.
std::vector<Tensor> forward(const Tensor& tokens, const Tensor& features, const Tensor& spans,
                            const Tensor& sequences, const Tensor& blocks, const Tensor& pool,
                            const std::vector<Tensor>& weights, const Ints& sizes, float norm_epsilon,
                            float rotary_base, const Names& names, const Ints& dtypes, const Ints& shapes) {
  const auto engine = session({sizes, norm_epsilon, rotary_base, names, dtypes, shapes}, weights);
  const int64_t n = sequences.shape()[0], n_queries = sizes[N_QUERIES], hidden = sizes[HIDDEN];
  const auto* rows = sequences.data<int32_t>();
  const auto* table = blocks.data<int32_t>();
  std::vector<qvl_sequence> parts;
  int64_t n_tokens = 0, n_blocks = 0;
  for (int64_t i = 0; i < n; ++i, rows += 4) {
    require(rows[0] >= 1 && rows[3] >= 0, "sequences: n_new must be over 0, n_blocks 0 or more");
    parts.push_back({rows[0], rows[1], rows[2], rows[3], table + n_blocks});
    n_tokens += rows[0];
    n_blocks += rows[3];
  }
  require(n_tokens == tokens.numel(), "sequences: the n_new do not add up to the tokens");
  require(n_blocks <= blocks.numel(), "sequences: the n_blocks are more than the blocks");
  std::vector<qvl_span> pictures;
  const auto* span = spans.data<int32_t>();
  for (int64_t i = 0; i < spans.shape()[0]; ++i, span += 2) {
    if (span[1] < 0) continue;
    require(span[1] < features.shape()[0], "spans: name a picture that is not there");
    pictures.push_back(
        {span[0], static_cast<int32_t>(n_queries), features.data<float>() + span[1] * n_queries * hidden});
  }
  qvl_batch batch = QVL_INIT(qvl_batch);
  batch.n_sequences = static_cast<int32_t>(n);
  batch.sequences = parts.data();
  batch.tokens = tokens.data<int32_t>();
  batch.n_spans = static_cast<int32_t>(pictures.size());
  batch.spans = pictures.data();
  const auto* p = pool.data<int64_t>();
  qvl_kv_pool* cache = engine->pool(p[0], static_cast<int32_t>(p[1]), static_cast<int32_t>(p[2]),
                                    static_cast<qvl_dtype>(p[3]));
  Tensor logits = make({n, sizes[VOCAB]}, paddle::DataType::FLOAT32);
  qvl_error error;
  check(qvl_forward(engine->engine(), cache, &batch, logits.data<float>(), nullptr, &error), error);
  return {logits};
}

std::vector<Shape> forward_shape(const Shape&, const Shape&, const Shape&, const Shape& sequences,
                                 const Shape&, const Shape&, const std::vector<Shape>&, const Ints& sizes,
                                 float, float, const Names&, const Ints&, const Ints&) {
  return {{sequences[0], sizes[VOCAB]}};
}

std::vector<paddle::DataType> forward_dtype(const paddle::DataType&, const paddle::DataType&,
                                            const paddle::DataType&, const paddle::DataType&,
                                            const paddle::DataType&, const paddle::DataType&,
                                            const std::vector<paddle::DataType>&) {
  return {paddle::DataType::FLOAT32};
}

// ---- a whole generation, as the stock predictor asks for it ---------------------------------------------

// What a row is told and what becomes of it; semantics as in modeling/generation.py.
struct Row {
  int64_t done, max_length, min_length, last = 0;
  bool stopped;
  std::vector<int32_t> tokens;
};

struct Progress {
  std::vector<Row>* rows;
  const std::vector<size_t>* row_of;  // of each request
  const std::vector<int32_t>* ends;
  int64_t stop_nums;
};

int32_t on_step(void* user, int32_t, int32_t n, const int32_t* requests, const int32_t* tokens) {
  const auto& progress = *static_cast<Progress*>(user);
  for (int32_t i = 0; i < n; ++i) {
    Row& row = (*progress.rows)[(*progress.row_of)[static_cast<size_t>(requests[i])]];
    row.last = tokens[i];
    row.tokens.push_back(tokens[i]);
    const auto& ends = *progress.ends;
    ++row.done;
    row.stopped = row.done >= row.max_length || std::find(ends.begin(), ends.end(), tokens[i]) != ends.end();
  }
  const auto stopped =
      std::count_if(progress.rows->begin(), progress.rows->end(), [](const Row& row) { return row.stopped; });
  return stopped >= progress.stop_nums;
}

std::vector<Tensor> generate(const Tensor& input_ids, const Tensor& features, const Tensor& img_pos,
                             const Tensor& penalty, const Tensor& frequency, const Tensor& presence,
                             const Tensor& min_length, const Tensor& max_length, const Tensor& temperature,
                             const Tensor& top_p, const Tensor& eos, const Tensor& seq_len_encoder,
                             const Tensor& seq_len_decoder, const Tensor& step_idx, const Tensor& stop_flags,
                             const Tensor& tgt_pos, const Tensor& stop_nums,
                             const std::vector<Tensor>& weights, const Ints& sizes, float norm_epsilon,
                             float rotary_base, const Names& names, const Ints& dtypes, const Ints& shapes) {
  const auto engine = session({sizes, norm_epsilon, rotary_base, names, dtypes, shapes}, weights);
  const auto n = static_cast<size_t>(input_ids.shape()[0]);
  const int64_t width = input_ids.shape()[1], n_queries = sizes[N_QUERIES], hidden = sizes[HIDDEN];
  const Tensor* per_row[] = {&penalty,         &frequency,       &presence, &min_length,
                             &max_length,      &temperature,     &top_p,    &tgt_pos,
                             &seq_len_encoder, &seq_len_decoder, &step_idx, &stop_flags};
  for (const Tensor* tensor : per_row) {
    require(tensor->numel() == static_cast<int64_t>(n), "an input does not have one value a row");
  }
  const auto* all_ids = input_ids.data<int64_t>();
  std::vector<std::vector<int32_t>> ids(n);
  std::vector<std::vector<qvl_span>> spans(n);
  for (int64_t i = 0; i < img_pos.shape()[0]; ++i) {
    const int64_t* picture = img_pos.data<int64_t>() + 3 * i;
    if (picture[0] < 0) continue;
    require(picture[0] < static_cast<int64_t>(n) && i < features.shape()[0],
            "img_pos: names a row or picture too many");
    spans[static_cast<size_t>(picture[0])].push_back({static_cast<int32_t>(picture[1] + 1),
                                                      static_cast<int32_t>(n_queries),
                                                      features.data<float>() + i * n_queries * hidden});
  }
  std::vector<int32_t> ends;
  for (int64_t i = 0; i < eos.numel(); ++i) ends.push_back(static_cast<int32_t>(eos.data<int64_t>()[i]));
  std::vector<Row> rows(n);
  std::vector<qvl_request> requests;
  std::vector<size_t> row_of;
  int64_t stride = 1;
  const uint64_t seed = phi::DefaultCPUGenerator()->Random64();
  for (size_t i = 0; i < n; ++i) {
    Row& row = rows[i];
    row.done = step_idx.data<int64_t>()[i];
    row.max_length = max_length.data<int64_t>()[i];
    row.min_length = min_length.data<int64_t>()[i];
    row.stopped = stop_flags.data<bool>()[i] || row.max_length < 1;
    stride = std::max(stride, row.max_length);
    if (row.stopped) continue;
    const int32_t length = seq_len_encoder.data<int32_t>()[i];
    require(length >= 1 && length <= width, "seq_len_encoder: must be 1 to the width of input_ids");
    const int64_t* first = all_ids + static_cast<int64_t>(i) * width;
    ids[i].assign(first, first + length);
    std::sort(spans[i].begin(), spans[i].end(),
              [](const qvl_span& a, const qvl_span& b) { return a.start < b.start; });
    qvl_request request{};
    request.n_tokens = length;
    request.tokens = ids[i].data();
    request.n_spans = static_cast<int32_t>(spans[i].size());
    request.spans = spans[i].data();
    request.max_new = static_cast<int32_t>(std::max<int64_t>(1, row.max_length - row.done));
    request.min_new = static_cast<int32_t>(std::max<int64_t>(0, row.min_length - row.done));
    request.sampling = qvl_sampling_default();
    request.sampling.repetition_penalty = penalty.data<float>()[i];
    request.sampling.frequency_penalty = frequency.data<float>()[i];
    request.sampling.presence_penalty = presence.data<float>()[i];
    request.sampling.top_p = top_p.data<float>()[i];
    // top_p 0 is upstream's word for the likeliest token, whatever the temperature.
    const float warmth = temperature.data<float>()[i];
    request.sampling.temperature = request.sampling.top_p > 0 ? std::clamp(warmth, 1e-6f, 100.0f) : 0;
    request.sampling.seed = seed + i;
    requests.push_back(request);
    row_of.push_back(i);
  }
  if (!requests.empty()) {
    std::vector<int32_t> tokens(requests.size() * static_cast<size_t>(stride));
    std::vector<qvl_result> results(requests.size());
    Progress progress{&rows, &row_of, &ends, stop_nums.data<int64_t>()[0]};
    qvl_error error;
    const qvl_status status =
        qvl_generate(engine->engine(), nullptr, static_cast<int32_t>(requests.size()), requests.data(),
                     static_cast<int32_t>(ends.size()), ends.data(), on_step, &progress, stride,
                     tokens.data(), results.data(), nullptr, &error);
    if (status != QVL_STOPPED) check(status, error);
  }
  const Shape column{static_cast<int64_t>(n), 1};
  Tensor next = integers(column), done = integers(column), position = integers(column);
  Tensor stopped = make(column, paddle::DataType::INT32);
  Tensor length = make(column, paddle::DataType::INT32);
  Tensor tokens = integers({static_cast<int64_t>(n), stride});
  std::fill_n(tokens.data<int64_t>(), tokens.numel(), int64_t{-1});
  for (size_t i = 0; i < n; ++i) {
    const Row& row = rows[i];
    const auto taken = static_cast<int64_t>(row.tokens.size());
    next.data<int64_t>()[i] = row.last;
    done.data<int64_t>()[i] = row.done;
    stopped.data<int32_t>()[i] = row.stopped;
    position.data<int64_t>()[i] = tgt_pos.data<int64_t>()[i] + taken;
    const auto fed = static_cast<int32_t>(std::max<int64_t>(0, taken - 1));
    length.data<int32_t>()[i] = row.stopped ? 0 : seq_len_decoder.data<int32_t>()[i] + fed;
    std::copy(row.tokens.begin(), row.tokens.end(),
              tokens.data<int64_t>() + static_cast<int64_t>(i) * stride);
  }
  return {next, done, stopped, length, position, tokens};
}

std::vector<Shape> generate_shape(const Shape& input_ids, const Shape&, const Shape&, const Shape&,
                                  const Shape&, const Shape&, const Shape&, const Shape&, const Shape&,
                                  const Shape&, const Shape&, const Shape&, const Shape&, const Shape&,
                                  const Shape&, const Shape&, const Shape&, const std::vector<Shape>&,
                                  const Ints&, float, float, const Names&, const Ints&, const Ints&) {
  const Shape column{input_ids[0], 1};
  return {column, column, column, column, column, {input_ids[0], -1}};
}

using paddle::DataType;
std::vector<DataType> generate_dtype(const DataType&, const DataType&, const DataType&, const DataType&,
                                     const DataType&, const DataType&, const DataType&, const DataType&,
                                     const DataType&, const DataType&, const DataType&, const DataType&,
                                     const DataType&, const DataType&, const DataType&, const DataType&,
                                     const DataType&, const std::vector<DataType>&) {
  return {DataType::INT64, DataType::INT64, DataType::INT32,
          DataType::INT32, DataType::INT64, DataType::INT64};
}

}  // namespace

#define QWENVL_ATTRIBUTES                                                               \
  {"sizes: std::vector<int>",         "norm_epsilon: float",      "rotary_base: float", \
   "names: std::vector<std::string>", "dtypes: std::vector<int>", "shapes: std::vector<int>"}

PD_BUILD_OP(qwenvl_encode_images)
    .Inputs({"images", paddle::Vec("weights")})
    .Outputs({"features"})
    .Attrs(QWENVL_ATTRIBUTES)
    .SetKernelFn(PD_KERNEL(encode_images))
    .SetInferShapeFn(PD_INFER_SHAPE(encode_images_shape))
    .SetInferDtypeFn(PD_INFER_DTYPE(encode_images_dtype));

PD_BUILD_OP(qwenvl_forward)
    .Inputs({"tokens", "features", "spans", "sequences", "blocks", "pool", paddle::Vec("weights")})
    .Outputs({"logits"})
    .Attrs(QWENVL_ATTRIBUTES)
    .SetKernelFn(PD_KERNEL(forward))
    .SetInferShapeFn(PD_INFER_SHAPE(forward_shape))
    .SetInferDtypeFn(PD_INFER_DTYPE(forward_dtype));

PD_BUILD_OP(qwenvl_generate)
    .Inputs({"input_ids", "image_features", "img_pos", "penalty_score", "frequency_score", "presence_score",
             "min_length", "max_length", "temperature", "top_p", "eos_token_id", "seq_len_encoder",
             "seq_len_decoder", "step_idx", "stop_flags", "tgt_pos", "stop_nums", paddle::Vec("weights")})
    .Outputs({"next_tokens", "steps", "stopped", "lengths", "positions", "tokens"})
    .Attrs(QWENVL_ATTRIBUTES)
    .SetKernelFn(PD_KERNEL(generate))
    .SetInferShapeFn(PD_INFER_SHAPE(generate_shape))
    .SetInferDtypeFn(PD_INFER_DTYPE(generate_dtype));
