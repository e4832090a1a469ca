// The pipeline of the Hopper GEMMs: a ring of shared-memory stages between one producer and two consumer warpgroups.
//
// A block is three warpgroups on one SM. The first, the producer, fills a ring of shared-memory stages 64 deep in k;
// the other two each multiply 64 of the tile's 128 rows by its kBlockN columns and store them. A stage has two
// mbarriers: `full` (the producer's copies have landed) and `empty` (the consumers have read it). The ring runs on
// across tiles, so the next tile's loads overlap an epilogue.
//
// The copy engine's writes are seen by wgmma as they are; cp.async's go through the generic proxy, so the producer
// waits for them, fences and only then arrives, kLag stages behind what it issues.
//
// Two blocks in a cluster (kBlocks) run in step, stage by stage, on tiles that have an operand in common: each loads
// half of it into the stages of both. A stage is then empty when the consumers of both blocks have read theirs, so they
// arrive at both blocks' `empty`; `full` stays a block's own, for whoever loads, the bytes count where they land.
#pragma once
#include "gemm.cuh"
#include "ptx.cuh"
#include "wgmma.cuh"

namespace smop::sm90 {

constexpr int kBlockM = kTileRows, kBlockK = 64, kThreads = 384, kGroup = 128;  // threads of a warpgroup
constexpr int kConsumerWarps = 8, kProducerWarps = 4;
constexpr int kBlockBytes = 64 * ptx::kSwizzleRow;  // a 64-row block of a tile
constexpr int kABytes = kBlockM / 64 * kBlockBytes;
constexpr int kRingBytes = 192 * 1024, kMaxStages = 8;
constexpr int kConsumersBarrier = 1, kGroupBarrier = 2;  // named barriers; each consumer group has one of its own
constexpr int kLag = 2;  // stages of cp.async in flight behind the newest
constexpr int kProducerRegisters = 72, kConsumerRegisters = 216;
static_assert((kProducerRegisters + 2 * kConsumerRegisters) * kGroup <= 65536, "the register file");

template <int kBlockN>
constexpr int kBBytes = kBlockN * ptx::kSwizzleRow;
// Columns of the blocks that B is a sequence of where it is MN-major.
template <int kBlockN>
constexpr int kBCols = kBlockN % 64 == 0 ? 64 : 32;
template <int kBlockN>
constexpr int kStages = kRingBytes / (kABytes + kBBytes<kBlockN>);
// Saved activations come through the ring too, behind a tile's last k: boxes of 64 columns, as A's, some a stage.
template <int kBlockN>
constexpr int kAuxBoxes = (kBlockN + 63) / 64;
template <int kBlockN>
constexpr int kAuxBoxesAStage = (kABytes + kBBytes<kBlockN>) / kABytes;

constexpr int kMaxBlockN = 256;
constexpr int kStagesBytes = kConsumerWarps * kStageBytes;   // the epilogue's
constexpr int kBiasBytes = 2 * 2 * kMaxBlockN * 4;           // of either group's tile and its next, in float32
constexpr int kSumsBytes = kConsumerWarps * kMaxBlockN * 4;  // of each warp's columns
constexpr int kAlignment = 1024;                             // of the ring
constexpr int kSharedBytes = kRingBytes + kStagesBytes + kBiasBytes + kSumsBytes + 2 * kMaxStages * 8 + kAlignment;
static_assert(kSharedBytes <= 227 * 1024, "shared memory of a block on sm_90");

struct Shared {
  uint32_t ring, stages, full, empty;  // shared addresses
  float *biases, *sums;

  __device__ explicit Shared(unsigned char* base) {
    unsigned char* aligned = base + (-ptx::shared_address(base) & 1023);
    ring = ptx::shared_address(aligned);
    stages = ring + kRingBytes;
    biases = reinterpret_cast<float*>(aligned + kRingBytes + kStagesBytes);
    sums = biases + kBiasBytes / 4;
    full = stages + kStagesBytes + kBiasBytes + kSumsBytes;
    empty = full + kMaxStages * 8;
  }
};

// This block's rank in its cluster.
template <int kBlocks>
__device__ __forceinline__ int cluster_rank() {
  return kBlocks == 1 ? 0 : blockIdx.x % kBlocks;
}

template <int kBlockN, int kBlocks>
struct Ring {
  const Shared& shared;
  int stage = 0;
  uint32_t phase = 0;

  __device__ uint32_t a() const { return shared.ring + stage * (kABytes + kBBytes<kBlockN>); }
  __device__ uint32_t b() const { return a() + kABytes; }
  __device__ uint32_t full() const { return shared.full + stage * 8; }
  __device__ uint32_t empty() const { return shared.empty + stage * 8; }
  __device__ void advance() {
    if (++stage == kStages<kBlockN>) stage = 0, phase ^= 1;
  }
  // A consumer warp has read the stage with this `empty` barrier.
  __device__ static void release(uint32_t barrier) {
    const int lane = threadIdx.x % kWarp;
    if constexpr (kBlocks == 1) {
      if (lane == 0) ptx::mbarrier_arrive(barrier);
    } else {
      if (lane < kBlocks) ptx::mbarrier_arrive_at(barrier, lane);
    }
  }
  // The producer's last act in a cluster: until the consumers of the other block have arrived for the last time, these
  // barriers, and so this block, must be there.
  __device__ void outlast_cluster() {
    if constexpr (kBlocks > 1) {
#pragma unroll 1
      for (int s = 0; s < kStages<kBlockN>; ++s) {
        ptx::mbarrier_wait(empty(), phase ^ 1);
        advance();
      }
    }
  }
};

// By all threads of a block; when it returns the barriers of the cluster's other block are ready too.
template <int kBlockN, int kBlocks>
__device__ __forceinline__ void init_barriers(const Shared& shared, int full_arrivals) {
  if (threadIdx.x == 0) {
    for (int s = 0; s < kStages<kBlockN>; ++s) {
      ptx::mbarrier_init(shared.full + s * 8, full_arrivals);
      ptx::mbarrier_init(shared.empty + s * 8, kBlocks * kConsumerWarps);
    }
    ptx::mbarrier_init_fence();
  }
  __syncthreads();
  if constexpr (kBlocks > 1) ptx::cluster_barrier();
}

// Announces the stages a producer warp has filled by cp.async, kLag behind.
template <int kBlockN, int kBlocks>
struct Announcer {
  Ring<kBlockN, kBlocks> ring;
  int pending = 0;

