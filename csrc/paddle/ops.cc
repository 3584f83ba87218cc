// Paddle custom operators that run the engine: the operators of engine programs. The last input of an
// operator is the list of weights. Attributes, written by modeling/engine_stage.py:
//   sizes    fields of qvl_config: stages, hidden, layers, heads, head_dim, mlp_width, vocab, seq_length,
//            max_positions, dynamic_ntk, logn, image_size, patch_size, vision_width, vision_layers,
//            vision_heads, vision_mlp_width, n_queries
//   norm_epsilon, rotary_base  fields of qvl_config
//   names    of the weights, in the order of the list of weights
//   dtypes   of the weights, qvl_dtype
//   shapes   of the weights, four dimensions each, padded with 0
//
// All tensors, also the weights, are on the CPU even if the engine runs on a GPU.
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
using qvl::paddle_ops::check_sizes;
using qvl::paddle_ops::HIDDEN;
using qvl::paddle_ops::IMAGE_SIZE;
using qvl::paddle_ops::MAX_POSITIONS;
using qvl::paddle_ops::N_QUERIES;
using qvl::paddle_ops::require;
using qvl::paddle_ops::session;
using qvl::paddle_ops::VOCAB;

using Shape = std::vector<int64_t>;
using Ints = std::vector<int>;
using Names = std::vector<std::string>;

std::string text(const Shape& shape) {
  std::string result = "[";
  for (size_t i = 0; i < shape.size(); ++i) {
    result += (i > 0 ? ", " : "") + (shape[i] >= 0 ? std::to_string(shape[i]) : std::string("any"));
  }
  return result + "]";
}

// Values of an input, after a check of its shape, type and device. In `shape`, -1 stands for any length.
template <typename T>
const T* values(const Tensor& tensor, const char* name, const Shape& shape) {
  const Shape given = tensor.shape();
  bool same = given.size() == shape.size();
  for (size_t i = 0; same && i < shape.size(); ++i) same = shape[i] < 0 || shape[i] == given[i];
  require(same, std::string(name) + ": shape is " + text(given) + "; it must be " + text(shape));
  constexpr auto kType = phi::CppTypeToDataType<T>::Type();
  require(tensor.dtype() == kType && tensor.place().GetType() == phi::AllocationType::CPU,
          std::string(name) + ": is " + phi::DataTypeToString(tensor.dtype()) + "; it must be " +
              phi::DataTypeToString(kType) + " on the CPU");
  return tensor.data<T>();
}

// Values of an input with one value per row, [n, 1].
template <typename T>
const T* column(const Tensor& tensor, const char* name, int64_t n) {
  return values<T>(tensor, name, {n, 1});
}

// Uninitialised tensor on the CPU.
Tensor make(const Shape& shape, paddle::DataType dtype) {
  return paddle::experimental::empty(shape, dtype, paddle::CPUPlace());
}

Tensor integers(const Shape& shape) {
  return make(shape, paddle::DataType::INT64);
}

// ---- images --------------------------------------------------------------------------------------------

std::vector<Tensor> encode_images(const Tensor& images, const std::vector<Tensor>& weights, const Ints& sizes,
                                  float norm_epsilon, float rotary_base, const Names& names,
                                  const Ints& dtypes, const Ints& shapes) {
  const auto engine = session({sizes, norm_epsilon, rotary_base, names, dtypes, shapes}, weights);
  const int64_t n_queries = sizes[N_QUERIES], hidden = sizes[HIDDEN], pixels = sizes[IMAGE_SIZE];
  const auto* from = values<float>(images, "images", {-1, 3, pixels, pixels});
  const int64_t n = images.shape()[0];
  Tensor features = make({n, n_queries, hidden}, paddle::DataType::FLOAT32);
  qvl_error error;
  check(qvl_encode_images(engine->engine(), n, from, features.data<float>(), nullptr, &error), error);
  return {features};
}

std::vector<Shape> encode_images_shape(const Shape& images, const std::vector<Shape>&, const Ints& sizes,
                                       float, float, const Names&, const Ints&, const Ints&) {
  check_sizes(sizes);
  require(!images.empty(), "images: has no axes");
  return {{images[0], sizes[N_QUERIES], sizes[HIDDEN]}};
}

std::vector<paddle::DataType> encode_images_dtype(const paddle::DataType&,
                                                  const std::vector<paddle::DataType>&) {
  return {paddle::DataType::FLOAT32};
}

// ---- completions, with the inputs of the stock program that the engine needs -----------------------------

// Parameters and state of a row, as in paddlemix_qwenvl_plugin/modeling/generation.py.
struct Row {
  int64_t done;  // number of generated tokens, including those of earlier calls
  int64_t max_length, min_length;
  int64_t last = 0;  // last token of this call; 0 if there is none
  bool stopped;
  std::vector<int32_t> tokens;  // tokens of this call
};

