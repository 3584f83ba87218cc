#include "cuda/step_input.h"

#include <algorithm>

namespace qvl::cuda {
namespace {

struct Layout {
  char* base;
  uint64_t used = 0;

  template <typename T>
  T* take(int n) {
    T* const taken = reinterpret_cast<T*>(base + used);
    used += rounded(static_cast<uint64_t>(n) * sizeof(T), 16);
    return taken;
  }
};

InputArrays lay_out(char* base, const InputSizes& n, uint64_t* bytes) {
  Layout layout{base};
  InputArrays arrays{};
  arrays.features = layout.take<uint64_t>(n.rows);
  arrays.ids = layout.take<int32_t>(n.rows);
  arrays.positions = layout.take<int32_t>(n.rows);
  arrays.angle_tables = layout.take<int32_t>(n.rows);
  arrays.table_of = layout.take<int32_t>(n.rows);
  arrays.blocks = layout.take<int32_t>(n.tables * n.max_blocks);
  arrays.chunks = layout.take<PromptChunk>(n.chunks);
  arrays.tiles = layout.take<Tile>(n.tiles);
  arrays.picks = layout.take<Pick>(n.picks);
  arrays.forbidden = layout.take<int32_t>(n.forbidden);
  if (n.adapted > 0) {
    arrays.adapters = layout.take<uint64_t>(n.adapted);
    arrays.adapter_order = layout.take<int32_t>(n.adapted);
  }
  *bytes = layout.used;
  return arrays;
}

}  // namespace

InputArrays StepInput::begin(const InputSizes& sizes) {
  sizes_ = sizes;
  uint64_t bytes = 0;
  lay_out(nullptr, sizes, &bytes);
  next_ = (next_ + 1) % slots_.size();
  Slot& slot = slots_[next_];
  slot.read.wait();
  if (slot.memory.bytes() < bytes) slot.memory = HostMemory(std::max<uint64_t>(2 * bytes, 1 << 16));
  if (device_.bytes() < bytes) {
    device_ = DeviceMemory(std::max<uint64_t>(2 * bytes, 1 << 16));  // cuMemFree waits for the GPU
    ++moved_;
  }
  return lay_out(slot.memory.get<char>(), sizes, &bytes);
}

InputArrays StepInput::send(CUstream stream) {
  uint64_t bytes = 0;
  const InputArrays arrays = lay_out(device_.get<char>(), sizes_, &bytes);
  Slot& slot = slots_[next_];
  copy(stream, device_.get(), slot.memory.get(), bytes);
  slot.read.record(stream);
  return arrays;
}

InputArrays StepInput::device(const InputSizes& sizes) const {
  uint64_t bytes = 0;
  return lay_out(device_.get<char>(), sizes, &bytes);
}

}  // namespace qvl::cuda
