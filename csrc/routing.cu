// Router (gate product, softmax, top-K, auxiliary losses), the stable counting sort that puts slots in expert order, and the router's
// backward. Everything is deterministic: sums over tokens go block by block, then over the blocks in a fixed order.
//
// Tokens are dealt to at most SMOP_MAX_ROUTE_BLOCKS blocks in contiguous runs. Each counts its choices; the scatter kernel then finds
// its place from the counts of all blocks, so no separate scan kernel is needed.
#include "common.cuh"

namespace smop {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarp;
constexpr int kPerLane = SMOP_MAX_EXPERTS / kWarp;  // lane l holds experts l, l + 32, …
constexpr int kGateTile = 8;                        // gate rows a warp multiplies at a time: x is read once for E ≤ 8

int tokens_per_block(int tokens) {
  const int even = static_cast<int>(ceil_div(tokens, SMOP_MAX_ROUTE_BLOCKS));
  return static_cast<int>(ceil_div(even > 1 ? even : 1, kWarps)) * kWarps;
}

__device__ __forceinline__ int router_of(const int32_t* modality, int routers, int token) {
  return routers == 2 && modality[token] != 0;
}

// Softmax pieces of one token's logits, held by its warp.
struct Softmax {
  float p[kPerLane];  // 0 beyond E
  float lse;
};

__device__ __forceinline__ Softmax softmax(const float (&logit)[kPerLane], int gates) {
  const int lane = threadIdx.x % kWarp;
  float top = -INFINITY;
#pragma unroll
  for (int j = 0; j < kPerLane; ++j)
    if (lane + j * kWarp < gates) top = fmaxf(top, logit[j]);
  top = warp_max(top);
  Softmax s;
  float total = 0.f;
#pragma unroll
  for (int j = 0; j < kPerLane; ++j) {
    s.p[j] = lane + j * kWarp < gates ? expf(logit[j] - top) : 0.f;
    total += s.p[j];
  }
  total = warp_sum(total);
#pragma unroll
  for (int j = 0; j < kPerLane; ++j) s.p[j] /= total;
  s.lse = top + logf(total);
  return s;
}

// Larger for the larger probability, then for the lower expert; a NaN is larger than all; 0 is never a key.
__device__ __forceinline__ uint64_t choice_key(float p, int expert) {
  const uint32_t bits = __float_as_uint(p) & 0x7fffffffu;  // p ≥ 0: its bits rise with it
  return static_cast<uint64_t>(bits) << 32 | (0xffffffffu - expert);
}

template <class T>
__global__ __launch_bounds__(kThreads, 4) void router_fwd(const SmopRoute p, int run) {
  // Per warp: E logits, then R·E choices, R·E probability sums and R squared log-sum-exps over its tokens.
  extern __shared__ float shared[];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int cells = p.routers * p.gates;
  const int per_warp = p.gates + 2 * cells + p.routers;
  float* logit_row = shared + warp * per_warp;
  int* count = reinterpret_cast<int*>(logit_row + p.gates);
  float* prob = logit_row + p.gates + cells;
  float* z = prob + cells;
  for (int i = lane; i < 2 * cells + p.routers; i += kWarp) logit_row[p.gates + i] = 0.f;
  __syncwarp();

  const T* x = static_cast<const T*>(p.x);
  const T* gate = static_cast<const T*>(p.gate_weight);
  const int begin = blockIdx.x * run, end = min(begin + run, p.tokens);
  for (int t = begin + warp; t < end; t += kWarps) {
    if (p.mask && !p.mask[t]) {
      for (int e = lane; e < p.gates; e += kWarp) p.logits[static_cast<int64_t>(t) * p.gates + e] = 0.f;
      for (int k = lane; k < p.top_k; k += kWarp) {
        p.chosen[static_cast<int64_t>(t) * p.top_k + k] = p.experts;
        p.weights[static_cast<int64_t>(t) * p.top_k + k] = 0.f;
      }
      continue;
    }
    const int r = router_of(p.modality, p.routers, t);
    const T* x_row = x + static_cast<int64_t>(t) * p.dim;
    const T* g_rows = gate + static_cast<int64_t>(r) * p.gates * p.dim;
    for (int e0 = 0; e0 < p.gates; e0 += kGateTile) {
      float dot[kGateTile] = {};
      for (int d = lane * 8; d < p.dim; d += kWarp * 8) {
        float xv[8], gv[8];
        load8(x_row + d, p.dim - d, xv);
#pragma unroll
        for (int i = 0; i < kGateTile; ++i) {
          if (e0 + i >= p.gates) break;
          load8(g_rows + static_cast<int64_t>(e0 + i) * p.dim + d, p.dim - d, gv);
#pragma unroll
          for (int c = 0; c < 8; ++c) dot[i] = fmaf(xv[c], gv[c], dot[i]);
        }
      }
#pragma unroll
      for (int i = 0; i < kGateTile; ++i) {
        const float sum = warp_sum(dot[i]);
        if (lane == 0 && e0 + i < p.gates) logit_row[e0 + i] = sum;
      }
    }
    __syncwarp();
    float logit[kPerLane];
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) {
      const int e = lane + j * kWarp;
      logit[j] = e < p.gates ? logit_row[e] : -INFINITY;
      if (e < p.gates) p.logits[static_cast<int64_t>(t) * p.gates + e] = logit[j];
    }
    const Softmax s = softmax(logit, p.gates);
    __syncwarp();  // logit_row becomes the chosen probabilities

    uint64_t key[kPerLane];
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) {
      const int e = lane + j * kWarp;
      key[j] = e < p.gates ? choice_key(s.p[j], e) : 0;
      if (e < p.gates) prob[r * p.gates + e] += s.p[j];
    }
    if (lane == 0) z[r] += s.lse * s.lse;
    float kept = 0.f;
    for (int k = 0; k < p.top_k; ++k) {
      uint64_t best = 0;
#pragma unroll
      for (int j = 0; j < kPerLane; ++j) best = max(best, key[j]);
#pragma unroll
      for (int d = kWarp / 2; d > 0; d /= 2) best = max(best, __shfl_xor_sync(kFullWarp, best, d));
#pragma unroll
      for (int j = 0; j < kPerLane; ++j)
        if (key[j] == best) key[j] = 0;
      const int e = static_cast<int>(0xffffffffu - static_cast<uint32_t>(best));
      const float chosen_p = __uint_as_float(static_cast<uint32_t>(best >> 32));
      kept += chosen_p;
      if (lane == 0) {
        logit_row[k] = chosen_p;
        count[r * p.gates + e] += 1;
        p.chosen[static_cast<int64_t>(t) * p.top_k + k] = e + (p.experts == p.gates ? 0 : r * p.gates);
      }
    }
    __syncwarp();
    for (int k = lane; k < p.top_k; k += kWarp) p.weights[static_cast<int64_t>(t) * p.top_k + k] = logit_row[k] / kept;
    __syncwarp();
  }

  __syncthreads();
  for (int i = threadIdx.x; i < cells; i += kThreads) {
    int n = 0;
    float sum = 0.f;
    for (int w = 0; w < kWarps; ++w) {
      n += reinterpret_cast<const int*>(shared)[w * per_warp + p.gates + i];
      sum += shared[w * per_warp + p.gates + cells + i];
    }
    p.block_counts[static_cast<int64_t>(blockIdx.x) * cells + i] = n;
    p.block_probs[static_cast<int64_t>(blockIdx.x) * cells + i] = sum;
  }
  if (threadIdx.x < p.routers) {
    float sum = 0.f;
    for (int w = 0; w < kWarps; ++w) sum += shared[w * per_warp + p.gates + 2 * cells + threadIdx.x];
    p.block_z[blockIdx.x * p.routers + threadIdx.x] = sum;
  }
}

