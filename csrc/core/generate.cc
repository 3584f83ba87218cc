// qvl_generate: one step computes all prompts as one batch, then decode steps compute one token per
// request until all requests have finished. Called by the operator qwenvl_generate (csrc/paddle/ops.cc) and
// by C programs; the plugin's loop calls qvl_step.
//
// On an asynchronous device step n + 1 is enqueued before the host has read the tokens of step n, unless a
// request reaches its maximum length in step n, or step n contains a request that finished in step n - 1.
// Step n + 1 then takes the tokens of step n from device memory, and its results for requests that turn out
// to have finished in step n are discarded. If an error or on_step ends the call while a step runs, freeing
// the buffers waits for it.
#include <algorithm>
#include <memory>
#include <numeric>
#include <utility>
#include <vector>

#include "core/checks.h"
#include "core/config.h"
#include "core/engine.h"
#include "core/error.h"
#include "core/passes.h"
#include "core/sampling.h"

namespace qvl {
namespace {

constexpr int32_t kBlockTokens = 32;  // tokens per block of a pool created here

// Device memory, freed at the end of the scope.
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

class Generation {
 public:
  Generation(qvl_engine& engine, const GenerateCall& call)
      : engine_(engine), call_(call), backend_(*engine.backend) {
    check();
    assign_blocks();
  }

  void run() {
    const auto n = static_cast<size_t>(call_.n);
    const auto vocab = static_cast<size_t>(engine_.config.vocab);
    size_t n_prompt = 0, n_counted = 0;  // prompt tokens; requests whose penalties need token counts
    for (size_t i = 0; i < n; ++i) {
      n_prompt += static_cast<size_t>(call_.requests[i].n_tokens);
      n_counted += penalised(call_.requests[i].sampling);
    }
    Buffer<int32_t> ids(backend_, n_prompt);  // also of decode steps: each prompt has at least one token
    Buffer<int32_t> counts(backend_, n_counted * vocab);
    const std::vector<int32_t> zeros(n_counted ? vocab : 0);
    counts_.assign(n, nullptr);
    for (size_t i = 0, c = 0; i < n; ++i) {
      if (!penalised(call_.requests[i].sampling)) continue;
      counts_[i] = counts.data() + vocab * c++;
      backend_.copy(counts_[i], zeros.data(), vocab * sizeof(int32_t), call_.stream);
    }
    std::iota(active_.begin(), active_.end(), 0);
    for (PendingStep& pending : pending_) {
      pending.tokens = HostTokens(backend_, n);
      pending.done_event = backend_.make_event();
    }
    start(pending_[0], /*prompts=*/true, ids.data());
    for (int32_t step = 0; !active_.empty(); ++step) {
      PendingStep &current = pending_[step % 2], &next = pending_[(step + 1) % 2];
      const bool ahead = backend_.runs_ahead() && may_repeat(current);
      if (ahead) start_ahead(next, ids.data());
      finish_step(current, step);
      if (!ahead && !active_.empty()) start(next, /*prompts=*/false, ids.data());
    }
  }

 private:
  // Tokens of a step in memory from alloc_host(), page-locked on a GPU; freed with this object.
  class HostTokens {
   public:
    HostTokens() = default;
    HostTokens(Backend& backend, size_t n)
        : backend_(&backend), data_(static_cast<int32_t*>(backend.alloc_host(n * sizeof(int32_t)))) {}
    HostTokens& operator=(HostTokens&& other) noexcept {
      std::swap(backend_, other.backend_);
      std::swap(data_, other.data_);
      return *this;
    }
    ~HostTokens() {
      if (data_ != nullptr) backend_->dealloc_host(data_);
    }
    int32_t* data() const { return data_; }

   private:
    Backend* backend_ = nullptr;
    int32_t* data_ = nullptr;
  };

