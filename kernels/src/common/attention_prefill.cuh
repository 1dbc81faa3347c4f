#include "common/codes.cuh"

// Attention of many queries over a cache, whose kernels are in hopper/attention_prefill.cu, of a cache in bf16, and in
// hopper/attention_prefill_fp8.cu. Codes of FP8 come to shared memory in the place of what they become: 16 of them
// where a thread finds its own, and makes 32 bytes of f16 of them while the next tile is on its way. Queries become
// f16 as well, where they stand.

#define BLOCK 16                 // Queries of a block; row r of its product is query r / 8, head r % 8.
#define SPAN 80                  // Keys of a tile.
#define SLOTS 4                  // Tiles of keys, and of values, that are on their way or in use.
#define SLOT (SPAN * ROW)
#define QUERIES (BLOCK * GROUP * ROW)
#define PREFILL_SHARED (QUERIES + SLOTS * SLOT + 256)
#define PART (H + 4)             // Floats of a row of a part.
#define LOADERS 128              // Threads that load.
#define MULTIPLIERS 8            // Warps that multiply.

// A row of 16-byte chunks as wgmma wants it: 64 columns after another, eight rows put a chunk in eight places.
__device__ inline unsigned spread(int row, int c, int rows)
{
    return (c / 8 * rows + row) * 128 + (c ^ row & 7) % 8 * 16;
}

// Of two values those that are numbers; zero for the others.
__device__ inline unsigned finite(unsigned both)
{
    const unsigned low = (both & 0x7f80u) == 0x7f80u ? 0 : both & 0xffffu;
    return (both & 0x7f800000u) == 0x7f800000u ? low : low | both & 0xffff0000u;
}

// The same of four codes; whether there were others is added to.
__device__ inline unsigned finite_codes(unsigned four, unsigned& others)
{
    const unsigned none = ((four & 0x7f7f7f7fu) + 0x01010101u & 0x80808080u) >> 7;
    others |= none;
    return four & ~(none * 0xffu);
}

// How the keys of a block of queries are shared out: tiles of a part, and how many parts have any.
struct Share {
    int size, used;

    __device__ Share(int keys, int PARTS)
    {
        const int tiles = (keys + SPAN - 1) / SPAN;
        size = PARTS == 1 ? tiles : max((tiles + PARTS - 1) / PARTS, 4);
        used = (tiles + size - 1) / size;
    }
};

// A piece of work: some queries and some of the tiles of keys that they see.
struct Work {
    Seen seen;
    int kv;          // Its head of keys and values; none if nothing is left.
    int strange;     // Whether values were left out.
    int begin, end;  // Tiles.
    int block;       // Which queries, counted from the last of all.
    int part, used;  // Which part of their keys, of how many.
};

// What is in shared memory behind queries and tiles.
struct Board {
    Work work[2];  // Of even and odd pieces.
    // Barriers: the next piece is on the board; its queries are there; they are no longer needed; a tile is
    // there; it is no longer needed.
    unsigned long long told, queries_full, queries_empty, full[SLOTS], empty[SLOTS];

    __device__ void wait_full(unsigned unit) { barrier_wait(shared_address(full + unit % SLOTS), unit / SLOTS & 1); }
    __device__ void wait_empty(unsigned unit)
    {
        barrier_wait(shared_address(empty + unit % SLOTS), unit / SLOTS & 1 ^ 1);
    }
};

// Which piece a ticket is for: all of the first head, then of the next; of the last sequence, then of the
// one before; of a sequence from the last queries on.
__device__ inline Work work_of(int ticket, const long long* cu_seqlens_q, const long long* cu_seqlens_k, int S,
                               int HKV, int PARTS, int plant)
{
    Work work;
    int left = ticket / PARTS;
    work.strange = 0;
    work.part = ticket % PARTS;
    for (work.kv = 0; work.kv < HKV; work.kv++) {
        work.block = 0;
        for (int s = S - 1; 0 <= s; s--) {
            const int blocks = (int)((cu_seqlens_q[s + 1] - cu_seqlens_q[s] + BLOCK - 1) / BLOCK);
            if (left < blocks) {
                work.seen = Seen(cu_seqlens_q, cu_seqlens_k, s, (blocks - 1 - left) * BLOCK, BLOCK, plant);
                const Share share(work.seen.most, PARTS);
                work.block += left;
                work.used = share.used;
                work.begin = work.part * share.size;
                work.end = min((work.part + 1) * share.size, (work.seen.most + SPAN - 1) / SPAN);
                return work;
            }
            left -= blocks;
            work.block += blocks;
        }
    }
    work.kv = -1;
    return work;
}