// Counts of caller-made routing, for schedule() alone: what router_fwd leaves in block_counts.
__global__ __launch_bounds__(kThreads) void count_choices(const SmopSchedule p, int run) {
  __shared__ int count[SMOP_MAX_EXPERTS];
  for (int e = threadIdx.x; e < p.experts; e += kThreads) count[e] = 0;
  __syncthreads();
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * run * p.top_k;
  const int64_t end = min(begin + static_cast<int64_t>(run) * p.top_k, static_cast<int64_t>(p.tokens) * p.top_k);
  for (int64_t slot = begin + threadIdx.x; slot < end; slot += kThreads) {
    const int e = p.chosen[slot];
    if (e >= 0 && e < p.experts) atomicAdd(&count[e], 1);  // integers: the order does not show
  }
  __syncthreads();
  for (int e = threadIdx.x; e < p.experts; e += kThreads) p.block_counts[static_cast<int64_t>(blockIdx.x) * p.experts + e] = count[e];
}

// Both auxiliary losses and the counts by router, from the blocks' partial sums; one block of the scatter kernel does it.
__device__ void finish_losses(const SmopRoute& p, int blocks) {
  __shared__ float term[2 * SMOP_MAX_EXPERTS];
  __shared__ int chosen[2 * SMOP_MAX_EXPERTS];
  __shared__ float z[2];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int cells = p.routers * p.gates;
  for (int i = warp; i < cells; i += kWarps) {
    int n = 0;
    float sum = 0.f;
    for (int b = lane; b < blocks; b += kWarp) {
      n += p.block_counts[static_cast<int64_t>(b) * cells + i];
      sum += p.block_probs[static_cast<int64_t>(b) * cells + i];
    }
    n = __reduce_add_sync(kFullWarp, n);
    sum = warp_sum(sum);
    if (lane == 0) {
      p.counts[i] = n;
      chosen[i] = n;
      term[i] = sum;
    }
  }
  if (warp < p.routers) {
    float sum = 0.f;
    for (int b = lane; b < blocks; b += kWarp) sum += p.block_z[b * p.routers + warp];
    sum = warp_sum(sum);
    if (lane == 0) z[warp] = sum;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    float balance = 0.f, z_loss = 0.f;
    int active = 0;
    for (int r = 0; r < p.routers; ++r) {
      int slots = 0;
      float dot = 0.f;
      for (int e = 0; e < p.gates; ++e) slots += chosen[r * p.gates + e];
      if (slots == 0) continue;
      const float n = static_cast<float>(slots / p.top_k);
      for (int e = 0; e < p.gates; ++e) dot += chosen[r * p.gates + e] / n * (term[r * p.gates + e] / n);
      balance += p.gates * dot;
      z_loss += z[r] / n;
      ++active;
    }
    *p.balance_loss = active ? balance / active : 0.f;
    *p.z_loss = active ? z_loss / active : 0.f;
  }
}

