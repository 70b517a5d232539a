// Copies byte ranges to addresses that are divisible by 8.
//
// starts [S] are any addresses, sizes [S] are bytes, targets [S] are addresses divisible by 8. The grid is (Y, S), with any Y.
// Up to 15 bytes around a range are read, but not used. The last word of a copy is filled with zeros.
extern "C" __global__ void __launch_bounds__(256) align(const u64 *starts, const i64 *sizes, const u64 *targets) {
    i64 size = sizes[blockIdx.y];
    u64 start = starts[blockIdx.y], *to = (u64 *)targets[blockIdx.y];
    const u64 *words = (const u64 *)(start & ~7ull);
    int skew = (int)(start & 7) * 8;
    i64 count = (size + 7) / 8, readable = (size + (start & 7) + 7) / 8;
    for (i64 i = ((i64)blockIdx.x * 256 + threadIdx.x) * 2; i < count; i += (i64)gridDim.x * 512) {
        u64 v[3];
#pragma unroll
        for (int j = 0; j < 3; j++) v[j] = i + j < readable ? words[i + j] : 0;
#pragma unroll
        for (int j = 0; j < 2; j++) {
            if (i + j >= count) break;
            u64 word = skew ? v[j] >> skew | v[j + 1] << (64 - skew) : v[j];
            if ((i + j) * 8 + 8 > size) word &= ~0ull >> (64 - (size & 7) * 8);
            to[i + j] = word;
        }
    }
}
