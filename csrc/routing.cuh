// What the routing kernels share: how tokens are dealt to blocks, which router a token has, the softmax of its logits.
//
// Tokens go to at most SMOP_MAX_ROUTE_BLOCKS blocks in contiguous runs. Each counts its choices; the scatter kernel
// then finds its place from the counts of all blocks, so no separate scan kernel is needed. Everything is
// deterministic: sums over tokens go block by block, then over the blocks in a fixed order.
#pragma once
#include <type_traits>

#include "common.cuh"

namespace smop {

constexpr int kRouteThreads = 256, kRouteWarps = kRouteThreads / kWarp;
constexpr int kGateTile = 8;  // gate rows multiplied at a time: x is read once for E ≤ 8

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

// A token's gates are held by kLanes consecutive lanes, kPerLane each: lane l of them holds experts l, l + kLanes, ….
template <int kLanes>
__device__ __forceinline__ float lanes_sum(float v) {
#pragma unroll
  for (int d = kLanes / 2; d > 0; d /= 2) v += __shfl_xor_sync(kFullWarp, v, d);
  return v;
}

// Softmax pieces of one token's logits.
template <int kPerLane>
struct Softmax {
  float p[kPerLane];  // 0 beyond E
  float lse;
};

template <int kLanes, int kPerLane>
__device__ __forceinline__ Softmax<kPerLane> softmax(const float (&logit)[kPerLane], int gates) {
  const int lane = threadIdx.x % kLanes;
  float top = -INFINITY;
#pragma unroll
  for (int j = 0; j < kPerLane; ++j)
    if (lane + j * kLanes < gates) top = fmaxf(top, logit[j]);
#pragma unroll
  for (int d = kLanes / 2; d > 0; d /= 2) top = fmaxf(top, __shfl_xor_sync(kFullWarp, top, d));
  Softmax<kPerLane> s;
  float total = 0.f;
#pragma unroll
  for (int j = 0; j < kPerLane; ++j) {
    s.p[j] = lane + j * kLanes < gates ? expf(logit[j] - top) : 0.f;
    total += s.p[j];
  }
  total = lanes_sum<kLanes>(total);
#pragma unroll
  for (int j = 0; j < kPerLane; ++j) s.p[j] /= total;
  s.lse = top + logf(total);
  return s;
}

// Calls f with how a token's gates are laid out in lanes: f(std::integral_constant<kLanes>, …<kPerLane>).
template <class F>
cudaError_t by_gates(int gates, F&& f) {
  constexpr std::integral_constant<int, 1> one;
  if (gates <= 4) return f(std::integral_constant<int, 4>{}, one);
  if (gates <= 32) return f(std::integral_constant<int, 32>{}, one);
  return f(std::integral_constant<int, 32>{}, std::integral_constant<int, SMOP_MAX_EXPERTS / 32>{});
}

// Queues the kernel that turns block counts into order, inverse and offs; with a `route`, into counts and losses too.
// block_counts is (blocks, folds, X): two routers that share their experts count apart.
cudaError_t launch_scatter(const SmopSchedule& schedule, int folds, const SmopRoute& route, uint64_t stream);

}  // namespace smop