  __device__ void issued() {
    ptx::cp_async_commit();
    if (++pending > kLag) {
      ptx::cp_async_wait<kLag>();
      announce();
    }
  }
  __device__ void drain() {
    ptx::cp_async_wait<0>();
    while (pending) announce();
  }

 private:
  __device__ void announce() {
    ptx::fence_async_proxy();
    __syncwarp();
    if (threadIdx.x % kWarp == 0) ptx::mbarrier_arrive(ring.full());
    ring.advance();
    --pending;
  }
};

// Before a consumer group's first product: the second group waits until `lead` stages more than its first are full, by
// which time the first group has multiplied about as many, and from then on it stays behind. So while one stores its part
// of a tile, the other has the tensor cores to itself. How far it can lag: what the ring holds, less what gathered stages
// are announced late.
template <int kBlockN, int kBlocks>
__device__ __forceinline__ void fall_behind(const Ring<kBlockN, kBlocks>& ring, int k_tiles, bool gathered) {
  const int lead = min(kStages<kBlockN> / 2, kStages<kBlockN> - 1 - (gathered ? kLag : 0));
  if (threadIdx.x >= 2 * kGroup && k_tiles > lead) ptx::mbarrier_wait(ring.shared.full + lead * 8, 0);
}

// Clears the rows of a stage from `rows` on: in a weight gradient's last stage they are another expert's, and a product
// with zero is no help where they hold an infinity. All consumers, together.
template <int kBlockN, int kBlocks>
__device__ __forceinline__ void clear_rows(const Ring<kBlockN, kBlocks>& ring, int rows) {
  const int first = rows * ptx::kSwizzleRow + (threadIdx.x - kGroup) * 16;
#pragma unroll 1
  for (uint32_t block = ring.a(); block < ring.a() + kABytes + kBBytes<kBlockN>; block += kBlockBytes)
    for (int at = first; at < kBlockBytes; at += kConsumerWarps * kWarp * 16) ptx::store_shared16(block + at, uint4{});
  ptx::fence_async_proxy();
  ptx::named_barrier(kConsumersBarrier, kConsumerWarps * kWarp);
}

// acc += A · B over a tile's k. One batch of wgmma stays in flight; a stage is handed back when the batch that read it
// has finished. `last_rows`: how much of the last stage's k belongs to the sum, where k is rows (kTransA).
template <class T, bool kTransA, bool kTransB, int kBlockN, int kBlocks>
__device__ __forceinline__ void consume(float (&acc)[kBlockN / 2], Ring<kBlockN, kBlocks>& ring, int k_tiles,
                                        int last_rows = kBlockK) {
  constexpr int kBRow = kTransB ? kBCols<kBlockN> * 2 : ptx::kSwizzleRow;  // bytes
  const int group = threadIdx.x / kGroup - 1;
  uint32_t previous = 0;
  for (int k_tile = 0; k_tile < k_tiles; ++k_tile) {
    ptx::mbarrier_wait(ring.full(), ring.phase);
    if constexpr (kTransA)
      if (k_tile == k_tiles - 1 && last_rows < kBlockK) clear_rows(ring, last_rows);
    const uint32_t a = ring.a() + group * kBlockBytes, b = ring.b();
    ptx::wgmma_fence();
#pragma unroll
    for (int k = 0; k < kBlockK / 16; ++k) {
      const uint64_t a_tile = ptx::descriptor(a + k * ptx::kStepBytes<kTransA>, kBlockBytes);
      const uint64_t b_tile = ptx::descriptor<kBRow>(b + k * ptx::kStepBytes<kTransB, kBRow>, kBlockK * kBRow);
      ptx::wgmma<T, kTransA, kTransB>(acc, a_tile, b_tile);
    }
    ptx::wgmma_commit();
    ptx::wgmma_wait<1>();
    if (k_tile > 0) ring.release(previous);
    previous = ring.empty();
    ring.advance();
  }
  ptx::wgmma_wait<0>();
  if (k_tiles > 0) ring.release(previous);
}

// As consume, for a consumer whose rows of the tile do not exist: it hands the stages back.
template <int kBlockN, int kBlocks>
__device__ __forceinline__ void pass(Ring<kBlockN, kBlocks>& ring, int k_tiles) {
#pragma unroll 1
  for (int k_tile = 0; k_tile < k_tiles; ++k_tile) {
    ptx::mbarrier_wait(ring.full(), ring.phase);
    ring.release(ring.empty());
    ring.advance();
  }
}

}  // namespace smop::sm90
