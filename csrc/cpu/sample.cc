#include "cpu/sample.h"

#include <algorithm>
#include <cmath>

#include "core/random.h"

namespace qvl::cpu {
namespace {

constexpr double kForbidden = -1e10;

struct Candidate {
  double logit;
  int32_t id;
};

bool likelier(const Candidate& a, const Candidate& b) {
  return a.logit > b.logit || (a.logit == b.logit && a.id < b.id);
}

// A NaN is the least likely, so that comparisons order all candidates.
double readable(float logit) {
  return std::isnan(logit) ? -INFINITY : static_cast<double>(logit);
}

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

// The token at `fraction` of the probability that top-k and top-p leave.
int32_t draw(const qvl_sampling& s, int32_t vocab, Candidate* candidates, double fraction) {
  const auto temperature = static_cast<double>(s.temperature);
  const auto weight = [&](const Candidate& c, double most) {
    return std::exp((c.logit - most) / temperature);
  };
  int32_t n = vocab;
  if (s.top_k > 0 && s.top_k < vocab) {
    n = s.top_k;
    std::nth_element(candidates, candidates + n, candidates + vocab, likelier);
  }
  const double most = std::min_element(candidates, candidates + n, likelier)->logit;
  double total = 0;
  for (int32_t i = 0; i < n; ++i) total += weight(candidates[i], most);
  // A NaN or infinite row has no distribution: its likeliest token.
  if (!std::isfinite(total)) return std::min_element(candidates, candidates + n, likelier)->id;
  // Sort the likeliest, more and more of them, until they reach top_p; mostly a few do. Sums go from the
  // likeliest on.
  int32_t kept = 0;
  double before = 0;
  for (int32_t sorted = 0; kept == sorted && sorted < n;) {
    const int32_t end = std::min<int64_t>(n, std::max<int64_t>(int64_t{sorted} * 8, 256));
    if (end < n) std::nth_element(candidates + sorted, candidates + end, candidates + n, likelier);
    std::sort(candidates + sorted, candidates + end, likelier);
    sorted = end;
    while (kept < end && before / total < static_cast<double>(s.top_p))
      before += weight(candidates[kept++], most);
  }
  kept = std::max(kept, 1);
  double mass = 0;
  for (int32_t i = 0; i < kept; ++i) mass += weight(candidates[i], most);
  double reach = 0;
  for (int32_t i = 0; i < kept; ++i) {
    reach += weight(candidates[i], most);
    if (reach > fraction * mass) return candidates[i].id;
  }
  return candidates[kept - 1].id;
}

}  // namespace

int32_t sample_row(int32_t vocab, const float* logits, const qvl_sampling& s, int32_t* counts,
                   Buffer& scratch) {
  auto* candidates = scratch.get<Candidate>(static_cast<size_t>(vocab));
  for (int32_t id = 0; id < vocab; ++id) candidates[id] = {readable(logits[id]), id};
  adjust(s, vocab, counts, candidates);
  const bool greedy = s.temperature == 0 || s.top_p == 0 || s.top_k == 1;
  const int32_t id = greedy ? std::min_element(candidates, candidates + vocab, likelier)->id
                            : draw(s, vocab, candidates, random_fraction(s.seed, s.counter));
  if (counts != nullptr) ++counts[id];
  return id;
}

}  // namespace qvl::cpu