  // A step that has been enqueued.
  struct PendingStep {
    std::vector<int32_t> requests;  // index of each row's request
    HostTokens tokens;
    std::unique_ptr<Event> done_event;  // recorded after the copy to `tokens`
  };

  // Check the arguments and initialise the requests' state.
  void check() {
    const qvl_config& config = engine_.config;
    QVL_REQUIRE(has_language(config), QVL_INVALID, "the engine has no language stage");
    QVL_REQUIRE(call_.tokens && call_.results, QVL_INVALID, "tokens or results is NULL");
    QVL_REQUIRE(call_.n_end >= 0, QVL_INVALID, "n_end is %d", call_.n_end);
    QVL_REQUIRE(call_.n_end == 0 || call_.end_ids, QVL_INVALID, "end_ids is NULL");
    int64_t n_prompt = 0;
    char where[48];
    for (int32_t i = 0; i < call_.n; ++i) {
      const Request& r = call_.requests[i];
      snprintf(where, sizeof where, "requests[%d]", i);
      QVL_REQUIRE(r.n_tokens >= 1 && r.tokens, QVL_INVALID, "%s: has no tokens", where);
      QVL_REQUIRE(r.max_new >= 1, QVL_INVALID, "%s: max_new is %d; it must be at least 1", where, r.max_new);
      QVL_REQUIRE(r.max_new <= call_.stride, QVL_INVALID, "%s: max_new is %d; stride is %lld", where,
                  r.max_new, static_cast<long long>(call_.stride));
      QVL_REQUIRE(int64_t{r.n_tokens} + r.max_new <= config.max_positions, QVL_INVALID,
                  "%s: %d tokens and %d new ones; the model takes %d", where, r.n_tokens, r.max_new,
                  config.max_positions);
      check_spans(where, r.n_spans, r.spans, r.n_tokens);
      check_ids(where, config.vocab, r.n_tokens, r.tokens, r.n_spans, r.spans);
      check_sampling(config, "requests", i, r.sampling, /*counted=*/true);
      QVL_REQUIRE(r.adapter == nullptr || r.adapter->engine == &engine_, QVL_INVALID,
                  "%s: adapter: belongs to another engine", where);
      n_prompt += r.n_tokens;
    }
    QVL_REQUIRE(n_prompt <= INT32_MAX, QVL_INVALID, "requests: too many tokens");
    // Omit ids outside the vocabulary: they are never generated, and check_sampling() would refuse them as
    // forbidden ids.
    for (int32_t i = 0; i < call_.n_end; ++i) {
      const int32_t id = call_.end_ids[i];
      if (id >= 0 && id < config.vocab) stop_tokens_.push_back(id);
    }
    const auto n = static_cast<size_t>(call_.n);
    active_.resize(n);
    forbidden_.resize(n);
    lengths_.resize(n);
    last_tokens_.resize(n);
    for (size_t i = 0; i < n; ++i) call_.results[i] = qvl_result{};
  }

  // Assign consecutive blocks of the pool to the requests; create a pool if there is none.
  void assign_blocks() {
    const int32_t block_tokens = call_.pool ? call_.pool->blocks->block_tokens : kBlockTokens;
    const auto n = static_cast<size_t>(call_.n);
    int64_t n_blocks = 0;
    first_block_.resize(n + 1);
    for (size_t i = 0; i < n; ++i) {
      const Request& r = call_.requests[i];
      n_blocks += (int64_t{r.n_tokens} + r.max_new + block_tokens - 1) / block_tokens;
      first_block_[i + 1] = n_blocks;
    }
    QVL_REQUIRE(n_blocks <= INT32_MAX, QVL_INVALID, "requests: too many tokens");
    if (call_.pool) {
      QVL_REQUIRE(n_blocks <= call_.pool->blocks->n_blocks, QVL_INVALID,
                  "pool: has %d blocks; these requests need %lld", call_.pool->blocks->n_blocks,
                  static_cast<long long>(n_blocks));
      pool_ = call_.pool;
    } else {
      created_pool_ = make_pool(engine_, static_cast<int32_t>(n_blocks), block_tokens, engine_.cache_dtype);
      pool_ = created_pool_.get();
    }
    blocks_.resize(static_cast<size_t>(n_blocks));
    std::iota(blocks_.begin(), blocks_.end(), 0);
  }

