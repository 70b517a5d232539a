// rANS lanes, 32 to a warp and a stream of words (docs/format.md): the words of a step are written side by side.
//
// ITEM, SHIFT, BINS as in scan.cu. Grid (P, slices of groups), a warp a group. meta [P, META] and entries [P, 64 * 256],
// code maps [P, BINS], tables of channels [P, C] are tables.cu's. scratch has room
// for a word a symbol, a group's words end where its channels' do; lengths [P, groups_most] and states [P, C] are written.
#include "meta.cuh"
#if ITEM == 2
typedef u16 Item;
#else
typedef u8 Item;
#endif
#define AHEAD 8

struct Lane {
    u32 state;
    u16 *end;  // of the group, the words written so far lie behind it
};

// Division by a frequency f: q = umulhi(2 x, reciprocal) >> shift, exact for x < 2^31 (Alverson 1991).
__device__ __forceinline__ void put(Lane &lane, u64 entry, bool live, u32 below) {
    u32 reciprocal = (u32)entry, packed = (u32)(entry >> 32);
    u32 rest = packed & 0xFFF, start = packed >> 12 & 0xFFF, shift = packed >> 24;  // rest: 4096 - frequency
    u32 x = lane.state;
    bool full = live && x >> 19 >= 4096 - rest;
    u32 mask = __ballot_sync(ALL, full);
    if (full) {
        lane.end[(int)__popc(mask & below) - (int)__popc(mask)] = (u16)x;
        x >>= 16;
    }
    lane.end -= __popc(mask);
    u32 quotient = __umulhi(2 * x, reciprocal) >> shift;
    if (live) lane.state = x + start + quotient * rest;
}

extern "C" __global__ void __launch_bounds__(256) encode(
    const u64 *sources, i64 head_stride, i64 heads_, i64 tokens_, i64 dims_, const int *meta, const u64 *entries,
    const u8 *maps, const u8 *tables, u16 *scratch, i64 groups_most, int *lengths, u32 *states, i64 budget) {
    extern __shared__ u64 shared[];
    __shared__ u8 map[BINS];
    const int *own = meta + blockIdx.x * META;
    int tokens = (int)tokens_, dims = (int)dims_, channels = (int)heads_ * dims;
    int alphabet = own[ALPHABET], per_lane = own[PER_LANE], size = own[TABLES] * alphabet;
    const u64 *table = entries + (i64)blockIdx.x * MOST_ENTRIES;
    if (own[MODE] != CODED) return;
    bool fits = size * 8 <= budget;
    for (int i = threadIdx.x; i < BINS; i += blockDim.x) map[i] = maps[(i64)blockIdx.x * BINS + i];
    for (int i = threadIdx.x; fits && i < size; i += blockDim.x) shared[i] = table[i];
    __syncthreads();
    int group = blockIdx.y * (blockDim.x / 32) + threadIdx.x / 32, l = threadIdx.x % 32;
    if (group >= own[GROUPS]) return;
    if (fits) table = shared;
    const Item *source = (const Item *)sources[blockIdx.x];
    u16 *end = scratch + words_end(blockIdx.x, group, per_lane, groups_most) * tokens;
    Lane lane = {LOW, end};
    u32 below = (1u << l) - 1;
    for (int j = per_lane - 1; j >= 0; j--) {
        int channel = (group * per_lane + j) * 32 + l;
        bool live = channel < channels;
        const Item *at = source + (live ? channel_offset(channel, dims, head_stride) : 0);
        const u64 *mine = table + (live ? tables[(i64)blockIdx.x * channels + channel] * alphabet : 0);
        int t = tokens - 1;
        for (; t >= AHEAD - 1; t -= AHEAD) {
            u32 v[AHEAD];
#pragma unroll
            for (int i = 0; i < AHEAD; i++) v[i] = at[(i64)(t - i) * dims];
#pragma unroll
            for (int i = 0; i < AHEAD; i++) put(lane, mine[map[v[i] >> SHIFT]], live, below);
        }
        for (; t >= 0; t--) put(lane, mine[map[at[(i64)t * dims] >> SHIFT]], live, below);
    }
    if (l == 0) lengths[blockIdx.x * groups_most + group] = (int)(end - lane.end);
    int channel = group * per_lane * 32 + l;
    if (channel < channels) states[(i64)blockIdx.x * channels + group * 32 + l] = lane.state;
}
