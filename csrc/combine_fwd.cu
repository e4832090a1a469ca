// From expert rows back to tokens: LayerNorm, gate weights and the sum over K. One block a token.
//
// The statistics are exact two-pass ones in float32. Rows of up to 4096 aligned columns stay in registers from the
// first pass to the last, two of the token's K at a time (combine_fwd); others are read once a pass (combine_fwd_any).
#include "combine.cuh"

namespace smop {
namespace {

constexpr int kThreads = 128, kWarps = kThreads / kWarp;
constexpr int kStep = kThreads * 8;  // columns a block covers at a time, 8 a thread
constexpr int kPair = 2;             // rows whose loads are in flight together

// kSteps · kStep columns or fewer.
template <class T, class P, int kSteps, bool kNorm>
__global__ __launch_bounds__(kThreads, 14 / kSteps) void combine_fwd(const SmopCombine p) {
  __shared__ __align__(16) float reduce[2][kPair * kWarps];
  begin_kernel();
  const int64_t token = blockIdx.x, first_slot = token * p.top_k;
  float out[kSteps][8] = {};
  for (int k = 0; k < p.top_k; k += kPair) {
    int row[kPair];
    Packed8<T> z[kPair][kSteps] = {};
#pragma unroll
    for (int i = 0; i < kPair; ++i) row[i] = k + i < p.top_k ? row_of_choice(p, first_slot + k + i) : -1;
#pragma unroll
    for (int i = 0; i < kPair; ++i)
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
        const int col = s * kStep + threadIdx.x * 8;
        if (row[i] >= 0 && col < p.dim) z[i][s].load(row_of<T>(p.z, row[i], p.dim) + col);
      }

    float mean[kPair] = {}, rstd[kPair] = {};
    if constexpr (kNorm) {
      float v[8];
#pragma unroll
      for (int i = 0; i < kPair; ++i)
#pragma unroll
        for (int s = 0; s < kSteps; ++s) {
          z[i][s].unpack(v);
#pragma unroll
          for (int c = 0; c < 8; ++c) mean[i] += v[c];
        }
      block_sum<kPair, kThreads>(mean, reduce[0]);
#pragma unroll
      for (int i = 0; i < kPair; ++i) {
        mean[i] /= p.dim;
#pragma unroll
        for (int s = 0; s < kSteps; ++s) {
          if (s * kStep + threadIdx.x * 8 >= p.dim) continue;
          z[i][s].unpack(v);
#pragma unroll
          for (int c = 0; c < 8; ++c) rstd[i] = fmaf(v[c] - mean[i], v[c] - mean[i], rstd[i]);
        }
      }
      block_sum<kPair, kThreads>(rstd, reduce[1]);
#pragma unroll
      for (int i = 0; i < kPair; ++i) {
        rstd[i] = rsqrtf(rstd[i] / p.dim + p.eps);
        if (threadIdx.x == 0 && row[i] >= 0) p.mean[row[i]] = mean[i], p.rstd[row[i]] = rstd[i];
      }
    }

#pragma unroll
    for (int i = 0; i < kPair; ++i) {
      if (row[i] < 0) continue;  // the same for the whole block
      const float w = p.weights[first_slot + k + i];
      const int expert = kNorm ? existing(p.chosen[first_slot + k + i], p.experts) : 0;
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
        const int col = s * kStep + threadIdx.x * 8;
        if (col >= p.dim) continue;
        float v[8];
        z[i][s].unpack(v);
        if constexpr (kNorm) {
          Packed8<P> packed;
          float gamma[8], beta[8];
          packed.load(row_of<P>(p.ln_weight, expert, p.dim) + col);
          packed.unpack(gamma);
          packed.load(row_of<P>(p.ln_bias, expert, p.dim) + col);
          packed.unpack(beta);
#pragma unroll
          for (int c = 0; c < 8; ++c) v[c] = fmaf((v[c] - mean[i]) * rstd[i], gamma[c], beta[c]);
        }
#pragma unroll
        for (int c = 0; c < 8; ++c) out[s][c] = fmaf(w, v[c], out[s][c]);
      }
    }
  }
#pragma unroll
  for (int s = 0; s < kSteps; ++s) {
    const int col = s * kStep + threadIdx.x * 8;
    if (col < p.dim) store8_aligned(static_cast<T*>(p.y) + token * p.dim + col, out[s]);
  }
}

