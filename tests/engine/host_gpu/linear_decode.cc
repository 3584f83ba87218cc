// The kernels of linear_decode_hopper.cu, linear_decode_hopper_groups.cu, low_rank.cu and upload_matrix.cu on
// the host; tests/engine/test_hopper_products.py links them with the code that launches them. Blocks run one
// after another, on a "GPU" of three multiprocessors.
#include <barrier>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <thread>

#define QVL_COMPUTE_BFLOAT16
#include "cuda/kernels/hopper.cuh"  // the stand-in in this folder

#define __shared__  // `extern char raw[]`, defined below, is the shared memory of these kernels
#include "cuda/kernels/linear_decode_hopper.cu"
#include "cuda/kernels/linear_decode_hopper_groups.cu"
#include "cuda/kernels/upload_matrix.cu"
#undef __shared__
#define __shared__ static  // shared by the threads of the only running block
#include "cuda/kernels/low_rank.cu"
#undef QVL_COMPUTE_BFLOAT16  // qwenvl.h has a constant of this name

#include "core/error.h"
#include "cuda/low_rank.h"
#include "cuda/ops.h"
#include "cuda/tensor_map.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace qvl::cuda {
namespace {
char raw[227 << 10];  // shared memory of a block, Hopper's maximum
}

char* const shared_memory = raw;
uint32 registers_of[544][4];  // used by hopper.cuh; by thread, of up to 17 warps

