// What the routing kernels share: how tokens are dealt to blocks, which router a token has, the softmax of its logits.
//
// Tokens go to at most SMOP_MAX_ROUTE_BLOCKS blocks in contiguous runs. Each counts its choices; the scatter kernel
// then finds its place from the counts of all blocks, so no separate scan kernel is needed. Everything is
// deterministic: sums over tokens go block by block, then over the blocks in a fixed order.
#pragma once
#include "common.cuh"

namespace smop {

constexpr int kRouteThreads = 256, kRouteWarps = kRouteThreads / kWarp;
constexpr int kPerLane = SMOP_MAX_EXPERTS / kWarp;  // lane l holds experts l, l + 32, …
constexpr int kGateTile = 8;                        // gate rows multiplied at a time: x is read once for E ≤ 8

inline int tokens_per_block(int tokens) {
  const int even = static_cast<int>(ceil_div(tokens, SMOP_MAX_ROUTE_BLOCKS));
  return static_cast<int>(ceil_div(even > 1 ? even : 1, kRouteWarps)) * kRouteWarps;
}

inline int route_blocks(int tokens) {
  const int64_t blocks = ceil_div(tokens, tokens_per_block(tokens));
  return blocks > 0 ? static_cast<int>(blocks)
                    : 1;  // without tokens one block still writes the counts, the losses and offs
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

// Queues the kernel that turns block counts into order, inverse and offs; with a `route`, into counts and losses too.
// block_counts is (blocks, folds, X): two routers that share their experts count apart.
cudaError_t launch_scatter(const SmopSchedule& schedule, int folds, const SmopRoute& route, uint64_t stream);

}  // namespace smop