// Scatters the slots into expert order. block_counts is (blocks, folds, X): two routers that share their experts count apart.
__global__ __launch_bounds__(kThreads) void scatter_slots(const SmopSchedule p, int run, int folds, const SmopRoute route) {
  __shared__ int total[SMOP_MAX_EXPERTS];          // choices of each expert
  __shared__ int next[SMOP_MAX_EXPERTS];           // where this block's next choice of it goes
  __shared__ int warp_count[kWarps][SMOP_MAX_EXPERTS];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int blocks = gridDim.x;
  for (int e = warp; e < p.experts; e += kWarps) {
    int all = 0, before = 0;
    for (int i = lane; i < blocks * folds; i += kWarp) {
      const int n = p.block_counts[static_cast<int64_t>(i) * p.experts + e];
      all += n;
      before += i / folds < static_cast<int>(blockIdx.x) ? n : 0;
    }
    all = __reduce_add_sync(kFullWarp, all);
    before = __reduce_add_sync(kFullWarp, before);
    if (lane == 0) total[e] = all, next[e] = before;
  }
  __syncthreads();
  if (threadIdx.x < p.experts) {
    int start = 0;
    for (int e = 0; e < static_cast<int>(threadIdx.x); ++e) start += total[e];
    next[threadIdx.x] += start;
    if (blockIdx.x == 0) p.offs[threadIdx.x] = start + total[threadIdx.x];
  }
  for (int i = threadIdx.x; i < kWarps * SMOP_MAX_EXPERTS; i += kThreads) (&warp_count[0][0])[i] = 0;
  __syncthreads();

  const int64_t begin = static_cast<int64_t>(blockIdx.x) * run * p.top_k;
  const int64_t end = min(begin + static_cast<int64_t>(run) * p.top_k, static_cast<int64_t>(p.tokens) * p.top_k);
  for (int64_t first = begin; first < end; first += kThreads) {
    const int64_t slot = first + threadIdx.x;
    int e = slot < end ? p.chosen[slot] : -1;
    if (e >= p.experts) e = -1;
    const unsigned same = __match_any_sync(kFullWarp, e);
    const int rank = __popc(same & ((1u << lane) - 1));
    if (e >= 0 && rank == 0) warp_count[warp][e] = __popc(same);
    __syncthreads();
    if (e >= 0) {
      int row = next[e] + rank;
      for (int w = 0; w < warp; ++w) row += warp_count[w][e];
      p.order[row] = static_cast<int>(slot);
      p.inverse[slot] = row;
    } else if (slot < end) {
      p.inverse[slot] = -1;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < p.experts; i += kThreads) {
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        next[i] += warp_count[w][i];
        warp_count[w][i] = 0;
      }
    }
    __syncthreads();
  }
  if (route.counts && blockIdx.x == 0) finish_losses(route, blocks);
}

