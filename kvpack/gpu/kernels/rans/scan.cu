// Counts the codes of each channel in one pass over parts; for bf16 it also packs the mantissas and sums the digest of the
// original.
//
// An element has ITEM bytes (1 or 2); its code is above SHIFT bits, and there are BINS codes. With FLOATS, elements are bf16
// and DIMS is a multiple of 64. sources [P] are addresses of parts [H, T, DIMS], with contiguous rows, whose heads lie
// head_stride elements apart. The grid is (B, P), and a block handles 64 channels.
//
// rows [P, B, BINS, 32] gets, for the codes that occur in the block, in ascending order, the counts of channels 2 i (lower 16
// bits) and 2 i + 1 (upper 16 bits); present [P, B, BINS / 32] says which codes those are. The packed mantissas of part p go
// to mantissas + p * mantissa_stride, 7 bits for each. To sums [P, 2] are added the digest of the original and the checksum of
// the mantissas' stream, which has the mode byte 0 before them, both without the lengths.
#if ITEM == 2
typedef u32 Pair;
typedef u16 Item;
#else
typedef u16 Pair;
typedef u8 Item;
#endif
#define MASK ((1u << (8 * ITEM)) - 1)
#define THREADS SCAN_THREADS

struct Sums {
    u64 original, mantissas;
};

#if FLOATS
// The checksum's keys for a lane's words, and where its word of packed mantissas goes.
struct Place {
    u64 key, packed_key;
    u64 *packed;
};

// The mantissas of four bf16, side by side.
__device__ __forceinline__ u64 seven_bits(u64 word) {
    return word & 127 | word >> 9 & 127 << 7 | word >> 18 & 127 << 14 | word >> 27 & 127 << 21;
}

// The last eight bits of the packed mantissas that end with these two bf16.
__device__ __forceinline__ u32 last_bits(u32 pair) { return pair >> 6 & 1 | (pair >> 16 & 127) << 1; }

// Handles four rows of 64 bf16, of which `rows` are there: a lane adds two words to the digest, then has 56 bits of mantissas,
// then a whole word of the stream. In lanes 0 to 3, `before` has the two elements before the lane's row.
__device__ __forceinline__ void four_rows(const u32 *v, u32 before, const Place &place, int rows, Sums &sums) {
    int lane = threadIdx.x % 32, octet = lane / 4, row = lane & 3;
    bool odd = lane & 1, upper = lane & 2;
    u32 a = __shfl_xor_sync(ALL, odd ? v[0] : v[1], 1), b = __shfl_xor_sync(ALL, odd ? v[2] : v[3], 1);
    u64 first = (u64)(odd ? v[1] : a) << 32 | (odd ? a : v[0]);
    u64 second = (u64)(odd ? v[3] : b) << 32 | (odd ? b : v[2]);
    if (odd < rows) sums.original += mixed_by(first, place.key);
    if (2 + odd < rows) sums.original += mixed_by(second, place.key + 2 * (DIMS / 4) * GOLDEN);
    u32 low = (u32)seven_bits(first), high = (u32)seven_bits(second);
    u32 other = __shfl_xor_sync(ALL, upper ? low : high, 2);
    u64 m = (u64)(upper ? high : other) << 28 | (upper ? other : low);
    u64 next = __shfl_down_sync(ALL, m, 4);
    u64 out = m >> 8 * octet | next << (56 - 8 * octet);
    u32 top = __shfl_up_sync(ALL, (u32)(out >> 56), 4);
    top = octet == 0 ? last_bits(before) : top;
    if (octet == 7 || row >= rows) return;
    *place.packed = out;
    sums.mantissas += mixed_by(out << 8 | top, place.packed_key);
}
#endif

// One token of two channels. The second lies `apart` bytes behind the first: with odd DIMS it may be in the next head.
__device__ __forceinline__ u32 pair_at(const u8 *at, i64 apart) {
#if DIMS % 2
    return *(const Item *)at | (u32)*(const Item *)(at + apart) << 8 * ITEM;
#else
    return *(const Pair *)at;
#endif
}

// Counts the codes of 64 channels in eight tokens, of which `left` are there; with FLOATS it also sums, and packs mantissas.
template <bool FULL>
__device__ __forceinline__ void eight_rows(
    const u8 *rows, i64 apart, bool live, int left, u32 *counts, u32 before, bool above
#if FLOATS
                                           , Place place, Sums &sums
#endif
) {
    u32 v[8], prior[2] = {before, 0};
    int lane = threadIdx.x % 32;
#pragma unroll
    for (int r = 0; r < 8; r++) v[r] = live && (FULL || r < left) ? pair_at(rows + r * (DIMS * ITEM), apart) : 0;
#if FLOATS
    const u8 *mine = rows + (lane & 3) * (DIMS * ITEM) - 4 * lane - 4;  // the row's first element is 2 * lane elements before this lane's
    if (lane < 4 && above && (FULL || lane < left)) prior[0] = *(const u32 *)mine;
    if (lane < 4 && (FULL || lane + 4 < left)) prior[1] = *(const u32 *)(mine + 4 * DIMS * ITEM);
#endif
#pragma unroll
    for (int r = 0; r < 8; r++) {
        if (!live || !(FULL || r < left)) continue;
        atomicAdd(&counts[((v[r] & MASK) >> SHIFT) * 32 + lane], 1u);
        atomicAdd(&counts[(v[r] >> (8 * ITEM + SHIFT)) * 32 + lane], 65536u);
    }
#if FLOATS
    four_rows(v, prior[0], place, FULL ? 4 : left, sums);
    place.key += 4 * (DIMS / 4) * GOLDEN, place.packed_key += 4 * (DIMS / 64) * 7 * GOLDEN;
    place.packed += 4 * (DIMS / 64) * 7;
    four_rows(v + 4, prior[1], place, FULL ? 4 : left - 4, sums);
#endif
}

