// One pass over parts: histograms of codes by channel; for bf16 also packed mantissas and the digest of the original.
//
// ITEM bytes an element (1 or 2), SHIFT bits below the code, BINS codes; FLOATS: bf16 with DIMS a multiple of 64.
// sources [P] addresses of parts [H, T, DIMS], rows contiguous, heads head_stride elements apart; DIMS even. Grid (B, P).
// A block takes 64 channels: rows [P, B, BINS, 32] holds, for the codes that occur in the block, in ascending order,
// the counts of channels 2 i (low 16 bits) and 2 i + 1 (high); present [P, B, BINS / 32] says which codes those are.
// mantissas: part p at p * mantissa_stride, 7 bits a code (bitpack); sums [P, 2] gets the digest of the original and the
// checksum of the mantissas' stream (mode byte 0 before them), but for the lengths.
#if ITEM == 2
typedef u32 Pair;
#else
typedef u16 Pair;
#endif
#define MASK ((1u << (8 * ITEM)) - 1)
#define THREADS 512

struct Sums {
    u64 original, mantissas;
};

#if FLOATS
// Four rows of 64 bf16: two words of the digest a lane, then 56 bits of mantissas, then whole words of the stream.
// before: the two elements before this lane's row, for lanes 0 to 3.
__device__ __forceinline__ void four_rows(
    const u32 *v, u32 before, int lane, i64 element, int rows, u64 last, u64 *mantissas, Sums &sums) {
    bool odd = lane & 1, upper = lane & 2;
    u32 a = __shfl_xor_sync(ALL, odd ? v[0] : v[1], 1), b = __shfl_xor_sync(ALL, odd ? v[2] : v[3], 1);
    u64 first = odd ? ((u64)v[1] << 32 | a) : ((u64)a << 32 | v[0]);
    u64 second = odd ? ((u64)v[3] << 32 | b) : ((u64)b << 32 | v[2]);
    u64 word = element / 4 + lane / 2 + odd * (DIMS / 4);
    if (odd < rows) sums.original += mixed(first, word);
    if (2 + odd < rows) sums.original += mixed(second, word + 2 * (DIMS / 4));
    u32 low = first & 127 | first >> 9 & 127 << 7 | first >> 18 & 127 << 14 | first >> 27 & 127 << 21;
    u32 high = second & 127 | second >> 9 & 127 << 7 | second >> 18 & 127 << 14 | second >> 27 & 127 << 21;
    u32 other = __shfl_xor_sync(ALL, upper ? low : high, 2);
    u64 m = upper ? ((u64)high << 28 | other) : ((u64)other << 28 | low);
    u64 next = __shfl_down_sync(ALL, m, 4);
    int octet = lane / 4, row = lane & 3;
    u64 out = m >> 8 * octet | next << (56 - 8 * octet);
    u32 top = __shfl_up_sync(ALL, (u32)(out >> 56), 4);
    if (octet == 0) top = before >> 6 & 1 | (before >> 16 & 127) << 1;
    if (octet == 7 || row >= rows) return;
    u64 at = (u64)(element / 64 + row * (DIMS / 64)) * 7 + octet;
    mantissas[at] = out;
    sums.mantissas += mixed(out << 8 | top, at);
    if (at == last) sums.mantissas += mixed(out >> 56, at + 1);
}
#endif

// Counts of 64 channels' codes over all tokens; with FLOATS also the sums and the packed mantissas.
__device__ __forceinline__ Sums count(
    const u8 *source, bool live, i64 head_stride, int heads, int tokens, u32 *counts, u64 *mantissas) {
    int lane = threadIdx.x % 32;
    Sums sums = {0, 0};
    for (int t = threadIdx.x / 32 * 8; t < tokens; t += THREADS / 32 * 8) {
        u32 v[8];
        const u8 *rows = source + (i64)t * (DIMS * ITEM);
#pragma unroll
        for (int r = 0; r < 8; r++) v[r] = live && t + r < tokens ? *(const Pair *)(rows + r * (DIMS * ITEM)) : 0;
#if FLOATS
        u32 before[2] = {0, 0};
#pragma unroll
        for (int q = 0; q < 2; q++) {  // the elements before a row of 64: in the row, in the row above, or in the head above
            int row = t + 4 * q + lane, head = blockIdx.x * 64 / DIMS;
            bool inside = blockIdx.x * 64 % DIMS || row;
            i64 back = inside ? 2 : head_stride - (i64)(tokens - 1) * DIMS - DIMS + 2;
            if (lane < 4 && row < tokens && (inside || head))
                before[q] = *(const u32 *)(source + ((i64)row * DIMS - back - 2 * lane) * 2);
        }
#endif
#pragma unroll
        for (int r = 0; r < 8; r++) {
            if (!live || t + r >= tokens) continue;
            atomicAdd(&counts[((v[r] & MASK) >> SHIFT) * 32 + lane], 1u);
            atomicAdd(&counts[(v[r] >> (8 * ITEM + SHIFT)) * 32 + lane], 65536u);
        }
#if FLOATS
        int first = blockIdx.x * 64;
        i64 element = ((i64)(first / DIMS) * tokens + t) * DIMS + first % DIMS;
        u64 last = (u64)heads * tokens * (DIMS / 64) * 7 - 1;
        four_rows(v, before[0], lane, element, tokens - t, last, mantissas, sums);
        four_rows(v + 4, before[1], lane, element + 4 * DIMS, tokens - t - 4, last, mantissas, sums);
#endif
    }
    return sums;
}

// The codes that occur, and their counts, from shared memory.
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

extern "C" __global__ void __launch_bounds__(THREADS) scan(
    const u64 *sources, i64 head_stride, i64 heads, i64 tokens, u32 *rows, u32 *present, u8 *mantissas,
    i64 mantissa_stride, u64 *sums) {
    extern __shared__ u32 counts[];  // [BINS, 32], then BINS / 32 words of present
    u32 *seen = counts + BINS * 32;
    int lane = threadIdx.x % 32, channel = blockIdx.x * 64 + 2 * lane;
    bool live = channel < (int)heads * DIMS;
    const u8 *source = (const u8 *)sources[blockIdx.y];
    if (live) source += channel_offset(channel, DIMS, head_stride) * ITEM;
    for (int i = threadIdx.x; i < BINS * 32 + (BINS + 31) / 32; i += THREADS) counts[i] = 0;
    __syncthreads();
    u64 *packed = (u64 *)(mantissas + blockIdx.y * mantissa_stride);
    Sums mine = count(source, live, head_stride, (int)heads, (int)tokens, counts, packed);
#if FLOATS
    mine.original = warp_sum(mine.original), mine.mantissas = warp_sum(mine.mantissas);
    if (lane == 0) atomicAdd(&sums[2 * blockIdx.y], mine.original), atomicAdd(&sums[2 * blockIdx.y + 1], mine.mantissas);
#endif
    __syncthreads();
    i64 block = (i64)blockIdx.y * gridDim.x + blockIdx.x;
    write_rows(counts, seen, rows + block * BINS * 32, present + block * ((BINS + 31) / 32));
}