namespace {

constexpr int kMultiprocessors_ = 3;

// A tensor map: sizes and box in values, the innermost first; strides in bytes, without the innermost.
struct HostMap {
  const char* base;
  std::vector<int64_t> sizes, strides;
  std::vector<int> box;
  bool swizzled;
};
std::vector<std::unique_ptr<HostMap>> maps;

struct Copy {
  uint32 to;
  const HostMap* map;
  std::vector<int> at;
  uint32 barrier;
};

// pending: arrivals that the phase still needs; bytes: of expected copies, not yet copied.
struct Barrier {
  int arrivals = 0, pending = 0, bytes = 0;
  uint32 phase = 0;
};

// One lock for everything: this test checks the order of events, not parallel speed.
std::mutex lock;
std::condition_variable changed;
std::map<uint32, Barrier> barriers;
std::vector<Copy> copies;
bool finished;
std::unique_ptr<std::barrier<>> meetings[kMeetings];

void finish_phase(Barrier& barrier) {
  if (barrier.pending != 0 || barrier.bytes != 0) return;
  barrier.phase ^= 1;
  barrier.pending = barrier.arrivals;
  changed.notify_all();
}

int bytes_of(const HostMap& map) {
  int bytes = 2;
  for (const int size : map.box) bytes *= size;
  return bytes;
}

void copy(const Copy& copy) {
  const HostMap& map = *copy.map;
  const int lines = bytes_of(map) / 2 / map.box[0];
  for (int line = 0; line < lines; ++line) {
    int64_t from = 0;
    bool inside = true;
    for (size_t d = 1, index = static_cast<size_t>(line); d < map.box.size(); ++d) {
      const auto size = static_cast<size_t>(map.box[d]);
      const int64_t coordinate = copy.at[d] + static_cast<int64_t>(index % size);
      index /= size;
      inside = inside && coordinate < map.sizes[d];
      from += coordinate * map.strides[d - 1];
    }
    for (int i = 0; i < map.box[0]; ++i) {
      const int64_t column = copy.at[0] + i;
      uint32 to = copy.to + static_cast<uint32>(2 * (line * map.box[0] + i));
      if (map.swizzled) to ^= to >> 3 & 0x70;
      uint16 value = 0;
      if (inside && column < map.sizes[0]) std::memcpy(&value, map.base + from + 2 * column, 2);
      std::memcpy(raw + to, &value, 2);
    }
  }
}

// The copy engine: a thread that executes copies in random order.
void copy_all() {
  static std::mt19937 random(1);
  std::unique_lock<std::mutex> held(lock);
  while (true) {
    changed.wait(held, [] { return finished || !copies.empty(); });
    if (copies.empty()) return;
    // Let the threads of the block add copies meanwhile, so that later copies can overtake earlier ones.
    held.unlock();
    std::this_thread::yield();
    held.lock();
    std::swap(copies[random() % copies.size()], copies.back());
    const Copy next = copies.back();
    copies.pop_back();
    copy(next);
    Barrier& barrier = barriers[next.barrier];
    barrier.bytes -= bytes_of(*next.map);
    finish_phase(barrier);
  }
}

using Hopper = void (*)(LinearHopper);
using LowRankKernel = void (*)(LowRankParams);
using Upload = void (*)(UploadMatrix);
// By name; there are no products of uint8_g128, because upload_matrix_uint8_g128 stores groups of 64.
const std::map<std::string, Hopper>& products_by_name() {
#define QVL_NAME(NAME, N, TILES) \
  {"linear_hopper_" #NAME "_" #N "_" #TILES, linear_hopper_##NAME##_##N##_##TILES},
#define QVL_NAMES(NAME) \
  QVL_NAME(NAME, 8, 1)  \
  QVL_NAME(NAME, 8, 2)  \
  QVL_NAME(NAME, 8, 3)  \
  QVL_NAME(NAME, 16, 1) \
  QVL_NAME(NAME, 16, 2) \
  QVL_NAME(NAME, 16, 3) QVL_NAME(NAME, 32, 1) QVL_NAME(NAME, 32, 2) QVL_NAME(NAME, 64, 1)
  static const std::map<std::string, Hopper> found = {
      QVL_NAMES(half) QVL_NAMES(int8) QVL_NAMES(int4_g64) QVL_NAMES(int4_g128) QVL_NAMES(uint4_g32)
          QVL_NAMES(uint4_g64) QVL_NAMES(uint4_g128) QVL_NAMES(uint8_g32) QVL_NAMES(uint8_g64)
              QVL_NAME(half, 32, 3) QVL_NAME(half, 64, 2)};
  return found;
}
const std::map<std::string, LowRankKernel> low_rank_kernels = {{"low_rank_down", low_rank_down},
                                                               {"low_rank_up", low_rank_up}};
const std::map<std::string, Upload> uploads = {{"upload_matrix_float32", upload_matrix_float32},
                                               {"upload_matrix_bfloat16", upload_matrix_bfloat16},
                                               {"upload_matrix_int8", upload_matrix_int8},
                                               {"upload_matrix_int4_g64", upload_matrix_int4_g64},
                                               {"upload_matrix_int4_g128", upload_matrix_int4_g128},
                                               {"upload_matrix_uint4_g32", upload_matrix_uint4_g32},
                                               {"upload_matrix_uint4_g64", upload_matrix_uint4_g64},
                                               {"upload_matrix_uint4_g128", upload_matrix_uint4_g128},
                                               {"upload_matrix_uint8_g32", upload_matrix_uint8_g32},
                                               {"upload_matrix_uint8_g64", upload_matrix_uint8_g64},
                                               {"upload_matrix_uint8_g128", upload_matrix_uint8_g128}};

}  // namespace

void barrier_init(uint32 barrier, int arrivals) {
  const std::lock_guard<std::mutex> held(lock);
  barriers[barrier] = {arrivals, arrivals};
}

void barrier_arrive(uint32 barrier) {
  const std::lock_guard<std::mutex> held(lock);
  --barriers[barrier].pending;
  finish_phase(barriers[barrier]);
}

void barrier_expect(uint32 barrier, int bytes) {
  const std::lock_guard<std::mutex> held(lock);
  barriers[barrier].bytes += bytes;
  --barriers[barrier].pending;
  finish_phase(barriers[barrier]);
}

void barrier_wait(uint32 barrier, uint32 parity) {
  std::unique_lock<std::mutex> held(lock);
  const auto done = [&] { return barriers[barrier].phase != parity; };
  if (changed.wait_for(held, std::chrono::seconds(60), done)) return;
  std::fprintf(stderr, "a barrier of the kernel was not completed in 60 s\n");
  std::abort();
}

void copy_later(uint32 to, const TensorMap& map, std::vector<int> at, uint32 barrier) {
  const std::lock_guard<std::mutex> held(lock);
  copies.push_back({to, reinterpret_cast<const HostMap*>(map.opaque[0]), std::move(at), barrier});
  changed.notify_all();
}

void meet(int barrier, int) {
  meetings[barrier]->arrive_and_wait();
}

Gpu::Gpu(int, Half half) : multiprocessors_(kMultiprocessors_), arch_(90), half_(half) {}
Gpu::~Gpu() = default;

bool has_tensor_maps(const Gpu&) {
  return true;
}

TensorMap tensor_map(const Gpu&, const void* base, std::initializer_list<int64_t> sizes,
                     std::initializer_list<int64_t> strides, std::initializer_list<int> box, bool swizzled) {
  for (const int64_t stride : strides)
    QVL_REQUIRE(stride % 16 == 0, QVL_INTERNAL, "a stride of %lld bytes", static_cast<long long>(stride));
  for (const int size : box) QVL_REQUIRE(size <= 256, QVL_INTERNAL, "a box of %d", size);
  maps.push_back(
      std::make_unique<HostMap>(HostMap{static_cast<const char*>(base), sizes, strides, box, swizzled}));
  TensorMap map{};
  map.opaque[0] = reinterpret_cast<unsigned long long>(maps.back().get());
  return map;
}

void Gpu::launch_bytes(CUstream, const char* name, Dim grid, int threads, int shared_bytes,
                       const void* params, bool) const {
  const auto upload = uploads.find(name);
  if (upload != uploads.end()) {
    // One thread suffices for a block, since the threads of these kernels do not wait for each other.
    threadIdx.x = 0;
    blockDim.x = 1;
    for (unsigned block = 0; block < grid.x; ++block) {
      blockIdx.x = block;
      upload->second(*static_cast<const UploadMatrix*>(params));
    }
    return;
  }
  QVL_REQUIRE(shared_bytes <= static_cast<int>(sizeof raw), QVL_INTERNAL, "%d bytes of shared memory",
              shared_bytes);
  const auto low_rank = low_rank_kernels.find(name);
  const std::function<void()> kernel = [&, name = std::string(name)] {
    if (low_rank != low_rank_kernels.end()) {
      low_rank->second(*static_cast<const LowRankParams*>(params));
    } else {
      products_by_name().at(name)(*static_cast<const LinearHopper*>(params));
    }
  };
  for (unsigned block = 0; block < grid.x * grid.y * grid.z; ++block) {
    std::memset(raw, 0xFF, sizeof raw);  // NaN, to detect reads of memory that was not written
    barriers.clear();
    finished = false;
    for (int i = 0; i < kMeetings; ++i) {
      // Barrier 0 is for all threads, barrier 1 for all but the last warp, which in Hopper's products only
      // requests copies; the others are for a warpgroup or a warp each.
      const int count = i == 0 ? threads : i == 1 ? threads - 32 : i < kOfWarps ? 128 : 32;
      meetings[i] = std::make_unique<std::barrier<>>(count);
    }
    std::thread engine(copy_all);
    std::vector<std::thread> running;
    for (int i = 0; i < threads; ++i) {
      running.emplace_back([&, i] {
        threadIdx.x = static_cast<unsigned>(i);
        blockIdx = {block % grid.x, block / grid.x % grid.y, block / grid.x / grid.y};
        gridDim = {grid.x, grid.y, grid.z};
        kernel();
      });
    }
    for (std::thread& thread : running) thread.join();
    {
      const std::lock_guard<std::mutex> held(lock);
      finished = true;
      changed.notify_all();
    }
    engine.join();
  }
  maps.clear();
}

}  // namespace qvl::cuda

