// The router's backward: the gradient of the logits, and from it those of the gate (sums over runs of tokens, then over
// the runs) and of x.
#include "partial_sums.cuh"
#include "routing.cuh"

namespace smop {
namespace {

constexpr int kTokens = 32;  // gate_wgrad stages so many tokens at a time

// The gradient of token t's logits, into `grad` (E floats): from the renormalised weights (a softmax over the chosen
// logits), from the balance loss through p, from the z loss through the log-sum-exp, and what came from outside. The
// token's kLanes lanes together; every lane of a warp takes part, those with live = false for nothing.
template <int kLanes, int kPerLane>
__device__ __forceinline__ void logits_bwd(const SmopRouteBwd& p, int t, bool live, float* grad) {
  const int lane = threadIdx.x % kLanes;
  const int64_t row = static_cast<int64_t>(live ? t : 0) * p.gates;
  const int gates = live ? p.gates : 0;
  for (int e = lane; e < p.gates; e += kLanes) grad[e] = live && p.dlogits ? p.dlogits[row + e] : 0.f;
  __syncwarp();
  if (p.dweights) {
    const int slot = t * p.top_k, dslot = t * p.dweights_columns;  // choices are numbered in 32 bits
    const int top_k = live ? p.top_k : 0;
    float mean = 0.f;
    for (int k = lane; k < top_k; k += kLanes) mean = fmaf(p.weights[slot + k], p.dweights[dslot + k], mean);
    mean = lanes_sum<kLanes>(mean);
    for (int k = lane; k < top_k; k += kLanes)  // a token's choices are distinct: no two lanes meet
      grad[p.chosen[slot + k] % p.gates] += p.weights[slot + k] * (p.dweights[dslot + k] - mean);
    __syncwarp();
  }
  if (p.dbalance || p.dz) {
    const int r = live ? router_of(p.modality, p.routers, t) : 0;
    int active = 0, mine = 0;
    for (int i = 0; i < p.routers; ++i) {
      int slots = 0;
      for (int e = lane; e < p.gates; e += kLanes) slots += p.counts[i * p.gates + e];
#pragma unroll
      for (int d = kLanes / 2; d > 0; d /= 2) slots += __shfl_xor_sync(kFullWarp, slots, d);
      active += slots > 0;
      if (i == r) mine = slots;
    }
    const float n = static_cast<float>(mine / p.top_k);
    float logit[kPerLane], dp[kPerLane];
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) {
      const int e = lane + j * kLanes;
      logit[j] = e < gates ? p.logits[row + e] : -INFINITY;
    }
    const auto s = softmax<kLanes>(logit, gates);
    const float balance = p.dbalance ? *p.dbalance * p.gates / (n * n * active) : 0.f;
    const float z = p.dz ? *p.dz * 2.f * s.lse / (n * active) : 0.f;
    float mean = 0.f;
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) {
      const int e = lane + j * kLanes;
      dp[j] = e < gates ? balance * p.counts[r * p.gates + e] : 0.f;
      mean = fmaf(s.p[j], dp[j], mean);
    }
    mean = lanes_sum<kLanes>(mean);
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) {
      const int e = lane + j * kLanes;
      if (e < gates) grad[e] += s.p[j] * (dp[j] - mean + z);
    }
  }
}

// dgate_partial[split, r, e, d] = Σ over the split's tokens of router r of dlogits[t, e] · x[t, d].
// A block owns 256 columns d, kGateTile rows (r, e) and one run of tokens, whose logits' gradients it computes itself;
// the first blocks of a run keep them for gate_dgrad.
template <class T, int kLanes, int kPerLane>
__global__ __launch_bounds__(kRouteThreads) void gate_wgrad(const SmopRouteBwd p, int run) {
  extern __shared__ float all_grads[];  // (kTokens, E)
  __shared__ float grad[kTokens][kGateTile];
  begin_kernel();
  const int d = blockIdx.y * kRouteThreads + threadIdx.x;
  const int cells = p.routers * p.gates, first_cell = blockIdx.z * kGateTile;
  const int begin = blockIdx.x * run, end = min(begin + run, p.tokens);
  const bool keeps = blockIdx.y == 0 && blockIdx.z == 0 && p.dx;
  const T* x = static_cast<const T*>(p.x);
  float sum[kGateTile] = {};
  for (int t0 = begin; t0 < end; t0 += kTokens) {
    __syncthreads();
    for (int i = threadIdx.x / kLanes; i < kTokens; i += kRouteThreads / kLanes) {
      const int t = t0 + i;
      const bool live = t < end && (!p.mask || p.mask[t]);
      logits_bwd<kLanes, kPerLane>(p, t, live, all_grads + i * p.gates);
    }
    __syncthreads();
    const int n = min(kTokens, end - t0);
    {
      const int i = threadIdx.x / kGateTile, cell = first_cell + threadIdx.x % kGateTile;
      const bool mine = i < n && cell < cells && cell / p.gates == router_of(p.modality, p.routers, t0 + i);
      grad[i][threadIdx.x % kGateTile] = mine ? all_grads[i * p.gates + cell % p.gates] : 0.f;
    }
    if (keeps)
      for (int i = threadIdx.x; i < n * p.gates; i += kRouteThreads)
        p.dlogits_total[static_cast<int64_t>(t0) * p.gates + i] = all_grads[i];
    __syncthreads();
    if (d >= p.dim) continue;
#pragma unroll 8
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
static_assert(kRouteThreads == kTokens * kGateTile, "one thread a (token, gate row) when the gradients are staged");

template <class T>
__global__ __launch_bounds__(kSumThreads) void gate_sums(const float* partial, T* out, int64_t n, int splits) {
  begin_kernel();
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kWarp + threadIdx.x % kWarp;
  float sum[1];
  sum_partials(sum, partial + i, n, splits, i < n);
  if (threadIdx.x < kWarp && i < n) out[i] = from_float<T>(sum[0]);
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
  const auto token_blocks = static_cast<unsigned>(ceil_div(p->tokens, kRouteWarps));
  const int64_t gate_size = static_cast<int64_t>(cells) * p->dim;
  return by_dtype(p->dtype, [&](auto t) {
    using T = decltype(t);
    const dim3 grid(splits, static_cast<unsigned>(ceil_div(p->dim, kRouteThreads)),
                    static_cast<unsigned>(ceil_div(cells, kGateTile)));
    const size_t grads = sizeof(float) * kTokens * p->gates;
    const auto wgrad = by_gates(p->gates, [&](auto lanes, auto per_lane) {
      return launch({grid, kRouteThreads, grads, stream, false}, gate_wgrad<T, lanes(), per_lane()>, *p,
                    tokens_per_split(p->tokens));
    });
    if (wgrad) return wgrad;
    const auto sum_blocks = static_cast<unsigned>(ceil_div(gate_size, kWarp));
    if (auto e = launch({sum_blocks, kSumThreads, 0, stream, true}, gate_sums<T>, p->dgate_partial,
                        static_cast<T*>(p->dgate), gate_size, splits))
      return e;
    if (!p->dx || !token_blocks) return cudaSuccess;
    return launch({token_blocks, kRouteThreads, 0, stream, true}, gate_dgrad<T>, *p);
  });
}
