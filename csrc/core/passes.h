// A packed batch in passes over the layers, the same on every device.
#pragma once

#include <algorithm>
#include <vector>

#include "qwenvl.h"

namespace qvl {

// Tokens of a sequence that are in a pass, all of its prompt or all as a decode step computes them.
struct Part {
  const qvl_sequence* sequence;
  int64_t token;  // its first, in the batch
  int32_t n;
  int32_t past;
  bool generated;
  int32_t logits;     // row of the logits that its last token gives, or -1
  int64_t first = 0;  // row of the pass
};

// Call `pass` with the parts of each pass of at most max_tokens tokens. Without `logits` no part gives any.
template <typename Pass>
void for_each_pass(const qvl_batch& batch, int32_t max_tokens, bool logits, Pass&& pass) {
  std::vector<Part> parts;
  int32_t n = 0, rows = 0;
  int64_t token = 0;
  for (int32_t i = 0; i < batch.n_sequences; ++i) {
    const qvl_sequence& sequence = batch.sequences[i];
    const bool wanted = logits && (sequence.flags & QVL_SEQUENCE_NO_LOGITS) == 0;
    for (int32_t done = 0; done < sequence.n_new;) {
      const int32_t past = sequence.n_past + done;
      const bool prompt = (sequence.flags & QVL_SEQUENCE_GENERATED) == 0 && past < sequence.prompt_len;
      int32_t part = std::min(sequence.n_new - done, max_tokens - n);
      if (prompt) part = std::min(part, sequence.prompt_len - past);
      const bool last = done + part == sequence.n_new;
      parts.push_back({&sequence, token, part, past, !prompt, last && wanted ? rows++ : -1});
      n += part;
      token += part;
      done += part;
      if (n < max_tokens) continue;
      pass(parts);
      parts.clear();
      n = 0;
    }
  }
  if (n > 0) pass(parts);
}

}  // namespace qvl
