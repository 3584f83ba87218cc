#include "paddle/session.h"

#include <algorithm>
#include <atomic>
#include <mutex>

#include "paddle/common/enforce.h"

namespace qvl::paddle_ops {
namespace {

std::mutex mutex;
std::atomic<int32_t> n_threads{0};
// By the address of the first weight: a session holds its weights, so that no other tensor can have it.
std::map<const void*, std::shared_ptr<Session>>& sessions() {
  static auto* const all = new std::map<const void*, std::shared_ptr<Session>>;  // outlives every predictor
  return *all;
}

qvl_config make_config(const Description& d) {
  const std::vector<int>& sizes = d.sizes;
  qvl_config c = QVL_INIT(qvl_config);
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
  if (sizes.size() != N_SIZES) {
    fail("the operator's attributes are of another version; export again");
  }
  for (size_t i = 0; i < sizes.size(); ++i) *fields[i] = sizes[i];
  c.n_threads = n_threads;
  c.norm_epsilon = d.norm_epsilon;
  c.rotary_base = d.rotary_base;
  return c;
}

}  // namespace

void fail(const std::string& message) {
  PADDLE_THROW(common::errors::InvalidArgument("qwenvl: %s", message.c_str()));
}

void check(qvl_status status, const qvl_error& error) {
  if (status != QVL_OK) fail(error.message);
}

Session::Session(const Description& d, const std::vector<paddle::Tensor>& weights) {
  const size_t n = weights.size();
  if (d.names.size() != n || d.dtypes.size() != n || d.shapes.size() != 4 * n) {
    fail("the operator has " + std::to_string(n) + " weights and its attributes tell of " +
         std::to_string(d.names.size()));
  }
  const qvl_config config = make_config(d);
  std::vector<qvl_tensor> tensors(n);
  for (size_t i = 0; i < n; ++i) {
    weights_.push_back(static_cast<const phi::DenseTensor*>(weights[i].impl().get())->Holder());
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
  }
  qvl_error error;
  check(qvl_engine_create(&config, tensors.data(), static_cast<int64_t>(n), &engine_, &error), error);
}

Session::~Session() {
  for (const auto& [id, pool] : pools_) qvl_kv_pool_free(pool);
  qvl_engine_free(engine_);
}

qvl_kv_pool* Session::pool(int64_t id, int32_t n_blocks, int32_t block_tokens, qvl_dtype dtype) {
  const std::lock_guard<std::mutex> lock(mutex);
  qvl_kv_pool*& pool = pools_[id];
  if (pool == nullptr) {
    qvl_error error;
    const qvl_status status = qvl_kv_pool_create(engine_, n_blocks, block_tokens, dtype, &pool, &error);
    if (status != QVL_OK) pools_.erase(id);
    check(status, error);
  }
  return pool;
}

void Session::free_pool(int64_t id) {
  const auto found = pools_.find(id);
  if (found == pools_.end()) return;
  qvl_kv_pool_free(found->second);
  pools_.erase(found);
}

bool Session::abandoned() const {
  return weights_.front().use_count() == 1;
}

std::shared_ptr<Session> session(const Description& description, const std::vector<paddle::Tensor>& weights) {
  if (weights.empty()) fail("the operator has no weights");
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = sessions().find(weights.front().data());
  if (found != sessions().end()) return found->second;
  // Programs that are gone leave their sessions behind: Paddle has no hook for the end of a program.
  for (auto it = sessions().begin(); it != sessions().end();) {
    it = it->second.use_count() == 1 && it->second->abandoned() ? sessions().erase(it) : std::next(it);
  }
  return sessions()[weights.front().data()] = std::make_shared<Session>(description, weights);
}

}  // namespace qvl::paddle_ops

// Called by the Python side through ctypes when a KV cache goes.
extern "C" __attribute__((visibility("default"))) void qwenvl_free_pool(int64_t id) {
  const std::lock_guard<std::mutex> lock(qvl::paddle_ops::mutex);
  for (const auto& [weights, session] : qvl::paddle_ops::sessions()) session->free_pool(id);
}

// For the engines made from now on; 0: as qvl_config has it.
extern "C" __attribute__((visibility("default"))) void qwenvl_set_threads(int32_t n) {
  qvl::paddle_ops::n_threads = n;
}
