// Sampling parameters of a row, for host and device.
#pragma once

namespace qvl::cuda {

// A row's sampling parameters (qvl_sampling), in device memory.
struct Pick {
  float temperature, top_p;
  int top_k;
  float repetition_penalty, frequency_penalty, presence_penalty;
  int n_forbidden, first_forbidden;  // range in `forbidden`
  double fraction;                   // random_fraction(seed, counter)
  int* counts;                       // [vocab] or NULL
};

}  // namespace qvl::cuda
