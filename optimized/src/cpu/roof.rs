//! The most that a processor does: reading memory, changing it in place, and products of each kind with
//! everything at hand. What a kernel does is a share of these.

use std::hint::black_box;

use half::bf16;

use super::{
    aligned::Aligned,
    pool,
    simd::{LANES, PAIRS, QUADS, Simd, map},
};

/// A kind of work whose pace bounds kernels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// Bytes read, once each.
    Read,
    /// Bytes read and written in their place; each counts twice.
    Change,
    /// Bytes read in one place and written in another; each counts twice.
    Copy,
    /// Multiplications and additions in f32.
    F32,
    /// The same of bf16 pairs.
    Bf16,
    /// The same of pairs of whole numbers of 16 bits.
    Int16,
    /// The same of bytes.
    Int8,
}

/// Memory to read and to change: more than any cache holds.
pub struct Memory(Aligned<f32>);

impl Memory {
    /// [`AWAY`] bytes, written once, each thread its own.
    #[expect(clippy::new_without_default, reason = "it takes memory")]
    pub fn new() -> Memory {
        let mut numbers = Aligned::zeros(AWAY / size_of::<f32>());
        pool::pieces(&mut numbers, STRETCH, |_, numbers| numbers.fill(1.0));
        Memory(numbers)
    }
}

/// Bytes of which caches keep nothing by the time that one comes back to the first.
pub(super) const AWAY: usize = 1 << 29;

/// Numbers of a task.
const STRETCH: usize = 1 << 18;

/// Lines between what is read and what memory is asked for.
const AHEAD: usize = 64;

/// Rounds of a task.
const ROUNDS: usize = 1 << 16;

/// Independent sums: more than the depth of any multiplier.
const SUMS: usize = 12;

/// Does some work on all threads; returns how much: bytes, or operations (a multiplication and an
/// addition are two).
pub fn work(kind: Work, memory: &mut Memory) -> u64 {
    #[cfg(target_arch = "x86_64")]
    {
        if let Some(s) = super::avx512::Avx512::new() {
            return work_on(s, kind, memory);
        }
        if let Some(s) = super::avx2::Avx2::new() {
            return work_on(s, kind, memory);
        }
    }
    work_on(super::simd::Plain, kind, memory)
}

fn work_on<S: Simd>(s: S, kind: Work, memory: &mut Memory) -> u64 {
    let tasks = 4 * rayon::current_num_threads();
    let each = match kind {
        Work::Read => {
            pool::each(memory.0.len().div_ceil(STRETCH), |i| {
                let own = &memory.0[i * STRETCH..memory.0.len().min((i + 1) * STRETCH)];
                let all = s.run(
                    #[inline(always)]
                    || {
                        let mut sums = [s.splat(0.0); 4];
                        // One line after another, asked a little ahead: of the ways that were tried two
                        // cores get the most so.
                        for (i, lines) in own.as_chunks::<LANES>().0.chunks_exact(4).enumerate() {
                            for (at, (line, sum)) in lines.iter().zip(&mut sums).enumerate() {
                                s.ahead(own, (4 * i + at + AHEAD) * LANES);
                                *sum = s.max(*sum, s.load::<f32>(line));
                            }
                        }
                        s.sum(s.max(s.max(sums[0], sums[1]), s.max(sums[2], sums[3])))
                    },
                );
                black_box(all);
            });
            return (size_of::<f32>() * memory.0.len()) as u64;
        }
        Work::Change => {
            pool::pieces(&mut memory.0, STRETCH, |_, own| {
                s.run(
                    #[inline(always)]
                    || {
                        // One stays one, however often this is done.
                        let half = s.splat(black_box(0.5));
                        map(
                            s,
                            own,
                            #[inline(always)]
                            |x| s.fma(x, half, half),
                        );
                    },
                );
            });
            return (2 * size_of::<f32>() * memory.0.len()) as u64;
        }
        Work::Copy => {
            let half = memory.0.len() / 2;
            // One piece a thread: who copies much writes past the caches.
            let piece = half.div_ceil(rayon::current_num_threads());
            let (to, from) = memory.0.split_at_mut(half);
            pool::pieces(to, piece, |i, own| own.copy_from_slice(&from[i * piece..][..own.len()]));
            return (2 * size_of::<f32>() * half) as u64;
        }
        Work::F32 => 2 * LANES,
        Work::Bf16 | Work::Int16 => 2 * PAIRS,
        Work::Int8 => 2 * QUADS,
    };
    pool::each(tasks, |_| {
        s.run(
            #[inline(always)]
            || {
                let x = black_box([1.0_f32; LANES]);
                let h = black_box([bf16::ONE; PAIRS]);
                let w = black_box([1_u8; QUADS]);
                let (x, h, w) = (s.load(&x), s.halves(&h), s.bytes(&w));
                let pair = s.word_pair(black_box([1; 2]));
                let mut sums = [s.splat(0.0); SUMS];
                let mut whole = [s.int(0); SUMS];
                for _ in 0..ROUNDS {
                    match kind {
                        Work::F32 => sums.iter_mut().for_each(
                            #[inline(always)]
                            |sum| *sum = s.fma(x, x, *sum),
                        ),
                        Work::Bf16 => sums.iter_mut().for_each(
                            #[inline(always)]
                            |sum| *sum = s.pairs(*sum, h, h),
                        ),
                        Work::Int16 => whole.iter_mut().for_each(
                            #[inline(always)]
                            |sum| *sum = s.word_pairs(*sum, pair, pair),
                        ),
                        Work::Int8 | Work::Read | Work::Change | Work::Copy => {
                            whole.iter_mut().for_each(
                                #[inline(always)]
                                |sum| *sum = s.quads(*sum, w, [1; 4]),
                            );
                        }
                    }
                }
                let mut o = [0.0; LANES];
                for (sum, whole) in sums.into_iter().zip(whole) {
                    s.store(&mut o, s.add(sum, s.number(whole)));
                    black_box(o);
                }
            },
        );
    });
    (tasks * ROUNDS * SUMS * each) as u64
}
