// Decodes the rANS lanes of streams to codes. With FLOATS it merges the codes with packed mantissas to bf16, and sums the
// digest of what comes out.
//
// ITEM, SHIFT and DIMS are those of scan.cu. A block has BLOCK threads, and a multiprocessor must have registers for BLOCKS
// blocks. The grid is (slices of groups, P), and a warp decodes one group. streams [P] are addresses; meta, bases, tables,
// slots and tails are what prepare.cu has made of them. targets [P] are addresses of parts [H, T, DIMS] whose heads lie
// head_stride elements apart. mantissas [P] are addresses, divisible by 4, of packed mantissas of SHIFT bits. With FLOATS,
// DIMS is a multiple of 64, and the digest without the length is added to sums [P]. Decoding tables are copied to shared
// memory if they take no more than budget bytes.
#include "meta.cuh"
#include "words.cuh"
#if ITEM == 2
typedef u16 Item;
#else
typedef u8 Item;
#endif

struct Lane {
    u32 state;
    u32 tail;     // the slot from which on slots are stored one by one, and not in runs of 16
    u32 runs;     // where the table's runs of 16 slots begin
    u32 singles;  // where its single slots begin, minus the tail
};

// Decodes one code and returns its entry (see prepare.cu), in which the code is at bit 12.
template <bool FITS>
__device__ __forceinline__ u32 get(Lane &lane, Words &words, const u32 *slots, bool live, u32 below) {
    u32 x = lane.state, slot = x & 0xFFF;
    bool large = slot < lane.tail;
    u32 place = large ? lane.runs + (slot >> 4) : lane.singles + slot;
    u32 entry = FITS ? shared_word(place * 4) : slots[place];
    u32 delta = entry >> 24, offset = large ? delta << 4 | x & 15 : delta;  // slot - start
    x = (entry & 0xFFF) * (x >> 12) + ((x >> 12) + offset);
    lane.state = take(words, x, x < LOW && live, below);
    return entry;
}

#if FLOATS
// Transposes 4 x 4 codes of four neighbouring lanes. v has entries of four rows of one channel, whose bits 8 to 23 are used;
// the result has those of row lane % 4 of the four lanes' channels.
__device__ __forceinline__ u64 transpose4(const u32 *v, int lane) {
    bool upper = lane & 2, odd = lane & 1;
    u32 first = __byte_perm(v[0], v[1], 0x6521), second = __byte_perm(v[2], v[3], 0x6521);
    u32 other = __shfl_xor_sync(ALL, upper ? first : second, 2);
    u32 a = upper ? other : first, b = upper ? second : other;  // two rows of the lower and of the upper lane
    u32 even_row = __byte_perm(a, b, 0x5410), odd_row = __byte_perm(a, b, 0x7632);
    u32 got = __shfl_xor_sync(ALL, odd ? even_row : odd_row, 1);
    u32 l = odd ? got : even_row, h = odd ? odd_row : got;
    return (u64)__byte_perm(l, h, 0x7632) << 32 | __byte_perm(l, h, 0x5410);
}
#endif

// Decodes all tokens of 32 channels, of which the lane has one; element is the channel's first code in the part. Returns what
// the lane adds to the digest. With FLOATS, the codes of four rows are transposed before they are merged with the mantissas,
// so that a lane has four codes that lie next to each other.
template <bool FITS>
__device__ __forceinline__ u64 run(Lane &lane, Words &words, const u32 *slots, bool live, Item *out, const u32 *packed,
                                   u64 element, int tokens) {
    int l = threadIdx.x % 32, t = 0;
    u32 below = pin_register((1u << l) - 1);
    u64 sum = 0;
#if FLOATS
    const u32 lower = (1u << SHIFT) - 1, codes = ~(lower << 16 | lower);
    u64 first = element - (l & 3) + (l & 3) * DIMS;  // the first of the lane's four codes
    const u32 *bits = packed + ((tokens < 4 ? element : first) * SHIFT >> 5);
    u32 bit = (u32)(first * SHIFT) & 31;  // rows are whole words long
    Item *mine = pin_register(out + (l & 3) * (DIMS - 1));
    u64 key = (first / 4 + 1) * GOLDEN;
    u32 low_bits = device_word(bits), high_bits = device_word(bits + 1);  // loaded four rows ahead, because device memory is slow
    for (; t + 4 <= tokens; t += 4, mine += 4 * DIMS, key += DIMS * GOLDEN) {
        u32 v[4];
        u32 m = __funnelshift_r(low_bits, high_bits, bit);
        if (t + 8 <= tokens) {
            bits += DIMS * SHIFT / 8;
            low_bits = device_word(bits), high_bits = device_word(bits + 1);
        }
#pragma unroll
        for (int r = 0; r < 4; r++) v[r] = get<FITS>(lane, words, slots, live, below);
        refill(words);
        u64 whole = transpose4(v, l);
        u32 low = (m & lower) | (m << (16 - SHIFT) & lower << 16) | ((u32)whole << (SHIFT - 4) & codes);
        m >>= 2 * SHIFT;
        u32 high = (m & lower) | (m << (16 - SHIFT) & lower << 16) | ((u32)(whole >> 32) << (SHIFT - 4) & codes);
        whole = (u64)high << 32 | low;
        if (live) {
            *(u64 *)mine = whole;
            sum += mixed_by(whole, key);
        }
    }
    packed += (element + (u64)t * DIMS) * SHIFT >> 5;
    bit = (u32)(element * SHIFT) & 31;
    for (out += (i64)t * DIMS; t < tokens; t++, packed += DIMS * SHIFT / 32, out += DIMS) {
        u32 m = __funnelshift_r(packed[0], packed[1], bit) & ((1 << SHIFT) - 1);
        u32 v = m | (get<FITS>(lane, words, slots, live, below) >> 12 & 0xFFF) << SHIFT;
        if (live) *out = (Item)v;
        u32 pair = v | __shfl_down_sync(ALL, v, 1) << 16, next = __shfl_down_sync(ALL, pair, 2);
        if (live && l % 4 == 0) sum += mixed((u64)next << 32 | pair, (element + (u64)t * DIMS) / 4);
    }
#else
    out = pin_register(out);
    for (; t + 4 <= tokens; t += 4, out += 4 * DIMS) {
#pragma unroll
        for (int r = 0; r < 4; r++) {
            u32 code = get<FITS>(lane, words, slots, live, below) >> 12 & 0xFFF;
            if (live) out[r * DIMS] = (Item)(code << SHIFT);
        }
        refill(words);
    }
    for (; t < tokens; t++, out += DIMS) {
        u32 code = get<FITS>(lane, words, slots, live, below) >> 12 & 0xFFF;
        if (live) *out = (Item)(code << SHIFT);
    }
#endif
    refill(words);
    return sum;
}