  // Whether the step after `pending` has the same requests, unless one of them generates a stop token.
  bool may_repeat(const PendingStep& pending) const {
    return pending.requests == active_ && std::all_of(active_.begin(), active_.end(), [&](int32_t i) {
             return call_.results[i].n_tokens + 1 < call_.requests[i].max_new;
           });
  }

  // Enqueue a step with the prompts of the active requests, or with their last tokens.
  void start(PendingStep& pending, bool prompts, int32_t* ids) {
    pending.requests = active_;
    build_batch(prompts, ids);
    enqueue(pending, /*unread=*/0, ids);
  }

  // Enqueue a decode step, as `pending`, before the host has read the tokens of the step before it; `ids`
  // contains these tokens.
  void start_ahead(PendingStep& pending, int32_t* ids) {
    pending.requests = active_;
    sequences_.clear();
    spans_.clear();
    for (const int32_t i : active_) {
      const auto index = static_cast<size_t>(i);
      sequences_.push_back(sequence(index, 1));
      lengths_[index] += 1;
    }
    enqueue(pending, /*unread=*/1, ids);
  }

  // Batch entry for a request's next n tokens.
  qvl_sequence sequence(size_t index, int32_t n) const {
    qvl_sequence entry{};
    entry.n_new = n;
    entry.n_past = lengths_[index];
    entry.prompt_len = call_.requests[index].n_tokens;
    entry.n_blocks = static_cast<int32_t>(first_block_[index + 1] - first_block_[index]);
    entry.blocks = blocks_.data() + first_block_[index];
    entry.adapter = call_.requests[index].adapter;
    return entry;
  }

  // Build the step's batch and copy its token ids to the device.
  void build_batch(bool prompts, int32_t* ids) {
    sequences_.clear();
    spans_.clear();
    step_ids_.clear();
    for (const int32_t i : active_) {
      const auto index = static_cast<size_t>(i);
      const Request& r = call_.requests[i];
      const auto start = static_cast<int32_t>(step_ids_.size());
      if (prompts) {
        step_ids_.insert(step_ids_.end(), r.tokens, r.tokens + r.n_tokens);
        for (int32_t s = 0; s < r.n_spans; ++s) {
          spans_.push_back(r.spans[s]);
          spans_.back().start += start;
        }
      } else {
        step_ids_.push_back(last_tokens_[index]);
      }
      sequences_.push_back(sequence(index, static_cast<int32_t>(step_ids_.size()) - start));
      lengths_[index] += sequences_.back().n_new;
    }
    backend_.copy(ids, step_ids_.data(), step_ids_.size() * sizeof(int32_t), call_.stream);
  }

