// Division of a batch into passes over the layers, by the same rules on every device, and the check of
// token ids in host memory.
#pragma once

#include <algorithm>
#include <vector>

#include "core/error.h"
#include "qwenvl.h"

namespace qvl {

// Check n token ids in host memory, except those that a span covers; check_spans() must have accepted the
// spans. `where`: beginning of the error message.
inline void check_ids(const char* where, int32_t vocab, int64_t n, const int32_t* ids, int32_t n_spans,
                      const qvl_span* spans) {
  int64_t index = 0;
  for (int32_t s = 0; s <= n_spans; ++s) {
    const int64_t end = s < n_spans ? spans[s].start : n;
    for (; index < end; ++index) {
      QVL_REQUIRE(ids[index] >= 0 && ids[index] < vocab, QVL_INVALID,
                  "%s: tokens[%lld] is %d; the vocabulary has %d", where, static_cast<long long>(index),
                  ids[index], vocab);
    }
    if (s < n_spans) index += spans[s].count;
  }
}

// Check the token ids of a batch, which must be in host memory.
inline void check_ids(const qvl_batch& batch, int32_t vocab) {
  int64_t n = 0;
  for (int32_t i = 0; i < batch.n_sequences; ++i) n += batch.sequences[i].n_new;
  check_ids("batch", vocab, n, batch.tokens, batch.n_spans, batch.spans);
}

// Consecutive tokens of one sequence in a pass. Either all are computed as a prompt, or all as decode steps.
struct Part {
  const qvl_sequence* sequence;
  int64_t token;      // index of the first token in the batch
  int32_t n;          // number of tokens
  int32_t past;       // number of tokens of the sequence before this part
  bool generated;     // the tokens are computed as decode steps
  int32_t logits;     // row, among those of the batch, of the logits for the last token, or -1
  int64_t first = 0;  // first row of activations in the pass; set by pass()
};

// Divide a batch into passes of at most max_tokens tokens and call pass(parts) for each. logits: whether
// logits are computed at all.
template <typename Pass>
void for_each_pass(const qvl_batch& batch, int32_t max_tokens, bool logits, Pass&& pass) {
  std::vector<Part> parts;
  int32_t n = 0, rows = 0;
  int64_t token = 0;
  for (int32_t i = 0; i < batch.n_sequences; ++i) {
    const qvl_sequence& sequence = batch.sequences[i];
    const bool wants_logits = logits && (sequence.flags & QVL_SEQUENCE_NO_LOGITS) == 0;
    for (int32_t done = 0; done < sequence.n_new;) {
      const int32_t past = sequence.n_past + done;
      const bool prompt = (sequence.flags & QVL_SEQUENCE_GENERATED) == 0 && past < sequence.prompt_len;
      int32_t count = std::min(sequence.n_new - done, max_tokens - n);
      if (prompt) count = std::min(count, sequence.prompt_len - past);
      const bool last = done + count == sequence.n_new;
      parts.push_back({&sequence, token, count, past, !prompt, last && wants_logits ? rows++ : -1});
      n += count;
      token += count;
      done += count;
      if (n < max_tokens) continue;
      pass(parts);
      parts.clear();
      n = 0;
    }
  }
  if (n > 0) pass(parts);
}

}  // namespace qvl