struct Stream {
    const int *own;
    const u8 *tables;
    const u32 *slots, *tails, *firsts, *packed;
    Item *target;
    i64 head_stride;
    int channels, tokens;
};

// Decodes the channels of a group. Returns false if the group does not end where and as it must.
template <bool FITS>
__device__ __forceinline__ bool run_group(const Stream &s, u32 table, int group, const int *bases, const u8 *stream,
                                          u64 *ring, u64 &sum) {
    int l = threadIdx.x % 32, per_lane = s.own[PER_LANE];
    Lane lane;
    bool lives = group * per_lane * 32 + l < s.channels;
    lane.state = lives ? ((const u32 *)(stream + HEAD))[group * 32 + l] : LOW;
    Words words = open_words((const u16 *)(stream + HEAD + 4ll * s.own[LANES]) + bases[group], ring);
    u32 begin = words.at;
    for (int j = 0; j < per_lane; j++) {
        int c = (group * per_lane + j) * 32 + l;
        bool live = c < s.channels;
        c = live ? c : 0;
        int k = s.tables[c];
        lane.tail = s.tails[k], lane.runs = s.firsts[k] + (FITS ? table / 4 : 0);
        lane.singles = pin_register(lane.runs + (lane.tail + 15) / 16 - lane.tail);
        u64 element = (u64)(c / DIMS) * s.tokens * DIMS + c % DIMS;
        Item *out = s.target + channel_offset(c, DIMS, s.head_stride);
        u32 before = lane.state;
        sum += run<FITS>(lane, words, s.slots, live, out, s.packed, element, s.tokens);
        if (!live) lane.state = before;
    }
    u32 fine = __ballot_sync(ALL, lane.state == LOW);
    return fine == ALL && words.at - begin == 2u * (bases[group + 1] - bases[group]);
}

extern "C" __global__ void __launch_bounds__(BLOCK, BLOCKS) decode(
    const u64 *streams, int *meta, const int *bases, const u8 *tables, const u32 *slots, const u32 *tails,
    i64 groups_most, const u64 *targets, i64 head_stride, i64 heads, i64 tokens, const u64 *mantissas, u64 *sums,
    i64 budget) {
    extern __shared__ u32 shared[];  // the warps' rings, then the decoding tables
    i64 part = blockIdx.y;
    int *own = meta + part * META, bytes = own[SLOT_BYTES], warps = blockDim.x / 32;
    if (own[FAULT] || own[MODE] != CODED) return;
    Stream s = {own, tables + part * heads * DIMS, slots + part * (i64)MAX_TABLES * MAX_SLOTS,
                tails + part * MAX_TABLES, tails + (gridDim.y + part) * MAX_TABLES,
                mantissas ? (const u32 *)mantissas[part] : 0, (Item *)targets[part], head_stride, (int)heads * DIMS,
                (int)tokens};
    u32 *table = shared + warps * (RING / 4);
    bool fits = bytes <= budget;
    for (int i = threadIdx.x; fits && i < bytes / 4; i += blockDim.x) table[i] = s.slots[i];
    __syncthreads();
    int group = blockIdx.x * warps + threadIdx.x / 32;
    if (group >= own[GROUPS]) return;
    u64 *ring = (u64 *)shared + threadIdx.x / 32 * (RING / 8);
    const u8 *stream = (const u8 *)streams[part];
    bases += part * (groups_most + 1);
    u64 sum = 0;
    bool fine = fits ? run_group<true>(s, shared_address(table), group, bases, stream, ring, sum)
                     : run_group<false>(s, 0, group, bases, stream, ring, sum);
    if (!fine) own[FAULT] = 2;
#if FLOATS
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0) atomicAdd(&sums[part], sum);
#endif
}
