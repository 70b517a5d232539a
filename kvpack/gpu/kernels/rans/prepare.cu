// Reads the heads and tables of streams for decode.cu. A block of threads handles one part.
//
// Written are meta (FAULT is not 0 where a stream is not sound), bases [P, groups_most + 1] (the first word of each group),
// tables [P, C] (of channels), slots [P, MAX_TABLES * MAX_SLOTS] and tails [2, P, MAX_TABLES] (each table's tail, and where
// in slots the table begins). entries [P, MAX_ENTRIES] is scratch memory.
//
// In slots, a table has one value for each run of 16 slots below its tail, then one for each slot from the tail on. The value
// is frequency - 1 | code << 12 | delta << 24. The distance of a slot from its symbol's start is delta, and in a run it is
// 16 delta + slot % 16. The order of starts (docs/format.md) has the effect that a run never has slots of two symbols.
#include "meta.cuh"

// Values of `width` bits each, packed one behind another.
struct Side {
    const u8 *bytes;
    __device__ u32 at(i64 i, int width) const {
        i64 bit = i * width;
        u32 value = 0;
        for (int got = 0; got < width;) {
            int low = (int)((bit + got) & 7), take = 8 - low < width - got ? 8 - low : width - got;
            value |= (bytes[(bit + got) / 8] >> low & ((1u << take) - 1)) << got;
            got += take;
        }
        return value;
    }
};

__device__ __forceinline__ i64 packed_bytes(i64 count, int width) { return (count * width + 7) / 8; }

// Writes the entries of a table, and to *tail the slot at which frequencies below 64 begin. Returns false if the table's codes
// are not sound. A thread handles one table.
__device__ bool expand(const u8 *codes, const u16 *values, int A, const u16 *symbols, u64 *entries, u32 *tail) {
    int sum = 0, rest = -1, first = 0;
    for (int s = 0; s < A; s++) {
        u32 code = codes[s];
        if (code >= LEVEL_COUNT && (code != REST || rest >= 0)) return false;
        if (code == REST) rest = s;
        int f = code == REST ? 0 : values[code];
        sum += f;
        first += f >= 64 ? f : 0;  // every frequency that is added here is a multiple of 16
    }
    if (rest < 0 || sum >= TOTAL) return false;
    int left = TOTAL - sum, starts[3] = {0, 0, 0};
    starts[1] = first + (left >= 64 && left % 16 == 0 ? left : 0);
    starts[2] = first + (left >= 64 ? left : 0);
    *tail = starts[2];
    for (int s = 0; s < A; s++) {
        int f = s == rest ? left : values[codes[s]];
        int start = f < 64 ? starts[2] : f % 16 ? starts[1] : starts[0];
        starts[0] += f >= 64 && f % 16 == 0 ? f : 0;
        starts[1] += f >= 64 && f % 16 ? f : 0;
        starts[2] += f < 64 ? f : 0;
        entries[s] = (u64)symbols[s] << 32 | (u32)start << 16 | f;
    }
    return true;
}

// Writes the slots of one table. A warp handles one table; a lane holds every 32nd entry and hands it to the others.
__device__ void fill(const u64 *entries, int A, u32 tail, u32 *runs) {
    u32 *singles = runs + (tail + 15) / 16;
    int lane = threadIdx.x % 32;
    for (int first = 0; first < A; first += 32) {
        u64 held = first + lane < A ? entries[first + lane] : 0;
        for (int s = 0; s < 32 && first + s < A; s++) {
            u64 whole = __shfl_sync(ALL, held, s);
            u32 f = whole & 0xFFFF, start = (u32)whole >> 16, entry = (f - 1) & 0xFFF | (u32)(whole >> 32) << 12;
            u32 count = start < tail ? (f + 15) / 16 : f, *to = start < tail ? runs + start / 16 : singles + start - tail;
            for (u32 i = lane; i < count; i += 32) to[i] = entry | i << 24;
        }
    }
}