// ------------------------------------------------------------------------------------------------------------- backward

// The gradient of each token's logits: from the renormalised weights (a softmax over the chosen logits), from the
// balance loss through p, from the z loss through the log-sum-exp, and what came from outside. One warp a token.
__global__ __launch_bounds__(kThreads) void logits_bwd(const SmopRouteBwd p) {
  __shared__ float grad[kWarps][SMOP_MAX_EXPERTS];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int t = blockIdx.x * kWarps + warp;
  if (t >= p.tokens) return;
  float* out = p.dlogits_total + static_cast<int64_t>(t) * p.gates;
  if (p.mask && !p.mask[t]) {
    for (int e = lane; e < p.gates; e += kWarp) out[e] = 0.f;
    return;
  }
  for (int e = lane; e < p.gates; e += kWarp) grad[warp][e] = p.dlogits ? p.dlogits[static_cast<int64_t>(t) * p.gates + e] : 0.f;
  __syncwarp();
  if (p.dweights) {
    const float* w = p.weights + static_cast<int64_t>(t) * p.top_k;
    const float* dw = p.dweights + static_cast<int64_t>(t) * p.top_k;
    float mean = 0.f;
    for (int k = lane; k < p.top_k; k += kWarp) mean = fmaf(w[k], dw[k], mean);
    mean = warp_sum(mean);
    for (int k = lane; k < p.top_k; k += kWarp)  // a token's choices are distinct: no two lanes meet
      grad[warp][p.chosen[static_cast<int64_t>(t) * p.top_k + k] % p.gates] += w[k] * (dw[k] - mean);
    __syncwarp();
  }
  if (p.dbalance || p.dz) {
    const int r = router_of(p.modality, p.routers, t);
    int active = 0, mine = 0;
    for (int i = 0; i < p.routers; ++i) {
      int slots = 0;
      for (int e = lane; e < p.gates; e += kWarp) slots += p.counts[i * p.gates + e];
      slots = __reduce_add_sync(kFullWarp, slots);
      active += slots > 0;
      if (i == r) mine = slots;
    }
    const float n = static_cast<float>(mine / p.top_k);
    float logit[kPerLane], dp[kPerLane];
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) {
      const int e = lane + j * kWarp;
      logit[j] = e < p.gates ? p.logits[static_cast<int64_t>(t) * p.gates + e] : -INFINITY;
    }
    const Softmax s = softmax(logit, p.gates);
    const float balance = p.dbalance ? *p.dbalance * p.gates / (n * n * active) : 0.f;
    const float z = p.dz ? *p.dz * 2.f * s.lse / (n * active) : 0.f;
    float mean = 0.f;
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) {
      const int e = lane + j * kWarp;
      dp[j] = e < p.gates ? balance * p.counts[r * p.gates + e] : 0.f;
      mean = fmaf(s.p[j], dp[j], mean);
    }
    mean = warp_sum(mean);
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) {
      const int e = lane + j * kWarp;
      if (e < p.gates) grad[warp][e] += s.p[j] * (dp[j] - mean + z);
    }
  }
  for (int e = lane; e < p.gates; e += kWarp) out[e] = grad[warp][e];  // each lane wrote its own last
}