// Where a row of a part is in the workspace: its answers, largest score in powers of two, sum.
__device__ inline float* part_of(float* parts, int block, int kv, int HKV, int part, int PARTS, int row)
{
    return parts + ((((size_t)block * HKV + kv) * PARTS + part) * BLOCK * GROUP + row) * PART;
}

// What is loaded, tile after tile, of a cache of C.
template <class C> struct Loader {
    static constexpr bool CODES = sizeof(C) == 1;

    Board& board;
    unsigned queries, ring;
    unsigned unit;  // Tiles so far.
    int warp, c;    // Rows warp, warp + 4 and so on; chunk c.

    // Of a tile of codes: rows `row`, row + 8 and so on, chunk `codes` of 16; where they stand in the first row until
    // they are f16, and where the other half of that is to be.
    __device__ int row() const { return CODES ? 2 * warp + c / 16 : warp; }
    __device__ int codes() const { return c % 16; }
    __device__ unsigned own(unsigned unit) const
    {
        return ring + unit % SLOTS * SLOT + spread(row(), 2 * codes() + codes() / 4 % 2, SPAN);
    }
    __device__ unsigned other(unsigned unit) const
    {
        return ring + unit % SLOTS * SLOT + spread(row(), 2 * codes() + 1 - codes() / 4 % 2, SPAN);
    }

    // A tile of keys or values of which so many rows are there.
    __device__ void tile(const C* at, size_t stride, int rows)
    {
        if (CODES) {
            const unsigned to = own(unit);
#pragma unroll
            for (int i = 0; i < SPAN / 8; i++) {
                const bool there = row() + 8 * i < rows;
                copy_16(to + i * 8 * 128, there ? at + i * 8 * stride : at, there ? 16 : 0);
            }
            return;
        }
        const unsigned to = ring + unit % SLOTS * SLOT;
        const unsigned even = to + spread(warp, c, SPAN), odd = to + spread(warp + 4, c, SPAN) - 4 * 128;
        if (rows == SPAN) {
#pragma unroll
            for (int i = 0; i < SPAN / 4; i++) copy_16((i % 2 ? odd : even) + i * 4 * 128, at + i * 4 * stride);
        } else {
#pragma unroll 2
            for (int i = 0; i < SPAN / 4; i++) {
                const bool there = warp + 4 * i < rows;
                copy_16((i % 2 ? odd : even) + i * 4 * 128, there ? at + i * 4 * stride : at, there ? 16 : 0);
            }
        }
    }

    // Of the values that this thread has loaded those from row `least` on that are no numbers become zero.
    __device__ void clean(int least, int rows, int* strange)
    {
        close_group();
        wait_for_groups<0>();
        for (int row = warp; row < rows; row += 4) {
            if (row < least) continue;
            const unsigned here = ring + unit % SLOTS * SLOT + spread(row, c, SPAN);
            for (int e = 0; e < 4; e++) {
                const unsigned both = read_word(here + 4 * e);
                if (finite(both) == both) continue;
                *(volatile int*)strange = 1;
                write_word(here + 4 * e, finite(both));
            }
        }
    }

    // Codes of a unit become f16; those from row `least` on that are no numbers become zero.
    __device__ void widen(unsigned unit, int least, int* strange)
    {
        const unsigned to = own(unit), beside = other(unit);
        const bool swapped = codes() / 4 % 2;
#pragma unroll 1
        for (int i = 0; i < SPAN / 8; i += 2) {
            const uint4 both[2] = {read_chunk(to + i * 8 * 128), read_chunk(to + (i + 1) * 8 * 128)};
            unsigned wide[2][8];
#pragma unroll
            for (int j = 0; j < 2; j++) {
                // What becomes of the half that is written here first.
                const uint4 x = both[j], of = swapped ? make_uint4(x.z, x.w, x.x, x.y) : x;
                unsigned four[4] = {of.x, of.y, of.z, of.w};
                if (least <= row() + 8 * (i + j)) {
                    unsigned others = 0;
#pragma unroll
                    for (int e = 0; e < 4; e++) four[e] = finite_codes(four[e], others);
                    if (others) *(volatile int*)strange = 1;
                }
#pragma unroll
                for (int e = 0; e < 8; e++) wide[j][e] = f16_of(four[e / 2] >> e % 2 * 16);
            }
#pragma unroll
            for (int j = 0; j < 2; j++) {
                const unsigned(&x)[8] = wide[j];
                write_chunk(to + (i + j) * 8 * 128, make_uint4(x[0], x[1], x[2], x[3]));
                write_chunk(beside + (i + j) * 8 * 128, make_uint4(x[4], x[5], x[6], x[7]));
            }
        }
        barrier_arrive(shared_address(board.full + unit % SLOTS));
    }

    __device__ unsigned full() const { return shared_address(board.full + unit % SLOTS); }

    // Queries; keys and values from the last tile down, keys of a tile before values of the one before;
    // and the gate of each half of the queries, in whose place their answers are gathered. Values that not
    // every query sees, and that are no numbers, are left out; add_strange() brings them back to those who
    // see them.
    __device__ void piece(Work& work, const bf16* q, const C* k, const C* v, const bf16* gate, int HKV, int plant)
    {
        rows_of_queries<BLOCK * GROUP>(work, q, 0, queries, HKV, plant);
        barrier_arrive_after_copies(shared_address(&board.queries_full));

        const int tiles = work.end - work.begin, last = work.end - 1, least = work.seen.by(0), most = work.seen.most;
        const size_t stride = (size_t)HKV * H, corner = ((work.seen.first + row()) * HKV + work.kv) * H;
        k += corner + (CODES ? codes() * 16 : c * 8);
        v += corner + (CODES ? codes() * 16 : c * 8);
        int before = SPAN;  // From which row on the values of the tile before are not seen by every query.
        for (int i = 0; i < 2 * tiles + CODES; i++) {
            const bool is_value = i % 2 == 0 ? i != 0 : i == 2 * tiles - 1;
            const int start = (last - (is_value ? (i - 1) / 2 : (i + 1) / 2)) * SPAN, rows = min(SPAN, most - start);
            if (i < 2 * tiles) {
                board.wait_empty(unit);
                // A row that is not read may lie behind the last.
                tile((is_value ? v : k) + (row() < rows ? start : -row()) * (long long)stride, stride, rows);
            }
            if (CODES) {
                close_group();
                wait_for_groups<1>();
                if (i != 0) widen(unit - 1, before, &work.strange);
                before = is_value ? least - start : SPAN;
            } else if (is_value && least < start + SPAN) {
                clean(least - start, rows, &work.strange);
                barrier_arrive(full());
            } else {
                barrier_arrive_after_copies(full());
            }
            if (i < 2 * tiles) unit++;
        }
        for (int half = 0; half < 2 && work.used == 1; half++, unit++) {
            board.wait_empty(unit);
            const unsigned to = ring + unit % SLOTS * SLOT;
            if (gate) rows_of_queries<BLOCK * GROUP / 2>(work, gate, half * BLOCK / 2, to, HKV, plant);
            barrier_arrive_after_copies(full());
        }
    }

    // Rows of all heads of queries from j on.
    template <int ROWS>
    __device__ void rows_of_queries(const Work& work, const bf16* x, int j, unsigned to, int HKV, int plant)
    {
#pragma unroll 4
        for (int i = 0; i < ROWS / 4; i++) {
            const int row = warp + 4 * i, query = j + row / GROUP;
            const bool there = query < work.seen.queries;
            const int head = head_of(row % GROUP, work.kv, HKV, plant);
            const size_t at = ((work.seen.query + (there ? query : 0)) * HKV * GROUP + head) * H + c * 8;
            copy_16(to + spread(row, c, ROWS), x + at, there ? 16 : 0);
        }
    }
};

