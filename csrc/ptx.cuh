// The PTX instructions the GEMMs are made of, one thin function each. "shared" addresses are 32-bit (shared_address()).
#pragma once
#include "common.cuh"

namespace smop::ptx {

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

__device__ __forceinline__ void store_shared16(uint32_t address, uint4 v) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
}
__device__ __forceinline__ uint4 load_shared16(uint32_t address) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(address)
               : "memory");
  return v;
}
// One element of two bytes.
template <class T>
__device__ __forceinline__ void store_shared2(uint32_t address, T v) {
  *static_cast<T*>(__cvta_shared_to_generic(address)) = v;
}
template <class T>
__device__ __forceinline__ T load_shared2(uint32_t address) {
  return *static_cast<const T*>(__cvta_shared_to_generic(address));
}

// The larger of the two, a NaN where either is one.
__device__ __forceinline__ float max_or_nan(float a, float b) {
  float larger;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(larger) : "f"(a), "f"(b));
  return larger;
}

// ------------------------------------------------------------------------------------------------ sm_80: cp.async,
// mma.sync

// 16 bytes from global to shared memory, of which the first `bytes` are read and the rest become zero. The L1 is
// bypassed.
__device__ __forceinline__ void cp_async16(uint32_t dst, const void* src, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(dst), "l"(src), "r"(bytes) : "memory");
}
__device__ __forceinline__ void cp_async16(uint32_t dst, const void* src) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(dst), "l"(src) : "memory");
}
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Four 8×8 matrices of 16-bit elements; lane i gives the address of row i % 8 of matrix i / 8.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

// Tiles in shared memory with rows of 128 bytes, whose 16-byte chunks are exchanged within each group of 8 rows: what a
// tensor map with the 128-byte swizzle writes.
constexpr int kSwizzleRow = 128;                // bytes
constexpr int kSwizzleGroup = 8 * kSwizzleRow;  // 8 rows: the pattern repeats

// Byte offset of a 16-byte chunk in such a tile.
__device__ __forceinline__ uint32_t swizzled(int row, int chunk) {
  return row * kSwizzleRow + ((chunk ^ (row % 8)) * 16);
}

// Of such a tile's first 16 rows, four 8×8 matrices: those of chunk `chunk` in rows 0 … 7 and 8 … 15, then of the next.
// A lane has elements 2(l%4), +1 of row l/4 of each.
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], uint32_t tile, int chunk) {
  const int lane = threadIdx.x % kWarp;
  ldmatrix_x4(r, tile + swizzled(lane % 16, chunk + lane / 16));
}
__device__ __forceinline__ void store_matrices(uint32_t tile, int chunk, const uint32_t (&r)[4]) {
  const int lane = threadIdx.x % kWarp;
#if __CUDA_ARCH__ >= 900
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                   tile + swizzled(lane % 16, chunk + lane / 16)),
               "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
#else
#pragma unroll
  for (int i = 0; i < 4; ++i)
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(tile + swizzled(lane / 4 + i % 2 * 8, chunk + i / 2) + lane % 4 * 4),
                 "r"(r[i])
                 : "memory");
#endif
}

// d += a · b, 16×8×16, float32 accumulators.
template <class T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
#define SMOP_MMA(TYPE, NAME)                                                                             \
  template <>                                                                                            \
  __device__ __forceinline__ void mma_m16n8k16<TYPE>(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, \
                                                     uint32_t b1) {                                      \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." NAME "." NAME                                  \
                 ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "                                          \
                 "{%0,%1,%2,%3};"                                                                        \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                        \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                        \
  }
SMOP_MMA(bf16, "bf16")
SMOP_MMA(fp16, "f16")
#undef SMOP_MMA

// ------------------------------------------------------------------------------------------ sm_90a: mbarrier, TMA,
// register counts

__device__ __forceinline__ void mbarrier_init(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
// Makes the initialised barriers visible to the copy engine; then a __syncthreads() for the threads.
__device__ __forceinline__ void mbarrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void mbarrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// The same at the barrier that lies there in block `rank` of the cluster. It hands over shared memory that has been
// read, not values that were written, so it needs no release over the cluster (a fence of the whole device).
__device__ __forceinline__ void mbarrier_arrive_at(uint32_t barrier, int rank) {
  asm volatile(
      "{\n"
      ".reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n"
      "}" ::"r"(barrier),
      "r"(rank)
      : "memory");
}
// One arrival; the phase also waits for `bytes` of bulk copies.
__device__ __forceinline__ void mbarrier_arrive_expect(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
// Returns once the phase of this parity has completed. A fresh barrier counts as having completed parity 1.
__device__ __forceinline__ void mbarrier_wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "WAIT_%=:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra WAIT_%=;\n"
      "}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// A box of the tensor map from global to shared memory; its bytes count towards the barrier. Coordinates innermost
// first; what lies outside the tensor arrives as zero.
__device__ __forceinline__ void tma_load(uint32_t dst, const void* map, uint32_t barrier, int c0, int c1) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::
          "r"(dst),
      "l"(map), "r"(barrier), "r"(c0), "r"(c1)
      : "memory");
}
__device__ __forceinline__ void tma_load(uint32_t dst, const void* map, uint32_t barrier, int c0, int c1, int c2) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], "
      "[%2];" ::"r"(dst),
      "l"(map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2)
      : "memory");
}

// The same to both blocks of a cluster: the box lands at `dst` in each, and counts towards each block's own barrier.
__device__ __forceinline__ void tma_load_both(uint32_t dst, const void* map, uint32_t barrier, int c0, int c1) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, "
      "{%3, %4}], [%2], %5;" ::"r"(dst),
      "l"(map), "r"(barrier), "r"(c0), "r"(c1), "h"(uint16_t{3})
      : "memory");
}
__device__ __forceinline__ void tma_load_both(uint32_t dst, const void* map, uint32_t barrier, int c0, int c1,
                                              int c2) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, "
      "{%3, %4, %5}], [%2], %6;" ::"r"(dst),
      "l"(map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2), "h"(uint16_t{3})
      : "memory");
}

// Starts bringing memory into the L2; address and size in multiples of 16.
__device__ __forceinline__ void prefetch_l2(const char* from, int bytes) {
#if __CUDA_ARCH__ >= 900
  if (bytes > 0) asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
#else
#pragma unroll 1
  for (int at = 0; at < bytes; at += 128) asm volatile("prefetch.global.L2 [%0];" ::"l"(from + at) : "memory");
#endif
}

// Orders this thread's ordinary and cp.async writes to shared memory before reads by the tensor cores.
__device__ __forceinline__ void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

__device__ __forceinline__ void prefetch_tensormap(const void* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// A barrier of `threads` threads; the number is theirs (0 is __syncthreads()).
__device__ __forceinline__ void named_barrier(int number, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

// All threads of a cluster's blocks, a warp's together: mbarriers initialised before, with their fence, are there after.
__device__ __forceinline__ void cluster_barrier() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Hand registers from the producers to the consumers; every warp of a warpgroup executes it.
template <int kRegisters>
__device__ __forceinline__ void lower_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void raise_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

}  // namespace smop::ptx
