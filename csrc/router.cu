// The router: gate product, float32 softmax, top-K, renormalised weights, and each block's part of the counts and
// losses.
#include "prefetch.cuh"
#include "routing.cuh"

namespace smop {
namespace {

// Larger for the larger probability, then for the lower expert; a NaN is larger than all; 0 is never a key.
__device__ __forceinline__ uint64_t choice_key(float p, int expert) {
  const uint32_t bits = __float_as_uint(p) & 0x7fffffffu;  // p ≥ 0: its bits rise with it
  return static_cast<uint64_t>(bits) << 32 | (0xffffffffu - expert);
}

// kTile gate rows are multiplied at a time; kAligned as in load8.
template <class T, int kPerLane, int kTile, bool kAligned>
__global__ __launch_bounds__(kRouteThreads, 2) void router_fwd(const SmopRoute p, int run) {
  // Per warp: E logits, then R·E choices, R·E probability sums and R squared log-sum-exps over its tokens.
  extern __shared__ float shared[];
  begin_kernel();
  if (only_prefetches(p.ahead, p.experts + p.shared)) return;
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
  for (int t = begin + warp; t < end; t += kRouteWarps) {
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
    for (int e0 = 0; e0 < p.gates; e0 += kTile) {
      float dot[kTile] = {};
#pragma unroll 2
      for (int d = lane * 8; d < p.dim; d += kWarp * 8) {
        float xv[8], gv[8];
        load8<kAligned>(x_row + d, p.dim - d, xv);
#pragma unroll
        for (int i = 0; i < kTile; ++i) {  // beyond E the last row again, so that no load waits for a branch
          load8<kAligned>(g_rows + static_cast<int64_t>(min(e0 + i, p.gates - 1)) * p.dim + d, p.dim - d, gv);
#pragma unroll
          for (int c = 0; c < 8; ++c) dot[i] = fmaf(xv[c], gv[c], dot[i]);
        }
      }
#pragma unroll
      for (int i = 0; i < kTile; ++i) {
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
    const auto s = softmax<kWarp>(logit, p.gates);
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
  for (int i = threadIdx.x; i < cells; i += kRouteThreads) {
    int n = 0;
    float sum = 0.f;
    for (int w = 0; w < kRouteWarps; ++w) {
      n += reinterpret_cast<const int*>(shared)[w * per_warp + p.gates + i];
      sum += shared[w * per_warp + p.gates + cells + i];
    }
    p.block_counts[static_cast<int64_t>(blockIdx.x) * cells + i] = n;
    p.block_probs[static_cast<int64_t>(blockIdx.x) * cells + i] = sum;
  }
  if (threadIdx.x < p.routers) {
    float sum = 0.f;
    for (int w = 0; w < kRouteWarps; ++w) sum += shared[w * per_warp + p.gates + 2 * cells + threadIdx.x];
    p.block_z[blockIdx.x * p.routers + threadIdx.x] = sum;
  }
}

}  // namespace
}  // namespace smop

extern "C" int smop_route_blocks(int tokens) { return smop::route_blocks(tokens); }

extern "C" int smop_route_fwd(const SmopRoute* p, uint64_t stream) {
  using namespace smop;
  SmopRoute args = *p;
  args.ahead = prefetchable(args.ahead);
  const int cells = p->routers * p->gates, blocks = route_blocks(p->tokens) + prefetch_blocks(args.ahead);
  const size_t shared = sizeof(float) * kRouteWarps * (p->gates + 2 * cells + p->routers);
  return by_dtype(p->dtype, [&](auto t) {
    const Grid grid{static_cast<unsigned>(blocks), kRouteThreads, shared, stream, false};
    using T = decltype(t);
    const bool aligned = p->dim % 8 == 0 && all_aligned16({p->x, p->gate_weight});
    const auto routed = by_gates(p->gates, [&](auto lanes, auto per_lane) {
      constexpr int kTile = lanes() < kGateTile ? lanes() : kGateTile;
      return launch(grid, aligned ? router_fwd<T, per_lane(), kTile, true> : router_fwd<T, per_lane(), kTile, false>,
                    args, tokens_per_block(p->tokens));
    });
    if (routed) return routed;
    const SmopSchedule schedule{p->tokens,
                                p->experts + p->shared,
                                p->top_k + p->shared,
                                p->chosen,
                                p->order,
                                p->inverse,
                                p->offs,
                                p->block_counts,
                                p->shared};
    return launch_scatter(schedule, cells / p->experts, *p, stream);
  });
}
