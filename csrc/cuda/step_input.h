// Inputs of a pass over the layers, of sampling, or (in StepGraphs) of both, written on the host and copied
// to the GPU in one transfer.
#pragma once

#include <array>
#include <cstddef>

#include "cuda/memory.h"
#include "cuda/ops.h"

namespace qvl::cuda {

// Sizes of the arrays. Only they determine the offsets of the arrays: steps with the same sizes have the
// arrays at the same addresses, as captured graphs require, until graph_version() changes.
struct InputSizes {
  int rows = 0;                    // tokens of the pass
  int tables = 0, max_blocks = 0;  // block tables, and their length
  int chunks = 0, tiles = 0;       // of prompts, for attention_prompt
  int picks = 0, forbidden = 0;    // rows to sample; forbidden ids of all of them (SampleKind)
  int adapted = 0;                 // number of rows if any of them has an adapter, else 0
};

// The arrays, in host or device memory.
struct InputArrays {
  int32_t* ids;           // [rows]
  uint64_t* features;     // [rows]: address of the image features of the row; 0: none
  int32_t* positions;     // [rows]
  int32_t* angle_tables;  // [rows]: index of the table in Angles for the row's sequence
  int32_t* table_of;      // [rows]: index of the row's sequence in `blocks`
  int32_t* blocks;        // [tables, max_blocks]
  PromptChunk* chunks;    // [chunks]
  Tile* tiles;            // [tiles]
  Pick* picks;            // [picks]
  int32_t* forbidden;     // [forbidden]
  uint64_t* adapters;  // [adapted]: address of the table of the row's adapter, 0: none; NULL if adapted is 0
  // [decode rows]: their indices (0: the first decode row), sorted by adapter, and the adapter of each index;
  // NULL if adapted is 0.
  int32_t* adapter_order;
  uint64_t* sorted_adapters;
};

class StepInput {
 public:
  // Return the arrays in host memory, to be filled. Waits until earlier copies from this memory have ended.
  InputArrays begin(const InputSizes& sizes);

  // Enqueue the copy to the GPU and return the arrays there, which must be read on this stream.
  InputArrays send(CUstream stream);

  // Arrays of these sizes on the GPU; their addresses are valid until graph_version() changes.
  InputArrays device(const InputSizes& sizes) const;
  int graph_version() const { return graph_version_; }

 private:
  struct Slot {
    HostMemory memory;
    StreamEvent copied;  // end of the last copy from the memory
  };

  std::array<Slot, 4> slots_;  // used in turn, so that begin() seldom waits
  size_t current_ = 0;
  InputSizes sizes_{};
  DeviceMemory device_;
  int graph_version_ = 0;
};

}  // namespace qvl::cuda
