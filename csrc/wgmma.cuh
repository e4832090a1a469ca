// wgmma: one warpgroup multiplies a 64×16 tile of A by a 16×N tile of B, both read from shared memory, in the
// background.
//
// A tile lies in shared memory as rows of 128 bytes (64 elements), 1024-byte aligned, its 16-byte chunks exchanged
// within each group of 8 rows (chunk ^ row % 8): what a tensor map with the 128-byte swizzle writes. A row is either
// one row of the operand (64 values of k, "K-major") or one k (64 rows or columns of the operand, "MN-major", kTrans);
// an MN-major tile wider than 64 is a sequence of such blocks. Where its width is no multiple of 64, they are 32 wide:
// rows of 64 bytes, the 64-byte swizzle.
#pragma once
#include <type_traits>

#include "ptx.cuh"

namespace smop::ptx {

// The matrix descriptor of a tile. `block_bytes` is the distance of its blocks, where it is MN-major and has several.
template <int kRowBytes = kSwizzleRow>
__device__ __forceinline__ uint64_t descriptor(uint32_t shared, int block_bytes) {
  static_assert(kRowBytes == 128 || kRowBytes == 64);
  return uint64_t((shared & 0x3ffff) >> 4) | uint64_t(block_bytes >> 4) << 16 | uint64_t(8 * kRowBytes >> 4) << 32 |
         uint64_t(kRowBytes == 128 ? 1 : 2) << 62;
}

// How far 16 steps of k are: within the 128-byte rows when K-major, 16 rows on when MN-major.
template <bool kTrans, int kRowBytes = kSwizzleRow>
constexpr int kStepBytes = kTrans ? 16 * kRowBytes : 32;

// Before the first wgmma that touches registers written otherwise; after the last of a batch; until at most so many
// batches run.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// The operand lists of the asm statements below.
#define SMOP_D32                                                                      \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "           \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
#define SMOP_D64                                                                      \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "           \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "  \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "  \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
#define SMOP_D80                                                                      \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "           \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "  \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "  \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "  \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79}, "
#define SMOP_D96                                                                      \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "           \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "  \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "  \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "  \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "  \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95}, "
#define SMOP_D128                                                                                     \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                           \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "                  \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "                  \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "                  \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "                  \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "                  \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "      \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}, "
#define SMOP_INOUT4_AT(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define SMOP_INOUT16_AT(i) SMOP_INOUT4_AT(i), SMOP_INOUT4_AT(i + 4), SMOP_INOUT4_AT(i + 8), SMOP_INOUT4_AT(i + 12)
#define SMOP_INOUT32 SMOP_INOUT16_AT(0), SMOP_INOUT16_AT(16)
#define SMOP_INOUT64 SMOP_INOUT32, SMOP_INOUT16_AT(32), SMOP_INOUT16_AT(48)
#define SMOP_INOUT80 SMOP_INOUT64, SMOP_INOUT16_AT(64)
#define SMOP_INOUT96 SMOP_INOUT80, SMOP_INOUT16_AT(80)
#define SMOP_INOUT128 SMOP_INOUT64, SMOP_INOUT16_AT(64), SMOP_INOUT16_AT(80), SMOP_INOUT16_AT(96), SMOP_INOUT16_AT(112)

// d += A · B, for N = 64, 128, 160, 192 and 256; lane l of warp w holds of each 8-column block the columns 2(l%4), +1
// of rows 16w + l/4 and + 8.
#define SMOP_WGMMA(N, REGS, REST)                                                                \
  template <class T, bool kTransA, bool kTransB>                                                 \
  __device__ __forceinline__ void wgmma(float (&d)[REGS], uint64_t a, uint64_t b) {              \
    if constexpr (std::is_same_v<T, bf16>)                                                       \
      asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 " SMOP_D##REGS REST \
                   : SMOP_INOUT##REGS                                                            \
                   : "l"(a), "l"(b), "n"(int(kTransA)), "n"(int(kTransB)));                      \
    else                                                                                         \
      asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.f16.f16 " SMOP_D##REGS REST   \
                   : SMOP_INOUT##REGS                                                            \
                   : "l"(a), "l"(b), "n"(int(kTransA)), "n"(int(kTransB)));                      \
  }
// REST: both descriptors, d is added to, A and B count positively, their transposition.
SMOP_WGMMA(64, 32, "%32, %33, 1, 1, 1, %34, %35;")
SMOP_WGMMA(128, 64, "%64, %65, 1, 1, 1, %66, %67;")
SMOP_WGMMA(160, 80, "%80, %81, 1, 1, 1, %82, %83;")
SMOP_WGMMA(192, 96, "%96, %97, 1, 1, 1, %98, %99;")
SMOP_WGMMA(256, 128, "%128, %129, 1, 1, 1, %130, %131;")
#undef SMOP_WGMMA
#undef SMOP_INOUT128
#undef SMOP_INOUT96
#undef SMOP_INOUT80
#undef SMOP_INOUT64
#undef SMOP_INOUT32
#undef SMOP_INOUT16_AT
#undef SMOP_INOUT4_AT
#undef SMOP_D128
#undef SMOP_D96
#undef SMOP_D80
#undef SMOP_D64
#undef SMOP_D32

}  // namespace smop::ptx
