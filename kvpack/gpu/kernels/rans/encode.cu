// Encodes codes by rANS. A warp encodes one group: 32 lanes that share a stream of words (docs/format.md), into which the
// words of one step are written side by side.
//
// ITEM, SHIFT, BINS and DIMS are those of scan.cu. The grid is (slices of groups, P). meta [P, META], entries
// [P, MAX_ENTRIES], maps [P, BINS] (from codes to symbols) and tables [P, C] (of channels) come from bank.cu. scratch has
// room for a word for each symbol, and a group's words end where those of its last channel would. lengths [P, groups_most],
// words of each group, and states [P, C] are written. Encoding tables are copied to shared memory if they take no more than
// budget bytes.
#include "meta.cuh"
#if ITEM == 2
typedef u16 Item;
#else
typedef u8 Item;
#endif
#define AHEAD 8

struct Lane {
    u32 state;
    int at;  // the next word's place, counted from the end of the group's scratch: zero or negative
};

// Encodes one symbol. The state is divided by the frequency f as umulhi(2 x, reciprocal) >> shift, which is exact for
// x < 2^31 (Alverson 1991).
__device__ __forceinline__ void put(Lane &lane, u64 entry, bool live, u32 below, u16 *end) {
    u32 reciprocal = (u32)entry, packed = (u32)(entry >> 32);
    u32 rest = packed >> 20, start = packed >> 8 & 0xFFF;  // rest is 4096 - frequency; the lowest bits of packed are the shift
    u32 x = lane.state;
    bool full = (x >> 19) + rest >= TOTAL && live;
    u32 mask = __ballot_sync(ALL, full);
    lane.at -= __popc(mask);
    if (full) {
        end[lane.at + (int)__popc(mask & below)] = (u16)x;
        x >>= 16;
    }
    u32 quotient = __funnelshift_r(__umulhi(2 * x, reciprocal), 0, packed);
    if (live) lane.state = x + start + quotient * rest;
}

// Encodes all channels of a group, the last symbol first. Returns the state and the negative number of words written.
template <bool FITS>
__device__ __forceinline__ Lane run(const u64 *table, const u64 *shared, const u8 *map, const u8 *tables,
                                    const Item *source, i64 head_stride, int group, int per_lane, int channels,
                                    int tokens, int alphabet, u16 *end) {
    int l = threadIdx.x % 32;
    u32 below = (1u << l) - 1;
    Lane lane = {LOW, 0};
    for (int j = per_lane - 1; j >= 0; j--) {
        int channel = (group * per_lane + j) * 32 + l;
        bool live = channel < channels;
        int first = live ? tables[channel] * alphabet : 0, t = tokens - 1;
        const Item *at = source + (live ? channel_offset(channel, DIMS, head_stride) : 0) + (i64)t * DIMS;
        for (; t >= AHEAD - 1; t -= AHEAD, at -= AHEAD * DIMS) {
            u32 v[AHEAD];
#pragma unroll
            for (int i = 0; i < AHEAD; i++) v[i] = at[-i * DIMS];
#pragma unroll
            for (int i = 0; i < AHEAD; i++) {
                int symbol = first + map[v[i] >> SHIFT];
                put(lane, FITS ? shared[symbol] : table[symbol], live, below, end);
            }
        }
        for (; t >= 0; t--, at -= DIMS) {
            int symbol = first + map[*at >> SHIFT];
            put(lane, FITS ? shared[symbol] : table[symbol], live, below, end);
        }
    }
    return lane;
}

extern "C" __global__ void __launch_bounds__(32 * ENCODE_WARPS) encode(
    const u64 *sources, i64 head_stride, i64 heads_, i64 tokens_, const int *meta, const u64 *entries, const u8 *maps,
    const u8 *tables, u16 *scratch, i64 groups_most, int *lengths, u32 *states, i64 budget) {
    extern __shared__ u64 shared[];
    __shared__ u8 map[BINS];
    i64 part = blockIdx.y;
    const int *own = meta + part * META;
    int tokens = (int)tokens_, channels = (int)heads_ * DIMS;
    int alphabet = own[ALPHABET], per_lane = own[PER_LANE], size = own[TABLES] * alphabet;
    const u64 *table = entries + part * MAX_ENTRIES;
    if (own[MODE] != CODED) return;
    bool fits = size * 8 <= budget;
    for (int i = threadIdx.x; i < BINS; i += blockDim.x) map[i] = maps[part * BINS + i];
    for (int i = threadIdx.x; fits && i < size; i += blockDim.x) shared[i] = table[i];
    __syncthreads();
    int group = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32, l = threadIdx.x % 32;
    if (group >= own[GROUPS]) return;
    const Item *source = (const Item *)sources[part];
    u16 *end = pin_register(scratch + words_end(part, group, per_lane, groups_most) * tokens);
    tables += part * channels;
    Lane lane = fits ? run<true>(table, shared, map, tables, source, head_stride, group, per_lane, channels, tokens, alphabet, end)
                     : run<false>(table, shared, map, tables, source, head_stride, group, per_lane, channels, tokens, alphabet, end);
    if (l == 0) lengths[part * groups_most + group] = -lane.at;
    if (group * per_lane * 32 + l < channels) states[part * channels + group * 32 + l] = lane.state;
}
