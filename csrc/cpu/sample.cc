#include "cpu/sample.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "core/sampling.h"

namespace qvl::cpu {
namespace {

constexpr double kForbidden = -1e10;  // logit of a forbidden token (qwenvl.h)

struct Candidate {
  double logit;
  int32_t id;
};

// Order from the most to the least likely candidate, so that std::min_element() finds the most likely one.
bool likelier(const Candidate& a, const Candidate& b) {
  return a.logit > b.logit || (a.logit == b.logit && a.id < b.id);
}

struct Peak {
  float logit;
  int32_t id;  // the lowest in a tie; -1 if the row has a NaN, a positive infinity or no finite value
};

// Find the largest logit. Although this function is compiled for baseline x86-64, it takes about as long as
// reading the row (150,000 logits) from memory.
Peak find_peak(int32_t vocab, const float* logits) {
  typedef float Four __attribute__((vector_size(16)));
  typedef int32_t FourInts __attribute__((vector_size(16)));
  constexpr int32_t kBlock = 256, kVectors = 4, kLanes = 4;
  float maximum = -INFINITY;
  // Start of the first block that contains the maximum, or its id if it occurs only after the last block.
  int32_t best = -1;
  // Per lane -1 (true) or 0. finite: a value was finite; numbers: no value was a NaN.
  FourInts finite = {}, numbers = FourInts{} - 1;
  int32_t start = 0;
  for (; start + kBlock <= vocab; start += kBlock) {
    Four largest[kVectors];
    for (Four& vector : largest) vector = -INFINITY - Four{};
    for (int32_t i = 0; i < kBlock; i += kVectors * kLanes) {
      for (int32_t v = 0; v < kVectors; ++v) {
        Four value;
        std::memcpy(&value, logits + start + i + v * kLanes, sizeof value);
        numbers &= value == value;
        finite |= (value - value) == Four{};
        largest[v] = value > largest[v] ? value : largest[v];
      }
    }
    float block_maximum = -INFINITY;
    for (const Four& vector : largest) {
      for (int l = 0; l < kLanes; ++l) block_maximum = std::max(block_maximum, vector[l]);
    }
    if (block_maximum > maximum) {
      maximum = block_maximum;
      best = start;
    }
  }
  bool any_finite = (finite[0] | finite[1] | finite[2] | finite[3]) != 0;
  bool all_numbers = (numbers[0] & numbers[1] & numbers[2] & numbers[3]) != 0;
  for (int32_t id = start; id < vocab; ++id) {
    any_finite |= std::isfinite(logits[id]);
    all_numbers &= !std::isnan(logits[id]);
    if (logits[id] > maximum) {
      maximum = logits[id];
      best = id;
    }
  }
  if (!any_finite || !all_numbers || maximum == INFINITY) return {0, -1};
  while (logits[best] != maximum) ++best;
  return {maximum, best};
}

bool is_forbidden(const qvl_sampling& s, int32_t id) {
  return std::find(s.forbidden, s.forbidden + s.n_forbidden, id) != s.forbidden + s.n_forbidden;
}

// Apply forbidden ids and penalties.
void adjust(const qvl_sampling& s, int32_t vocab, const int32_t* counts, Candidate* candidates) {
  for (int32_t i = 0; i < s.n_forbidden; ++i) candidates[s.forbidden[i]].logit = kForbidden;
  if (counts == nullptr) return;
  const auto repetition = static_cast<double>(s.repetition_penalty);
  for (int32_t id = 0; id < vocab; ++id) {
    if (counts[id] <= 0) continue;
    double& logit = candidates[id].logit;
    logit = logit < 0 ? logit * repetition : logit / repetition;
    logit -= counts[id] * static_cast<double>(s.frequency_penalty) + static_cast<double>(s.presence_penalty);
  }
}

// Token at `fraction` of the probability mass of the candidates within top-k and top-p, in descending order
// of probability. Sorts the candidates in rounds, and stops when enough are sorted.
int32_t draw(const qvl_sampling& s, int32_t vocab, Candidate* candidates, double fraction) {
  const auto temperature = static_cast<double>(s.temperature), top_p = static_cast<double>(s.top_p);
  int32_t n = vocab;
  if (s.top_k > 0 && s.top_k < vocab) {
    n = s.top_k;
    std::partial_sort(candidates, candidates + n, candidates + vocab, likelier);
  }
  const double maximum = std::min_element(candidates, candidates + n, likelier)->logit;
  const auto weight = [&](const Candidate& c) { return std::exp((c.logit - maximum) / temperature); };
  double total = 0;
  for (int32_t i = 0; i < n; ++i) total += weight(candidates[i]);
  // Keep the most likely candidates: with top-p those within top-p, else those up to the drawn token.
  const bool no_top_p = top_p >= 1;
  int32_t kept = 0;
  double mass = 0;
  double depth = 4;  // sort weights down to exp(-depth); the first round is usually enough
  for (int32_t sorted = 0; kept == sorted && sorted < n; depth += depth < 16 ? 2 : depth) {
    const double threshold = depth < 800 ? maximum - depth * temperature : -INFINITY;  // exp(-800) is 0
    Candidate* const end = std::partition(candidates + sorted, candidates + n,
                                          [&](const Candidate& c) { return c.logit >= threshold; });
    std::sort(candidates + sorted, end, likelier);
    sorted = static_cast<int32_t>(end - candidates);
    while (kept < sorted && (no_top_p ? mass <= fraction * total : mass / total < top_p)) {
      mass += weight(candidates[kept++]);
    }
  }
  if (no_top_p) return candidates[kept - 1].id;
  double cumulative = 0;
  for (int32_t i = 0; i < kept; ++i) {
    cumulative += weight(candidates[i]);
    if (cumulative > fraction * mass) return candidates[i].id;
  }
  return candidates[kept - 1].id;
}

}  // namespace

size_t sample_scratch_bytes(int32_t vocab) {
  return static_cast<size_t>(vocab) * sizeof(Candidate);
}

bool needs_scratch(const qvl_sampling& s, const int32_t* counts) {
  return !greedy(s) || s.n_forbidden > 0 || (counts != nullptr && penalised(s));
}

int32_t sample_row(int32_t vocab, const float* logits, const qvl_sampling& s, int32_t* counts,
                   Buffer& scratch) {
  const Peak peak = find_peak(vocab, logits);
  int32_t id = peak.id;
  if (id < 0) return id;
  // A forbidden token other than the peak does not affect greedy sampling, unless the peak is as low as
  // kForbidden.
  const bool penalties = counts != nullptr && penalised(s);
  const bool adjusted = penalties || (s.n_forbidden > 0 && (peak.logit <= kForbidden || is_forbidden(s, id)));
  if (!greedy(s) || adjusted) {
    auto* candidates = scratch.get<Candidate>(static_cast<size_t>(vocab));
    for (int32_t i = 0; i < vocab; ++i) candidates[i] = {static_cast<double>(logits[i]), i};
    adjust(s, vocab, penalties ? counts : nullptr, candidates);
    id = greedy(s) ? std::min_element(candidates, candidates + vocab, likelier)->id
                   : draw(s, vocab, candidates, random_fraction(s.seed, s.counter));
  }
  if (counts != nullptr) ++counts[id];
  return id;
}

void row_logprobs(int32_t vocab, const float* logits, int32_t token, float* logprob, int32_t n_top,
                  int32_t* top_tokens, float* top_logprobs) {
  if (token < 0) {
    if (logprob != nullptr) *logprob = NAN;
    std::fill_n(top_tokens, n_top, -1);
    std::fill_n(top_logprobs, n_top, NAN);
    return;
  }
  const float maximum = find_peak(vocab, logits).logit;
  double total = 0;
  for (int32_t id = 0; id < vocab; ++id) total += static_cast<double>(std::exp(logits[id] - maximum));
  const double log_total = static_cast<double>(maximum) + std::log(total);
  if (logprob != nullptr) *logprob = static_cast<float>(static_cast<double>(logits[token]) - log_total);
  // Insertion sort of the n_top most likely tokens; in a tie the lower id precedes.
  int32_t n = 0;
  for (int32_t id = 0; id < vocab; ++id) {
    if (n == n_top && (n == 0 || !(logits[id] > logits[top_tokens[n - 1]]))) continue;
    int32_t at = n < n_top ? n++ : n - 1;
    for (; at > 0 && logits[id] > logits[top_tokens[at - 1]]; --at) top_tokens[at] = top_tokens[at - 1];
    top_tokens[at] = id;
  }
  for (int32_t i = 0; i < n_top; ++i) {
    top_logprobs[i] = static_cast<float>(static_cast<double>(logits[top_tokens[i]]) - log_total);
  }
}

}  // namespace qvl::cpu
