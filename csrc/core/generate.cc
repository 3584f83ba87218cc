// qvl_generate: the prompts as one packed batch, then one token a request and step until all have ended.
#include <algorithm>
#include <cstring>
#include <numeric>
#include <vector>

#include "core/checks.h"
#include "core/config.h"
#include "core/engine.h"
#include "core/error.h"

namespace qvl {
namespace {

constexpr int32_t kBlockTokens = 32;

// Device memory that goes with its scope.
template <typename T>
class Buffer {
 public:
  Buffer(Backend& backend, size_t n)
      : backend_(backend), data_(static_cast<T*>(backend.alloc(n * sizeof(T)))) {}
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { backend_.dealloc(data_); }
  T* data() { return data_; }

 private:
  Backend& backend_;
  T* data_;
};

bool penalised(const qvl_sampling& s) {
  return s.repetition_penalty != 1 || s.frequency_penalty != 0 || s.presence_penalty != 0;
}

class Generation {
 public:
  Generation(qvl_engine& engine, const GenerateCall& call)
      : engine_(engine), call_(call), backend_(*engine.backend) {
    check();
    lay_out_blocks();
  }

  void run() {
    const auto n = static_cast<size_t>(call_.n);
    const auto vocab = static_cast<size_t>(engine_.config.vocab);
    size_t n_prompt = 0, n_counted = 0;
    for (size_t i = 0; i < n; ++i) {
      n_prompt += static_cast<size_t>(call_.requests[i].n_tokens);
      n_counted += penalised(call_.requests[i].sampling);
    }
    Buffer<int32_t> ids(backend_, std::max(n_prompt, n));
    Buffer<float> logits(backend_, n * vocab);
    Buffer<int32_t> counts(backend_, n_counted * vocab);
    const std::vector<int32_t> zeros(n_counted ? vocab : 0);
    counts_.assign(n, nullptr);
    for (size_t i = 0, c = 0; i < n; ++i) {
      if (!penalised(call_.requests[i].sampling)) continue;
      counts_[i] = counts.data() + vocab * c++;
      backend_.copy(counts_[i], zeros.data(), vocab * sizeof(int32_t), call_.stream);
    }
    std::iota(active_.begin(), active_.end(), 0);
    for (int32_t step = 0; !active_.empty(); ++step) {
      feed(step == 0, ids.data(), logits.data());
      pick(ids.data(), logits.data());
      take(step);
    }
  }

 private:
  void check() {
    const qvl_config& config = engine_.config;
    QVL_REQUIRE(has_language(config), QVL_INVALID, "the engine has no language stage");
    QVL_REQUIRE(call_.n >= 1 && call_.n <= (1 << 16), QVL_INVALID, "n is %d; it must be at least 1", call_.n);
    QVL_REQUIRE(call_.requests && call_.tokens && call_.results, QVL_INVALID,
                "requests, tokens or results is NULL");
    QVL_REQUIRE(call_.n_end >= 0 && (call_.n_end == 0 || call_.end_ids), QVL_INVALID, "end_ids is NULL");
    int64_t n_prompt = 0;
    char where[48];
    for (int32_t i = 0; i < call_.n; ++i) {
      const qvl_request& r = call_.requests[i];
      snprintf(where, sizeof where, "requests[%d]", i);
      QVL_REQUIRE(r.n_tokens >= 1 && r.tokens, QVL_INVALID, "%s: has no tokens", where);
      QVL_REQUIRE(r.max_new >= 1, QVL_INVALID, "%s: max_new is %d; it must be at least 1", where, r.max_new);
      QVL_REQUIRE(r.max_new <= call_.stride, QVL_INVALID, "%s: max_new is %d; stride is %lld", where,
                  r.max_new, static_cast<long long>(call_.stride));
      QVL_REQUIRE(int64_t{r.n_tokens} + r.max_new <= config.max_positions, QVL_INVALID,
                  "%s: %d tokens and %d new ones; the model takes %d", where, r.n_tokens, r.max_new,
                  config.max_positions);
      check_spans(where, r.n_spans, r.spans, r.n_tokens);
      check_sampling(config, where, r.sampling, true);
      n_prompt += r.n_tokens;
    }
    QVL_REQUIRE(n_prompt <= INT32_MAX, QVL_INVALID, "requests: too many tokens");
    for (int32_t i = 0; i < call_.n_end; ++i) {
      const int32_t id = call_.end_ids[i];
      if (id >= 0 && id < config.vocab) ends_.push_back(id);
    }
    const auto n = static_cast<size_t>(call_.n);
    active_.resize(n);
    forbidden_.resize(n);
    lengths_.resize(n);
    picked_.resize(n);
    for (size_t i = 0; i < n; ++i) call_.results[i] = qvl_result{};
  }

