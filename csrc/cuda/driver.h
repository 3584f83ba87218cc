// The CUDA driver, loaded when a GPU is requested: neither the compilation of the host code nor the start of
// a process requires CUDA. Types and functions have the names of the driver's documented interface.
#pragma once

#include <cstddef>
#include <cstdint>

#include "qwenvl.h"

namespace qvl::cuda {

using CUresult = int;
using CUdevice = int;
using CUdeviceptr = unsigned long long;
using CUcontext = struct CUctx_st*;
using CUmodule = struct CUmod_st*;
using CUfunction = struct CUfunc_st*;
using CUstream = struct CUstream_st*;
using CUevent = struct CUevent_st*;
using CUgraph = struct CUgraph_st*;
using CUgraphExec = struct CUgraphExec_st*;

// Attributes of a device, for cuDeviceGetAttribute.
constexpr int kMultiprocessors = 16, kComputeMajor = 75, kComputeMinor = 76;

// Flag of cuStreamCreate: the stream is not ordered with the default stream.
constexpr unsigned kNonBlocking = 1;

constexpr CUresult kOutOfMemory = 2, kNoDevice = 100, kNotReady = 600;

// Tensor map: the description of a tensor for the bulk copy engine (sm_90 and newer), 128 bytes.
struct alignas(64) CUtensorMap {
  uint64_t opaque[16];
};

struct CUlaunchAttribute {
  int id;
  char pad[4];
  char value[64];
};

struct CUlaunchConfig {
  unsigned grid_x, grid_y, grid_z, block_x, block_y, block_z, shared_bytes;
  CUstream stream;
  CUlaunchAttribute* attributes;
  unsigned n_attributes;
};

// Required functions, with the symbol versions of CUDA 12.0, exported by drivers from 525 on.
#define QVL_DRIVER_FUNCTIONS(F)                                                                              \
  F(cuInit, "cuInit", (unsigned))                                                                            \
  F(cuDriverGetVersion, "cuDriverGetVersion", (int*))                                                        \
  F(cuGetErrorString, "cuGetErrorString", (CUresult, const char**))                                          \
  F(cuDeviceGetCount, "cuDeviceGetCount", (int*))                                                            \
  F(cuDeviceGet, "cuDeviceGet", (CUdevice*, int))                                                            \
  F(cuDeviceGetName, "cuDeviceGetName", (char*, int, CUdevice))                                              \
  F(cuDeviceGetAttribute, "cuDeviceGetAttribute", (int*, int, CUdevice))                                     \
  F(cuDevicePrimaryCtxRetain, "cuDevicePrimaryCtxRetain", (CUcontext*, CUdevice))                            \
  F(cuDevicePrimaryCtxRelease, "cuDevicePrimaryCtxRelease_v2", (CUdevice))                                   \
  F(cuCtxPushCurrent, "cuCtxPushCurrent_v2", (CUcontext))                                                    \
  F(cuCtxPopCurrent, "cuCtxPopCurrent_v2", (CUcontext*))                                                     \
  F(cuMemGetInfo, "cuMemGetInfo_v2", (size_t*, size_t*))                                                     \
  F(cuMemAlloc, "cuMemAlloc_v2", (CUdeviceptr*, size_t))                                                     \
  F(cuMemFree, "cuMemFree_v2", (CUdeviceptr))                                                                \
  F(cuMemHostAlloc, "cuMemHostAlloc", (void**, size_t, unsigned))                                            \
  F(cuMemFreeHost, "cuMemFreeHost", (void*))                                                                 \
  F(cuMemcpyAsync, "cuMemcpyAsync", (CUdeviceptr, CUdeviceptr, size_t, CUstream))                            \
  F(cuMemsetD8Async, "cuMemsetD8Async", (CUdeviceptr, unsigned char, size_t, CUstream))                      \
  F(cuPointerGetAttribute, "cuPointerGetAttribute", (void*, int, CUdeviceptr))                               \
  F(cuStreamCreate, "cuStreamCreate", (CUstream*, unsigned))                                                 \
  F(cuStreamDestroy, "cuStreamDestroy_v2", (CUstream))                                                       \
  F(cuStreamSynchronize, "cuStreamSynchronize", (CUstream))                                                  \
  F(cuStreamWaitEvent, "cuStreamWaitEvent", (CUstream, CUevent, unsigned))                                   \
  F(cuStreamBeginCapture, "cuStreamBeginCapture_v2", (CUstream, int))                                        \
  F(cuStreamEndCapture, "cuStreamEndCapture", (CUstream, CUgraph*))                                          \
  F(cuEventCreate, "cuEventCreate", (CUevent*, unsigned))                                                    \
  F(cuEventDestroy, "cuEventDestroy_v2", (CUevent))                                                          \
  F(cuEventRecord, "cuEventRecord", (CUevent, CUstream))                                                     \
  F(cuEventQuery, "cuEventQuery", (CUevent))                                                                 \
  F(cuEventSynchronize, "cuEventSynchronize", (CUevent))                                                     \
  F(cuModuleLoadData, "cuModuleLoadData", (CUmodule*, const void*))                                          \
  F(cuModuleUnload, "cuModuleUnload", (CUmodule))                                                            \
  F(cuModuleGetFunction, "cuModuleGetFunction", (CUfunction*, CUmodule, const char*))                        \
  F(cuFuncSetAttribute, "cuFuncSetAttribute", (CUfunction, int, int))                                        \
  F(cuLaunchKernelEx, "cuLaunchKernelEx", (const CUlaunchConfig*, CUfunction, void**, void**))               \
  F(cuGraphInstantiate, "cuGraphInstantiateWithFlags", (CUgraphExec*, CUgraph, unsigned long long))          \
  F(cuGraphLaunch, "cuGraphLaunch", (CUgraphExec, CUstream))                                                 \
  F(cuGraphExecDestroy, "cuGraphExecDestroy", (CUgraphExec))                                                 \
  F(cuGraphDestroy, "cuGraphDestroy", (CUgraph))                                                             \
  F(cuTensorMapEncodeTiled, "cuTensorMapEncodeTiled",                                                        \
    (CUtensorMap*, int, unsigned, void*, const uint64_t*, const uint64_t*, const uint32_t*, const uint32_t*, \
     int, int, int, int))

struct Driver {
#define QVL_DRIVER_FIELD(field, symbol, arguments) CUresult(*field) arguments;
  QVL_DRIVER_FUNCTIONS(QVL_DRIVER_FIELD)
#undef QVL_DRIVER_FIELD
};

// The initialised driver. Throws QVL_UNSUPPORTED if it is missing or too old, cannot be initialised, or finds
// no GPU.
const Driver& driver();

// Throw unless `result` is success: QVL_NO_MEMORY if the GPU is out of memory, else QVL_INTERNAL. `what`
// begins the message: an action, as in "copying", or the name of a kernel or file.
void check(CUresult result, const char* what);

}  // namespace qvl::cuda