void __syncthreads() {
  qvl::cuda::meet(0, 0);
}

namespace {

// The result of `combine(values)` with the values of all lanes of the warp.
template <class Value, class Combine>
auto of_warp(Value value, const Combine& combine) {
  static Value values[544];
  const int warp = static_cast<int>(threadIdx.x / 32);
  values[threadIdx.x] = value;
  qvl::cuda::meet(qvl::cuda::kOfWarps + warp, 32);
  const auto found = combine(values + 32 * warp);
  qvl::cuda::meet(qvl::cuda::kOfWarps + warp, 32);
  return found;
}

}  // namespace

unsigned __shfl_sync(unsigned, unsigned value, int lane) {
  return of_warp(value, [=](const unsigned* values) { return values[lane]; });
}

unsigned long long __shfl_up_sync(unsigned, unsigned long long value, int by) {
  const int lane = static_cast<int>(threadIdx.x % 32), from = lane < by ? lane : lane - by;
  return of_warp(value, [=](const unsigned long long* values) { return values[from]; });
}

unsigned __ballot_sync(unsigned, bool value) {
  return of_warp(value, [](const bool* values) {
    unsigned bits = 0;
    for (int lane = 0; lane < 32; ++lane) bits |= unsigned{values[lane]} << lane;
    return bits;
  });
}

