// The backward of combine: dz and dweights, and partial sums of the gradients of b2, ln_weight and ln_bias.
//   dout = w · dy;  dx̂ = dout · γ;  dz = rstd · (dx̂ − mean(dx̂) − x̂ · mean(dx̂ · x̂));  dw = Σ dy · (x̂ · γ + β)
//
// One block a run of rows of one expert, each thread with columns of its own, so that γ, β and the column sums stay in
// the block: in registers for rows of up to 4096 aligned columns (combine_bwd), else in the block's part of the partial
// sums (combine_bwd_any). bias_sums.cu adds the runs up.
#include "combine.cuh"
#include "prefetch.cuh"

namespace smop {
namespace {

__device__ __forceinline__ void add8(float* to, const float (&v)[8]) {
  float4* q = reinterpret_cast<float4*>(to);
  float4 a = q[0], b = q[1];
  a.x += v[0], a.y += v[1], a.z += v[2], a.w += v[3];
  b.x += v[4], b.y += v[5], b.z += v[6], b.w += v[7];
  q[0] = a, q[1] = b;
}

// What a row takes from its token.
struct Row {
  int slot;
  float weight, mean, rstd;
};

__device__ __forceinline__ Row row_info(const SmopCombineBwd& p, int row, bool norm) {
  const int slot = existing(p.order[row], static_cast<int64_t>(p.tokens) * p.top_k);
  return {slot, p.weights[slot], norm ? p.mean[row] : 0.f, norm ? p.rstd[row] : 1.f};
}

// No row stands for a skipped choice: the blocks share them.
__device__ __forceinline__ void clear_skipped(const SmopCombineBwd& p) {
  if (!p.dweights) return;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
#pragma unroll 1  // most threads have one, if any
  for (int64_t slot = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
       slot < static_cast<int64_t>(p.tokens) * p.top_k; slot += threads)
    if (p.inverse[slot] < 0) p.dweights[slot] = 0.f;
}

// Up to 8 · kThreads columns. The next row's loads are in flight while one is computed.
template <class T, class P, int kThreads, bool kNorm>
__global__ __launch_bounds__(kThreads, 512 / kThreads) void combine_bwd(const SmopCombineBwd p, int run) {
  constexpr int kSums = kNorm ? 3 : 1;
  __shared__ __align__(16) float reduce[2][3 * kThreads / kWarp];
  __shared__ Row info[128];
  begin_kernel();
  clear_skipped(p);
  const int64_t rows = static_cast<int64_t>(p.tokens) * p.top_k;
  if (only_prefetches(p.ahead, p.experts, p.offs, rows)) return;
  RowTile tile;
  RowTileScheduler scheduler(p.offs, p.experts, rows, run, 1);
  if (!scheduler.find(blockIdx.x, tile)) return;
  for (int i = threadIdx.x; i < tile.rows; i += kThreads) info[i] = row_info(p, tile.row + i, kNorm);
  __syncthreads();

  const int col = threadIdx.x * 8;
  const bool mine = col < p.dim;
  const float per_column = 1.f / p.dim;
  float gamma[8] = {}, beta[8] = {}, sums[kSums][8] = {};
  if (kNorm && mine) {
    Packed8<P> packed;
    packed.load(row_of<P>(p.ln_weight, tile.expert, p.dim) + col);
    packed.unpack(gamma);
    packed.load(row_of<P>(p.ln_bias, tile.expert, p.dim) + col);
    packed.unpack(beta);
  }
  Packed8<T> next_dy = {}, next_z = {};
  const auto fetch = [&](int i) {
    if (!mine || i >= tile.rows) return;
    next_dy.load(row_of<T>(p.dy, info[i].slot / p.top_k, p.dim) + col);
    next_z.load(row_of<T>(p.z, tile.row + i, p.dim) + col);
  };
  fetch(0);
#pragma unroll 1
  for (int i = 0; i < tile.rows; ++i) {
    const auto [slot, w, mean, rstd] = info[i];
    float dy[8], z[8], dxhat[8], total[3] = {};  // Σ dx̂ / w, Σ dx̂ · x̂ / w, Σ dy · β (without LayerNorm Σ dy · z)
    next_dy.unpack(dy);
    next_z.unpack(z);
    fetch(i + 1);
#pragma unroll
    for (int c = 0; c < 8; ++c) {  // a thread without columns adds zeros: its γ and β are
      if constexpr (kNorm) {
        z[c] = (z[c] - mean) * rstd;  // x̂
        dxhat[c] = dy[c] * gamma[c];
        total[0] += dxhat[c];
        total[1] = fmaf(dxhat[c], z[c], total[1]);
        total[2] = fmaf(dy[c], beta[c], total[2]);
      } else {
        total[2] = fmaf(dy[c], z[c], total[2]);
      }
    }
    block_sum<3, kThreads>(total, reduce[i % 2]);
    if (p.dweights && threadIdx.x == 0) p.dweights[slot] = total[1] + total[2];
    if (!mine) continue;
    const float scale = rstd * w, mean_dxhat = total[0] * per_column, mean_dot = total[1] * per_column;
#pragma unroll
    for (int c = 0; c < 8; ++c) {
      const float dout = w * dy[c];
      dy[c] = dout;
      if constexpr (kNorm) {
        sums[1][c] = fmaf(dout, z[c], sums[1][c]);
        sums[2][c] += dout;
        dy[c] = scale * fmaf(-z[c], mean_dot, dxhat[c] - mean_dxhat);
      }
      sums[0][c] += dy[c];
    }
    store8_aligned(static_cast<T*>(p.dz) + static_cast<int64_t>(tile.row + i) * p.dim + col, dy);
  }
  if (!p.sums || !mine) return;
#pragma unroll
  for (int s = 0; s < kSums; ++s)
    store8_aligned(p.sums + (static_cast<int64_t>(tile.index) * kSums + s) * padded(p.dim) + col, sums[s]);
}

constexpr int kAnyThreads = 256, kStep = kAnyThreads * 8;  // columns a block covers at a time, 8 a thread

// Any width and alignment.
template <class T, class P>
__global__ __launch_bounds__(kAnyThreads, 3) void combine_bwd_any(const SmopCombineBwd p, int run) {
  __shared__ __align__(16) float reduce[2][3 * kAnyThreads / kWarp];
  begin_kernel();
  clear_skipped(p);
  const int64_t rows = static_cast<int64_t>(p.tokens) * p.top_k;
  if (only_prefetches(p.ahead, p.experts, p.offs, rows)) return;
  RowTile tile;
  RowTileScheduler scheduler(p.offs, p.experts, rows, run, 1);
  if (!scheduler.find(blockIdx.x, tile)) return;
  const int my_col = threadIdx.x * 8, width = padded(p.dim);
  const bool norm = p.ln_weight != nullptr;
  float* sums = p.sums ? p.sums + static_cast<int64_t>(tile.index) * sums_per_run(norm) * width : nullptr;
  if (sums) {
    for (int s = 0; s < sums_per_run(norm); ++s)
      for (int d = my_col; d < p.dim; d += kStep) {  // a thread touches its own columns only: no barrier is needed
#pragma unroll
        for (int i = 0; i < 8; ++i) sums[s * width + d + i] = 0.f;
      }
  }
  const P* gamma_row = norm ? row_of<P>(p.ln_weight, tile.expert, p.dim) : nullptr;
  const P* beta_row = norm ? row_of<P>(p.ln_bias, tile.expert, p.dim) : nullptr;
  for (int r = tile.row; r < tile.row + tile.rows; ++r) {
    const auto [slot, w, mean, rstd] = row_info(p, r, norm);
    const T* z_row = row_of<T>(p.z, r, p.dim);
    const T* dy_row = row_of<T>(p.dy, slot / p.top_k, p.dim);
    T* dz_row = static_cast<T*>(p.dz) + static_cast<int64_t>(r) * p.dim;
    float total[3] = {};  // Σ dy · out, Σ dx̂, Σ dx̂ · x̂
    for (int d = my_col; d < p.dim; d += kStep) {
      float dy[8], z[8], gamma[8], beta[8];
      const int n = p.dim - d;
      load8(dy_row + d, n, dy);
      load8(z_row + d, n, z);
      if (norm) load8(gamma_row + d, n, gamma), load8(beta_row + d, n, beta);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const float xhat = (z[i] - mean) * rstd;
        total[0] = fmaf(dy[i], norm ? fmaf(xhat, gamma[i], beta[i]) : z[i], total[0]);
        const float dxhat = norm ? w * dy[i] * gamma[i] : 0.f;
        total[1] += dxhat;
        total[2] = fmaf(dxhat, xhat, total[2]);
      }
    }
    block_sum<3, kAnyThreads>(total, reduce[(r - tile.row) % 2]);
    if (p.dweights && threadIdx.x == 0) p.dweights[slot] = total[0];
    const float mean_dxhat = total[1] / p.dim, mean_dot = total[2] / p.dim;
    for (int d = my_col; d < p.dim; d += kStep) {
      float dy[8], z[8], gamma[8], dz[8];
      const int n = p.dim - d;
      load8(dy_row + d, n, dy);
#pragma unroll
      for (int i = 0; i < 8; ++i) dz[i] = dy[i] *= w;
      if (norm) {
        load8(z_row + d, n, z);
        load8(gamma_row + d, n, gamma);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          z[i] = (z[i] - mean) * rstd;
          dz[i] = i < n ? rstd * (dy[i] * gamma[i] - mean_dxhat - z[i] * mean_dot) : 0.f;
        }
        if (sums) {
          add8(sums + 2 * width + d, dy);
#pragma unroll
          for (int i = 0; i < 8; ++i) z[i] *= dy[i];
          add8(sums + width + d, z);
        }
      }
      store8(dz_row + d, n, dz);
      if (sums) add8(sums + d, dz);
    }
  }
}

