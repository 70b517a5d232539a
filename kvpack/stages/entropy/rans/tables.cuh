// The bank of tables of each part, by the k-means of tables.py: the same integers. A block a part.
//
// rows and present as scan.cu leaves them; nearest [4097], levels [REST] and cost [4097] are tables.py's own. Writes
// counts [P, C, 256] (of symbols), symbols [P, 256], maps [P, BINS] (code to symbol), tables [P, C], codes [P, 64 * 256]
// (frequency codes, A a table), entries [P, 64 * 256] for encode.cu, and meta. Parts with TABLES * ALPHABET outside
// (least, most] are left alone, so that most parts need little shared memory and pass through a first launch.
#include "meta.cuh"
#define THREADS 512
#define TOTAL 4096
#define ROUNDS 3

struct Bank {
    int tables, alphabet;
    int *sums;       // [K, A]
    u16 *values;     // [A, K] cost, later [K, A] frequency
    u8 *codes;       // [K, A]
};

__device__ __forceinline__ u64 warp_max(u64 value) {
    for (int step = 16; step; step >>= 1) {
        u64 other = __shfl_xor_sync(ALL, value, step);
        value = other > value ? other : value;
    }
    return value;
}

// Frequency codes of table k from its sums; returns what the symbols other than the rest take. A warp a table.
__device__ int quantize(const Bank &bank, int k, const u8 *nearest, const u16 *levels) {
    int lane = threadIdx.x % 32, alphabet = bank.alphabet;
    const int *sums = bank.sums + k * alphabet;
    u8 *codes = bank.codes + k * alphabet;
    u64 total = 0, largest = 0;
    for (int s = lane; s < alphabet; s += 32) {
        total += sums[s];
        u64 key = (u64)sums[s] << 8 | (255 - s);
        largest = key > largest ? key : largest;
    }
    total = warp_sum(total);
    total = total ? total : 1;
    int rest = 255 - (int)(warp_max(largest) & 255);
    u64 used = 0;
    for (int s = lane; s < alphabet; s += 32) {
        int code = nearest[((u64)sums[s] * (2 * TOTAL) + total) / (2 * total)];
        code = sums[s] > 0 && s != rest ? (code > 1 ? code : 1) : 0;
        codes[s] = code;
        used += levels[code];
    }
    used = warp_sum(used);
    while (used >= TOTAL) {
        largest = 0;
        for (int s = lane; s < alphabet; s += 32) {
            u64 key = (u64)codes[s] << 8 | (255 - s);
            largest = key > largest ? key : largest;
        }
        largest = warp_max(largest);
        int code = (int)(largest >> 8), s = 255 - (int)(largest & 255);
        used -= levels[code] - levels[code - 1];
        if (s % 32 == lane) codes[s] = code - 1;
        __syncwarp();
    }
    if (rest % 32 == lane) codes[rest] = REST;
    __syncwarp();
    return (int)used;
}

__device__ void sum_channels(const Bank &bank, const u16 *counts, const u8 *tables, int channels) {
    for (int i = threadIdx.x; i < bank.tables * bank.alphabet; i += THREADS) bank.sums[i] = 0;
    __syncthreads();
    int lane = threadIdx.x % 32;
    for (int c = threadIdx.x / 32; c < channels; c += THREADS / 32)
        for (int s = lane; s < bank.alphabet; s += 32) {
            int n = counts[c * MOST_SYMBOLS + s];
            if (n) atomicAdd(&bank.sums[tables[c] * bank.alphabet + s], n);
        }
    __syncthreads();
}

// Every channel to the table that codes it shortest, the first of several. A warp takes four channels, a lane two tables.
__device__ void assign(const Bank &bank, const u16 *counts, u8 *tables, int channels) {
    int lane = threadIdx.x % 32, K = bank.tables;
    bool low = lane < K, high = lane + 32 < K;
    for (int c = threadIdx.x / 32 * 4; c < channels; c += THREADS / 32 * 4) {
        const u16 *own[4];
#pragma unroll
        for (int i = 0; i < 4; i++) own[i] = counts + (c + i < channels ? c + i : c) * MOST_SYMBOLS;
        u32 bits[4] = {0, 0, 0, 0}, more[4] = {0, 0, 0, 0};
        for (int s = 0; s < bank.alphabet; s++) {
            u32 a = low ? bank.values[s * K + lane] : 0, b = high ? bank.values[s * K + lane + 32] : 0;
#pragma unroll
            for (int i = 0; i < 4; i++) {
                u32 n = own[i][s];
                bits[i] += n * a;
                more[i] += n * b;
            }
        }
#pragma unroll
        for (int i = 0; i < 4; i++) {
            u64 key = low ? (u64)bits[i] << 8 | lane : ~0ull, other = high ? (u64)more[i] << 8 | (lane + 32) : ~0ull;
            key = ~warp_max(~(key < other ? key : other));
            if (lane == 0 && c + i < channels) tables[c + i] = (u8)(key & 255);
        }
    }
}

// Symbols that occur, ascending; counts [C, 256] of them; where each channel stands by its mean code, as first table.
__device__ int gather(const u32 *rows, const u32 *present, int blocks, int channels, int tokens, int K, u16 *symbols,
                      u8 *map, u16 *counts, u8 *tables, int *keys) {
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
        if (here && symbol < MOST_SYMBOLS) symbols[symbol] = bin;
        if (bin == BINS - 1) alphabet = symbol + here;
    }
    __syncthreads();
    if (alphabet > MOST_SYMBOLS) return alphabet;
    for (int c = threadIdx.x; c < channels; c += THREADS) {
        const u32 *bits = present + c / 64 * groups;
        const u32 *row = rows + (i64)(c / 64) * BINS * 32 + c % 64 / 2;
        int symbol = 0, key = 0;
        for (int g = 0; g < groups; g++)
            for (u32 left = every[g]; left; left &= left - 1, symbol++) {
                u32 n = 0;
                if (bits[g] & left & -left) {
                    n = c % 2 ? *row >> 16 : *row & 0xFFFF;
                    row += 32;
                }
                counts[c * MOST_SYMBOLS + symbol] = (u16)n;
                key += (int)n * symbol;
            }
        keys[c] = key;
    }
    __syncthreads();
    for (int c = threadIdx.x; c < channels; c += THREADS) {
        int rank = 0, key = keys[c];
        for (int other = 0; other < channels; other++) rank += keys[other] < key || (keys[other] == key && other < c);
        tables[c] = (u8)((i64)rank * K / channels);
    }
    __syncthreads();
    return alphabet;
}

// Where a symbol of this frequency stands in its table (docs/format.md): 0 first, 2 last.
__device__ __forceinline__ int place_of(int f) { return f < 64 ? 2 : f % 16 != 0; }

// Frequencies [K, A] into values, starts into sums; then the entries of encode.cu. A thread a table, then all.
__device__ void entries_of(const Bank &bank, const u16 *levels, u64 *entries) {
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
    for (int i = threadIdx.x; i < bank.tables * bank.alphabet; i += THREADS) {
        u32 f = bank.values[i] ? bank.values[i] : 1;
        u32 shift = bits_for(f - 1);
        u64 reciprocal = ((1ull << (31 + shift)) + f - 1) / f;
        u32 packed = (TOTAL - f) | (u32)bank.sums[i] << 12 | shift << 24;
        entries[i] = bank.values[i] ? (u64)packed << 32 | reciprocal : 0;
    }
}
