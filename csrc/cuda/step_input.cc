#include "cuda/step_input.h"

#include <algorithm>

namespace qvl::cuda {
namespace {

// Bump allocator of 16-byte aligned arrays; with base NULL it only computes the size.
struct Layout {
  char* base;
  uint64_t used = 0;

  template <typename T>
  T* array_of(int n) {
    T* const array = reinterpret_cast<T*>(base + used);
    used += round_up(static_cast<uint64_t>(n) * sizeof(T), 16);
    return array;
  }
};

// The arrays in memory from `base` on; sets `bytes` to their total size.
InputArrays lay_out(char* base, const InputSizes& n, uint64_t* bytes) {
  Layout layout{base};
  InputArrays arrays{};
  arrays.features = layout.array_of<uint64_t>(n.rows);
  arrays.ids = layout.array_of<int32_t>(n.rows);
  arrays.positions = layout.array_of<int32_t>(n.rows);
  arrays.angle_tables = layout.array_of<int32_t>(n.rows);
  arrays.table_of = layout.array_of<int32_t>(n.rows);
  arrays.blocks = layout.array_of<int32_t>(n.tables * n.max_blocks);
  arrays.chunks = layout.array_of<PromptChunk>(n.chunks);
  arrays.tiles = layout.array_of<Tile>(n.tiles);
  arrays.picks = layout.array_of<Pick>(n.picks);
  arrays.forbidden = layout.array_of<int32_t>(n.forbidden);
  if (n.adapted > 0) {
    arrays.adapters = layout.array_of<uint64_t>(n.adapted);
    arrays.sorted_adapters = layout.array_of<uint64_t>(n.adapted);
    arrays.adapter_order = layout.array_of<int32_t>(n.adapted);
  }
  *bytes = layout.used;
  return arrays;
}

}  // namespace

InputArrays StepInput::begin(const InputSizes& sizes) {
  sizes_ = sizes;
  uint64_t bytes = 0;
  lay_out(nullptr, sizes, &bytes);
  current_ = (current_ + 1) % slots_.size();
  Slot& slot = slots_[current_];
  slot.copied.wait();
  // Twice the size, so that growing inputs seldom reallocate.
  if (slot.memory.bytes() < bytes) slot.memory = HostMemory(std::max<uint64_t>(2 * bytes, 1 << 16));
  if (device_.bytes() < bytes) {
    // The old memory is freed by cuMemFree, which waits until the GPU has used it.
    device_ = DeviceMemory(std::max<uint64_t>(2 * bytes, 1 << 16));
    ++graph_version_;
  }
  return lay_out(slot.memory.get<char>(), sizes, &bytes);
}

InputArrays StepInput::send(CUstream stream) {
  uint64_t bytes = 0;
  const InputArrays arrays = lay_out(device_.get<char>(), sizes_, &bytes);
  Slot& slot = slots_[current_];
  copy(stream, device_.get(), slot.memory.get(), bytes);
  slot.copied.record(stream);
  return arrays;
}

InputArrays StepInput::device(const InputSizes& sizes) const {
  uint64_t bytes = 0;
  return lay_out(device_.get<char>(), sizes, &bytes);
}

}  // namespace qvl::cuda
