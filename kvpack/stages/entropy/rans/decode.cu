// rANS lanes back to codes, and with FLOATS merged with packed mantissas to bf16, with the digest of what comes out.
//
// ITEM, SHIFT as in scan.cu. Grid (P, slices of groups), a warp a group. streams [P] addresses, and what prepare.cu made
// of them. targets [P] addresses of parts [H, T, D] with heads head_stride elements apart; mantissas [P] addresses of
// packed codes of SHIFT bits, 4 bytes aligned; digests [P], zeroed before, and written with FLOATS alone (D a multiple of 4).
#include "meta.cuh"
#define MOST_SLOTS 4352
#define HEAD 16
#if ITEM == 2
typedef u16 Item;
#else
typedef u8 Item;
#endif

struct Lane {
    u32 state, tail, skip;   // skip: what turns a slot beyond the tail into its place in slots
    const u8 *slots;
    const u64 *entries;
    const u16 *words;        // of the group, at the next word
};

// One code, with its SHIFT lower bits zero.
__device__ __forceinline__ u32 get(Lane &lane, bool live, u32 below) {
    u32 slot = lane.state & 0xFFF;
    u64 entry = lane.entries[lane.slots[slot < lane.tail ? slot >> 4 : slot + lane.skip]];
    u32 range = (u32)entry;
    u32 x = (range & 0xFFFF) * (lane.state >> 12) + slot - (range >> 16);
    bool due = live && x < LOW;
    u32 mask = __ballot_sync(ALL, due);
    if (due) x = x << 16 | lane.words[__popc(mask & below)];
    lane.words += __popc(mask);
    lane.state = x;
    return (u32)(entry >> 32) << SHIFT;
}

__device__ __forceinline__ u32 mantissa(const u32 *packed, u64 bit) {
    const u32 *word = packed + (bit >> 5);
    return __funnelshift_r(word[0], word[1], (u32)bit) & ((1u << SHIFT) - 1);
}

#if FLOATS
// Rows r to r + 3 of four lanes to row lane % 4 of the same four channels, as one word of the part.
__device__ __forceinline__ u64 turn(const u32 *v, int lane) {
    bool upper = lane & 2, odd = lane & 1;
    u32 first = v[0] | v[1] << 16, second = v[2] | v[3] << 16;
    u32 other = __shfl_xor_sync(ALL, upper ? first : second, 2);
    u32 a = upper ? other : first, b = upper ? second : other;  // two rows of the lower and of the upper lane
    u32 even_row = __byte_perm(a, b, 0x5410), odd_row = __byte_perm(a, b, 0x7632);
    u32 got = __shfl_xor_sync(ALL, odd ? even_row : odd_row, 1);
    u32 l = odd ? got : even_row, h = odd ? odd_row : got;
    return (u64)__byte_perm(l, h, 0x7632) << 32 | __byte_perm(l, h, 0x5410);
}
#endif

__device__ u64 channel(Lane &lane, bool live, Item *out, const u32 *packed, u64 element, int tokens, int dims) {
    int l = threadIdx.x % 32, t = 0;
    u32 below = (1u << l) - 1;
    u64 bit = element * SHIFT, sum = 0;
#if FLOATS
    Item *mine = out + (i64)(l & 3) * dims - (l & 3);
    u64 word = element / 4 + (u64)(l & 3) * (dims / 4);
    for (; t + 4 <= tokens; t += 4) {
        u32 v[4];
#pragma unroll
        for (int r = 0; r < 4; r++) v[r] = mantissa(packed, bit + (u64)r * dims * SHIFT);
#pragma unroll
        for (int r = 0; r < 4; r++) v[r] |= get(lane, live, below);
        u64 whole = turn(v, l);
        if (live) {
            *(u64 *)(mine + (i64)t * dims) = whole;
            sum += mixed(whole, word + (u64)t * (dims / 4));
        }
        bit += (u64)dims * SHIFT * 4;
    }
    for (; t < tokens; t++, bit += (u64)dims * SHIFT) {
        u32 v = mantissa(packed, bit) | get(lane, live, below);
        if (live) out[(i64)t * dims] = (Item)v;
        u32 pair = v | __shfl_down_sync(ALL, v, 1) << 16, next = __shfl_down_sync(ALL, pair, 2);
        if (live && l % 4 == 0) sum += mixed((u64)next << 32 | pair, element / 4 + (u64)t * (dims / 4));
    }
#else
#pragma unroll 4
    for (; t < tokens; t++) {
        u32 v = get(lane, live, below);
        if (live) out[(i64)t * dims] = (Item)v;
    }
#endif
    return sum;
}

