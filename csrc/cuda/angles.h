// Tables of rotary angles, one per rotary base (dynamic NTK: the length of the prompt determines the base),
// and query scales of all positions, computed when a model is opened; formulas in core/rotary.h.
#pragma once

#include "cuda/memory.h"
#include "cuda/ops.h"
#include "cuda/upload.h"

namespace qvl::cuda {

class AngleTables {
 public:
  AngleTables(const qvl_config& config, Uploader& uploader);

  const Angles& angles() const { return angles_; }

  // Index, in angles(), of the table for the rotary base of a prompt length.
  int table(int32_t prompt_len) const;

 private:
  const qvl_config config_;
  DeviceMemory cos_, sin_, scale_;
  Angles angles_{};
};

}  // namespace qvl::cuda
