// From expert rows back to tokens: LayerNorm, gate weights and the sum over K, their backward, and two small row
// kernels.
//
// The statistics are exact two-pass ones in float32; a row is read again from L1/L2 for the second pass. LayerNorm
// parameters may be float32 beside 16-bit activations (autocast keeps them so): P is their type.
#include "common.cuh"

namespace smop {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarp;
constexpr int kStep = kThreads * 8;  // columns a block covers at a time, 8 a thread

template <class T>
__device__ __forceinline__ const T* row_of(const void* base, int64_t row, int dim) {
  return static_cast<const T*>(base) + row * dim;
}

// One block a token.
template <class T, class P>
__global__ __launch_bounds__(kThreads) void combine_fwd(const SmopCombine p) {
  __shared__ float reduce[kWarps], mean_of[SMOP_MAX_EXPERTS], rstd_of[SMOP_MAX_EXPERTS];
  const int64_t first_slot = static_cast<int64_t>(blockIdx.x) * p.top_k;
  const int my_col = threadIdx.x * 8;
  if (p.ln_weight) {
    for (int k = 0; k < p.top_k; ++k) {
      const int r = p.inverse[first_slot + k];
      if (r < 0) continue;
      const T* z = row_of<T>(p.z, r, p.dim);
      float v[8], mean[1] = {}, square[1] = {};
      for (int d = my_col; d < p.dim; d += kStep) {
        load8(z + d, p.dim - d, v);
#pragma unroll
        for (int i = 0; i < 8; ++i) mean[0] += v[i];
      }
      block_sum<1, kThreads>(mean, reduce);
      mean[0] /= p.dim;
      for (int d = my_col; d < p.dim; d += kStep) {
        load8(z + d, p.dim - d, v);
#pragma unroll
        for (int i = 0; i < 8; ++i)
          if (d + i < p.dim) square[0] += (v[i] - mean[0]) * (v[i] - mean[0]);
      }
      block_sum<1, kThreads>(square, reduce);
      const float rstd = rsqrtf(square[0] / p.dim + p.eps);
      if (threadIdx.x == 0) {
        mean_of[k] = p.mean[r] = mean[0];
        rstd_of[k] = p.rstd[r] = rstd;
      }
    }
    __syncthreads();
  }
  T* y = static_cast<T*>(p.y) + static_cast<int64_t>(blockIdx.x) * p.dim;
  for (int d = my_col; d < p.dim; d += kStep) {
    float sum[8] = {}, v[8], gamma[8], beta[8];
    for (int k = 0; k < p.top_k; ++k) {
      const int r = p.inverse[first_slot + k];
      if (r < 0) continue;
      const float w = p.weights[first_slot + k];
      load8(row_of<T>(p.z, r, p.dim) + d, p.dim - d, v);
      if (p.ln_weight) {
        const int e = p.chosen[first_slot + k];
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

// Rows of one expert a block of combine_bwd takes: enough to make the partial sums small, few enough to fill the
// device.
int chunk_rows(int64_t rows) {
  const int64_t even = ceil_div(rows, 512);
  return static_cast<int>(even < 4 ? 4 : even > 64 ? 64 : even);
}

__host__ __device__ __forceinline__ int padded(int dim) {
  return (dim + 7) / 8 * 8;
}  // keeps the partial sums float4-aligned

__device__ __forceinline__ void add8(float* to, const float (&v)[8]) {
  float4* q = reinterpret_cast<float4*>(to);
  float4 a = q[0], b = q[1];
  a.x += v[0], a.y += v[1], a.z += v[2], a.w += v[3];
  b.x += v[4], b.y += v[5], b.z += v[6], b.w += v[7];
  q[0] = a, q[1] = b;
}

// One block a chunk of rows of one expert, so that the sums of dln_weight and dln_bias over the chunk can stay in the
// block: in shared memory, or, when the rows are too wide for that, in the block's own slice of the partial array.
//   dout = w · dy;  dx̂ = dout · γ;  dz = rstd · (dx̂ − mean(dx̂) − x̂ · mean(dx̂ · x̂));  dw = Σ dy · (x̂ · γ + β)
template <class T, class P>
__global__ __launch_bounds__(kThreads, 3) void combine_bwd(const SmopCombineBwd p, int rows_per_chunk,
                                                           bool sums_in_shared) {
  extern __shared__ __align__(16) float shared_sums[];
  __shared__ float reduce[3 * kWarps];
  RowTile tile;
  RowTileScheduler scheduler(p.offs, p.experts, rows_per_chunk, 1);
  if (!scheduler.find(blockIdx.x, tile)) return;
  const int my_col = threadIdx.x * 8, width = padded(p.dim);
  const bool norm = p.ln_weight != nullptr;
  float* partial = p.ln_partial ? p.ln_partial + static_cast<int64_t>(tile.index) * 2 * width : nullptr;
  float* dgamma = sums_in_shared ? shared_sums : partial;
  float* dbeta = dgamma + width;
  if (partial) {
    for (int d = my_col; d < p.dim; d += kStep) {  // a thread touches its own columns only: no barrier is needed
#pragma unroll
      for (int i = 0; i < 8; ++i) dgamma[d + i] = dbeta[d + i] = 0.f;
    }
  }
  const P* gamma_row = norm ? row_of<P>(p.ln_weight, tile.expert, p.dim) : nullptr;
  const P* beta_row = norm ? row_of<P>(p.ln_bias, tile.expert, p.dim) : nullptr;
  for (int r = tile.row; r < tile.row + tile.rows; ++r) {
    const int slot = p.order[r];
    const float w = p.weights[slot];
    const T* z_row = row_of<T>(p.z, r, p.dim);
    const T* dy_row = row_of<T>(p.dy, slot / p.top_k, p.dim);
    T* dz_row = static_cast<T*>(p.dz) + static_cast<int64_t>(r) * p.dim;
    const float mean = norm ? p.mean[r] : 0.f, rstd = norm ? p.rstd[r] : 1.f;
    float sum[3] = {};  // Σ dy · out, Σ dx̂, Σ dx̂ · x̂
    for (int d = my_col; d < p.dim; d += kStep) {
      float dy[8], z[8], gamma[8], beta[8];
      const int n = p.dim - d;
      load8(dy_row + d, n, dy);
      load8(z_row + d, n, z);
      if (norm) load8(gamma_row + d, n, gamma), load8(beta_row + d, n, beta);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const float xhat = (z[i] - mean) * rstd;
        sum[0] = fmaf(dy[i], norm ? fmaf(xhat, gamma[i], beta[i]) : z[i], sum[0]);
        const float dxhat = norm ? w * dy[i] * gamma[i] : 0.f;
        sum[1] += dxhat;
        sum[2] = fmaf(dxhat, xhat, sum[2]);
      }
    }
    block_sum<3, kThreads>(sum, reduce);
    if (p.dweights && threadIdx.x == 0) p.dweights[slot] = sum[0];
    const float mean_dxhat = sum[1] / p.dim, mean_dot = sum[2] / p.dim;
    for (int d = my_col; d < p.dim; d += kStep) {
      float dy[8], z[8], gamma[8], dz[8];
      const int n = p.dim - d;
      load8(dy_row + d, n, dy);
#pragma unroll
      for (int i = 0; i < 8; ++i) dy[i] *= w;
      if (norm) {
        load8(z_row + d, n, z);
        load8(gamma_row + d, n, gamma);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          z[i] = (z[i] - mean) * rstd;
          dz[i] = rstd * (dy[i] * gamma[i] - mean_dxhat - z[i] * mean_dot);
        }
        store8(dz_row + d, n, dz);
        if (partial) {
          add8(dbeta + d, dy);
#pragma unroll
          for (int i = 0; i < 8; ++i) z[i] *= dy[i];
          add8(dgamma + d, z);
        }
      } else {
        store8(dz_row + d, n, dy);
      }
    }
  }
  if (partial && sums_in_shared)
    for (int d = my_col; d < p.dim; d += kStep) {
#pragma unroll
      for (int i = 0; i < 8; i += 4) {
        *reinterpret_cast<float4*>(partial + d + i) = *reinterpret_cast<const float4*>(dgamma + d + i);
        *reinterpret_cast<float4*>(partial + width + d + i) = *reinterpret_cast<const float4*>(dbeta + d + i);
      }
    }
}

// Sums the chunks of each expert, in order. A block owns 32 columns of one expert; its 8 warps share the chunks.
template <class P>
__global__ __launch_bounds__(kThreads) void sum_ln_partials(const SmopCombineBwd p, int rows_per_chunk) {
  __shared__ float part[2][kWarps][kWarp];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int e = blockIdx.y, d = blockIdx.x * kWarp + lane, width = padded(p.dim);
  const int first = row_tiles_before(p.offs, e, rows_per_chunk);
  const int chunks = static_cast<int>(ceil_div(p.offs[e] - (e ? p.offs[e - 1] : 0), rows_per_chunk));
  float gamma = 0.f, beta = 0.f;
  if (d < p.dim) {
#pragma unroll 4
    for (int c = warp; c < chunks; c += kWarps) {
      const float* row = p.ln_partial + static_cast<int64_t>(first + c) * 2 * width + d;
      gamma += row[0];
      beta += row[width];
    }
  }
  part[0][warp][lane] = gamma;
  part[1][warp][lane] = beta;
  __syncthreads();
  if (warp != 0 || d >= p.dim) return;
  gamma = beta = 0.f;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) gamma += part[0][w][lane], beta += part[1][w][lane];
  static_cast<P*>(p.dln_weight)[static_cast<int64_t>(e) * p.dim + d] = from_float<P>(gamma);
  static_cast<P*>(p.dln_bias)[static_cast<int64_t>(e) * p.dim + d] = from_float<P>(beta);
}

constexpr int kRowThreads = 128;

template <class T>
__global__ __launch_bounds__(kRowThreads) void gather_sum(const SmopGatherSum p) {
  const int64_t first_slot = static_cast<int64_t>(blockIdx.x) * p.top_k;
  T* dx = static_cast<T*>(p.dx) + static_cast<int64_t>(blockIdx.x) * p.dim;
  for (int d = threadIdx.x * 8; d < p.dim; d += kRowThreads * 8) {
    float sum[8] = {}, v[8];
    for (int k = 0; k < p.top_k; ++k) {
      const int r = p.inverse[first_slot + k];
      if (r < 0) continue;
      load8(row_of<T>(p.rows, r, p.dim) + d, p.dim - d, v);
#pragma unroll
      for (int i = 0; i < 8; ++i) sum[i] += v[i];
    }
    store8(dx + d, p.dim - d, sum);
  }
}

template <class T>
__global__ __launch_bounds__(kRowThreads) void zero_tail(const SmopZeroTail p) {
  const float zero[8] = {};
  for (int64_t r = p.offs[p.experts - 1] + static_cast<int64_t>(blockIdx.x); r < p.rows; r += gridDim.x) {
    T* row = static_cast<T*>(p.out) + r * p.n;
    for (int d = threadIdx.x * 8; d < p.n; d += kRowThreads * 8) store8(row + d, p.n - d, zero);
  }
}

// As by_dtype, with the type of the LayerNorm parameters: that of the activations, or float32.
template <class F>
cudaError_t by_dtypes(int dtype, int ln_dtype, F&& f) {
  return by_dtype(dtype, [&](auto t) {
    if (ln_dtype == SMOP_FLOAT32) return f(t, float{});
    return ln_dtype == dtype ? f(t, t) : cudaErrorInvalidValue;
  });
}

}  // namespace
}  // namespace smop

