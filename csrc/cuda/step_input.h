// What a pass over the layers is told besides its weights, written on the host and sent in one copy.
#pragma once

#include <array>
#include <cstddef>

#include "cuda/memory.h"
#include "cuda/ops.h"

namespace qvl::cuda {

// Numbers of elements: they alone decide where each array lies, so that a captured graph finds it again.
struct InputSizes {
  int rows = 0;  // tokens
  int tables = 0, max_blocks = 0;
  int chunks = 0, tiles = 0;
  int picks = 0, forbidden = 0;
};

// The arrays, in host or device memory.
struct InputArrays {
  int32_t* ids;        // [rows]
  uint64_t* features;  // [rows]
  int32_t* positions;  // [rows]
  int32_t* angle_tables;
  int32_t* table_of;  // [rows]: the sequence's row of blocks
  int32_t* blocks;    // [tables, max_blocks]
  PromptChunk* chunks;
  Tile* tiles;
  Pick* picks;
  int32_t* forbidden;
};

class StepInput {
 public:
  // The arrays to fill in host memory; waits until an earlier copy out of it has been read.
  InputArrays begin(const InputSizes& sizes);

  // Enqueue the copy, and say where the arrays are on the GPU. The work that reads them must be on this
  // stream.
  InputArrays send(CUstream stream);

  // Where the arrays of such sizes are on the GPU. They stay there until moved() gives another number.
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