// dgate_partial[split, r, e, d] = Σ over the split's tokens of router r of dlogits[t, e] · x[t, d].
// A block owns 256 columns d, kGateTile rows (r, e) and one run of tokens.
template <class T>
__global__ __launch_bounds__(kThreads) void gate_wgrad(const SmopRouteBwd p, int run) {
  constexpr int kTokens = 32;
  __shared__ float grad[kTokens][kGateTile];
  const int d = blockIdx.y * kThreads + threadIdx.x;
  const int cells = p.routers * p.gates, first_cell = blockIdx.z * kGateTile;
  const int begin = blockIdx.x * run, end = min(begin + run, p.tokens);
  const T* x = static_cast<const T*>(p.x);
  float sum[kGateTile] = {};
  for (int t0 = begin; t0 < end; t0 += kTokens) {
    __syncthreads();
    {
      const int t = t0 + threadIdx.x / kGateTile, cell = first_cell + threadIdx.x % kGateTile;
      const bool mine = t < end && cell < cells && cell / p.gates == router_of(p.modality, p.routers, t);
      grad[threadIdx.x / kGateTile][threadIdx.x % kGateTile] = mine ? p.dlogits_total[static_cast<int64_t>(t) * p.gates + cell % p.gates] : 0.f;
    }
    __syncthreads();
    if (d >= p.dim) continue;
    const int n = min(kTokens, end - t0);
#pragma unroll 4
    for (int i = 0; i < n; ++i) {
      if (p.mask && !p.mask[t0 + i]) continue;  // a masked row of x may hold anything, NaN too
      const float v = to_float(x[static_cast<int64_t>(t0 + i) * p.dim + d]);
#pragma unroll
      for (int c = 0; c < kGateTile; ++c) sum[c] = fmaf(grad[i][c], v, sum[c]);
    }
  }
  if (d >= p.dim) return;
#pragma unroll
  for (int c = 0; c < kGateTile; ++c)
    if (first_cell + c < cells) p.dgate_partial[(static_cast<int64_t>(blockIdx.x) * cells + first_cell + c) * p.dim + d] = sum[c];
}
static_assert(kThreads == 32 * kGateTile, "one thread a (token, gate row) when the gradients are staged");

template <class T>
__global__ __launch_bounds__(kThreads) void sum_splits(const float* partial, T* out, int64_t n, int splits) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= n) return;
  float sum = 0.f;
  for (int s = 0; s < splits; ++s) sum += partial[s * n + i];
  out[i] = from_float<T>(sum);
}

// dx[t] = Σ_e dlogits[t, e] · gate[r, e]; one warp a token.
template <class T>
__global__ __launch_bounds__(kThreads) void gate_dgrad(const SmopRouteBwd p) {
  const int t = blockIdx.x * kWarps + threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  if (t >= p.tokens) return;
  const float* grad = p.dlogits_total + static_cast<int64_t>(t) * p.gates;
  const T* gate = static_cast<const T*>(p.gate_weight) + static_cast<int64_t>(router_of(p.modality, p.routers, t)) * p.gates * p.dim;
  T* dx = static_cast<T*>(p.dx) + static_cast<int64_t>(t) * p.dim;
  for (int d = lane * 8; d < p.dim; d += kWarp * 8) {
    float sum[8] = {}, g[8];
    for (int e = 0; e < p.gates; ++e) {
      load8(gate + static_cast<int64_t>(e) * p.dim + d, p.dim - d, g);
#pragma unroll
      for (int i = 0; i < 8; ++i) sum[i] = fmaf(grad[e], g[i], sum[i]);
    }
    store8(dx + d, p.dim - d, sum);
  }
}