  void lay_out_blocks() {
    const int32_t block_tokens = call_.pool ? call_.pool->blocks->block_tokens : kBlockTokens;
    const auto n = static_cast<size_t>(call_.n);
    int64_t n_blocks = 0;
    std::vector<int64_t> first(n + 1);
    for (size_t i = 0; i < n; ++i) {
      const qvl_request& r = call_.requests[i];
      n_blocks += (int64_t{r.n_tokens} + r.max_new + block_tokens - 1) / block_tokens;
      first[i + 1] = n_blocks;
    }
    QVL_REQUIRE(n_blocks <= INT32_MAX, QVL_INVALID, "requests: too many tokens");
    if (call_.pool) {
      QVL_REQUIRE(n_blocks <= call_.pool->blocks->n_blocks, QVL_INVALID,
                  "pool: has %d blocks; these requests need %lld", call_.pool->blocks->n_blocks,
                  static_cast<long long>(n_blocks));
      pool_ = call_.pool;
    } else {
      own_pool_ = make_pool(engine_, static_cast<int32_t>(n_blocks), block_tokens, engine_.cache_dtype);
      pool_ = own_pool_.get();
    }
    blocks_.resize(static_cast<size_t>(n_blocks));
    std::iota(blocks_.begin(), blocks_.end(), 0);
    first_block_ = std::move(first);
  }

  // The prompts, or the last token of each active request.
  void feed(bool prompts, int32_t* ids, float* logits) {
    std::vector<qvl_sequence> sequences;
    std::vector<qvl_span> spans;
    std::vector<int32_t> host;
    for (const int32_t i : active_) {
      const auto at = static_cast<size_t>(i);
      const qvl_request& r = call_.requests[i];
      const auto start = static_cast<int32_t>(host.size());
      if (prompts) {
        host.insert(host.end(), r.tokens, r.tokens + r.n_tokens);
        for (int32_t s = 0; s < r.n_spans; ++s) {
          spans.push_back(r.spans[s]);
          spans.back().start += start;
        }
      } else {
        host.push_back(picked_[at]);
      }
      const auto n_new = static_cast<int32_t>(host.size()) - start;
      sequences.push_back({n_new, lengths_[at], r.n_tokens,
                           static_cast<int32_t>(first_block_[at + 1] - first_block_[at]),
                           blocks_.data() + first_block_[at]});
      lengths_[at] += n_new;
    }
    backend_.copy(ids, host.data(), host.size() * sizeof(int32_t), call_.stream);
    qvl_batch batch = QVL_INIT(qvl_batch);
    batch.n_sequences = static_cast<int32_t>(sequences.size());
    batch.sequences = sequences.data();
    batch.tokens = ids;
    batch.n_spans = static_cast<int32_t>(spans.size());
    batch.spans = spans.data();
    forward(engine_, *pool_, &batch, logits, call_.stream);
  }

  void pick(int32_t* ids, const float* logits) {
    std::vector<qvl_sampling> sampling;
    std::vector<int32_t*> counts;
    for (const int32_t i : active_) {
      const auto at = static_cast<size_t>(i);
      const qvl_request& r = call_.requests[i];
      const int32_t done = call_.results[i].n_tokens;
      qvl_sampling s = r.sampling;
      std::vector<int32_t>& forbidden = forbidden_[at];
      forbidden.clear();
      if (done == 0) forbidden.assign(s.forbidden, s.forbidden + s.n_forbidden);
      if (done < r.min_new) forbidden.insert(forbidden.end(), ends_.begin(), ends_.end());
      s.n_forbidden = static_cast<int32_t>(forbidden.size());
      s.forbidden = forbidden.data();
      s.counter += static_cast<uint64_t>(done);
      sampling.push_back(s);
      counts.push_back(counts_[at]);
    }
    const auto n = static_cast<int32_t>(active_.size());
    sample(engine_, n, logits, sampling.data(), counts.data(), ids, call_.stream);
    step_tokens_.resize(active_.size());
    backend_.copy(step_tokens_.data(), ids, active_.size() * sizeof(int32_t), call_.stream);
    backend_.synchronize(call_.stream);
  }

  // Hand the step's tokens out and drop the requests that have ended.
  void take(int32_t step) {
    const std::vector<int32_t> requests = active_;
    for (size_t row = 0; row < requests.size(); ++row) {
      const int32_t i = requests[row], token = step_tokens_[row];
      qvl_result& result = call_.results[i];
      call_.tokens[i * call_.stride + result.n_tokens++] = token;
      picked_[static_cast<size_t>(i)] = token;
      if (std::find(ends_.begin(), ends_.end(), token) != ends_.end()) {
        result.finish = QVL_FINISH_END;
      } else if (result.n_tokens == call_.requests[i].max_new) {
        result.finish = QVL_FINISH_LENGTH;
      }
    }
    active_.erase(
        std::remove_if(active_.begin(), active_.end(), [&](int32_t i) { return call_.results[i].finish; }),
        active_.end());
    if (call_.on_step == nullptr) return;
    const auto n = static_cast<int32_t>(requests.size());
    QVL_REQUIRE(call_.on_step(call_.user, step, n, requests.data(), step_tokens_.data()) == 0, QVL_STOPPED,
                "on_step asked to stop after step %d", step);
  }

  qvl_engine& engine_;
  const GenerateCall& call_;
  Backend& backend_;
  std::unique_ptr<qvl_kv_pool> own_pool_;
  qvl_kv_pool* pool_ = nullptr;
  std::vector<int32_t> ends_, active_, lengths_, picked_, blocks_, step_tokens_;
  std::vector<int64_t> first_block_;
  std::vector<std::vector<int32_t>> forbidden_;
  std::vector<int32_t*> counts_;
};

}  // namespace

void generate(qvl_engine& engine, const GenerateCall& call) {
  Generation(engine, call).run();
}

}  // namespace qvl
