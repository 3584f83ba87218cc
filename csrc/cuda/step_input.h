// Inputs of a pass over the layers, written on the host and copied to the GPU in one transfer.
#pragma once

#include <array>
#include <cstddef>

#include "cuda/memory.h"
#include "cuda/ops.h"

namespace qvl::cuda {

// Sizes of the arrays. They alone determine the address of each array, as captured graphs require.
struct InputSizes {
  int rows = 0;  // tokens
  int tables = 0, max_blocks = 0;
  int chunks = 0, tiles = 0;
  int picks = 0, forbidden = 0;
  int adapted = 0;  // number of rows if any has an adapter, else 0
};

// The arrays, in host or device memory.
struct InputArrays {
  int32_t* ids;        // [rows]
  uint64_t* features;  // [rows]
  int32_t* positions;  // [rows]
  int32_t* angle_tables;
  int32_t* table_of;  // [rows]: row of `blocks`, the token's sequence
  int32_t* blocks;    // [tables, max_blocks]
  PromptChunk* chunks;
  Tile* tiles;
  Pick* picks;
  int32_t* forbidden;
  uint64_t* adapters;      // [rows]: address of the adapter's table; 0: none; NULL without `adapted`
  int32_t* adapter_order;  // [rows]: indices of the decode rows, from 0, sorted by adapter
};

class StepInput {
 public:
  // Return the arrays in host memory, to be filled; waits for earlier copies from this memory.
  InputArrays begin(const InputSizes& sizes);

  // Enqueue the copy and return the arrays on the GPU, which must be read on this stream.
  InputArrays send(CUstream stream);

  // Arrays of these sizes on the GPU; their addresses are valid until moved() changes.
  InputArrays device(const InputSizes& sizes) const;
  int moved() const { return moved_; }

 private:
  struct Slot {
    HostMemory memory;
    Mark read;
  };

  std::array<Slot, 4> slots_;
  size_t next_ = 0;
  InputSizes sizes_{};
  DeviceMemory device_;
  int moved_ = 0;
};

}  // namespace qvl::cuda
