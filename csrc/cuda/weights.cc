#include "cuda/weights.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <vector>

#include "core/error.h"
#include "core/pack.h"

namespace qvl::cuda {
namespace {

constexpr uint64_t kAlignment = 256;  // of each weight, in bytes
constexpr uint64_t kSlab = 64 << 20;  // bytes of an allocation that small weights share

// Number of values of a row: the product of all dimensions but the first.
int64_t row_values(const qvl_tensor& tensor) {
  int64_t n = 1;
  for (int i = 1; i < tensor.n_dims; ++i) n *= tensor.shape[i];
  return n;
}

qvl_dtype dtype_of(Half half) {
  return half == Half::kBfloat16 ? QVL_BFLOAT16 : QVL_FLOAT16;
}

// Whether matrix() uses the tensor where it is.
bool is_usable_in_place(const qvl_tensor& tensor, Half half) {
  return tensor.device == QVL_DEVICE_CUDA && tensor.dtype == dtype_of(half) && row_values(tensor) % 8 == 0;
}

}  // namespace

Weights::Weights(const Gpu& gpu, CUstream stream, const WeightTable& table)
    : gpu_(gpu), stream_(stream), table_(table), uploader_(gpu.context(), stream) {
  check_memory();
}

// needed is a lower bound: matrices on the GPU that are usable in place do not count, although interleaved()
// copies them, and quantized matrices count as such, although half_matrix() dequantizes them. bytes_as_int4
// is a lower bound of the size of an export with weight_only_int4: half a byte per value of a matrix,
// although wte stays unquantized and lm_head and c_attn get 8 bits; a byte per value of a vector; no scales.
void Weights::check_memory() const {
  uint64_t needed = 0, bytes_as_int4 = 0;
  for (const auto& [name, tensor] : table_) {
    const auto out = static_cast<int>(tensor.shape[0]), in = static_cast<int>(row_values(tensor));
    const bool is_matrix = tensor.n_dims > 1;
    const MatrixBytes bytes = matrix_bytes(storage_of(tensor.dtype), out, in);
    if (!is_matrix) needed += 4 * static_cast<uint64_t>(out);
    if (is_matrix && !is_usable_in_place(tensor, gpu_.half())) needed += bytes.values + bytes.scales;
    bytes_as_int4 += static_cast<uint64_t>(out) * static_cast<uint64_t>(in) / (is_matrix ? 2 : 1);
  }
  size_t free = 0, total = 0;
  check(driver().cuMemGetInfo(&free, &total), "querying free GPU memory");
  const bool quantized = std::any_of(table_.begin(), table_.end(),
                                     [](const auto& entry) { return is_quantized(entry.second.dtype); });
  const bool has_language = table_.count("lm_head.weight") != 0;
  const char* advice = has_language && bytes_as_int4 < free && !quantized
                           ? "; an export of the language stage with weight_only_int4 may fit"
                           : "";
  QVL_REQUIRE(needed <= free, QVL_NO_MEMORY,
              "out of GPU memory: the weights need %.2f GiB, %.2f of %.2f GiB are free%s", gib(needed),
              gib(free), gib(total), advice);
}

void* Weights::suballocate(uint64_t bytes) {
  bytes = round_up(bytes, kAlignment);
  if (bytes > slab_left_) {
    const uint64_t allocated = std::max(bytes, bytes < kSlab / 4 ? kSlab : bytes);
    memory_.emplace_back(allocated);
    if (allocated == bytes) return memory_.back().get();
    slab_ = memory_.back().get<char>();
    slab_left_ = allocated;
  }
  void* const memory = slab_;
  slab_ += bytes;
  slab_left_ -= bytes;
  return memory;
}

void Weights::copy_to_gpu(void* to, const void* from, uint64_t bytes, qvl_device source) {
  if (source == QVL_DEVICE_CUDA) {
    copy(stream_, to, from, bytes);
  } else {
    uploader_.copy(to, from, bytes);
  }
}

const float* Weights::floats(const std::string& name) {
  const qvl_tensor& tensor = table_.at(name);
  const int64_t n = tensor.shape[0] * row_values(tensor);
  std::vector<char> fetched;
  const void* data = tensor.data;
  if (tensor.device == QVL_DEVICE_CUDA) {
    fetched.resize(tensor.bytes);
    copy(stream_, fetched.data(), data, tensor.bytes);
    check(driver().cuStreamSynchronize(stream_), "reading a weight");
    data = fetched.data();
  }
  const std::unique_ptr<float[]> values(new float[static_cast<size_t>(n)]);
  unpack(tensor.dtype, 1, n, data, values.get());
  const auto bytes = static_cast<uint64_t>(n) * sizeof(float);
  auto* on_gpu = static_cast<float*>(suballocate(bytes));
  uploader_.copy(on_gpu, values.get(), bytes);
  return on_gpu;
}

const qvl_tensor* Weights::order_of(const std::string& name) const {
  const auto found = table_.find(name + ".order");
  return found != table_.end() ? &found->second : nullptr;
}

const int32_t* Weights::order(const std::string& name) {
  const qvl_tensor* const tensor = order_of(name);
  if (tensor == nullptr) return nullptr;
  QVL_REQUIRE(name.rfind("visual.", 0) != 0, QVL_UNSUPPORTED,
              "%s.order: act-order of the vision stage is not supported on a GPU; run this model on the CPU",
              name.c_str());
  auto* const on_gpu = static_cast<int32_t*>(suballocate(tensor->bytes));
  uploader_.copy(on_gpu, tensor->data, tensor->bytes);
  return on_gpu;
}

Matrix Weights::allocate_matrix(Storage storage, int64_t out, int64_t in) {
  const MatrixBytes bytes = matrix_bytes(storage, static_cast<int>(out), static_cast<int>(in));
  Matrix result{};
  result.storage = storage;
  result.out = static_cast<int>(out);
  result.in = static_cast<int>(in);
  result.stride =
      static_cast<int>(round_up(static_cast<uint64_t>(in), storage == Storage::kHalf ? 8 : kPackUnit));
  result.values = suballocate(bytes.values);
  if (bytes.scales) result.scales = suballocate(bytes.scales);
  return result;
}

void Weights::write_rows(const qvl_tensor& tensor, const Matrix& to, int first, int step) {
  const bool same_layout = tensor.dtype == dtype_of(gpu_.half()) && to.in == to.stride && step == 1;
  if (same_layout) {
    const auto row_bytes = static_cast<uint64_t>(to.stride) * 2;
    copy_to_gpu(static_cast<char*>(to.values) + static_cast<uint64_t>(first) * row_bytes, tensor.data,
                tensor.bytes, tensor.device);
    return;
  }
  const void* from = tensor.data;
  if (tensor.device == QVL_DEVICE_CPU) {
    if (staging_.bytes() < tensor.bytes) staging_ = DeviceMemory(tensor.bytes);
    uploader_.copy(staging_.get(), tensor.data, tensor.bytes);
    from = staging_.get();
  }
  upload_matrix(gpu_, stream_, tensor.dtype, from, static_cast<int>(tensor.shape[0]), to, first, step);
}

Matrix Weights::matrix(const std::string& name, const std::string& bias) {
  const qvl_tensor& tensor = table_.at(name);
  Matrix result{};
  if (is_usable_in_place(tensor, gpu_.half())) {
    result = {Storage::kHalf,
              static_cast<int>(tensor.shape[0]),
              static_cast<int>(row_values(tensor)),
              static_cast<int>(row_values(tensor)),
              const_cast<void*>(tensor.data),
              nullptr,
              nullptr,
              nullptr};
  } else {
    result = allocate_matrix(storage_of(tensor.dtype), tensor.shape[0], row_values(tensor));
    write_rows(tensor, result, 0, 1);
  }
  if (!bias.empty()) result.bias = floats(bias);
  result.order = order(name);
  return result;
}

Matrix Weights::interleaved(const std::string& first, const std::string& second) {
  const qvl_tensor &a = table_.at(first), &b = table_.at(second);
  QVL_REQUIRE(storage_of(a.dtype) == storage_of(b.dtype), QVL_UNSUPPORTED,
              "%s and %s have different types; a GPU needs the same type", first.c_str(), second.c_str());
  const qvl_tensor *order_a = order_of(first), *order_b = order_of(second);
  const bool same_order =
      (order_a == nullptr) == (order_b == nullptr) &&
      (order_a == nullptr || std::memcmp(order_a->data, order_b->data, order_a->bytes) == 0);
  QVL_REQUIRE(same_order, QVL_UNSUPPORTED, "%s and %s have their inputs in different orders; a GPU needs one",
              first.c_str(), second.c_str());
  // Pad with rows of zeros, so that a row of the product's result (kSiluTimes: `rows` values) is a whole
  // number of vectors of 8 values.
  const auto rows = static_cast<int64_t>(round_up(static_cast<uint64_t>(a.shape[0]), 8));
  Matrix result = allocate_matrix(storage_of(a.dtype), 2 * rows, row_values(a));
  if (rows != a.shape[0]) {
    const MatrixBytes bytes = matrix_bytes(result.storage, result.out, result.in);
    check(driver().cuMemsetD8Async(address(result.values), 0, bytes.values, stream_), "clearing a weight");
    if (bytes.scales)
      check(driver().cuMemsetD8Async(address(result.scales), 0, bytes.scales, stream_), "clearing a weight");
  }
  write_rows(a, result, 0, 2);
  write_rows(b, result, 1, 2);
  result.order = order(first);
  return result;
}

Matrix Weights::half_matrix(const std::string& name, const std::string& bias) {
  qvl_tensor tensor = table_.at(name);
  if (!is_quantized(tensor.dtype)) return matrix(name, bias);
  QVL_REQUIRE(tensor.device == QVL_DEVICE_CPU, QVL_UNSUPPORTED, "%s: is quantized; it must be on the CPU",
              name.c_str());
  order(name);  // fails if the matrix, one of the vision stage, has an input order
  const int64_t out = tensor.shape[0], in = row_values(tensor);
  const std::unique_ptr<float[]> values(new float[static_cast<size_t>(out * in)]);
  unpack(tensor.dtype, out, in, tensor.data, values.get());
  tensor.data = values.get();
  tensor.bytes = static_cast<uint64_t>(out * in) * sizeof(float);
  tensor.dtype = QVL_FLOAT32;
  Matrix result = allocate_matrix(Storage::kHalf, out, in);
  write_rows(tensor, result, 0, 1);
  if (!bias.empty()) result.bias = floats(bias);
  return result;
}

std::deque<DeviceMemory> Weights::finish() {
  check(driver().cuStreamSynchronize(stream_), "uploading the weights");
  return std::move(memory_);
}

}  // namespace qvl::cuda
