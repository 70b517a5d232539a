// rANS lanes of planes, 32 to a warp and a stream of words. Grid (slices of groups, U), a warp a group.
//
// entries [K, 64]: of each symbol 2^32 over its frequency, rounded down (32 bits), frequency (14), start (14). scratch [U * T * D]
// has room for a word a symbol, a group's words end where its codes do; lengths [U, groups_most] and states
// [U, groups_most, 32] are written.
#include "planes.cuh"
#define AHEAD 8

struct Lane {
    u32 state;
    int at;  // words from the end of the group's scratch, negative
};

// The quotient by the rounded reciprocal is at most one too small.
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

extern "C" __global__ void __launch_bounds__(32 * WARPS, 4) encode(
    const u16 *codes, const int *columns, const int *rows, i64 tokens, i64 dims, i64 tables, const u64 *entries,
    const int *meta, u16 *scratch, i64 groups_most, int *lengths, u32 *states) {
    extern __shared__ u64 table[];
    const int *own = meta + blockIdx.y * META;
    if (blockIdx.x * WARPS >= own[GROUPS]) return;
#pragma unroll 8
    for (int i = threadIdx.x; i < tables * SYMBOLS; i += 32 * WARPS) table[i] = entries[i];
    __syncthreads();
    int group = blockIdx.x * WARPS + threadIdx.x / 32, l = threadIdx.x % 32, span = own[SPAN];
    if (group >= own[GROUPS]) return;
    Plane plane = {columns, rows + blockIdx.y * tokens, (int)tokens, (int)dims, (int)tables - 1};
    int first = group * span, count = plane.size() - first < span ? plane.size() - first : span;
    codes += (i64)blockIdx.y * plane.size() + first;
    u16 *end = kept(scratch + (i64)blockIdx.y * plane.size() + first + count);
    u32 below = (1u << l) - 1;
    Lane lane = {LOW, 0};
    int at = (count - 1) / 32 * 32 + l;
    Place place = {(first + at) / plane.dims, (first + at) % plane.dims};
    for (; at >= 0; at -= 32 * AHEAD) {
        u32 v[AHEAD];
        int column[AHEAD], row[AHEAD];
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            int mine = at - 32 * i;
            v[i] = codes[mine < 0 ? 0 : mine < count ? mine : count - 1];
            column[i] = plane.columns[place.column];
            row[i] = plane.rows[place.row < 0 ? 0 : place.row < plane.tokens ? place.row : plane.tokens - 1];
            place.back(plane.dims);
        }
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            int mine = at - 32 * i, k = plane.class_of(column[i], row[i]);
            put(lane, table[k * SYMBOLS + symbol_of(v[i])], mine >= 0 && mine < count, below, end);
        }
    }
    if (l == 0) lengths[blockIdx.y * groups_most + group] = -lane.at;
    states[(blockIdx.y * groups_most + group) * 32 + l] = lane.state;
}