// Two values of a key are added, as far as they were left out; an infinite one stays so whatever it weighs.
__device__ inline void add_strange(float& low, float& high, unsigned both)
{
    if ((both & 0x7f80u) == 0x7f80u) low += low_of(both);
    if ((both & 0x7f800000u) == 0x7f800000u) high += high_of(both);
}

__device__ inline unsigned two_of(const bf16* at) { return word(at); }
__device__ inline unsigned two_of(const Code* at) { return bf16_of(*(const unsigned short*)at); }

// The queries of a warp from bf16 to f16, two lanes to each of its 16 rows from `first` on: times the power of two that
// brings the largest channel to 2^14 (attention_decode.cuh). What undoes it of rows g and g + 8 comes back.
__device__ inline void narrow_queries(unsigned queries, int first, float (&back)[2])
{
    const int lane = threadIdx.x % 32, row = first + lane / 2;
    const auto place = [&](int i) { return queries + spread(row, lane % 2 * 20 ^ i, BLOCK * GROUP); };
    int exponent = 15;
#pragma unroll 4
    for (int i = 0; i < 16; i++) {
        const uint4 x = read_chunk(place(i));
        exponent = largest_exponent(exponent, x.x), exponent = largest_exponent(exponent, x.y);
        exponent = largest_exponent(exponent, x.z), exponent = largest_exponent(exponent, x.w);
    }
    exponent = max(exponent, __shfl_xor_sync(~0u, exponent, 1));
#pragma unroll 4
    for (int i = 0; i < 16; i++) {
        const uint4 x = read_chunk(place(i));
        write_chunk(place(i), make_uint4(lifted(x.x, exponent), lifted(x.y, exponent), lifted(x.z, exponent),
                                         lifted(x.w, exponent)));
    }
    back[0] = undone(__shfl_sync(~0u, exponent, lane / 4 * 2));
    back[1] = undone(__shfl_sync(~0u, exponent, lane / 4 * 2 + 16));
}