extern "C" __global__ void __launch_bounds__(256) prepare(
    const u64 *streams, const i64 *sizes, i64 channels_, i64 tokens_, i64 width_, i64 groups_most, const u16 *levels_,
    int *meta, int *bases, u8 *tables, u64 *entries, u32 *slots, u32 *tails) {
    __shared__ u16 symbols[MAX_SYMBOLS], values[48];
    __shared__ u8 codes[MAX_ENTRIES];
    __shared__ u32 tail_of[MAX_TABLES], first_of[MAX_TABLES + 1];
    __shared__ int fault;
    i64 part = blockIdx.x, size = sizes[part];
    const u8 *stream = (const u8 *)streams[part];
    int channels = (int)channels_, width = (int)width_, *own = meta + part * META;
    bases += part * (groups_most + 1), tables += part * channels, entries += part * MAX_ENTRIES;
    slots += part * (i64)MAX_TABLES * MAX_SLOTS, tails += part * MAX_TABLES;
    i64 codes_bytes = packed_bytes(channels_ * tokens_, width);
    if (size < 1 || stream[0] != CODED) {
        if (threadIdx.x == 0) own[MODE] = PACKED, own[FAULT] = size != 1 + codes_bytes || stream[0] != PACKED;
        return;
    }
    if (threadIdx.x == 0) own[MODE] = CODED, own[FAULT] = 1;
    if (size < HEAD) return;
    const u32 *head = (const u32 *)stream;
    int K = stream[1] + 1, A = stream[2] + 1, spread = stream[3];
    i64 per_lane = head[1], shortest = head[2], words = head[3];
    if (K > MAX_TABLES || per_lane < 1 || per_lane > channels || spread > 32 || words > channels_ * tokens_) return;
    i64 groups = (channels + 32 * per_lane - 1) / (32 * per_lane), tail = channels - (groups - 1) * 32 * per_lane;
    i64 lanes = (groups - 1) * 32 + (tail < 32 ? tail : 32);
    i64 at = HEAD + 4 * lanes + 2 * words;
    i64 codes_at = at, levels_at = codes_at + packed_bytes(A, width), tables_at = levels_at + packed_bytes((i64)K * A, 6);
    int table_width = bits_for(K - 1);
    i64 lengths_at = tables_at + packed_bytes(channels, table_width);
    if (lengths_at + packed_bytes(groups, spread) != size) return;
    Side symbol_codes = {stream + codes_at}, levels = {stream + levels_at}, names = {stream + tables_at},
         lengths = {stream + lengths_at};
    if (threadIdx.x == 0) fault = 0;
    for (int s = threadIdx.x; s < A; s += 256) symbols[s] = symbol_codes.at(s, width);
    for (int i = threadIdx.x; i < K * A; i += 256) codes[i] = (u8)levels.at(i, 6);
    if (threadIdx.x < LEVEL_COUNT) values[threadIdx.x] = levels_[threadIdx.x];
    __syncthreads();
    for (int s = threadIdx.x + 1; s < A; s += 256)
        if (symbols[s - 1] >= symbols[s]) fault = 1;
    for (int k = threadIdx.x; k < K; k += 256)
        if (!expand(codes + k * A, values, A, symbols, entries + k * A, &tail_of[k])) fault = 1;
    for (int c = threadIdx.x; c < channels; c += 256) {
        u32 table = names.at(c, table_width);
        if (table >= K) fault = 1;
        tables[c] = (u8)table;
    }
    __syncthreads();
    if (fault) return;
    if (threadIdx.x == 0) {
        i64 sum = 0;
        for (int g = 0; g < groups; g++) {
            bases[g] = (int)sum;
            sum += lengths.at(g, spread) + shortest;
            if (sum > words) fault = 1, sum = 0;
        }
        bases[groups] = (int)sum;
        if (sum != words) fault = 1;
        first_of[0] = 0;
        for (int k = 0; k < K; k++) first_of[k + 1] = first_of[k] + (tail_of[k] + 15) / 16 + TOTAL - tail_of[k];
        own[TABLES] = K, own[ALPHABET] = A, own[PER_LANE] = (int)per_lane, own[GROUPS] = (int)groups;
        own[LANES] = (int)lanes, own[WORDS] = (int)words, own[SLOT_BYTES] = 4 * first_of[K];
    }
    __syncthreads();
    for (int k = threadIdx.x / 32; k < K; k += 8) fill(entries + k * A, A, tail_of[k], slots + first_of[k]);
    for (int k = threadIdx.x; k < K; k += 256) tails[k] = tail_of[k], tails[MAX_TABLES * gridDim.x + k] = first_of[k];
    if (threadIdx.x == 0) own[FAULT] = fault;
}
