// Tensor cores, asynchronous copies and barriers of sm_90a, as their instructions are. Tiles in shared
// memory are rows of 128 bytes in groups of 8, the pieces of 16 bytes of a row r at places p ^ (r % 8):
// what wgmma calls a swizzle of 128 bytes. A tile begins at a multiple of 1024.

__device__ inline unsigned shared_address(const void* at)
{
    unsigned long long address;
    asm("cvta.to.shared.u64 %0, %1;" : "=l"(address) : "l"(at));
    return (unsigned)address;
}

// Where a piece of a row of such a tile stands.
__device__ inline unsigned swizzled(int row, int piece) { return row * 128 + ((piece ^ (row & 7)) << 4); }

// Two numbers as bf16, the first in the lower half.
__device__ inline unsigned packed(float first, float second)
{
    unsigned both;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(second), "f"(first));
    return both;
}

__device__ inline float first_of(unsigned both) { return __uint_as_float(both << 16); }
__device__ inline float second_of(unsigned both) { return __uint_as_float(both & 0xffff0000); }

// log2 x and 2^x, to a few ulp (log2 near 1: of 1).
__device__ inline float log_of_two(float x)
{
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ inline float power_of_two(float x)
{
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// 16 bytes from global to shared memory.
__device__ inline void copy_16(unsigned to, const void* from)
{
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}

// The same, or 16 zeros; nothing is read then.
__device__ inline void copy_16(unsigned to, const void* from, bool there)
{
    const int bytes = there ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}

__device__ inline void copies_end_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until of the groups of this thread at most N are under way.
template <int N> __device__ inline void copies_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }

// What this thread wrote to shared memory may be read by wgmma and by bulk copies, once a barrier has told.
__device__ inline void writes_to_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

__device__ inline void barrier_init(unsigned barrier, int arrivals)
{
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

__device__ inline void barriers_are_there() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

__device__ inline void arrive(unsigned barrier)
{
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrives, and says how many bytes of bulk copies are to arrive too.
__device__ inline void arrive_expecting(unsigned barrier, int bytes)
{
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ inline void barrier_wait(unsigned barrier, int parity)
{
    asm volatile("{\n"
                 ".reg .pred done;\n"
                 "again:\n"
                 "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
                 "@!done bra again;\n"
                 "}" ::"r"(barrier), "r"(parity) : "memory");
}

// So many bytes, a multiple of 16, from global to shared memory; the barrier is told.
__device__ inline void bulk_load(unsigned to, const void* from, int bytes, unsigned barrier)
{
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
                 "l"(from), "r"(bytes), "r"(barrier) : "memory");
}

__device__ inline void bulk_store(void* to, unsigned from, int bytes)
{
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to), "r"(from), "r"(bytes)
                 : "memory");
}

// Waits until the bulk stores of this thread have been read out of shared memory (not yet written).
__device__ inline void bulk_stores_wait()
{
    asm volatile("cp.async.bulk.commit_group;\ncp.async.bulk.wait_group.read 0;" ::: "memory");
}

// Waits until all that this thread has waited for so has been written.
__device__ inline void bulk_stores_are_there() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

// Some threads of a block wait for one another.
__device__ inline void some_wait(int barrier, int threads)
{
    asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// What a warpgroup gives of its registers, and what it takes of those given.
template <int N> __device__ inline void registers_down()
{
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}

template <int N> __device__ inline void registers_up()
{
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}

// Four matrices of 8x8 numbers of 16 bits, of which a thread gets two neighbours in a row each.
__device__ inline void load_rows(unsigned (&to)[4], unsigned row)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(row) : "memory");
}

__device__ inline void store_rows(unsigned row, unsigned a, unsigned b, unsigned c, unsigned d)
{
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row), "r"(a), "r"(b), "r"(c),
                 "r"(d) : "memory");
}

// The same transposed: a thread has two neighbours in a column each.
__device__ inline void load_transposed(unsigned (&to)[4], unsigned row)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(row) : "memory");
}

__device__ inline void store_transposed(unsigned row, unsigned a, unsigned b, unsigned c, unsigned d)
{
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row), "r"(a), "r"(b),
                 "r"(c), "r"(d) : "memory");
}