// Any width and alignment.
template <class T, class P>
__global__ __launch_bounds__(kThreads) void combine_fwd_any(const SmopCombine p) {
  __shared__ __align__(16) float reduce[2][kWarps];
  __shared__ float mean_of[SMOP_MAX_EXPERTS], rstd_of[SMOP_MAX_EXPERTS];
  begin_kernel();
  const int64_t token = blockIdx.x, first_slot = token * p.top_k;
  const int my_col = threadIdx.x * 8;
  if (p.ln_weight) {
    for (int k = 0; k < p.top_k; ++k) {
      const int r = row_of_choice(p, first_slot + k);
      if (r < 0) continue;
      const T* z = row_of<T>(p.z, r, p.dim);
      float v[8], mean[1] = {}, square[1] = {};
      for (int d = my_col; d < p.dim; d += kStep) {
        load8(z + d, p.dim - d, v);
#pragma unroll
        for (int i = 0; i < 8; ++i) mean[0] += v[i];
      }
      block_sum<1, kThreads>(mean, reduce[0]);
      mean[0] /= p.dim;
      for (int d = my_col; d < p.dim; d += kStep) {
        load8(z + d, p.dim - d, v);
#pragma unroll
        for (int i = 0; i < 8; ++i)
          if (d + i < p.dim) square[0] += (v[i] - mean[0]) * (v[i] - mean[0]);
      }
      block_sum<1, kThreads>(square, reduce[1]);
      const float rstd = rsqrtf(square[0] / p.dim + p.eps);
      if (threadIdx.x == 0) {
        mean_of[k] = p.mean[r] = mean[0];
        rstd_of[k] = p.rstd[r] = rstd;
      }
    }
    __syncthreads();
  }
  T* y = static_cast<T*>(p.y) + token * p.dim;
  for (int d = my_col; d < p.dim; d += kStep) {
    float sum[8] = {}, v[8], gamma[8], beta[8];
    for (int k = 0; k < p.top_k; ++k) {
      const int r = row_of_choice(p, first_slot + k);
      if (r < 0) continue;
      const float w = p.weights[first_slot + k];
      load8(row_of<T>(p.z, r, p.dim) + d, p.dim - d, v);
      if (p.ln_weight) {
        const int e = existing(p.chosen[first_slot + k], p.experts);
        load8(row_of<P>(p.ln_weight, e, p.dim) + d, p.dim - d, gamma);
        load8(row_of<P>(p.ln_bias, e, p.dim) + d, p.dim - d, beta);
#pragma unroll
        for (int i = 0; i < 8; ++i) v[i] = fmaf((v[i] - mean_of[k]) * rstd_of[k], gamma[i], beta[i]);
      }
#pragma unroll
      for (int i = 0; i < 8; ++i) sum[i] = fmaf(w, v[i], sum[i]);
    }
    store8(y + d, p.dim - d, sum);
  }
}

template <class T, class P>
auto kernel_for(const SmopCombine& p) {
  const bool aligned = p.dim % 8 == 0 && all_aligned16({p.z, p.y, p.ln_weight, p.ln_bias});
  if (!aligned || p.dim > 4 * kStep) return combine_fwd_any<T, P>;
  if (p.dim > 2 * kStep) return p.ln_weight ? combine_fwd<T, P, 4, true> : combine_fwd<T, P, 4, false>;
  return p.ln_weight ? combine_fwd<T, P, 2, true> : combine_fwd<T, P, 2, false>;
}

}  // namespace
}  // namespace smop

extern "C" int smop_combine_fwd(const SmopCombine* p, uint64_t stream, int dependent) {
  using namespace smop;
  if (p->tokens == 0) return cudaSuccess;
  return by_dtypes(p->dtype, p->ln_dtype, [&](auto t, auto ln) {
    return launch({static_cast<unsigned>(p->tokens), kThreads, 0, stream, dependent != 0},
                  kernel_for<decltype(t), decltype(ln)>(*p), *p);
  });
}