  // Enqueue the batch, the sampling of a token per sequence and the copy of the tokens. unread: number of
  // sampled tokens per sequence that the host has not read yet.
  void enqueue(PendingStep& pending, int32_t unread, int32_t* ids) {
    sampling_.clear();
    step_counts_.clear();
    for (const int32_t i : active_) {
      const auto index = static_cast<size_t>(i);
      const Request& r = call_.requests[i];
      const int32_t done = call_.results[i].n_tokens + unread;
      qvl_sampling s = r.sampling;
      std::vector<int32_t>& forbidden = forbidden_[index];
      forbidden.clear();
      // The caller's forbidden tokens apply to the first token only.
      if (done == 0) forbidden.assign(s.forbidden, s.forbidden + s.n_forbidden);
      if (done < r.min_new) forbidden.insert(forbidden.end(), stop_tokens_.begin(), stop_tokens_.end());
      s.n_forbidden = static_cast<int32_t>(forbidden.size());
      s.forbidden = forbidden.data();
      s.counter += static_cast<uint64_t>(done);
      sampling_.push_back(s);
      step_counts_.push_back(counts_[index]);
    }
    qvl_batch batch = QVL_INIT(qvl_batch);
    batch.n_sequences = static_cast<int32_t>(sequences_.size());
    batch.sequences = sequences_.data();
    batch.tokens = ids;
    batch.n_spans = static_cast<int32_t>(spans_.size());
    batch.spans = spans_.data();
    SampleCall sample_call{};
    sample_call.n = batch.n_sequences;
    sample_call.sampling = sampling_.data();
    sample_call.counts = step_counts_.data();
    sample_call.tokens = ids;  // replaces the ids of this step: start_ahead() uses the sampled tokens as ids
    step(engine_, *pool_, batch, nullptr, sample_call, call_.stream);
    backend_.copy_async(pending.tokens.data(), ids, active_.size() * sizeof(int32_t), call_.stream);
    pending.done_event->record(call_.stream);
  }

  // Wait for a step, store its tokens, remove the requests that have finished and call on_step.
  void finish_step(PendingStep& pending, int32_t step) {
    pending.done_event->wait();
    step_requests_.clear();
    step_tokens_.clear();
    for (size_t row = 0; row < pending.requests.size(); ++row) {
      const int32_t i = pending.requests[row], token = pending.tokens.data()[row];
      qvl_result& result = call_.results[i];
      if (result.finish) continue;  // finished in the previous step
      QVL_REQUIRE(token >= 0, QVL_INTERNAL,
                  "requests[%d]: the logits of token %d are not finite; are the weights damaged?", i,
                  result.n_tokens);
      step_requests_.push_back(i);
      step_tokens_.push_back(token);
      call_.tokens[i * call_.stride + result.n_tokens++] = token;
      last_tokens_[static_cast<size_t>(i)] = token;
      if (std::find(stop_tokens_.begin(), stop_tokens_.end(), token) != stop_tokens_.end()) {
        result.finish = QVL_FINISH_END;
      } else if (result.n_tokens == call_.requests[i].max_new) {
        result.finish = QVL_FINISH_LENGTH;
      }
    }
    active_.erase(
        std::remove_if(active_.begin(), active_.end(), [&](int32_t i) { return call_.results[i].finish; }),
        active_.end());
    if (call_.on_step == nullptr) return;
    const auto n = static_cast<int32_t>(step_requests_.size());
    QVL_REQUIRE(call_.on_step(call_.user, step, n, step_requests_.data(), step_tokens_.data()) == 0,
                QVL_STOPPED, "on_step requested a stop after step %d", step);
  }

  qvl_engine& engine_;
  const GenerateCall& call_;
  Backend& backend_;
  std::unique_ptr<qvl_kv_pool> created_pool_;
  qvl_kv_pool* pool_ = nullptr;
  std::vector<int32_t> stop_tokens_;
  std::vector<int32_t> active_;                 // indices of the requests that have not finished
  std::vector<int32_t> lengths_, last_tokens_;  // per request: tokens in the pool, last token
  std::vector<int32_t> blocks_;                 // block tables of all requests
  std::vector<int64_t> first_block_;            // per request: start of its table in blocks_
  std::vector<std::vector<int32_t>> forbidden_;
  PendingStep pending_[2];
  std::vector<int32_t*> counts_;  // per request: token counts in device memory, NULL without penalties
  // Scratch memory of a step, reused.
  std::vector<qvl_sequence> sequences_;
  std::vector<qvl_span> spans_;
  std::vector<qvl_sampling> sampling_;
  std::vector<int32_t> step_ids_, step_tokens_, step_requests_;
  std::vector<int32_t*> step_counts_;
};

}  // namespace

void generate(qvl_engine& engine, const GenerateCall& call) {
  Generation(engine, call).run();
}

}  // namespace qvl
