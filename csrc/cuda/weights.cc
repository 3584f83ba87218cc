#include "cuda/weights.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <vector>

#include "core/error.h"
#include "core/pack.h"

namespace qvl::cuda {
namespace {

constexpr uint64_t kAlignment = 256;
constexpr uint64_t kSlab = 64 << 20;  // small weights share allocations of this size

int64_t inner(const qvl_tensor& tensor) {
  int64_t n = 1;
  for (int i = 1; i < tensor.n_dims; ++i) n *= tensor.shape[i];
  return n;
}

qvl_dtype stored_as(Half half) {
  return half == Half::kBfloat16 ? QVL_BFLOAT16 : QVL_FLOAT16;
}

}  // namespace

Weights::Weights(const Gpu& gpu, CUstream stream, const WeightTable& table)
    : gpu_(gpu), stream_(stream), table_(table), uploader_(gpu.context(), stream) {
  check_room();
}

void Weights::check_room() const {
  uint64_t needed = 0, at_4_bits = 0;
  for (const auto& [name, tensor] : table_) {
    const auto out = static_cast<int>(tensor.shape[0]), in = static_cast<int>(inner(tensor));
    const bool matrix = tensor.n_dims > 1;
    const MatrixBytes bytes = matrix_bytes(storage_of(tensor.dtype), out, in);
    needed += matrix ? bytes.values + bytes.scales : 4 * static_cast<uint64_t>(out);
    at_4_bits += static_cast<uint64_t>(out) * static_cast<uint64_t>(in) / (matrix ? 2 : 1);
  }
  size_t free = 0, total = 0;
  check(driver().cuMemGetInfo(&free, &total), "querying free GPU memory");
  const bool quantised = std::any_of(table_.begin(), table_.end(),
                                     [](const auto& entry) { return is_quantised(entry.second.dtype); });
  const char* advice = at_4_bits < free && !quantised ? "; an export with weight_only_int4 would fit" : "";
  QVL_REQUIRE(needed <= free, QVL_NO_MEMORY,
              "out of GPU memory: the weights need %.2f GiB, %.2f of %.2f GiB are free%s", gib(needed),
              gib(free), gib(total), advice);
}

void* Weights::take(uint64_t bytes) {
  bytes = rounded(bytes, kAlignment);
  if (bytes > left_) {
    const uint64_t made = std::max(bytes, bytes < kSlab / 4 ? kSlab : bytes);
    memory_.emplace_back(made);
    if (made == bytes) return memory_.back().get();
    room_ = memory_.back().get<char>();
    left_ = made;
  }
  void* const taken = room_;
  room_ += bytes;
  left_ -= bytes;
  return taken;
}

void Weights::put(void* to, const void* from, uint64_t bytes, qvl_device where) {
  if (where == QVL_DEVICE_CUDA) {
    copy(stream_, to, from, bytes);
  } else {
    uploader_.copy(to, from, bytes);
  }
}

const float* Weights::floats(const std::string& name) {
  const qvl_tensor& tensor = table_.at(name);
  const int64_t n = tensor.shape[0] * inner(tensor);
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
  auto* made = static_cast<float*>(take(bytes));
  uploader_.copy(made, values.get(), bytes);
  return made;
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
  auto* const made = static_cast<int32_t*>(take(tensor->bytes));
  uploader_.copy(made, tensor->data, tensor->bytes);
  return made;
}

Matrix Weights::empty(Storage storage, int64_t out, int64_t in) {
  const MatrixBytes bytes = matrix_bytes(storage, static_cast<int>(out), static_cast<int>(in));
  Matrix made{};
  made.storage = storage;
  made.out = static_cast<int>(out);
  made.in = static_cast<int>(in);
  made.stride =
      static_cast<int>(rounded(static_cast<uint64_t>(in), storage == Storage::kHalf ? 8 : kPackUnit));
  made.values = take(bytes.values);
  if (bytes.scales) made.scales = take(bytes.scales);
  return made;
}

void Weights::fill(const qvl_tensor& tensor, const Matrix& to, int first, int step) {
  const bool as_it_is = tensor.dtype == stored_as(gpu_.half()) && to.in == to.stride && step == 1;
  if (as_it_is) {
    const auto row = static_cast<uint64_t>(to.stride) * 2;
    put(static_cast<char*>(to.values) + static_cast<uint64_t>(first) * row, tensor.data, tensor.bytes,
        tensor.device);
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
  const bool in_place =
      tensor.device == QVL_DEVICE_CUDA && tensor.dtype == stored_as(gpu_.half()) && inner(tensor) % 8 == 0;
  Matrix made{};
  if (in_place) {
    made = {Storage::kHalf,
            static_cast<int>(tensor.shape[0]),
            static_cast<int>(inner(tensor)),
            static_cast<int>(inner(tensor)),
            const_cast<void*>(tensor.data),
            nullptr,
            nullptr,
            nullptr};
  } else {
    made = empty(storage_of(tensor.dtype), tensor.shape[0], inner(tensor));
    fill(tensor, made, 0, 1);
  }
  if (!bias.empty()) made.bias = floats(bias);
  made.order = order(name);
  return made;
}

Matrix Weights::interleaved(const std::string& first, const std::string& second) {
  const qvl_tensor &a = table_.at(first), &b = table_.at(second);
  QVL_REQUIRE(storage_of(a.dtype) == storage_of(b.dtype), QVL_UNSUPPORTED,
              "%s and %s have different types; a GPU needs the same type", first.c_str(), second.c_str());
  const qvl_tensor *order_a = order_of(first), *order_b = order_of(second);
  const bool alike = (order_a == nullptr) == (order_b == nullptr) &&
                     (order_a == nullptr || std::memcmp(order_a->data, order_b->data, order_a->bytes) == 0);
  QVL_REQUIRE(alike, QVL_UNSUPPORTED, "%s and %s have their inputs in different orders; a GPU needs one",
              first.c_str(), second.c_str());
  // Pad with rows of zeros, so that a row of the result is a whole number of vectors.
  const auto rows = static_cast<int64_t>(rounded(static_cast<uint64_t>(a.shape[0]), 8));
  Matrix made = empty(storage_of(a.dtype), 2 * rows, inner(a));
  if (rows != a.shape[0]) {
    const MatrixBytes bytes = matrix_bytes(made.storage, made.out, made.in);
    check(driver().cuMemsetD8Async(address(made.values), 0, bytes.values, stream_), "clearing a weight");
    if (bytes.scales)
      check(driver().cuMemsetD8Async(address(made.scales), 0, bytes.scales, stream_), "clearing a weight");
  }
  fill(a, made, 0, 2);
  fill(b, made, 1, 2);
  made.order = order(first);
  return made;
}

Matrix Weights::half_matrix(const std::string& name, const std::string& bias) {
  qvl_tensor tensor = table_.at(name);
  if (!is_quantised(tensor.dtype)) return matrix(name, bias);
  QVL_REQUIRE(tensor.device == QVL_DEVICE_CPU, QVL_UNSUPPORTED, "%s: is quantised; it must be on the CPU",
              name.c_str());
  order(name);  // fails if the matrix has an input order
  const int64_t out = tensor.shape[0], in = inner(tensor);
  const std::unique_ptr<float[]> values(new float[static_cast<size_t>(out * in)]);
  unpack(tensor.dtype, out, in, tensor.data, values.get());
  tensor.data = values.get();
  tensor.bytes = static_cast<uint64_t>(out * in) * sizeof(float);
  tensor.dtype = QVL_FLOAT32;
  Matrix made = empty(Storage::kHalf, out, in);
  fill(tensor, made, 0, 1);
  if (!bias.empty()) made.bias = floats(bias);
  return made;
}

std::deque<DeviceMemory> Weights::finish() {
  check(driver().cuStreamSynchronize(stream_), "uploading the weights");
  return std::move(memory_);
}

}  // namespace qvl::cuda
