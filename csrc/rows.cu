// Two small kernels over rows: the sum of dx over a token's choices, and zeros behind the last expert's rows.
#include "combine.cuh"

namespace smop {
namespace {

constexpr int kThreads = 128;

template <class T, bool kAligned>
__global__ __launch_bounds__(kThreads) void gather_sum(const SmopGatherSum p) {
  begin_kernel();
  const int64_t first_slot = static_cast<int64_t>(blockIdx.x) * p.top_k;
  T* dx = static_cast<T*>(p.dx) + static_cast<int64_t>(blockIdx.x) * p.dim;
  for (int d = threadIdx.x * 8; d < p.dim; d += kThreads * 8) {
    float sum[8] = {}, v[8];
#pragma unroll 2
    for (int k = 0; k < p.top_k; ++k) {
      const int r = row_of_choice(p, first_slot + k);
      if (r < 0) continue;
      load8<kAligned>(row_of<T>(p.rows, r, p.dim) + d, p.dim - d, v);
#pragma unroll
      for (int i = 0; i < 8; ++i) sum[i] += v[i];
    }
    store8(dx + d, p.dim - d, sum);
  }
}

template <class T>
__global__ __launch_bounds__(kThreads) void zero_tail(const SmopZeroTail p) {
  begin_kernel();
  const float zero[8] = {};
  const int64_t first = rows_end(0, p.offs[p.experts - 1], static_cast<int>(p.rows));
  for (int64_t r = first + blockIdx.x; r < p.rows; r += gridDim.x) {
    T* row = static_cast<T*>(p.out) + r * p.n;
    for (int d = threadIdx.x * 8; d < p.n; d += kThreads * 8) store8(row + d, p.n - d, zero);
  }
}

}  // namespace
}  // namespace smop

extern "C" int smop_gather_sum(const SmopGatherSum* p, uint64_t stream, int dependent) {
  using namespace smop;
  if (p->tokens == 0) return cudaSuccess;
  return by_dtype(p->dtype, [&](auto t) {
    using T = decltype(t);
    const bool aligned = p->dim % 8 == 0 && all_aligned16({p->rows});
    return launch({static_cast<unsigned>(p->tokens), kThreads, 0, stream, dependent != 0},
                  aligned ? gather_sum<T, true> : gather_sum<T, false>, *p);
  });
}

extern "C" int smop_zero_tail(const SmopZeroTail* p, uint64_t stream, int dependent) {
  using namespace smop;
  if (p->rows == 0) return cudaSuccess;
  const auto blocks = static_cast<unsigned>(p->rows < 1024 ? p->rows : 1024);
  return by_dtype(p->dtype, [&](auto t) {
    return launch({blocks, kThreads, 0, stream, dependent != 0}, zero_tail<decltype(t)>, *p);
  });
}
