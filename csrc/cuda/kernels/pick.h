// Sampling parameters, for host and device.
#pragma once

namespace qvl::cuda {

// Sampling parameters of a row of logits, from qvl_sampling.
struct Pick {
  float temperature, top_p;  // greedy if one of them is 0, or if top_k is 1
  int top_k;
  float repetition_penalty, frequency_penalty, presence_penalty;
  int n_forbidden, first_forbidden;  // range of the row in SampleParams::forbidden
  double fraction;                   // random_fraction(seed, counter): in [0, 1)
  int* counts;                       // [vocab] or NULL: how often each token was generated
};

}  // namespace qvl::cuda
