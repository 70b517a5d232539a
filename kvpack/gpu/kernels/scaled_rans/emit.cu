// Makes the streams of docs/format.md from the groups of planes: their sizes and places (layout), their bytes (emit), and the
// raw bits of codes (raw).
#include "planes.cuh"

// Writes places [U + 1], where each stream begins in the arena, divisible by 16, and where the last one ends, and sizes [U].
// The grid is one warp.
extern "C" __global__ void __launch_bounds__(32) layout(
    int *meta, const int *lengths, i64 planes, i64 groups_most, i64 *places, i64 *sizes) {
    i64 place = 0;
    for (int u = 0; u < planes; u++) {
        int *own = meta + u * META, words = 0;
        for (int g = threadIdx.x; g < own[GROUPS]; g += 32) words += lengths[u * groups_most + g];
        words = warp_total(words);
        i64 size = HEAD + (i64)GROUP_OVERHEAD * own[GROUPS] + 2ll * words + own[RAW_BYTES];
        if (threadIdx.x == 0) own[WORDS] = words, sizes[u] = size, places[u] = place;
        place += (size + 15) / 16 * 16;
    }
    if (threadIdx.x == 0) places[planes] = place;
}

// The grid is (1 + groups, U). Block 0 of a plane writes the head and the lengths, and sets the raw bits to 0; each other block
// writes one group.
extern "C" __global__ void __launch_bounds__(256) emit(
    const int *meta, const int *lengths, i64 groups_most, const u32 *states, const u16 *scratch, i64 size,
    const i64 *places, u8 *arena) {
    const int *own = meta + blockIdx.y * META;
    int groups = own[GROUPS], g = (int)blockIdx.x - 1, span = own[SPAN];
    u8 *out = arena + places[blockIdx.y], *words = out + HEAD + (i64)GROUP_OVERHEAD * groups;
    lengths += blockIdx.y * groups_most, states += blockIdx.y * groups_most * 32;
    if (g >= groups) return;
    if (g < 0) {
        if (threadIdx.x == 0) ((u32 *)out)[0] = span, ((u32 *)out)[1] = own[RAW_BYTES];
        for (int i = threadIdx.x; i < groups; i += 256) ((u32 *)(out + HEAD))[i] = lengths[i];
        u8 *raw = words + 2ll * own[WORDS];
        for (int i = threadIdx.x; i < own[RAW_BYTES]; i += 256) raw[i] = 0;
        return;
    }
    int before = 0, length = lengths[g];
    for (int i = threadIdx.x % 32; i < g; i += 32) before += lengths[i];
    before = warp_total(before);
    if (threadIdx.x < 32) ((u32 *)(out + HEAD + 4ll * groups))[g * 32 + threadIdx.x] = states[g * 32 + threadIdx.x];
    i64 end = (g + 1ll) * span < size ? (g + 1ll) * span : size;
    const u16 *from = scratch + blockIdx.y * size + end - length;
    u16 *to = (u16 *)words + before;
#pragma unroll 4
    for (int i = threadIdx.x; i < length; i += 256) to[i] = from[i];
}

// Writes the raw bits of each row's codes, which begin at starts. A warp handles one row.
extern "C" __global__ void __launch_bounds__(32 * ROW_WARPS) raw(
    const u16 *codes, i64 all_rows, i64 tokens, i64 dims, const int *bits, const int *starts, const int *meta,
    const i64 *places, u8 *arena) {
    int row = (int)(blockIdx.x * ROW_WARPS + threadIdx.x / 32), unit = row / (int)tokens, l = threadIdx.x % 32;
    if (row >= all_rows || !bits[row]) return;
    const int *own = meta + unit * META;
    i64 byte = places[unit] + HEAD + (i64)GROUP_OVERHEAD * own[GROUPS] + 2ll * own[WORDS], bit = byte * 8 + starts[row];
    codes += (i64)row * dims;
    for (int first = 0; first < dims; first += 32 * BATCH) {
        u32 held[BATCH];
        if (!any_raw(held, codes + first, (int)dims - first)) continue;
#pragma unroll
        for (int i = 0; i < BATCH; i++) {
            u32 magnitude = magnitude_of(held[i]);
            int width = raw_width(magnitude), sum = warp_scan(width);
            if (width) {
                i64 at = bit + sum - width;
                u64 value = (u64)(magnitude & ((1u << width) - 1)) << (at & 31);
                u32 *word = (u32 *)arena + at / 32;
                atomicOr(word, (u32)value);
                if (value >> 32) atomicOr(word + 1, (u32)(value >> 32));
            }
            bit += __shfl_sync(ALL, sum, 31);
        }
    }
}
