#include "paddle/session.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <map>
#include <mutex>
#include <new>
#include <utility>

#include "paddle/common/enforce.h"
#include "paddle/phi/core/dense_tensor.h"

namespace qvl::paddle_ops {
namespace {

std::mutex mutex;
std::atomic<int32_t> n_threads{0};

// Device of engines created later: index of a GPU, kCpu, or kFromEnvironment.
constexpr int32_t kCpu = -1, kFromEnvironment = -2;
std::atomic<int32_t> gpu_index{kFromEnvironment};

struct Entry {
  std::shared_ptr<Session> session;
  phi::Allocation::DeleterFnPtr deleter;  // original deleter of the allocation
};

// Sessions, keyed by the allocation of the first weight.
std::map<const phi::Allocation*, Entry>& sessions() {
  // Never freed, because it must outlive all predictors.
  static auto* const by_allocation = new std::map<const phi::Allocation*, Entry>;
  return *by_allocation;
}

// Deleter of the first weight's allocation, called when the program is destroyed.
void free_session(phi::Allocation* allocation) {
  Entry entry{};
  {
    const std::lock_guard<std::mutex> lock(mutex);
    const auto found = sessions().find(allocation);
    if (found == sessions().end()) return;
    entry = std::move(found->second);
    sessions().erase(found);
  }
  if (entry.deleter != nullptr) entry.deleter(allocation);
}

// GPU index from QWENVL_DEVICE, or kCpu. An index has four digits at most, so std::stoi cannot fail.
int32_t gpu_from_environment() {
  const char* value = std::getenv("QWENVL_DEVICE");
  const std::string name = value != nullptr ? value : "";
  if (name.empty() || name == "cpu") return kCpu;
  if (name == "gpu") return 0;
  const std::string number = name.rfind("gpu:", 0) == 0 ? name.substr(4) : "";
  require(
      !number.empty() && number.size() <= 4 && number.find_first_not_of("0123456789") == std::string::npos,
      "QWENVL_DEVICE " + name + ": must be cpu, gpu or gpu:N");
  return std::stoi(number);
}

qvl_config make_config(const Description& d) {
  qvl_config c = QVL_INIT(qvl_config);
  // In the order of the operators' attribute `sizes` (ops.cc).
  int32_t* const fields[N_SIZES] = {reinterpret_cast<int32_t*>(&c.stages),
                                    &c.hidden,
                                    &c.layers,
                                    &c.heads,
                                    &c.head_dim,
                                    &c.mlp_width,
                                    &c.vocab,
                                    &c.seq_length,
                                    &c.max_positions,
                                    &c.dynamic_ntk,
                                    &c.logn,
                                    &c.image_size,
                                    &c.patch_size,
                                    &c.vision_width,
                                    &c.vision_layers,
                                    &c.vision_heads,
                                    &c.vision_mlp_width,
                                    &c.n_queries};
  check_sizes(d.sizes);
  for (size_t i = 0; i < d.sizes.size(); ++i) *fields[i] = d.sizes[i];
  c.n_threads = n_threads;
  const int32_t index = gpu_index == kFromEnvironment ? gpu_from_environment() : gpu_index.load();
  c.device = index == kCpu ? QVL_DEVICE_CPU : QVL_DEVICE_CUDA;
  c.device_index = std::max(index, 0);
  c.norm_epsilon = d.norm_epsilon;
  c.rotary_base = d.rotary_base;
  return c;
}

// Paddle's type of a tensor that contains a weight stored as `dtype`.
paddle::DataType stored_as(int dtype) {
  switch (dtype) {
    case QVL_FLOAT32:
      return paddle::DataType::FLOAT32;
    case QVL_BFLOAT16:
      return paddle::DataType::BFLOAT16;
    case QVL_FLOAT16:
      return paddle::DataType::FLOAT16;
    default:
      return paddle::DataType::UINT8;
  }
}

// The allocation that contains a tensor's data.
const std::shared_ptr<phi::Allocation>& holder(const paddle::Tensor& tensor) {
  return static_cast<const phi::DenseTensor*>(tensor.impl().get())->Holder();
}

}  // namespace

void fail(const std::string& message) {
  PADDLE_THROW(common::errors::InvalidArgument("qwenvl: %s", message.c_str()));
}

void check(qvl_status status, const qvl_error& error) {
  if (status != QVL_OK) fail(error.message);
}

void check_sizes(const std::vector<int>& sizes) {
  require(sizes.size() == N_SIZES, "the operator's attributes have a different version; export again");
}

Session::Session(const Description& d, const std::vector<paddle::Tensor>& weights) {
  const size_t n = weights.size();
  require(d.names.size() == n && d.dtypes.size() == n && d.shapes.size() == 4 * n,
          "the operator has " + std::to_string(n) + " weights, but its attributes describe " +
              std::to_string(d.names.size()));
  const qvl_config config = make_config(d);
  std::vector<qvl_tensor> tensors(n);
  for (size_t i = 0; i < n; ++i) {
    require(phi::DenseTensor::classof(weights[i].impl().get()) && weights[i].initialized() &&
                weights[i].place().GetType() == phi::AllocationType::CPU,
            d.names[i] + ": is not a tensor on the CPU");
    require(weights[i].dtype() == stored_as(d.dtypes[i]),
            d.names[i] + ": dtype differs from the operator's attributes");
    qvl_tensor& tensor = tensors[i];
    tensor.name = d.names[i].c_str();
    tensor.data = weights[i].data();
    tensor.dtype = d.dtypes[i];
    tensor.device = QVL_DEVICE_CPU;
    for (tensor.n_dims = 0; tensor.n_dims < 4 && d.shapes[4 * i + static_cast<size_t>(tensor.n_dims)] > 0;) {
      tensor.shape[tensor.n_dims] = d.shapes[4 * i + static_cast<size_t>(tensor.n_dims)];
      ++tensor.n_dims;
    }
    tensor.bytes = static_cast<uint64_t>(weights[i].numel()) * phi::SizeOf(weights[i].dtype());
    addresses_.push_back(tensor.data);
  }
  qvl_error error;
  qvl_weights* handle;
  check(qvl_weights_create(tensors.data(), static_cast<int64_t>(n), sizeof(qvl_tensor), &handle, &error),
        error);
  const qvl_status status = qvl_engine_create(&config, handle, &engine_, &error);
  qvl_weights_free(handle);
  check(status, error);
}

Session::~Session() {
  qvl_engine_free(engine_);
}

bool Session::matches(const std::vector<paddle::Tensor>& weights) const {
  if (weights.size() != addresses_.size()) return false;
  for (size_t i = 0; i < addresses_.size(); ++i) {
    if (weights[i].data() != addresses_[i]) return false;
  }
  return true;
}

std::shared_ptr<Session> session(const Description& description, const std::vector<paddle::Tensor>& weights) {
  require(!weights.empty() && phi::DenseTensor::classof(weights[0].impl().get()) && weights[0].initialized(),
          "the operator has no weights");
  phi::Allocation* const key = holder(weights[0]).get();
  std::shared_ptr<Session> old;  // declared before the lock, so that it is freed after the unlock
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = sessions().find(key);
  if (found != sessions().end() && found->second.session->matches(weights)) return found->second.session;
  auto created = std::make_shared<Session>(description, weights);
  if (found != sessions().end()) {
    old = std::exchange(found->second.session, created);
    return created;
  }
  // Paddle has no hook for the destruction of a program, but an allocation may have a deleter. To replace the
  // deleter, move-assign an allocation with the same memory, which swaps the two. The swapped-out allocation
  // must not free the memory, so it stays in a buffer for which no destructor runs.
  sessions()[key] = {created, key->deleter()};
  alignas(phi::Allocation) unsigned char buffer[sizeof(phi::Allocation)];
  *key = std::move(*new (buffer) phi::Allocation(key->ptr(), key->size(), free_session, key->place()));
  return created;
}

}  // namespace qvl::paddle_ops

// paddlemix_qwenvl_plugin/engine/operators.py calls the functions below.

// Set the number of threads of engines created later; 0: the default of qvl_config.
extern "C" __attribute__((visibility("default"))) void qwenvl_set_threads(int32_t n) {
  qvl::paddle_ops::n_threads = n;
}

// Set the GPU of engines created later; -1: the CPU. Until the first call QWENVL_DEVICE sets the device.
extern "C" __attribute__((visibility("default"))) void qwenvl_set_gpu(int32_t index) {
  qvl::paddle_ops::gpu_index = index;
}
