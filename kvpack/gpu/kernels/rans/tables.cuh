// The bank of tables of a part, by the k-means of tables.py, with the same integers. A block of THREADS threads handles one
// part, with A = alphabet symbols and K = tables tables.
#include "meta.cuh"

struct Bank {
    int tables, alphabet, channels, stride;
    const u16 *counts;  // [A, stride], how often each channel has each symbol
    u8 *names;          // [C], the table of each channel
    int *sums;          // [K, A], the counts of each table's channels
    u16 *values;        // [K, A], frequencies; before they are known [A / 2, K] costs, four bytes for two symbols (set_cost)
    u8 *codes;          // [K, A], frequency codes
};

// Finds the frequency codes of table k from its sums. Returns the sum of all frequencies but that of the symbol that gets the
// rest. A warp handles one table.
__device__ int quantize(const Bank &bank, int k, const u8 *nearest, const u16 *levels) {
    int lane = threadIdx.x % 32, alphabet = bank.alphabet;
    const int *sums = bank.sums + k * alphabet;
    u8 *codes = bank.codes + k * alphabet;
    u32 total = 0, largest = 0, rest = ALL, used = 0;
    for (int s = lane; s < alphabet; s += 32) {
        total += sums[s];
        largest = sums[s] > largest ? sums[s] : largest;
    }
    total = __reduce_add_sync(ALL, total);
    total = total ? total : 1;
    largest = __reduce_max_sync(ALL, largest);
    for (int s = lane; s < alphabet; s += 32)
        if (sums[s] == largest && s < rest) rest = s;
    rest = __reduce_min_sync(ALL, rest);
    for (int s = lane; s < alphabet; s += 32) {
        int code = nearest[((u64)sums[s] * (2 * TOTAL) + total) / (2ull * total)];
        code = sums[s] > 0 && s != rest ? (code > 1 ? code : 1) : 0;
        codes[s] = code;
        used += levels[code];
    }
    used = __reduce_add_sync(ALL, used);
    while (used >= TOTAL) {
        u32 key = 0;
        for (int s = lane; s < alphabet; s += 32) key = key > (codes[s] << 8 | 255 - s) ? key : codes[s] << 8 | 255 - s;
        key = __reduce_max_sync(ALL, key);
        int code = key >> 8, s = 255 - (int)(key & 255);
        used -= levels[code] - levels[code - 1];
        if (s % 32 == lane) codes[s] = code - 1;
        __syncwarp();
    }
    if (rest % 32 == lane) codes[rest] = REST;
    __syncwarp();
    return (int)used;
}

__device__ void sum_channels(const Bank &bank) {
    for (int i = threadIdx.x; i < bank.tables * bank.alphabet; i += THREADS) bank.sums[i] = 0;
    __syncthreads();
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, tiles = (bank.channels + 31) / 32;
    for (int i = warp; i < tiles * bank.alphabet; i += THREADS / 32) {
        int s = i / tiles, c = i % tiles * 32 + lane;
        int n = c < bank.channels ? bank.counts[s * bank.stride + c] : 0;
        if (n) atomicAdd(&bank.sums[bank.names[c] * bank.alphabet + s], n);
    }
    __syncthreads();
}

// Stores a symbol's cost in a table: its lowest three bits and the eight bits above them, where dot_low and dot_high want
// them.
__device__ __forceinline__ void set_cost(const Bank &bank, int s, int k, int cost) {
    u8 *four = (u8 *)bank.values + 4 * (s / 2 * bank.tables + k);
    four[s % 2] = cost & 7, four[2 + s % 2] = cost >> 3;
}

// Gives every channel to the table that codes it shortest, the first of several. A warp handles eight channels at a time, and
// a lane one table.
__device__ void assign(const Bank &bank) {
    int lane = threadIdx.x % 32, K = bank.tables;
    const u32 *costs = (const u32 *)bank.values + (lane < K ? lane : 0);
    for (int c = threadIdx.x / 32 * 8; c < bank.channels; c += THREADS / 32 * 8) {
        u32 low[8] = {}, high[8] = {};
        for (int first = 0; first < bank.alphabet; first += 4) {
            uint4 n[4];
#pragma unroll
            for (int j = 0; j < 4; j++)
                n[j] = first + j < bank.alphabet ? *(const uint4 *)(bank.counts + (first + j) * bank.stride + c)
                                                 : make_uint4(0, 0, 0, 0);
#pragma unroll
            for (int j = 0; j < 4; j += 2) {
                u32 a[4] = {n[j].x, n[j].y, n[j].z, n[j].w}, b[4] = {n[j + 1].x, n[j + 1].y, n[j + 1].z, n[j + 1].w};
                if (!(a[0] | a[1] | a[2] | a[3] | b[0] | b[1] | b[2] | b[3])) continue;  // this is the same for all lanes, and often true
                u32 cost = costs[(first + j) / 2 * K];
#pragma unroll
                for (int i = 0; i < 8; i++) {
                    u32 both = __byte_perm(a[i / 2], b[i / 2], i % 2 ? 0x7632 : 0x5410);
                    low[i] = dot_low(both, cost, low[i]), high[i] = dot_high(both, cost, high[i]);
                }
            }
        }
#pragma unroll
        for (int i = 0; i < 8; i++) {
            u32 bits = lane < K ? (high[i] << 3) + low[i] : ALL, least = __reduce_min_sync(ALL, bits);
            u32 table = __reduce_min_sync(ALL, bits == least ? lane : ALL);
            if (lane == 0 && c + i < bank.channels) bank.names[c + i] = (u8)table;
        }
    }
}

