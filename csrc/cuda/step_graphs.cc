#include "cuda/step_graphs.h"

#include <algorithm>

#include "cuda/gpu.h"

namespace qvl::cuda {
namespace {

constexpr int kMaxRows = 256;       // as many as the functions *_decode of ops.h process in one call
constexpr size_t kMaxGraphs = 128;  // when there are as many, all are destroyed (drop_stale_graphs)
constexpr int kRelaxedCapture = 2;  // mode of capture in which other threads may use the GPU meanwhile
// Two chunks of attention_decode.cc: with a bucket of one chunk, a step would have one block of threads less
// per row and head, but there would be one graph more for each number of rows.
constexpr int kMinKeys = 256;

// Number of rows of the graph for n sequences: n rounded up to 1, 2, 4 or a multiple of 8 with padding rows.
int row_bucket(int n) {
  return n <= 2 ? n : n <= 4 ? 4 : (n + 7) / 8 * 8;
}

// Maximum number of keys of a row in the graph for `keys` keys: `keys` rounded up to a power of two, at least
// kMinKeys and at most max_keys.
int key_bucket(int keys, int max_keys) {
  int bucket = kMinKeys;
  while (bucket < keys) bucket *= 2;
  return std::min(bucket, max_keys);
}

}  // namespace

StepGraphs::StepGraphs(const qvl_config& config, CUcontext context, Language& language, Sampler& sampler,
                       StepInput& input)
    : config_(config), context_(context), language_(language), sampler_(sampler), input_(input) {
  check(driver().cuStreamCreate(&stream_, kNonBlocking), "creating a stream");
}

StepGraphs::~StepGraphs() {
  const CurrentContext current(context_);
  for (const auto& [key, graph] : graphs_) driver().cuGraphExecDestroy(graph);
  driver().cuStreamDestroy(stream_);
}

bool StepGraphs::can_run(const qvl_batch& batch, const SampleCall& call) {
  if (batch.n_spans > 0 || batch.n_sequences > kMaxRows || call.n != batch.n_sequences) return false;
  for (int i = 0; i < batch.n_sequences; ++i) {
    const qvl_sequence& s = batch.sequences[i];
    const bool decode = s.n_past >= s.prompt_len || (s.flags & QVL_SEQUENCE_GENERATED) != 0;
    if (s.n_new != 1 || !decode) return false;
    if (call.counts != nullptr && call.counts[i] != nullptr && !is_device_visible(call.counts[i]))
      return false;
  }
  return true;
}

void StepGraphs::step(CUstream stream, const CudaKvPool& pool, const qvl_batch& batch,
                      const SampleCall& call) {
  const int n = batch.n_sequences, rows = row_bucket(n);
  int keys = 0;
  bool adapted = false;
  for (int i = 0; i < n; ++i) {
    keys = std::max(keys, batch.sequences[i].n_past + 1);
    adapted = adapted || batch.sequences[i].adapter != nullptr;
  }
  const SampleKind kind = sample_kind(call);
  PassShape shape;
  shape.is_step = true;
  shape.is_adapted = adapted;
  shape.n_decode = rows;
  shape.max_keys = key_bucket(keys, config_.max_positions);
  shape.max_blocks = (shape.max_keys + pool.block_tokens - 1) / pool.block_tokens;
  InputSizes sizes;
  sizes.rows = sizes.tables = sizes.picks = rows;
  sizes.max_blocks = shape.max_blocks;
  sizes.forbidden = kind.forbidden;
  sizes.adapted = adapted ? rows : 0;

  const InputArrays host = input_.begin(sizes);
  const bool ids_on_host = !is_device_visible(batch.tokens);
  const int32_t spare = pool.spare_block();
  for (int i = 0; i < rows; ++i) {
    // A padding row is the first token of a sequence that uses the spare block. In order: n_new, n_past,
    // prompt_len, n_blocks, blocks, flags, reserved.
    const qvl_sequence padding{1, 0, 1, 1, &spare, 0, 0};
    const qvl_sequence& s = i < n ? batch.sequences[i] : padding;
    language_.describe_row(host, i, s, s.n_past, i);
    host.ids[i] = ids_on_host && i < n ? batch.tokens[i] : 0;
    std::copy_n(s.blocks, s.n_past / pool.block_tokens + 1, host.blocks + i * shape.max_blocks);
  }
  Language::sort_by_adapter(host, 0, rows);
  sampler_.write_picks(call, rows, host);
  const CUgraphExec graph = graph_for(pool, sizes, shape, kind);
  const InputArrays inputs = input_.send(stream);
  if (!ids_on_host) copy(stream, inputs.ids, batch.tokens, static_cast<uint64_t>(n) * 4);
  check(driver().cuGraphLaunch(graph, stream), "computing on the GPU");
  sampler_.copy_outputs(stream, call);
}

void StepGraphs::drop_stale_graphs() {
  const int graph_version = input_.graph_version() + language_.graph_version() + sampler_.graph_version();
  if (graph_version == graph_version_ && graphs_.size() < kMaxGraphs) return;
  graph_version_ = graph_version;
  for (const auto& [key, graph] : graphs_) driver().cuGraphExecDestroy(graph);
  graphs_.clear();
}

CUgraphExec StepGraphs::graph_for(const CudaKvPool& pool, const InputSizes& sizes, const PassShape& shape,
                                  const SampleKind& kind) {
  const int rows = shape.n_decode;
  language_.reserve(rows, shape.max_keys);
  sampler_.reserve(rows, kind);
  const uint64_t bytes = static_cast<uint64_t>(rows) * static_cast<uint64_t>(config_.vocab) * sizeof(float);
  if (logits_.bytes() < bytes) {
    logits_ = DeviceMemory();
    logits_ = DeviceMemory(bytes);
    graph_version_ = -1;  // all graphs are stale
  }
  drop_stale_graphs();
  const Key key{pool.id(),     rows,       shape.max_keys, kind.draws,      kind.changes,
                kind.logprobs, kind.n_top, kind.forbidden, shape.is_adapted};
  const auto found = graphs_.find(key);
  if (found != graphs_.end()) return found->second;

  const InputArrays inputs = input_.device(sizes);
  CUgraph graph = nullptr;
  check(driver().cuStreamBeginCapture(stream_, kRelaxedCapture), "capturing a step");
  try {
    language_.layers(stream_, pool, inputs, shape);
    language_.lm_head(stream_, inputs, 0, rows, logits_.get<float>());
    sampler_.run(stream_, logits_.get<float>(), rows, inputs, kind);
  } catch (...) {
    driver().cuStreamEndCapture(stream_, &graph);
    if (graph != nullptr) driver().cuGraphDestroy(graph);
    throw;
  }
  check(driver().cuStreamEndCapture(stream_, &graph), "capturing a step");
  CUgraphExec executable = nullptr;
  const CUresult result = driver().cuGraphInstantiate(&executable, graph, 0);
  driver().cuGraphDestroy(graph);
  check(result, "capturing a step");
  graphs_.emplace(key, executable);
  return executable;
}

}  // namespace qvl::cuda
