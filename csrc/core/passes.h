// Split of a packed batch into passes over the layers, the same on every device.
#pragma once

#include <algorithm>
#include <vector>

#include "core/error.h"
#include "qwenvl.h"

namespace qvl {

// Check token ids in host memory, except those covered by a span. `where`: prefix of the message.
inline void check_ids(const char* where, int32_t vocab, int64_t n, const int32_t* ids, int32_t n_spans,
                      const qvl_span* spans) {
  int64_t at = 0;
  for (int32_t s = 0; s <= n_spans; ++s) {
    const int64_t end = s < n_spans ? spans[s].start : n;
    for (; at < end; ++at) {
      QVL_REQUIRE(ids[at] >= 0 && ids[at] < vocab, QVL_INVALID,
                  "%s: tokens[%lld] is %d; the vocabulary has %d", where, static_cast<long long>(at), ids[at],
                  vocab);
    }
    if (s < n_spans) at += spans[s].count;
  }
}

// Check the token ids of a batch.
inline void check_ids(const qvl_batch& batch, int32_t vocab) {
  int64_t n = 0;
  for (int32_t i = 0; i < batch.n_sequences; ++i) n += batch.sequences[i].n_new;
  check_ids("batch", vocab, n, batch.tokens, batch.n_spans, batch.spans);
}

// Tokens of one sequence in a pass, all of the prompt or all of decode steps.
struct Part {
  const qvl_sequence* sequence;
  int64_t token;  // index of the first token in the batch
  int32_t n;
  int32_t past;  // tokens of the sequence before them
  bool generated;
  int32_t logits;     // row of the logits for the last token, or -1
  int64_t first = 0;  // first row in the pass
};

// Call `pass` with the parts of each pass, which has at most max_tokens tokens. Without `logits` no part has
// a row of logits.
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