// Lists the codes that occur, ascending, as symbols; returns how many there are.
__device__ int list_symbols(const u32 *present, int blocks, u16 *symbols, u8 *map) {
    __shared__ u32 every[BINS / 32 + 1];
    __shared__ int alphabet;
    const int groups = (BINS + 31) / 32;
    if (threadIdx.x < groups) {
        u32 bits = 0;
        for (int b = 0; b < blocks; b++) bits |= present[b * groups + threadIdx.x];
        every[threadIdx.x] = bits;
    }
    __syncthreads();
    for (int bin = threadIdx.x; bin < BINS; bin += THREADS) {
        int before = 0;
        for (int g = 0; g < bin / 32; g++) before += __popc(every[g]);
        u32 bits = every[bin / 32];
        int symbol = before + __popc(bits & ((1u << bin % 32) - 1));
        bool here = bits >> bin % 32 & 1;
        map[bin] = (u8)symbol;
        if (here && symbol < MAX_SYMBOLS) symbols[symbol] = bin;
        if (bin == BINS - 1) alphabet = symbol + here;
    }
    __syncthreads();
    return alphabet;
}

// Collects counts [A, stride] from the rows of scan.cu's blocks. Then sorts channels by their mean code, and gives equal
// shares of them to the tables to begin with.
__device__ void gather(const Bank &bank, const u32 *rows, const u32 *present, const u16 *symbols, u16 *counts, int *keys) {
    __shared__ int near[2048];  // has room for the keys of most parts
    const int groups = (BINS + 31) / 32;
    if (bank.channels <= 2048) keys = near;
    int lane = threadIdx.x % 32, blocks = bank.stride / 64, channels = bank.channels;
    for (int i = threadIdx.x / 32; i < blocks * bank.alphabet; i += THREADS / 32) {
        int b = i % blocks, s = i / blocks, code = symbols[s];
        const u32 *bits = present + b * groups;
        int row = __popc(bits[code / 32] & ((1u << code % 32) - 1));
        u32 mine = lane < code / 32 && lane < groups ? __popc(bits[lane]) : 0;
        row += __reduce_add_sync(ALL, mine);
        u32 pair = bits[code / 32] >> code % 32 & 1 ? rows[((i64)b * BINS + row) * 32 + lane] : 0;
        ((u32 *)(counts + s * bank.stride + b * 64))[lane] = pair;
    }
    __syncthreads();
    for (int c = threadIdx.x; c < channels; c += THREADS) {
        int key = 0;
#pragma unroll 8
        for (int s = 0; s < bank.alphabet; s++) key += (int)counts[s * bank.stride + c] * s;
        keys[c] = key;
    }
    __syncthreads();
    for (int c = threadIdx.x; c < channels; c += THREADS) {
        int rank = 0, key = keys[c], near_from = c - lane, near_to = near_from + 32 < channels ? near_from + 32 : channels;
#pragma unroll 8
        for (int other = 0; other < near_from; other++) rank += keys[other] <= key;
        for (int other = near_from; other < near_to; other++) rank += keys[other] < key || (keys[other] == key && other < c);
#pragma unroll 8
        for (int other = near_to; other < channels; other++) rank += keys[other] < key;
        bank.names[c] = (u8)((i64)rank * bank.tables / channels);
    }
    __syncthreads();
}

// Which symbols of a table come first (docs/format.md): those for which this is 0, then 1, then 2.
__device__ __forceinline__ int place_of(int f) { return f < 64 ? 2 : f % 16 != 0; }

// Writes frequencies [K, A] to values and starts to sums, where a thread handles one table; then all threads write the entries
// of encode.cu for the tables that are used, in their new order.
__device__ void entries_of(const Bank &bank, const u16 *levels, const int *order, int live, u64 *entries) {
    for (int k = threadIdx.x; k < bank.tables; k += THREADS) {
        const u8 *codes = bank.codes + k * bank.alphabet;
        u16 *values = bank.values + k * bank.alphabet;
        int others = 0, starts[3] = {0, 0, 0};
        for (int s = 0; s < bank.alphabet; s++) others += codes[s] == REST ? 0 : levels[codes[s]];
        for (int s = 0; s < bank.alphabet; s++) {
            int f = codes[s] == REST ? TOTAL - others : levels[codes[s]], place = place_of(f);
            values[s] = f;
            starts[1] += place == 0 ? f : 0;
            starts[2] += place < 2 ? f : 0;
        }
        for (int s = 0; s < bank.alphabet; s++) {
            int f = values[s], place = place_of(f);
            bank.sums[k * bank.alphabet + s] = place == 0 ? starts[0] : place == 1 ? starts[1] : starts[2];
            starts[0] += place == 0 ? f : 0;
            starts[1] += place == 1 ? f : 0;
            starts[2] += place == 2 ? f : 0;
        }
    }
    __syncthreads();
    for (int to = threadIdx.x; to < live * bank.alphabet; to += THREADS) {
        int i = order[to / bank.alphabet] * bank.alphabet + to % bank.alphabet;
        u32 f = bank.values[i] ? bank.values[i] : 1, shift = bits_for(f - 1);
        u64 reciprocal = ((1ull << (31 + shift)) + f - 1) / f;
        u32 packed = (TOTAL - f) << 20 | (u32)bank.sums[i] << 8 | shift;
        entries[to] = bank.values[i] ? (u64)packed << 32 | reciprocal : 0;
    }
}
