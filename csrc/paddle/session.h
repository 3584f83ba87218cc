// Engines behind the custom operators: made at an operator's first run, found again by its weights.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "paddle/phi/api/ext/op_meta_info.h"
#include "paddle/phi/core/dense_tensor.h"
#include "qwenvl.h"

namespace qvl::paddle_ops {

// Places in an operator's attribute `sizes`; the others are in session.cc.
enum Size { HIDDEN = 1, VOCAB = 6, N_QUERIES = 17, N_SIZES = 18 };

// What an operator's attributes say about the engine and its weights; see ops.cc for their order.
struct Description {
  const std::vector<int>& sizes;
  float norm_epsilon, rotary_base;
  const std::vector<std::string>& names;
  const std::vector<int>& dtypes;
  const std::vector<int>& shapes;  // four a weight, 0 behind the last axis
};

// An engine, the weights it refers to, and the pools made for it.
class Session {
 public:
  Session(const Description& description, const std::vector<paddle::Tensor>& weights);
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;
  ~Session();

  qvl_engine* engine() const { return engine_; }

  // Pool `id`, made when it is first asked for.
  qvl_kv_pool* pool(int64_t id, int32_t n_blocks, int32_t block_tokens, qvl_dtype dtype);
  void free_pool(int64_t id);

  // Whether nobody but this session holds the weights any more: their program is gone.
  bool abandoned() const;

 private:
  // Not the tensors: those that an operator gets are Paddle's own, and go with their program.
  std::vector<std::shared_ptr<phi::Allocation>> weights_;
  qvl_engine* engine_ = nullptr;
  std::map<int64_t, qvl_kv_pool*> pools_;
};

// The session of these weights.
std::shared_ptr<Session> session(const Description& description, const std::vector<paddle::Tensor>& weights);

// End the run with this line. Of other exceptions than its own, Paddle's executor loses the text.
[[noreturn]] void fail(const std::string& message);

void check(qvl_status status, const qvl_error& error);

}  // namespace qvl::paddle_ops
