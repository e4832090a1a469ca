// The schedule: a stable counting sort of the slots by expert; a block more finishes the router's losses.
#include "routing.cuh"

namespace smop {
namespace {

// Counts of caller-made routing, for schedule() alone: what router_fwd leaves in block_counts.
__global__ __launch_bounds__(kRouteThreads) void count_choices(const SmopSchedule p, int run) {
  __shared__ int count[SMOP_MAX_EXPERTS];
  begin_kernel();
  for (int e = threadIdx.x; e < p.experts; e += kRouteThreads) count[e] = 0;
  __syncthreads();
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * run * p.top_k;
  const int64_t end = min(begin + static_cast<int64_t>(run) * p.top_k, static_cast<int64_t>(p.tokens) * p.top_k);
  for (int64_t slot = begin + threadIdx.x; slot < end; slot += kRouteThreads) {
    const int e = p.chosen[slot];
    if (e >= 0 && e < p.experts) atomicAdd(&count[e], 1);  // integers: the order does not show
  }
  __syncthreads();
  for (int e = threadIdx.x; e < p.experts; e += kRouteThreads)
    p.block_counts[static_cast<int64_t>(blockIdx.x) * p.experts + e] = count[e];
}

// Both auxiliary losses and the counts by router, from the blocks' partial sums; the last block of the scatter kernel
// does it.
__device__ void finish_losses(const SmopRoute& p, int blocks) {
  __shared__ float term[2 * SMOP_MAX_EXPERTS];
  __shared__ int chosen[2 * SMOP_MAX_EXPERTS];
  __shared__ float z[2];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int cells = p.routers * p.gates;
  for (int i = warp; i < cells; i += kRouteWarps) {
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

// The expert of a slot. With shared experts it is read from, and written to, the arrays of the route.
__device__ __forceinline__ int expert_of(const SmopSchedule& p, const SmopRoute& route, int64_t slot) {
  if (!p.shared) return p.chosen[slot];
  const int routed = p.top_k - p.shared, k = static_cast<int>(slot % p.top_k);
  const int64_t first = slot / p.top_k * routed;
  const bool real = p.chosen[first] < p.experts - p.shared, is_routed = k < routed;
  const int e = !real ? p.experts : is_routed ? p.chosen[first + k] : p.experts - p.shared + k - routed;
  route.all_chosen[slot] = e;
  route.all_weights[slot] = !real ? 0.f : is_routed ? route.weights[first + k] : 1.f;
  return e;
}

// Scatters the slots into expert order. Of `blocks` + 1 blocks the last finishes the losses, if there are any.
__global__ __launch_bounds__(kRouteThreads) void scatter_slots(const SmopSchedule p, int run, int folds, int blocks,
                                                               const SmopRoute route) {
  __shared__ int total[SMOP_MAX_EXPERTS];  // choices of each expert
  __shared__ int next[SMOP_MAX_EXPERTS];   // where this block's next choice of it goes
  __shared__ int warp_count[kRouteWarps][SMOP_MAX_EXPERTS];
  begin_kernel();
  if (static_cast<int>(blockIdx.x) == blocks) {
    finish_losses(route, blocks);
    return;
  }
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int routed = p.experts - p.shared;
  for (int e = warp; e < routed; e += kRouteWarps) {
    int all = 0, before = 0;
    for (int i = lane; i < blocks * folds; i += kWarp) {
      const int n = p.block_counts[static_cast<int64_t>(i) * routed + e];
      all += n;
      before += i / folds < static_cast<int>(blockIdx.x) ? n : 0;
    }
    all = __reduce_add_sync(kFullWarp, all);
    before = __reduce_add_sync(kFullWarp, before);
    if (lane == 0) total[e] = all, next[e] = before;
  }
  __syncthreads();
  if (p.shared) {  // every token that is routed goes through each of them once
    if (threadIdx.x < p.shared) {
      int all = 0, before = 0;
      for (int e = 0; e < routed; ++e) all += total[e], before += next[e];
      total[routed + threadIdx.x] = all / (p.top_k - p.shared);
      next[routed + threadIdx.x] = before / (p.top_k - p.shared);
    }
    __syncthreads();
  }
  if (threadIdx.x < p.experts) {
    int start = 0;
    for (int e = 0; e < static_cast<int>(threadIdx.x); ++e) start += total[e];
    next[threadIdx.x] += start;
    if (blockIdx.x == 0) p.offs[threadIdx.x] = start + total[threadIdx.x];
  }
  for (int i = threadIdx.x; i < kRouteWarps * SMOP_MAX_EXPERTS; i += kRouteThreads) (&warp_count[0][0])[i] = 0;
  __syncthreads();

  const int64_t begin = static_cast<int64_t>(blockIdx.x) * run * p.top_k;
  const int64_t end = min(begin + static_cast<int64_t>(run) * p.top_k, static_cast<int64_t>(p.tokens) * p.top_k);
  for (int64_t first = begin; first < end; first += kRouteThreads) {
    const int64_t slot = first + threadIdx.x;
    int e = slot < end ? expert_of(p, route, slot) : -1;
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
    for (int i = threadIdx.x; i < p.experts; i += kRouteThreads) {
#pragma unroll
      for (int w = 0; w < kRouteWarps; ++w) {
        next[i] += warp_count[w][i];
        warp_count[w][i] = 0;
      }
    }
    __syncthreads();
  }
}

}  // namespace

cudaError_t launch_scatter(const SmopSchedule& schedule, int folds, const SmopRoute& route, uint64_t stream) {
  const int blocks = route_blocks(schedule.tokens);
  const Grid grid{static_cast<unsigned>(blocks + (route.counts != nullptr)), kRouteThreads, 0, stream, true};
  return launch(grid, scatter_slots, schedule, tokens_per_block(schedule.tokens), folds, blocks, route);
}

}  // namespace smop

extern "C" int smop_schedule(const SmopSchedule* p, uint64_t stream) {
  using namespace smop;
  const Grid grid{static_cast<unsigned>(route_blocks(p->tokens)), kRouteThreads, 0, stream, false};
  if (auto e = launch(grid, count_choices, *p, tokens_per_block(p->tokens))) return e;
  return launch_scatter(*p, 1, SmopRoute{}, stream);
}