template <class T, class P>
cudaError_t launch_combine_bwd(const SmopCombineBwd& p, uint64_t stream, bool dependent) {
  const int64_t rows = static_cast<int64_t>(p.tokens) * p.top_k;
  const int run = rows_per_run(rows);
  const auto queue = [&](auto kernel, int threads) {
    const auto blocks = static_cast<unsigned>(max_row_tiles(rows, p.experts, run) + prefetch_blocks(p.ahead));
    return launch({blocks, threads, 0, stream, dependent}, kernel, p, run);
  };
  const bool aligned = p.dim % 8 == 0 && all_aligned16({p.dy, p.z, p.dz, p.ln_weight, p.ln_bias});
  if (!aligned || p.dim > 4096) return queue(combine_bwd_any<T, P>, kAnyThreads);
  if (p.dim > 2048) return queue(p.ln_weight ? combine_bwd<T, P, 512, true> : combine_bwd<T, P, 512, false>, 512);
  return queue(p.ln_weight ? combine_bwd<T, P, 256, true> : combine_bwd<T, P, 256, false>, 256);
}

}  // namespace
}  // namespace smop

extern "C" int smop_combine_bwd(const SmopCombineBwd* p, uint64_t stream, int dependent) {
  using namespace smop;
  if (p->tokens == 0) return cudaSuccess;
  SmopCombineBwd args = *p;
  args.ahead = prefetchable(args.ahead);
  return by_dtypes(p->dtype, p->ln_dtype, [&](auto t, auto ln) {
    return launch_combine_bwd<decltype(t), decltype(ln)>(args, stream, dependent != 0);
  });
}
