// Adds the 64-bit checksums of byte ranges to sums: for each range the sum of mixed(word, index) over its words, and its length.
//
// starts [S] are any addresses, sizes [S] are bytes, sums [S] must be zero before. The grid is (Y, S), with any Y. Up to 15
// bytes around a range are read, but not used. A thread takes four words in a row: it reads 32 aligned bytes and the word
// behind them.
extern "C" __global__ void __launch_bounds__(256) checksum(const u64 *starts, const i64 *sizes, u64 *sums) {
    i64 size = sizes[blockIdx.y];
    u64 start = starts[blockIdx.y], total = 0;
    const u64 *words = (const u64 *)(start & ~7ull);
    int skew = (int)(start & 7) * 8;
    i64 count = (size + 7) / 8, readable = (size + (start & 7) + 7) / 8;
    for (i64 i = ((i64)blockIdx.x * 256 + threadIdx.x) * 4; i < count; i += (i64)gridDim.x * 1024) {
        u64 v[5];
#pragma unroll
        for (int j = 0; j < 5; j++) v[j] = i + j < readable ? words[i + j] : 0;
#pragma unroll
        for (int j = 0; j < 4; j++) {
            if (i + j >= count) break;
            u64 word = skew ? v[j] >> skew | v[j + 1] << (64 - skew) : v[j];
            if ((i + j) * 8 + 8 > size) word &= ~0ull >> (64 - (size & 7) * 8);
            total += mixed(word, i + j);
        }
    }
    if (blockIdx.x == 0 && threadIdx.x == 0) total += size;
    total = warp_sum(total);
    if (threadIdx.x % 32 == 0) atomicAdd(&sums[blockIdx.y], total);
}