extern "C" int64_t smop_ln_partial_size(int64_t rows, int experts, int dim) {
  using namespace smop;
  return max_row_tiles(rows, experts, chunk_rows(rows)) * 2 * padded(dim);
}

extern "C" int smop_combine_fwd(const SmopCombine* p, uint64_t stream) {
  using namespace smop;
  if (p->tokens == 0) return cudaSuccess;
  return by_dtypes(p->dtype, p->ln_dtype, [&](auto t, auto ln) {
    combine_fwd<decltype(t), decltype(ln)><<<p->tokens, kThreads, 0, as_stream(stream)>>>(*p);
    return cudaGetLastError();
  });
}

extern "C" int smop_combine_bwd(const SmopCombineBwd* p, uint64_t stream) {
  using namespace smop;
  const int64_t rows = static_cast<int64_t>(p->tokens) * p->top_k;
  const int per_chunk = chunk_rows(rows);
  const int64_t chunks = max_row_tiles(rows, p->experts, per_chunk);
  // 96 KiB: what every device from sm_80 on grants a block (sm_86 and sm_89 have 99).
  const size_t sums = p->ln_partial ? 2 * sizeof(float) * padded(p->dim) : 0;
  const bool in_shared = sums > 0 && sums <= 96 * 1024;
  const size_t shared = in_shared ? sums : 0;
  return by_dtypes(p->dtype, p->ln_dtype, [&](auto t, auto ln) {
    auto kernel = combine_bwd<decltype(t), decltype(ln)>;
    if (chunks) {
      if (auto e = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)))
        return e;
      kernel<<<static_cast<unsigned>(chunks), kThreads, shared, as_stream(stream)>>>(*p, per_chunk, in_shared);
      if (auto e = cudaGetLastError()) return e;
    }
    if (p->dln_weight) {  // without tokens too: idle experts get zeros
      const dim3 grid(static_cast<unsigned>(ceil_div(p->dim, kWarp)), p->experts);
      sum_ln_partials<decltype(ln)><<<grid, kThreads, 0, as_stream(stream)>>>(*p, per_chunk);
    }
    return cudaGetLastError();
  });
}

extern "C" int smop_gather_sum(const SmopGatherSum* p, uint64_t stream) {
  using namespace smop;
  if (p->tokens == 0) return cudaSuccess;
  return by_dtype(p->dtype, [&](auto t) {
    gather_sum<decltype(t)><<<p->tokens, kRowThreads, 0, as_stream(stream)>>>(*p);
    return cudaGetLastError();
  });
}

extern "C" int smop_zero_tail(const SmopZeroTail* p, uint64_t stream) {
  using namespace smop;
  if (p->rows == 0) return cudaSuccess;
  return by_dtype(p->dtype, [&](auto t) {
    zero_tail<decltype(t)>
        <<<static_cast<unsigned>(p->rows < 1024 ? p->rows : 1024), kRowThreads, 0, as_stream(stream)>>>(*p);
    return cudaGetLastError();
  });
}