int route_blocks(int tokens) {
  const int64_t blocks = ceil_div(tokens, tokens_per_block(tokens));
  return blocks > 0 ? static_cast<int>(blocks) : 1;  // without tokens one block still writes the counts, the losses and offs
}

int tokens_per_split(int tokens) {
  const int64_t even = ceil_div(tokens, SMOP_MAX_GATE_SPLITS);
  return even > 32 ? static_cast<int>(even) : 32;
}

int gate_splits(int tokens) {
  const int64_t splits = ceil_div(tokens, tokens_per_split(tokens));
  return splits > 0 ? static_cast<int>(splits) : 1;
}

}  // namespace
}  // namespace smop

extern "C" int smop_route_blocks(int tokens) { return smop::route_blocks(tokens); }
extern "C" int smop_gate_splits(int tokens) { return smop::gate_splits(tokens); }

extern "C" int smop_route_fwd(const SmopRoute* p, uint64_t stream) {
  using namespace smop;
  const int run = tokens_per_block(p->tokens), blocks = route_blocks(p->tokens);
  const int cells = p->routers * p->gates;
  const size_t shared = sizeof(float) * kWarps * (p->gates + 2 * cells + p->routers);
  return by_dtype(p->dtype, [&](auto t) {
    router_fwd<decltype(t)><<<blocks, kThreads, shared, as_stream(stream)>>>(*p, run);
    if (auto e = cudaGetLastError()) return e;
    const SmopSchedule s{p->tokens, p->experts, p->top_k, p->chosen, p->order, p->inverse, p->offs, p->block_counts};
    scatter_slots<<<blocks, kThreads, 0, as_stream(stream)>>>(s, run, cells / p->experts, *p);
    return cudaGetLastError();
  });
}

extern "C" int smop_schedule(const SmopSchedule* p, uint64_t stream) {
  using namespace smop;
  const int run = tokens_per_block(p->tokens), blocks = route_blocks(p->tokens);
  count_choices<<<blocks, kThreads, 0, as_stream(stream)>>>(*p, run);
  if (auto e = cudaGetLastError()) return e;
  scatter_slots<<<blocks, kThreads, 0, as_stream(stream)>>>(*p, run, 1, SmopRoute{});
  return cudaGetLastError();
}

extern "C" int smop_route_bwd(const SmopRouteBwd* p, uint64_t stream) {
  using namespace smop;
  const int splits = gate_splits(p->tokens), cells = p->routers * p->gates;
  const int token_blocks = static_cast<int>(ceil_div(p->tokens, kWarps));
  const int64_t gate_size = static_cast<int64_t>(cells) * p->dim;
  return by_dtype(p->dtype, [&](auto t) {
    using T = decltype(t);
    if (token_blocks) logits_bwd<<<token_blocks, kThreads, 0, as_stream(stream)>>>(*p);
    if (auto e = cudaGetLastError()) return e;
    const dim3 grid(splits, static_cast<unsigned>(ceil_div(p->dim, kThreads)), static_cast<unsigned>(ceil_div(cells, kGateTile)));
    gate_wgrad<T><<<grid, kThreads, 0, as_stream(stream)>>>(*p, tokens_per_split(p->tokens));
    if (auto e = cudaGetLastError()) return e;
    sum_splits<T><<<static_cast<unsigned>(ceil_div(gate_size, kThreads)), kThreads, 0, as_stream(stream)>>>(
        p->dgate_partial, static_cast<T*>(p->dgate), gate_size, splits);
    if (auto e = cudaGetLastError()) return e;
    if (p->dx && token_blocks) gate_dgrad<T><<<token_blocks, kThreads, 0, as_stream(stream)>>>(*p);
    return cudaGetLastError();
  });
}