template <class C>
__device__ void prefill(bf16* o, const bf16* q, const C* k, const C* v, const bf16* gate,
                        const long long* cu_seqlens_q, const long long* cu_seqlens_k, float* parts, int* tickets, int S,
                        int HKV, int PARTS, int plant)
{
    extern __shared__ __align__(1024) unsigned char shared[];
    const unsigned queries = shared_address(shared), ring = queries + QUERIES;
    Board& board = *(Board*)(shared + QUERIES + SLOTS * SLOT);
    const bool is_gated = gate && plant != GATE_MISSING;
    if (threadIdx.x == 0) {
        barrier_start(shared_address(&board.told), 1);
        barrier_start(shared_address(&board.queries_full), LOADERS);
        barrier_start(shared_address(&board.queries_empty), MULTIPLIERS);
        for (int i = 0; i < SLOTS; i++) {
            barrier_start(shared_address(board.full + i), LOADERS);
            barrier_start(shared_address(board.empty + i), MULTIPLIERS);
        }
    }
    __syncthreads();

    if (threadIdx.x < LOADERS) {
        give_registers_back<56>();
        Loader<C> loader = {board, queries, ring, 0, (int)threadIdx.x / 32, (int)threadIdx.x % 32};
        int ticket = blockIdx.x;
        for (int piece = 0;; piece++) {
            Work& work = board.work[piece % 2];
            barrier_wait(shared_address(&board.queries_empty), piece & 1 ^ 1);
            if (threadIdx.x == 0) {
                work = work_of(ticket, cu_seqlens_q, cu_seqlens_k, S, HKV, PARTS, plant);
                while (0 <= work.kv && work.used <= work.part) {
                    ticket = gridDim.x + atomicAdd(tickets, 1);
                    work = work_of(ticket, cu_seqlens_q, cu_seqlens_k, S, HKV, PARTS, plant);
                }
                barrier_arrive(shared_address(&board.told));
            }
            asm volatile("bar.sync 1, %0;" :: "n"(LOADERS) : "memory");
            if (work.kv < 0) break;
            if (threadIdx.x == 0) ticket = gridDim.x + atomicAdd(tickets, 1);
            loader.piece(work, q, k, v, is_gated ? gate : nullptr, HKV, plant);
        }
        wait_for_groups<0>();
        // The last block to find nothing leaves the tickets as they were.
        if (threadIdx.x == 0 && atomicAdd(tickets + 1, 1) == gridDim.x - 1) tickets[0] = tickets[1] = 0;
        return;
    }
    take_registers<224>();
    const int group = threadIdx.x / 128 - 1, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
    const int g = lane / 4, t = lane % 4, mine = group * 8 + warp * 2;  // Queries mine and mine + 1, head g.
    constexpr bool CODES = sizeof(C) == 1;
    float scales[2] = {scale_of(plant), scale_of(plant)};  // Of rows g and g + 8.

    // Scores of rows g and g + 8 of the warp, columns 8 i + 2 t and the next: s[4 i], s[4 i + 1], and s[4 i + 2],
    // s[4 i + 3]. Answers in the same order.
    float score[SPAN / 2], out[H / 2];
    unsigned p[SPAN / 4], unit = 0;

    const unsigned query_matrix = uniform(matrix_at(queries + group * 64 * 128, 16));
    const auto multiply_keys = [&](unsigned unit) {
        const unsigned key_matrix = uniform(matrix_at(ring + unit % SLOTS * SLOT, 16));
#pragma unroll
        for (int c = 0; c < H / 16; c++) {
            const auto a = matrix(query_matrix + (c / 4 * BLOCK * GROUP * 128 + c % 4 * 32) / 16);
            const auto b = matrix(key_matrix + (c / 4 * SPAN * 128 + c % 4 * 32) / 16);
            if (CODES) wgmma_n80_f16(score, a, b, c != 0);
            else wgmma_n80(score, a, b, c != 0);
        }
        wgmma_close();
    };
    const auto multiply_values = [&](unsigned unit) {
        const unsigned value_matrix = uniform(matrix_at(ring + unit % SLOTS * SLOT, SPAN * 128));
#pragma unroll
        for (int c = 0; c < SPAN / 16; c++) {
            const auto b = matrix(value_matrix + c * 16 * 128 / 16);
            if (CODES) wgmma_n256_f16(out, p + 4 * c, b);
            else wgmma_n256(out, p + 4 * c, b);
        }
        wgmma_close();
    };
    const auto release = [&](unsigned unit) {
        if (lane == 0) barrier_arrive(shared_address(board.empty + unit % SLOTS));
    };
    const auto narrow = [&] {
#pragma unroll
        for (int i = 0; i < SPAN / 4; i++)
            p[i] = CODES ? pack_f16(score[2 * i], score[2 * i + 1]) : pack(score[2 * i], score[2 * i + 1]);
    };

    for (int piece = 0;; piece++) {
        barrier_wait(shared_address(&board.told), piece & 1);
        const Work& work = board.work[piece % 2];
        if (work.kv < 0) return;
        const int begin = work.begin, end = work.end;
        const int limits[2] = {work.seen.by(mine), work.seen.by(mine + 1)};
        float top[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0}, kept[2];
#pragma unroll
        for (int i = 0; i < H / 2; i++) out[i] = 0;

        // Scores of a tile become what they weigh; what was added before weighs `kept` of it.
        const auto weigh = [&](int tile) {
            if (limits[0] < (tile + 1) * SPAN) {
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    const int left = limits[half] - tile * SPAN - 2 * t;
#pragma unroll
                    for (int i = 0; i < SPAN / 8; i++)
#pragma unroll
                        for (int e = 0; e < 2; e++)
                            if (left <= 8 * i + e) score[4 * i + 2 * half + e] = -INFINITY;
                }
            }
#pragma unroll
            for (int half = 0; half < 2; half++) {
                float raised = top[half];
#pragma unroll
                for (int i = 0; i < SPAN / 8; i++)
                    raised = fmaxf(raised, fmaxf(score[4 * i + 2 * half], score[4 * i + 2 * half + 1]));
                raised = fmaxf(raised, __shfl_xor_sync(~0u, raised, 1));
                raised = fmaxf(raised, __shfl_xor_sync(~0u, raised, 2));
                // Where nothing was seen yet nothing is subtracted, and nothing is kept.
                const float base = raised == -INFINITY ? 0 : raised * scales[half];
                kept[half] = exp2_fast(top[half] * scales[half] - base);
                if (plant == SUM_NOT_RESCALED) kept[half] = 1;
                top[half] = raised;
                float added = 0;
#pragma unroll
                for (int i = 0; i < SPAN / 8; i++)
#pragma unroll
                    for (int e = 0; e < 2; e++) {
                        float& x = score[4 * i + 2 * half + e];
                        x = exp2_fast(x * scales[half] - base);
                        added += x;
                    }
                sum[half] = sum[half] * kept[half] + added;
            }
        };

        barrier_wait(shared_address(&board.queries_full), piece & 1);
        if (CODES) {
            float back[2];
            narrow_queries(queries, group * 64 + warp * 16, back);
            for (int half = 0; half < 2; half++) scales[half] = scale_of(plant) * back[half];
            fence_for_wgmma();
            asm volatile("bar.sync %0, 128;" :: "r"(2 + group) : "memory");
        }
        board.wait_full(unit);
        fence_for_wgmma();
        hold(score);
        wgmma_begin();
        multiply_keys(unit);
        wgmma_wait<0>();
        hold(score);
        release(unit++);
        weigh(end - 1);
        narrow();
        for (int tile = end - 2; begin <= tile; tile--, unit += 2) {
            board.wait_full(unit);
            fence_for_wgmma();
            hold(score);
            hold(p);
            hold(out);
            wgmma_begin();
            multiply_keys(unit);
            board.wait_full(unit + 1);
            fence_for_wgmma();
            wgmma_begin();
            multiply_values(unit + 1);
            // While values are multiplied, the next scores are weighed.
            wgmma_wait<1>();
            hold(score);
            release(unit);
            weigh(tile);
            wgmma_wait<0>();
            hold(out);
            hold(p);
            release(unit + 1);
            narrow();
            if (__any_sync(~0u, kept[0] != 1 || kept[1] != 1)) {
#pragma unroll
                for (int n = 0; n < H / 2; n++) out[n] *= kept[n / 2 % 2];
            }
        }
        if (lane == 0) barrier_arrive(shared_address(&board.queries_empty));
        board.wait_full(unit);
        fence_for_wgmma();
        hold(p);
        hold(out);
        wgmma_begin();
        multiply_values(unit);
        wgmma_wait<0>();
        hold(out);
        release(unit++);

        const Seen seen = work.seen;
        const int kv = work.kv;
        if (*(volatile const int*)&work.strange) {
            for (int key = max(seen.by(0), begin * SPAN); key < min(seen.most, end * SPAN); key++) {
                const C* value = v + ((seen.first + key) * HKV + kv) * H + 2 * t;
#pragma unroll
                for (int i = 0; i < H / 8; i++) {
                    const unsigned both = two_of(value + 8 * i);
                    if (finite(both) == both) continue;
                    if (key < limits[0]) add_strange(out[4 * i], out[4 * i + 1], both);
                    if (key < limits[1]) add_strange(out[4 * i + 2], out[4 * i + 3], both);
                }
            }
        }
#pragma unroll
        for (int half = 0; half < 2; half++) {
            sum[half] += __shfl_xor_sync(~0u, sum[half], 1);
            sum[half] += __shfl_xor_sync(~0u, sum[half], 2);
        }
        if (work.used != 1) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                if (seen.queries <= mine + half) continue;
                float* part = part_of(parts, work.block, kv, HKV, work.part, PARTS, (mine + half) * GROUP + g);
                if (t == 0) *(float2*)(part + H) = {top[half] * scales[half], sum[half]};
#pragma unroll
                for (int i = 0; i < H / 8; i++)
                    *(float2*)(part + 8 * i + 2 * t) = {out[4 * i + 2 * half], out[4 * i + 2 * half + 1]};
            }
            continue;
        }
        // Answers take the place of their gate, and go out by rows.
        if (group == 1) {
            board.wait_full(unit);
            release(unit);
        }
        board.wait_full(unit + group);
        const unsigned gathered = ring + (unit + group) % SLOTS * SLOT;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const float share = 1 / sum[half];
#pragma unroll
            for (int i = 0; i < H / 8; i++) {
                const unsigned at = gathered + spread(warp * 16 + g + 8 * half, i, 64) + 4 * t;
                const float low = out[4 * i + 2 * half] * share, high = out[4 * i + 2 * half + 1] * share;
                write_word(at, is_gated ? gated(low, high, read_word(at)) : pack(low, high));
            }
        }
        __syncwarp();
#pragma unroll 4
        for (int row = 0; row < 16; row++) {
            const int j = mine + row / GROUP, head = head_of(row % GROUP, kv, HKV, plant);
            if (seen.queries <= j) break;
            const uint4 chunk = read_chunk(gathered + spread(warp * 16 + row, lane, 64));
            *(uint4*)(o + ((seen.query + j) * HKV * GROUP + head) * H + lane * 8) = chunk;
        }
        __syncwarp();
        release(unit + group);
        if (group == 0) {
            board.wait_full(unit + 1);
            release(unit + 1);
        }
        unit += 2;
    }
}