extern "C" __global__ void __launch_bounds__(512) decode(
    const u64 *streams, int *meta, const int *bases, const u8 *tables, const u64 *entries, const u8 *slots,
    const u32 *tails, i64 groups_most, const u64 *targets, i64 head_stride, i64 heads_, i64 tokens_, i64 dims_,
    const u64 *mantissas, u64 *digests, i64 budget) {
    extern __shared__ u64 shared[];
    i64 part = blockIdx.x;
    int *own = meta + part * META, tokens = (int)tokens_, dims = (int)dims_, channels = (int)heads_ * dims;
    if (own[FAULT] || own[MODE] != CODED) return;
    int A = own[ALPHABET], per_lane = own[PER_LANE], size = own[TABLES] * A, bytes = own[SLOT_BYTES];
    entries += part * MOST_ENTRIES, slots += part * (i64)MOST_TABLES * MOST_SLOTS, tails += part * MOST_TABLES;
    const u32 *firsts = tails + MOST_TABLES * gridDim.x;
    bool fits = size * 8 + bytes <= budget;
    for (int i = threadIdx.x; fits && i < size; i += blockDim.x) shared[i] = entries[i];
    for (int i = threadIdx.x; fits && i < bytes; i += blockDim.x) ((u8 *)(shared + size))[i] = slots[i];
    __syncthreads();
    int group = blockIdx.y * (blockDim.x / 32) + threadIdx.x / 32, l = threadIdx.x % 32;
    if (group >= own[GROUPS]) return;
    if (fits) entries = shared, slots = (const u8 *)(shared + size);
    const u8 *stream = (const u8 *)streams[part];
    const u16 *words = (const u16 *)(stream + HEAD + 4ll * own[LANES]) + bases[part * (groups_most + 1) + group];
    Lane lane;
    lane.words = words;
    bool lives = group * per_lane * 32 + l < channels;
    lane.state = lives ? ((const u32 *)(stream + HEAD))[group * 32 + l] : LOW;
    u64 sum = 0;
    for (int j = 0; j < per_lane; j++) {
        int c = (group * per_lane + j) * 32 + l;
        bool live = c < channels;
        int k = live ? tables[part * channels + c] : 0;
        lane.tail = tails[k], lane.slots = slots + firsts[k], lane.entries = entries + k * A;
        lane.skip = (lane.tail + 15) / 16 - lane.tail;
        int here = live ? c : 0;
        u64 element = ((u64)(here / dims) * tokens) * dims + here % dims;
        Item *out = (Item *)targets[part] + channel_offset(here, dims, head_stride);
        u32 before = lane.state;
        sum += channel(lane, live, out, mantissas ? (const u32 *)mantissas[part] : 0, element, tokens, dims);
        if (!live) lane.state = before;
    }
    u32 fine = __ballot_sync(ALL, lane.state == LOW);
    if (fine != ALL || lane.words != words + bases[part * (groups_most + 1) + group + 1] - bases[part * (groups_most + 1) + group])
        own[FAULT] = 2;
#if FLOATS
    sum = warp_sum(sum);
    if (l == 0) atomicAdd(&digests[part], sum);
#endif
}