// Adapters of the same rank. a, b: bfloat16 [adapters, rank, in], [adapters, out, rank]; of_rows: the adapter
// of each row, -1 for none; order: the rows, sorted by adapter; low: receives A x, bfloat16 [n, rank].
struct HostAdapted {
  const uint16_t *a, *b;
  int adapters, rank;
  const int32_t* of_rows;
  const int32_t* order;
  uint16_t* low;
};

// y = epilogue(x W^T + bias); if `adapted` is not NULL, `epilogue` is kFloat and y += B (A x). dtype, stored:
// W [out, in] in the layout of files (qwenvl.h). x: bfloat16 [n, x_stride]. y: float32 or bfloat16, depending
// on the epilogue. Returns NULL or an error message.
EXPORT const char* host_linear(int dtype, int out, int in, const void* stored, const float* bias,
                               const void* x, int64_t x_stride, int n, int epilogue, void* y,
                               const HostAdapted* adapted) {
  using namespace qvl;
  using namespace qvl::cuda;
  static std::string message;
  try {
    const Gpu gpu(0, Half::kBfloat16);
    const Storage storage = storage_of(dtype);
    const MatrixBytes bytes = matrix_bytes(storage, out, in);
    std::vector<char> values(bytes.values + 64), scales(bytes.scales + 64);
    const int unit = storage == Storage::kHalf ? 8 : 128;  // values; a row is padded to a multiple of them
    const Matrix matrix{storage, out, in, (in + unit - 1) / unit * unit, values.data(), scales.data(), bias};
    upload_matrix(gpu, nullptr, dtype, stored, out, matrix, 0, 1);
    linear_decode(gpu, nullptr, matrix, x, x_stride, n, static_cast<Epilogue>(epilogue), y,
                  /*low_rank_next=*/adapted != nullptr);
    if (adapted == nullptr) return nullptr;

    const int rank = adapted->rank;
    std::vector<LowRankEntry> entries;  // by adapter: its table, of this product only
    for (int64_t i = 0; i < adapted->adapters; ++i)
      entries.push_back({adapted->a + i * rank * in, adapted->b + i * out * rank, rank, 1});
    std::vector<uint64_t> addresses;
    for (int i = 0; i < n; ++i) {
      const int adapter = adapted->of_rows[adapted->order[i]];
      addresses.push_back(adapter < 0 ? 0 : reinterpret_cast<uint64_t>(&entries[size_t(adapter)]));
    }
    std::vector<char> scratch(low_rank_scratch(n, rank));
    const AdaptedRows rows{addresses.data(), adapted->order, n, 0};
    const LowRankMemory memory{adapted->low, scratch.data(), n, rank};
    low_rank_down(gpu, nullptr, rows, x, x_stride, in, rank, /*x_is_complete=*/true, memory);
    low_rank_up(gpu, nullptr, rows, memory, out, nullptr, static_cast<Epilogue>(epilogue), y);
    return nullptr;
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
}
