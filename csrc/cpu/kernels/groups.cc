// The kernels of the types with zero points for one ISA. Compiled with the same flags and definitions as
// kernels.cc; a separate file, so that the two compile in parallel.
#include "cpu/kernels/groups.h"

#include "cpu/kernels/matvec_groups.h"
#include "cpu/kernels/unpack.h"

namespace qvl::cpu {
namespace {

// Add the kernels of one type with zero points to the table.
template <int Bits, int Group>
void add_groups(qvl_dtype dtype, Kernels& k) {
  k.prepared_bytes[dtype] = prepared_bytes_groups<Bits, Group>;
  k.prepare_x[dtype] = prepare_groups<Bits, Group>;
  k.matvec[dtype] = matvec_groups<Bits, Group>;
  k.unpack_tile[0][dtype] = unpack_to_f32<UnpackGroups<Bits, Group>>;
#if defined(__AVX512BF16__)
  k.unpack_tile[1][dtype] = unpack_to_bf16<UnpackGroups<Bits, Group>>;
#endif
}

}  // namespace

void QVL_ADD_GROUPS(Kernels& k) {
  add_groups<4, 32>(QVL_UINT4_G32, k);
  add_groups<4, 64>(QVL_UINT4_G64, k);
  add_groups<4, 128>(QVL_UINT4_G128, k);
  add_groups<8, 32>(QVL_UINT8_G32, k);
  add_groups<8, 64>(QVL_UINT8_G64, k);
  add_groups<8, 128>(QVL_UINT8_G128, k);
}

}  // namespace qvl::cpu
