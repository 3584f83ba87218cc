// The table of versions (versions.h) for one ISA. CMakeLists.txt compiles this file once per ISA, with the
// flags and macros of the kernels: QVL_TEXTBOOK is the name of the function that returns the table,
// QVL_KERNELS the name of the function that returns the production kernels, which some versions call.
#include "textbook/versions.h"

#include "textbook/attention.h"
#include "textbook/matvec_bf16.h"
#include "textbook/matvec_int4.h"

namespace qvl::textbook {

const Versions* QVL_TEXTBOOK() {
  static constexpr Versions table = {
      {{"v1 scalar", bf16::v1},
       {"v2 vectors", bf16::v2},
       {"v3 several accumulators", bf16::v3},
       {"v4 full-width loads", bf16::v4},
       {"v5 several rows", bf16::v5},
       {"v6 production", bf16::v6}},
      {{"v1 scalar", int4::v1},
       {"v2 vectors", int4::v2},
       {"v3 integer sums", int4::v3},
       {"v4 several rows", int4::v4},
       {"v5 prefetch", int4::v5},
       {"v6 production", int4::v6}},
      {{"v1 score buffer", one_query::v1},
       {"v2 online softmax", one_query::v2},
       {"v3 vectors", one_query::v3},
       {"v4 several keys", one_query::v4},
       {"v5 prefetch", one_query::v5},
       {"v6 production", one_query::v6}},
  };
  return &table;
}

}  // namespace qvl::textbook