// User data of on_step.
struct Progress {
  std::vector<Row>* rows;
  const std::vector<size_t>* row_of;  // row of each request
  const std::vector<int32_t>* stop_tokens;
  int64_t stop_nums;  // generation ends when this number of rows has stopped
};

// qvl_on_step: update the rows; request a stop when enough rows have stopped.
int32_t on_step(void* user, int32_t, int32_t n, const int32_t* requests, const int32_t* tokens) {
  const auto& progress = *static_cast<Progress*>(user);
  for (int32_t i = 0; i < n; ++i) {
    Row& row = (*progress.rows)[(*progress.row_of)[static_cast<size_t>(requests[i])]];
    row.last = tokens[i];
    row.tokens.push_back(tokens[i]);
    const auto& stop_tokens = *progress.stop_tokens;
    const bool is_stop = std::find(stop_tokens.begin(), stop_tokens.end(), tokens[i]) != stop_tokens.end();
    ++row.done;
    row.stopped = row.done >= row.max_length || is_stop;
  }
  const auto stopped =
      std::count_if(progress.rows->begin(), progress.rows->end(), [](const Row& row) { return row.stopped; });
  return stopped >= progress.stop_nums;
}

// Convert a token id. An id outside the vocabulary becomes -1, which equals no token; in a prompt it is valid
// only in an image slot.
int32_t as_id(int64_t id, int64_t vocab) {
  return id >= 0 && id < vocab ? static_cast<int32_t>(id) : -1;
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
  const int64_t n_queries = sizes[N_QUERIES], hidden = sizes[HIDDEN], max_positions = sizes[MAX_POSITIONS];
  const auto* all_ids = values<int64_t>(input_ids, "input_ids", {-1, -1});
  const int64_t n_rows = input_ids.shape()[0], width = input_ids.shape()[1];
  const auto* penalties = column<float>(penalty, "penalty_score", n_rows);
  const auto* frequencies = column<float>(frequency, "frequency_score", n_rows);
  const auto* presences = column<float>(presence, "presence_score", n_rows);
  const auto* min_lengths = column<int64_t>(min_length, "min_length", n_rows);
  const auto* max_lengths = column<int64_t>(max_length, "max_length", n_rows);
  const auto* temperatures = column<float>(temperature, "temperature", n_rows);
  const auto* top_ps = column<float>(top_p, "top_p", n_rows);
  const auto* lengths = column<int32_t>(seq_len_encoder, "seq_len_encoder", n_rows);
  const auto* decoded = column<int32_t>(seq_len_decoder, "seq_len_decoder", n_rows);
  const auto* steps = column<int64_t>(step_idx, "step_idx", n_rows);
  const auto* stops = column<bool>(stop_flags, "stop_flags", n_rows);
  const auto* positions = column<int64_t>(tgt_pos, "tgt_pos", n_rows);
  const int64_t stop_count = *values<int64_t>(stop_nums, "stop_nums", {1});
  const auto* end_ids = values<int64_t>(eos, "eos_token_id", {-1});
  const auto* image_features = values<float>(features, "image_features", {-1, n_queries, hidden});
  // Per image: row, index of <img>, index of </img>. The features are between the two.
  const auto* image_positions = values<int64_t>(img_pos, "img_pos", {-1, 3});
  require(n_rows <= (1 << 16), "input_ids: has more than 65536 rows");  // the limit of qvl_generate()
  const auto n = static_cast<size_t>(n_rows);
  std::vector<std::vector<int32_t>> ids(n);
  std::vector<std::vector<qvl_span>> spans(n);
  for (int64_t i = 0; i < img_pos.shape()[0]; ++i) {
    const int64_t row = image_positions[3 * i], start = image_positions[3 * i + 1];
    if (row < 0) continue;  // an absent image
    const std::string where = "img_pos: image " + std::to_string(i);
    require(row < n_rows && i < features.shape()[0], where + ": no such row, or no such image");
    require(start >= 0 && start < width - n_queries, where + ": does not end within its row");
    spans[static_cast<size_t>(row)].push_back({static_cast<int32_t>(start + 1),
                                               static_cast<int32_t>(n_queries),
                                               image_features + i * n_queries * hidden});
  }
  std::vector<int32_t> stop_tokens;
  for (int64_t i = 0; i < eos.numel(); ++i) stop_tokens.push_back(as_id(end_ids[i], sizes[VOCAB]));
  std::vector<Row> rows(n);
  std::vector<qvl_request> requests;
  std::vector<qvl_sampling> sampling(n);
  std::vector<size_t> row_of;
  int64_t stride = 1;
  const uint64_t seed = phi::DefaultCPUGenerator()->Random64();
  for (size_t i = 0; i < n; ++i) {
    Row& row = rows[i];
    require(max_lengths[i] <= max_positions, "max_length: is " + std::to_string(max_lengths[i]) +
                                                 "; the model takes " + std::to_string(max_positions));
    require(steps[i] >= 0 && steps[i] <= max_positions, "step_idx: is " + std::to_string(steps[i]));
    row.done = steps[i];
    row.max_length = max_lengths[i];
    row.min_length = std::clamp<int64_t>(min_lengths[i], 0, max_positions);
    row.stopped = stops[i] || row.max_length < 1;
    stride = std::max(stride, row.max_length);
    if (row.stopped) continue;
    const int32_t length = lengths[i];
    require(length >= 1 && length <= width, "seq_len_encoder: must be 1 to the width of input_ids");
    const int64_t* first = all_ids + static_cast<int64_t>(i) * width;
    for (int32_t t = 0; t < length; ++t) ids[i].push_back(as_id(first[t], sizes[VOCAB]));
    std::sort(spans[i].begin(), spans[i].end(),
              [](const qvl_span& a, const qvl_span& b) { return a.start < b.start; });
    qvl_request request{};
    request.n_tokens = length;
    request.tokens = ids[i].data();
    request.n_spans = static_cast<int32_t>(spans[i].size());
    request.spans = spans[i].data();
    // As in the stock program, a row that has not stopped generates a token even if its step_idx has reached
    // max_length.
    request.max_new = static_cast<int32_t>(std::max<int64_t>(1, row.max_length - row.done));
    request.min_new = static_cast<int32_t>(std::max<int64_t>(0, row.min_length - row.done));
    request.span_size = sizeof(qvl_span);
    request.sampling = &sampling[i];
    sampling[i].size = sizeof(qvl_sampling);
    qvl_sampling_init(&sampling[i]);
    sampling[i].repetition_penalty = penalties[i];
    sampling[i].frequency_penalty = frequencies[i];
    sampling[i].presence_penalty = presences[i];
    sampling[i].top_p = top_ps[i];
    // With top_p 0 upstream takes the most likely token, regardless of the temperature. Otherwise the
    // temperature is limited to the engine's range without 0, which would select greedy sampling.
    sampling[i].temperature = top_ps[i] > 0 ? std::clamp(temperatures[i], 1e-6f, 100.0f) : 0;
    sampling[i].seed = seed + i;
    requests.push_back(request);
    row_of.push_back(i);
  }
  if (!requests.empty()) {
    std::vector<int32_t> tokens(requests.size() * static_cast<size_t>(stride));
    std::vector<qvl_result> results(requests.size());
    Progress progress{&rows, &row_of, &stop_tokens, stop_count};
    qvl_error error;
    const qvl_status status =
        qvl_generate(engine->engine(), nullptr, static_cast<int32_t>(requests.size()), requests.data(),
                     sizeof(qvl_request), static_cast<int32_t>(stop_tokens.size()), stop_tokens.data(),
                     on_step, &progress, stride, tokens.data(), results.data(), nullptr, &error);
    if (status != QVL_STOPPED) check(status, error);
  }
  const Shape column_shape{n_rows, 1};
  Tensor next = integers(column_shape), done = integers(column_shape), position = integers(column_shape);
  Tensor stopped = make(column_shape, paddle::DataType::INT32);
  Tensor length = make(column_shape, paddle::DataType::INT32);
  Tensor tokens = integers({n_rows, stride});
  std::fill_n(tokens.data<int64_t>(), tokens.numel(), int64_t{-1});
  for (size_t i = 0; i < n; ++i) {
    const Row& row = rows[i];
    const auto n_new = static_cast<int64_t>(row.tokens.size());
    next.data<int64_t>()[i] = row.last;
    done.data<int64_t>()[i] = row.done;
    stopped.data<int32_t>()[i] = row.stopped;
    position.data<int64_t>()[i] = positions[i] + n_new;
    // The last token is not in the KV cache yet.
    const auto n_cached = static_cast<int32_t>(std::max<int64_t>(0, n_new - 1));
    length.data<int32_t>()[i] = row.stopped ? 0 : decoded[i] + n_cached;
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
  require(!input_ids.empty(), "input_ids: has no axes");
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

PD_BUILD_OP(qwenvl_generate)
    .Inputs({"input_ids", "image_features", "img_pos", "penalty_score", "frequency_score", "presence_score",
             "min_length", "max_length", "temperature", "top_p", "eos_token_id", "seq_len_encoder",
             "seq_len_decoder", "step_idx", "stop_flags", "tgt_pos", "stop_nums", paddle::Vec("weights")})
    .Outputs({"next_tokens", "steps", "stopped", "lengths", "positions", "tokens"})
    .Attrs(QWENVL_ATTRIBUTES)
    .SetKernelFn(PD_KERNEL(generate))
    .SetInferShapeFn(PD_INFER_SHAPE(generate_shape))
    .SetInferDtypeFn(PD_INFER_DTYPE(generate_dtype));
