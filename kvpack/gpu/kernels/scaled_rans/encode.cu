// Encodes planes by rANS. A warp encodes one group: 32 lanes that share a stream of words. The grid is (slices of groups, U).
//
// picks [U, T * D] are class * SYMBOLS + symbol of each code. entries [K, SYMBOLS] have, of each symbol, 2^32 over its
// frequency, rounded down (32 bits), the frequency (14 bits) and the start (14 bits). scratch [U, T * D] has room for a word
// for each symbol, and a group's words end where its codes end. lengths [U, groups_most] and states [U, groups_most, 32] are
// written.
#include "planes.cuh"
#define AHEAD 8

struct Lane {
    u32 state;
    int at;  // the next word's place, counted from the end of the group's scratch: zero or negative
};

// Encodes one symbol. The quotient that the rounded reciprocal gives is at most one too small.
__device__ __forceinline__ void put(Lane &lane, u64 entry, bool live, u32 below, u16 *end) {
    u32 reciprocal = (u32)entry, f = (u32)(entry >> 32) & 0x3FFF, start = (u32)(entry >> 46), x = lane.state;
    bool full = live && x >= f << (32 - PRECISION);
    u32 mask = __ballot_sync(ALL, full);
    lane.at -= __popc(mask);
    if (full) {
        end[lane.at + (int)__popc(mask & below)] = (u16)x;
        x >>= 16;
    }
    u32 quotient = __umulhi(x, reciprocal), rest = x - quotient * f;
    if (rest >= f) quotient++, rest -= f;
    if (live) lane.state = (quotient << PRECISION) + start + rest;
}

extern "C" __global__ void __launch_bounds__(32 * WARPS) encode(
    const u16 *picks, i64 size, i64 tables, const u64 *entries, const int *meta, u16 *scratch, i64 groups_most,
    int *lengths, u32 *states) {
    extern __shared__ u64 table[];
    const int *own = meta + blockIdx.y * META;
    if (blockIdx.x * WARPS >= own[GROUPS]) return;
#pragma unroll 8
    for (int i = threadIdx.x; i < tables * SYMBOLS; i += 32 * WARPS) table[i] = entries[i];
    __syncthreads();
    int group = blockIdx.x * WARPS + threadIdx.x / 32, l = threadIdx.x % 32, span = own[SPAN];
    if (group >= own[GROUPS]) return;
    i64 first = (i64)group * span;
    int count = size - first < span ? (int)(size - first) : span, step = count / 32;
    const u16 *mine = pin_register(picks + blockIdx.y * size + first + l + 32 * step);
    u16 *end = pin_register(scratch + blockIdx.y * size + first + count);
    u32 below = (1u << l) - 1;
    Lane lane = {LOW, 0};
    if (count % 32) put(lane, table[l < count % 32 ? *mine : 0], l < count % 32, below, end);
    u32 next[AHEAD];  // loaded early, because device memory is slow and few warps are there to hide it
#pragma unroll
    for (int i = 0; i < AHEAD; i++) next[i] = i < step ? mine[-32 * (i + 1)] : 0;
    for (; step >= AHEAD; step -= AHEAD) {
        u64 entry[AHEAD];
#pragma unroll
        for (int i = 0; i < AHEAD; i++) entry[i] = table[next[i]];
        mine -= 32 * AHEAD;
#pragma unroll
        for (int i = 0; i < AHEAD; i++) next[i] = AHEAD + i < step ? mine[-32 * (i + 1)] : 0;
#pragma unroll
        for (int i = 0; i < AHEAD; i++) put(lane, entry[i], true, below, end);
    }
    for (; step; step--) put(lane, table[*(mine -= 32)], true, below, end);
    if (l == 0) lengths[blockIdx.y * groups_most + group] = -lane.at;
    states[(blockIdx.y * groups_most + group) * 32 + l] = lane.state;
}