// Counts the codes of all tokens of 64 channels; a warp handles eight rows at a time.
__device__ __forceinline__ Sums count(
    const u8 *source, i64 apart, bool live, i64 head_stride, int heads, int tokens, u32 *counts, u64 *mantissas) {
    int lane = threadIdx.x % 32, t = threadIdx.x / 32 * 8;
    const int step = THREADS / 32 * 8;
    const u8 *rows = pin_register(source + (i64)t * (DIMS * ITEM));
    Sums sums = {0, 0};
    u32 before = 0;
    bool above = true;
#if FLOATS
    int first = blockIdx.x * 64;
    i64 element = ((i64)(first / DIMS) * tokens + t) * DIMS + first % DIMS;
    i64 packed = (element / 64 + (lane & 3) * (DIMS / 64)) * 7 + lane / 4;
    Place place = {(u64)(element / 4 + lane / 2 + (lane & 1) * (DIMS / 4) + 1) * GOLDEN, (u64)(packed + 1) * GOLDEN,
                   pin_register(mantissas + packed)};
    above = t + lane || first % DIMS;  // otherwise the row above is in the head above, or there is none
    if (!above && first) before = *(const u32 *)(source + ((i64)tokens * DIMS - head_stride - 2) * ITEM);
#endif
    for (; t < tokens; t += step, rows += step * (DIMS * ITEM)) {
#if FLOATS
        if (t + 8 <= tokens) eight_rows<true>(rows, apart, live, 8, counts, before, above, place, sums);
        else eight_rows<false>(rows, apart, live, tokens - t, counts, before, above, place, sums);
        place.key += step * (DIMS / 4) * GOLDEN, place.packed_key += step * (DIMS / 64) * 7 * GOLDEN;
        place.packed += step * (DIMS / 64) * 7;
        above = true;
#else
        if (t + 8 <= tokens) eight_rows<true>(rows, apart, live, 8, counts, before, above);
        else eight_rows<false>(rows, apart, live, tokens - t, counts, before, above);
#endif
    }
#if FLOATS
    if (blockIdx.x == gridDim.x - 1 && threadIdx.x == 31) {  // the stream's last byte is alone in its word
        u32 pair = *(const u32 *)(source + (i64)(tokens - 1) * (DIMS * ITEM));
        u64 words = (u64)heads * tokens * (DIMS / 64) * 7;
        sums.mantissas += mixed(last_bits(pair), words);
    }
#endif
    return sums;
}

// Writes which codes occur, and their counts, from shared memory.
__device__ void write_rows(const u32 *counts, u32 *seen, u32 *rows, u32 *present) {
    const int groups = (BINS + 31) / 32;
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, before = 0;
    for (int bin = warp; bin < BINS; bin += THREADS / 32) {
        bool any = __ballot_sync(ALL, counts[bin * 32 + lane] != 0) != 0;
        if (any && lane == 0) atomicOr(&seen[bin / 32], 1u << bin % 32);
    }
    __syncthreads();
    for (int group = 0; group < groups; group++) {
        u32 bits = seen[group];
        if (threadIdx.x == 0) present[group] = bits;
        for (int bin = warp; bin < 32; bin += THREADS / 32)
            if (bits >> bin & 1)
                rows[(before + __popc(bits & ((1u << bin) - 1))) * 32 + lane] = counts[(group * 32 + bin) * 32 + lane];
        before += __popc(bits);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 3) scan(
    const u64 *sources, i64 head_stride, i64 heads, i64 tokens, u32 *rows, u32 *present, u8 *mantissas,
    i64 mantissa_stride, u64 *sums) {
    extern __shared__ u32 counts[];  // [BINS, 32], then BINS / 32 words of present
    u32 *seen = counts + BINS * 32;
    int lane = threadIdx.x % 32, channel = blockIdx.x * 64 + 2 * lane;
    bool live = FLOATS || channel < (int)heads * DIMS;
    const u8 *source = (const u8 *)sources[blockIdx.y];
    i64 first = live ? channel_offset(channel, DIMS, head_stride) : 0, apart = ITEM;
    if (DIMS % 2)  // a last channel without a second one is counted twice, once where there is no channel
        apart = (channel_offset(channel + (channel + 1 < (int)heads * DIMS), DIMS, head_stride) - first) * ITEM;
    source += first * ITEM;
    for (int i = threadIdx.x; i < BINS * 32 + (BINS + 31) / 32; i += THREADS) counts[i] = 0;
    __syncthreads();
    u64 *packed = (u64 *)(mantissas + blockIdx.y * mantissa_stride);
    Sums mine = count(source, apart, live, head_stride, (int)heads, (int)tokens, counts, packed);
#if FLOATS
    mine.original = warp_sum(mine.original), mine.mantissas = warp_sum(mine.mantissas);
    if (lane == 0) atomicAdd(&sums[2 * blockIdx.y], mine.original), atomicAdd(&sums[2 * blockIdx.y + 1], mine.mantissas);
#endif
    __syncthreads();
    i64 block = (i64)blockIdx.y * gridDim.x + blockIdx.x;
    write_rows(counts, seen, rows + block * BINS * 32, present + block * ((BINS + 31) / 32));
}
