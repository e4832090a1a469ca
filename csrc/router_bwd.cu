// The router's backward: the gradient of the logits, then of the gate (sums over runs of tokens, then over the runs)
// and of x.
#include "routing.cuh"

namespace smop {
namespace {

// The gradient of each token's logits: from the renormalised weights (a softmax over the chosen logits), from the
// balance loss through p, from the z loss through the log-sum-exp, and what came from outside. One warp a token.
__global__ __launch_bounds__(kRouteThreads) void logits_bwd(const SmopRouteBwd p) {
  __shared__ float grad[kRouteWarps][SMOP_MAX_EXPERTS];
  begin_kernel();
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int t = blockIdx.x * kRouteWarps + warp;
  if (t >= p.tokens) return;
  float* out = p.dlogits_total + static_cast<int64_t>(t) * p.gates;
  if (p.mask && !p.mask[t]) {
    for (int e = lane; e < p.gates; e += kWarp) out[e] = 0.f;
    return;
  }
  for (int e = lane; e < p.gates; e += kWarp)
    grad[warp][e] = p.dlogits ? p.dlogits[static_cast<int64_t>(t) * p.gates + e] : 0.f;
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
__global__ __launch_bounds__(kRouteThreads) void gate_wgrad(const SmopRouteBwd p, int run) {
  constexpr int kTokens = 32;
  __shared__ float grad[kTokens][kGateTile];
  begin_kernel();
  const int d = blockIdx.y * kRouteThreads + threadIdx.x;
  const int cells = p.routers * p.gates, first_cell = blockIdx.z * kGateTile;
  const int begin = blockIdx.x * run, end = min(begin + run, p.tokens);
  const T* x = static_cast<const T*>(p.x);
  float sum[kGateTile] = {};
  for (int t0 = begin; t0 < end; t0 += kTokens) {
    __syncthreads();
    {
      const int t = t0 + threadIdx.x / kGateTile, cell = first_cell + threadIdx.x % kGateTile;
      const bool mine = t < end && cell < cells && cell / p.gates == router_of(p.modality, p.routers, t);
      grad[threadIdx.x / kGateTile][threadIdx.x % kGateTile] =
          mine ? p.dlogits_total[static_cast<int64_t>(t) * p.gates + cell % p.gates] : 0.f;
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
    if (first_cell + c < cells)
      p.dgate_partial[(static_cast<int64_t>(blockIdx.x) * cells + first_cell + c) * p.dim + d] = sum[c];
}
static_assert(kRouteThreads == 32 * kGateTile, "one thread a (token, gate row) when the gradients are staged");

template <class T>
__global__ __launch_bounds__(kRouteThreads) void sum_splits(const float* partial, T* out, int64_t n, int splits) {
  begin_kernel();
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kRouteThreads + threadIdx.x;
  if (i >= n) return;
  float sum = 0.f;
  for (int s = 0; s < splits; ++s) sum += partial[s * n + i];
  out[i] = from_float<T>(sum);
}

// dx[t] = Σ_e dlogits[t, e] · gate[r, e]; one warp a token.
template <class T>
__global__ __launch_bounds__(kRouteThreads) void gate_dgrad(const SmopRouteBwd p) {
  begin_kernel();
  const int t = blockIdx.x * kRouteWarps + threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  if (t >= p.tokens) return;
  const float* grad = p.dlogits_total + static_cast<int64_t>(t) * p.gates;
  const T* gate = static_cast<const T*>(p.gate_weight) +
                  static_cast<int64_t>(router_of(p.modality, p.routers, t)) * p.gates * p.dim;
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

extern "C" int smop_gate_splits(int tokens) { return smop::gate_splits(tokens); }

extern "C" int smop_route_bwd(const SmopRouteBwd* p, uint64_t stream) {
  using namespace smop;
  const int splits = gate_splits(p->tokens), cells = p->routers * p->gates;
  const int token_blocks = static_cast<int>(ceil_div(p->tokens, kRouteWarps));
  const int64_t gate_size = static_cast<int64_t>(cells) * p->dim;
  return by_dtype(p->dtype, [&](auto t) {
    using T = decltype(t);
    const auto queue = [&](dim3 blocks, bool dependent, auto kernel, const auto&... arguments) {
      return launch({blocks, kRouteThreads, 0, stream, dependent}, kernel, arguments...);
    };
    if (token_blocks)
      if (auto e = queue(token_blocks, false, logits_bwd, *p)) return e;
    const dim3 grid(splits, static_cast<unsigned>(ceil_div(p->dim, kRouteThreads)),
                    static_cast<unsigned>(ceil_div(cells, kGateTile)));
    if (auto e = queue(grid, token_blocks > 0, gate_wgrad<T>, *p, tokens_per_split(p->tokens))) return e;
    const auto sum_blocks = static_cast<unsigned>(ceil_div(gate_size, kRouteThreads));
    if (auto e = queue(sum_blocks, true, sum_splits<T>, p->dgate_partial, static_cast<T*>(p->dgate), gate_size, splits))
      return e;
    return p->dx && token_blocks ? queue(token_blocks, true, gate_dgrad<T>, *p) : cudaSuccess;
  });
}
