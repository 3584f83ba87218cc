// Engines of the custom operators. An engine is created on an operator's first run, found in later runs by
// the allocation of the operator's first weight, replaced if another weight has moved, and freed with that
// allocation. Its threads and its device are those that Python has set by qwenvl_set_threads and
// qwenvl_set_gpu, or defaults (session.cc).
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "paddle/phi/api/ext/op_meta_info.h"
#include "qwenvl.h"

namespace qvl::paddle_ops {

// Indices in an operator's attribute `sizes`, as far as ops.cc needs them, and its length N_SIZES;
// make_config() in session.cc has the complete list.
enum Size {
  HIDDEN = 1,
  VOCAB = 6,
  MAX_POSITIONS = 8,
  IMAGE_SIZE = 11,
  N_QUERIES = 17,
  N_SIZES = 18,
};

// Attributes of an operator: the engine's config and the description of its weights, ordered as in ops.cc.
struct Description {
  const std::vector<int>& sizes;
  float norm_epsilon, rotary_base;
  const std::vector<std::string>& names;
  const std::vector<int>& dtypes;
  const std::vector<int>& shapes;  // four dimensions per weight, padded with 0
};

// An engine, and the addresses that its weights had when it was created. The program owns the weights; a
// session does not keep them alive.
class Session {
 public:
  Session(const Description& description, const std::vector<paddle::Tensor>& weights);
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;
  ~Session();

  qvl_engine* engine() const { return engine_; }

  // Whether the weights are still at the addresses used by the engine.
  bool matches(const std::vector<paddle::Tensor>& weights) const;

 private:
  std::vector<const void*> addresses_;
  qvl_engine* engine_ = nullptr;
};

// Find or create the session of these weights. Thread-safe.
std::shared_ptr<Session> session(const Description& description, const std::vector<paddle::Tensor>& weights);

// Throw Paddle's exception type with this message: its executor loses the text of other exceptions.
[[noreturn]] void fail(const std::string& message);

inline void require(bool condition, const std::string& message) {
  if (!condition) fail(message);
}

// Throw the error of a failed call.
void check(qvl_status status, const qvl_error& error);

// Check the length of the attribute `sizes`.
void check_sizes(const std::vector<int>& sizes);

}  // namespace qvl::paddle_ops
