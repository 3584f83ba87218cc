// The table of kernels (table.h) for one ISA. This file is compiled once for each ISA of the build, with the
// flags of isas.txt: QVL_KERNELS is the name of the function that returns the table, QVL_KERNELS_ISA the ISA.
// dispatch.cc selects a table at run time.
#include "cpu/kernels/attention.h"
#include "cpu/kernels/elementwise.h"
#include "cpu/kernels/gemm.h"
#include "cpu/kernels/groups.h"
#include "cpu/kernels/matvec_bf16.h"
#include "cpu/kernels/matvec_float.h"
#include "cpu/kernels/matvec_int4.h"
#include "cpu/kernels/matvec_int8.h"
#include "cpu/kernels/norm.h"
#include "cpu/kernels/unpack.h"

namespace qvl::cpu {
namespace {

// All kernels except those of the types with zero points, which QVL_ADD_GROUPS (groups.h) adds.
constexpr Kernels make() {
  Kernels k{};
  k.isa = QVL_KERNELS_ISA;
  k.lanes = kLanes;
  k.rms_norm = rms_norm;
  k.layer_norm = layer_norm;
  k.gelu = gelu;
  k.silu_mul = silu_mul;
  k.add = add;
  k.widen = widen_all<BFloat16>;
  k.widen_float16 = widen_all<Float16>;
  k.narrow = narrow_all;
  k.narrow_float16 = narrow_all_float16;
  k.narrow_int8 = narrow_all_int8;
  k.rotate = rotate;

  k.prepared_bytes[QVL_FLOAT32] = prepared_bytes_f32;
  k.prepared_bytes[QVL_BFLOAT16] = prepared_bytes_bf16;
  k.prepared_bytes[QVL_FLOAT16] = prepared_bytes_f32;
  k.prepared_bytes[QVL_INT8] = prepared_bytes_int8;
  k.prepared_bytes[QVL_INT4_G64] = prepared_bytes_int4<64>;
  k.prepared_bytes[QVL_INT4_G128] = prepared_bytes_int4<128>;
  k.prepare_x[QVL_FLOAT32] = prepare_f32;
  k.prepare_x[QVL_BFLOAT16] = prepare_bf16;
  k.prepare_x[QVL_FLOAT16] = prepare_f32;
  k.prepare_x[QVL_INT8] = prepare_int8;
  k.prepare_x[QVL_INT4_G64] = prepare_int4<64>;
  k.prepare_x[QVL_INT4_G128] = prepare_int4<128>;
  k.matvec[QVL_FLOAT32] = matvec<RowsOf<float>>;
  k.matvec[QVL_BFLOAT16] = matvec<RowsBf16>;
  k.matvec[QVL_FLOAT16] = matvec<RowsOf<Float16>>;
  k.matvec[QVL_INT8] = matvec<RowsInt8>;
  k.matvec[QVL_INT4_G64] = matvec<RowsInt4<64>>;
  k.matvec[QVL_INT4_G128] = matvec<RowsInt4<128>>;

  // The blocked product, which multiplies float32 (index 0) or bfloat16 (index 1).
  k.pack_panel[0] = pack_panel_f32;
  k.pack_panel[1] = pack_panel_bf16;
  k.unpack_tile[0][QVL_FLOAT32] = unpack_to_f32<UnpackFloats<float>>;
  k.unpack_tile[0][QVL_BFLOAT16] = unpack_to_f32<UnpackFloats<BFloat16>>;
  k.unpack_tile[0][QVL_FLOAT16] = unpack_to_f32<UnpackFloats<Float16>>;
  k.unpack_tile[0][QVL_INT8] = unpack_to_f32<UnpackInt8>;
  k.unpack_tile[0][QVL_INT4_G64] = unpack_to_f32<UnpackInt4<64>>;
  k.unpack_tile[0][QVL_INT4_G128] = unpack_to_f32<UnpackInt4<128>>;
  k.multiply_tile[0] = multiply_tile<StepF32>;
  k.write_block = write_block;
#if defined(__AVX512BF16__)
  k.bf16_dot = true;
  k.unpack_tile[1][QVL_BFLOAT16] = unpack_to_bf16<UnpackFloats<BFloat16>>;
  k.unpack_tile[1][QVL_FLOAT16] = unpack_to_bf16<UnpackFloats<Float16>>;
  k.unpack_tile[1][QVL_INT8] = unpack_to_bf16<UnpackInt8>;
  k.unpack_tile[1][QVL_INT4_G64] = unpack_to_bf16<UnpackInt4<64>>;
  k.unpack_tile[1][QVL_INT4_G128] = unpack_to_bf16<UnpackInt4<128>>;
  k.multiply_tile[1] = multiply_tile<StepBf16>;
  k.attend_rounded = attend_rounded;
#endif

  k.attend_begin = attend_begin;
  k.attend_scratch_bytes = attend_scratch_bytes;
  k.attend = attend;
  k.attend_one = attend_one;
  k.attend_merge = attend_merge;
  k.attend_end = attend_end;
  return k;
}

}  // namespace

const Kernels* QVL_KERNELS() {
  static const Kernels table = [] {
    Kernels k = make();
    QVL_ADD_GROUPS(k);
    return k;
  }();
  return &table;
}

}  // namespace qvl::cpu
