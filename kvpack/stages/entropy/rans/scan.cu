// One pass over parts: histograms of codes by channel; for bf16 also packed mantissas and the digest of the original.
//
// ITEM bytes an element (1 or 2), SHIFT bits below the code, BINS codes; FLOATS: bf16 with D a multiple of 64.
// sources [P] addresses of parts [H, T, D], rows contiguous, heads head_stride elements apart; D even.
// A block takes 64 channels: rows [P, B, BINS, 32] holds, for the codes that occur in the block, in ascending order,
// the counts of channels 2 i (low 16 bits) and 2 i + 1 (high); present [P, B, BINS / 32] says which codes those are.
// mantissas: part p at p * mantissa_stride, 7 bits a code (bitpack). digests [P], zeroed before.
#if ITEM == 2
typedef u32 Pair;
#else
typedef u16 Pair;
#endif
#define MASK ((1u << (8 * ITEM)) - 1)

#if FLOATS
// Four rows of 64 bf16: two words of the digest a lane, then 56 bits of mantissas, then whole words of the stream.
__device__ __forceinline__ u64 four_rows(const u32 *v, int lane, i64 element, int dims, int rows, u64 *mantissas) {
    bool odd = lane & 1, upper = lane & 2;
    u32 a = __shfl_xor_sync(ALL, odd ? v[0] : v[1], 1), b = __shfl_xor_sync(ALL, odd ? v[2] : v[3], 1);
    u64 first = odd ? ((u64)v[1] << 32 | a) : ((u64)a << 32 | v[0]);
    u64 second = odd ? ((u64)v[3] << 32 | b) : ((u64)b << 32 | v[2]);
    u64 sum = 0;
    i64 word = element / 4 + lane / 2;
    if (odd < rows) sum += mixed(first, word + (i64)odd * (dims / 4));
    if (2 + odd < rows) sum += mixed(second, word + (i64)(2 + odd) * (dims / 4));
    u32 low = first & 127 | first >> 9 & 127 << 7 | first >> 18 & 127 << 14 | first >> 27 & 127 << 21;
    u32 high = second & 127 | second >> 9 & 127 << 7 | second >> 18 & 127 << 14 | second >> 27 & 127 << 21;
    u32 other = __shfl_xor_sync(ALL, upper ? low : high, 2);
    u64 m = upper ? ((u64)high << 28 | other) : ((u64)other << 28 | low);
    u64 next = __shfl_down_sync(ALL, m, 4);
    int octet = lane / 4, row = lane & 3;
    if (octet < 7 && row < rows)
        mantissas[(element + (i64)row * dims) / 64 * 7 + octet] = m >> 8 * octet | next << (56 - 8 * octet);
    return sum;
}
#endif

extern "C" __global__ void __launch_bounds__(256) scan(
    const u64 *sources, i64 head_stride, i64 heads_, i64 tokens_, i64 dims_, u32 *rows, u32 *present,
    u8 *mantissas, i64 mantissa_stride, u64 *digests) {
    extern __shared__ u32 counts[];  // [BINS, 32], then BINS / 32 words of present
    u32 *seen = counts + BINS * 32;
    int tokens = (int)tokens_, dims = (int)dims_, channels = (int)heads_ * dims;
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int channel = blockIdx.y * 64 + 2 * lane;
    bool live = channel < channels;
    const u8 *source = (const u8 *)sources[blockIdx.x];
    if (live) source += channel_offset(channel, dims, head_stride) * ITEM;
    for (int i = threadIdx.x; i < BINS * 32 + (BINS + 31) / 32; i += 256) counts[i] = 0;
    __syncthreads();
    i64 row_bytes = (i64)dims * ITEM;
    u64 sum = 0;
    for (int t = warp * 8; t < tokens; t += 64) {
        u32 v[8];
#pragma unroll
        for (int r = 0; r < 8; r++) v[r] = live && t + r < tokens ? *(const Pair *)(source + (t + r) * row_bytes) : 0;
#pragma unroll
        for (int r = 0; r < 8; r++) {
            if (!live || t + r >= tokens) continue;
            atomicAdd(&counts[((v[r] & MASK) >> SHIFT) * 32 + lane], 1u);
            atomicAdd(&counts[(v[r] >> (8 * ITEM + SHIFT)) * 32 + lane], 65536u);
        }
#if FLOATS
        int first = blockIdx.y * 64;
        i64 element = ((i64)(first / dims) * tokens + t) * dims + first % dims;
        u64 *out = (u64 *)(mantissas + blockIdx.x * mantissa_stride);
        sum += four_rows(v, lane, element, dims, tokens - t, out);
        sum += four_rows(v + 4, lane, element + 4 * (i64)dims, dims, tokens - t - 4, out);
#endif
    }
#if FLOATS
    sum = warp_sum(sum);
    if (lane == 0) atomicAdd(&digests[blockIdx.x], sum);
#endif
    __syncthreads();
    for (int bin = warp; bin < BINS; bin += 8) {
        bool any = __ballot_sync(ALL, counts[bin * 32 + lane] != 0) != 0;
        if (any && lane == 0) atomicOr(&seen[bin / 32], 1u << bin % 32);
    }
    __syncthreads();
    i64 block = (i64)blockIdx.x * gridDim.y + blockIdx.y;
    int before = 0;
    for (int group = 0; group < (BINS + 31) / 32; group++) {
        u32 bits = seen[group];
        if (threadIdx.x == 0) present[block * ((BINS + 31) / 32) + group] = bits;
        for (int bin = warp; bin < 32; bin += 8) {
            int row = before + __popc(bits & ((1u << bin) - 1));
            if (bits >> bin & 1) rows[(block * BINS + row) * 32 + lane] = counts[(group * 32 + bin) * 32 + lane];
        }
        before += __popc(bits);
    }
}
