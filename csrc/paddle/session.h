// Engines behind the custom operators: made at an operator's first run, found again by its weights, and gone
// with them.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "paddle/phi/api/ext/op_meta_info.h"
#include "qwenvl.h"

namespace qvl::paddle_ops {

// Places in an operator's attribute `sizes`; the others are in session.cc.
enum Size {
  HIDDEN = 1,
  VOCAB = 6,
  MAX_POSITIONS = 8,
  IMAGE_SIZE = 11,
  N_QUERIES = 17,
  N_SIZES = 18,
};

// What an operator's attributes say about the engine and its weights; see ops.cc for their order.
struct Description {
  const std::vector<int>& sizes;
  float norm_epsilon, rotary_base;
  const std::vector<std::string>& names;
  const std::vector<int>& dtypes;
  const std::vector<int>& shapes;  // four a weight, 0 behind the last axis
};

// An engine and where its weights were when it was made. The weights are their program's: nothing here keeps
// them.
class Session {
 public:
  Session(const Description& description, const std::vector<paddle::Tensor>& weights);
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;
  ~Session();

  qvl_engine* engine() const { return engine_; }

  // Whether the weights still lie where the engine reads them.
  bool matches(const std::vector<paddle::Tensor>& weights) const;

 private:
  std::vector<const void*> places_;
  qvl_engine* engine_ = nullptr;
};

// The session of these weights.
std::shared_ptr<Session> session(const Description& description, const std::vector<paddle::Tensor>& weights);

// End the run with this line. Of other exceptions than its own, Paddle's executor loses the text.
[[noreturn]] void fail(const std::string& message);

inline void require(bool condition, const std::string& message) {
  if (!condition) fail(message);
}

void check(qvl_status status, const qvl_error& error);

void check_sizes(const std::vector<int>& sizes);

}  // namespace qvl::paddle_ops
