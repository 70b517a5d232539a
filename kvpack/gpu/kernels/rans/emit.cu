// Makes the streams of docs/format.md from lanes and tables: first their sizes and places (layout), then their bytes (emit).
#include "meta.cuh"

__device__ __forceinline__ i64 packed_bytes(i64 count, int width) { return (count * width + 7) / 8; }

// Returns the bytes of one part's stream, and writes what its head says to `own`. codes_bytes is what all codes would take
// packed, without the mode byte.
__device__ i64 stream_bytes(int *own, const int *lengths, int channels, int width, i64 codes_bytes) {
    if (own[MODE] != CODED) return 1 + codes_bytes;
    int shortest = lengths[0], longest = shortest;
    i64 words = 0;
    for (int g = 0; g < own[GROUPS]; g++) {
        words += lengths[g];
        shortest = lengths[g] < shortest ? lengths[g] : shortest;
        longest = lengths[g] > longest ? lengths[g] : longest;
    }
    own[WORDS] = (int)words, own[SHORTEST] = shortest, own[SPREAD] = bits_for(longest - shortest);
    i64 size = HEAD + 4ll * own[LANES] + 2 * words + packed_bytes(own[ALPHABET], width)
        + packed_bytes((i64)own[TABLES] * own[ALPHABET], 6) + packed_bytes(channels, bits_for(own[TABLES] - 1))
        + packed_bytes(own[GROUPS], own[SPREAD]);
    if (size <= codes_bytes) return size;
    own[MODE] = PACKED;
    return 1 + codes_bytes;
}

// Writes places [P + 1], where each stream begins in the arena, divisible by 16, and where the last one ends, and sizes [P].
// The grid is one block.
extern "C" __global__ void __launch_bounds__(1024) layout(
    int *meta, const int *lengths, i64 parts, i64 groups_most, i64 channels, i64 width, i64 codes, i64 *places,
    i64 *sizes) {
    __shared__ i64 sums[1024];
    __shared__ i64 carry;
    if (threadIdx.x == 0) carry = 0;
    for (i64 first = 0; first < parts; first += 1024) {
        i64 part = first + threadIdx.x, size = 0;
        if (part < parts) {
            size = stream_bytes(meta + part * META, lengths + part * groups_most, (int)channels, (int)width,
                                packed_bytes(codes, (int)width));
            sizes[part] = size;
        }
        sums[threadIdx.x] = (size + 15) / 16 * 16;
        __syncthreads();
        for (int step = 1; step < 1024; step *= 2) {
            i64 other = threadIdx.x >= step ? sums[threadIdx.x - step] : 0;
            __syncthreads();
            sums[threadIdx.x] += other;
            __syncthreads();
        }
        if (part < parts) places[part + 1] = carry + sums[threadIdx.x];
        __syncthreads();
        if (threadIdx.x == 1023) carry += sums[1023];
        __syncthreads();
    }
    if (threadIdx.x == 0) places[0] = 0;
}

// The side information that docs/format.md packs, as a function of the position. kind is 0 for symbols, 1 for levels, 2 for
// tables of channels, 3 for lengths of groups.
struct Fields {
    const u16 *symbols;
    const u8 *levels, *tables;
    const int *lengths;
    int kind, shortest;
    __device__ __forceinline__ u32 at(i64 i) const {
        return kind == 0 ? symbols[i] : kind == 1 ? levels[i] : kind == 2 ? tables[i] : lengths[i] - shortest;
    }
};

__device__ void pack_field(u8 *out, const Fields &fields, u32 count, u32 width) {
    u32 bytes = (u32)packed_bytes(count, width);  // no field has 2^27 entries
    for (u32 byte = threadIdx.x; byte < bytes; byte += blockDim.x) {
        u64 value = 0;
        for (u32 i = byte * 8 / width; i < count && i * width < byte * 8 + 8; i++) {
            int shift = (int)(i * width - byte * 8);
            value |= shift < 0 ? (u64)fields.at(i) >> -shift : (u64)fields.at(i) << shift;
        }
        out[byte] = (u8)value;
    }
}

// Copies words from where encode.cu has left them; eight loads are under way before the first word is stored.
__device__ __forceinline__ void copy_words(u16 *__restrict__ to, const u16 *__restrict__ from, int count) {
    for (int i = threadIdx.x; i < count; i += 8 * 256) {
        u16 v[8];
#pragma unroll
        for (int j = 0; j < 8; j++) v[j] = i + 256 * j < count ? from[i + 256 * j] : 0;
#pragma unroll
        for (int j = 0; j < 8; j++)
            if (i + 256 * j < count) to[i + 256 * j] = v[j];
    }
}

// The grid is (1 + groups, P). Block 0 of a part writes the head and the side information; each other block copies the words
// of one group.
extern "C" __global__ void __launch_bounds__(256) emit(
    const int *meta, const int *lengths, i64 groups_most, i64 channels, i64 width, const u16 *symbols, const u8 *levels,
    const u8 *tables, const u32 *states, const u16 *scratch, i64 tokens, const i64 *places, u8 *arena) {
    i64 part = blockIdx.y;
    const int *own = meta + part * META;
    u8 *out = arena + places[part];
    int groups = own[GROUPS], lanes = own[LANES], K = own[TABLES], A = own[ALPHABET];
    lengths += part * groups_most;
    if (own[MODE] != CODED) return;
    u8 *words = out + HEAD + 4ll * lanes;
    if (blockIdx.x == 0) {
        if (threadIdx.x == 0) {
            out[0] = CODED, out[1] = K - 1, out[2] = A - 1, out[3] = own[SPREAD];
            u32 *head = (u32 *)out;
            head[1] = own[PER_LANE], head[2] = own[SHORTEST], head[3] = own[WORDS];
        }
        for (int i = threadIdx.x; i < lanes; i += blockDim.x) ((u32 *)(out + HEAD))[i] = states[part * channels + i];
        Fields fields = {symbols + part * MAX_SYMBOLS, levels + part * MAX_ENTRIES, tables + part * channels, lengths,
                         0, own[SHORTEST]};
        i64 counts[4] = {A, (i64)K * A, channels, groups};
        int widths[4] = {(int)width, 6, bits_for(K - 1), own[SPREAD]};
        u8 *at = words + 2ll * own[WORDS];
        for (fields.kind = 0; fields.kind < 4; fields.kind++) {
            pack_field(at, fields, (u32)counts[fields.kind], widths[fields.kind]);
            at += packed_bytes(counts[fields.kind], widths[fields.kind]);
        }
        return;
    }
    int lane = threadIdx.x % 32, g = blockIdx.x - 1;
    if (g >= groups) return;
    int before = 0, length = lengths[g];
    for (int i = lane; i < g; i += 32) before += lengths[i];
    before = (int)__reduce_add_sync(ALL, before);
    const u16 *source = scratch + words_end(part, g, own[PER_LANE], groups_most) * tokens - length;
    copy_words((u16 *)words + before, source, length);
}