// Two and four numbers of shared memory, in order with the waits of this file.
__device__ inline float2 shared_2(unsigned at)
{
    float2 x;
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(x.x), "=f"(x.y) : "r"(at));
    return x;
}

__device__ inline uint4 shared_4(unsigned at)
{
    uint4 x;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "r"(at));
    return x;
}

__device__ inline void store_1(unsigned at, unsigned x)
{
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(at), "r"(x) : "memory");
}

__device__ inline void store_4(unsigned at, unsigned a, unsigned b, unsigned c, unsigned d)
{
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}

// A tile as wgmma reads it. Where rows run along what is summed over (K-major), `next` says nothing; where
// they run across it, the second 64 columns stand `next` bytes on.
__device__ inline unsigned long long tile(unsigned address, int next = 16)
{
    return (unsigned long long)((address & 0x3ffff) >> 4) | (unsigned long long)(next >> 4) << 16 |
           (unsigned long long)(1024 >> 4) << 32 | 1ull << 62;
}

// Every second eight rows of a tile, K-major.
__device__ inline unsigned long long half_tile(unsigned address) { return tile(address) + ((1024ull >> 4) << 32); }

// The tile so many bytes on.
__device__ inline unsigned long long on(unsigned long long tile, int bytes) { return tile + (bytes >> 4); }

__device__ inline void wgmma_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void wgmma_end_group() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until of the groups at most N are under way.
template <int N> __device__ inline void wgmma_wait()
{
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

// Sums are read only behind this, as the compiler does not know when they are there.
template <int N> __device__ inline void there(float (&d)[N])
{
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+f"(d[i])::"memory");
}

#define MMA_4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define MMA_16(d, i) MMA_4(d, i), MMA_4(d, i + 4), MMA_4(d, i + 8), MMA_4(d, i + 12)
#define MMA_32(d, i) MMA_16(d, i), MMA_16(d, i + 16)

// d (+)= a b over 16 products: d [64, 64], a and b tiles, both K-major.
__device__ inline void wgmma_tiles(float (&d)[32], unsigned long long a, unsigned long long b, int add)
{
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
                 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
                 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
                 "%32, %33, p, 1, 1, 0, 0;\n}"
                 : MMA_32(d, 0)
                 : "l"(a), "l"(b), "r"(add));
}

// The same of 32 rows of b; d [64, 32].
__device__ inline void wgmma_tiles_32(float (&d)[16], unsigned long long a, unsigned long long b, int add)
{
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %18, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 "
                 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, "
                 "%16, %17, p, 1, 1, 0, 0;\n}"
                 : MMA_16(d, 0)
                 : "l"(a), "l"(b), "r"(add));
}

// The same with a, four registers of every thread; d [64, 64].
__device__ inline void wgmma_64(float (&d)[32], const unsigned* a, unsigned long long b, int add)
{
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %37, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
                 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
                 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
                 "{%32, %33, %34, %35}, %36, p, 1, 1, 0;\n}"
                 : MMA_32(d, 0)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
}

// d and e [64, 64], of 128 rows of b: e has the second half. They run along what is summed over, or ACROSS it.
template <int ACROSS>
__device__ inline void wgmma_2_64(float (&d)[32], float (&e)[32], const unsigned* a, unsigned long long b, int add)
{
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %69, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
                 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
                 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
                 "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
                 "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
                 "{%64, %65, %66, %67}, %68, p, 1, 1, %70;\n}"
                 : MMA_32(d, 0), MMA_32(e, 0)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add), "n"(ACROSS));
}

// d [64, 128], the same.
template <int ACROSS> __device__ inline void wgmma_128(float (&d)[64], const unsigned* a, unsigned long long b, int add)
{
    wgmma_2_64<ACROSS>((float(&)[32])d[0], (float(&)[32])d[32], a, b, add);
}

// Two numbers as f16, the first in the lower half.
__device__ inline unsigned packed_f16(float first, float second)
{
    unsigned both;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(second), "f"(first));
    return both;
}

// d += a b over 16 products: d [16, 8], of one warp, factors in f16.
__device__ inline void mma_f16(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1)
{
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : MMA_4(d, 0)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
