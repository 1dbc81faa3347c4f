//! The words of [`Simd`] in AVX2, FMA and F16C: two registers of eight lanes for sixteen numbers.
#![expect(unsafe_code, reason = "intrinsics may run only where the processor has them")]
// One argument holds for every block below: an `Avx2` exists only where `new` found the features,
// so that their instructions may be executed; pointers come from references of the length that is
// read or written.
#![expect(
    clippy::undocumented_unsafe_blocks,
    clippy::multiple_unsafe_ops_per_block,
    reason = "argued once, above"
)]
#![expect(clippy::cast_ptr_alignment, reason = "loads that ask for no alignment")]

use std::arch::x86_64::{
    __m128i, __m256, __m256i, _CMP_UNORD_Q, _MM_FROUND_NO_EXC, _MM_FROUND_TO_NEAREST_INT,
    _MM_HINT_T1, _mm_add_ps, _mm_add_ss, _mm_cvtss_f32, _mm_loadl_epi64, _mm_loadu_si128,
    _mm_movehl_ps, _mm_prefetch, _mm_set1_epi32, _mm_shuffle_ps, _mm256_add_epi32, _mm256_add_ps,
    _mm256_and_si256, _mm256_blendv_ps, _mm256_castps_si256, _mm256_castps256_ps128,
    _mm256_castsi256_ps, _mm256_cmp_ps, _mm256_cvtepi8_epi16, _mm256_cvtepi32_ps,
    _mm256_cvtepu8_epi32, _mm256_cvtepu16_epi32, _mm256_cvtph_ps, _mm256_cvtps_epi32,
    _mm256_div_ps, _mm256_extractf128_ps, _mm256_fmadd_ps, _mm256_hadd_epi32, _mm256_i32gather_ps,
    _mm256_loadu_ps, _mm256_loadu_si256, _mm256_madd_epi16, _mm256_max_epi32, _mm256_max_ps,
    _mm256_min_ps, _mm256_mul_ps, _mm256_packs_epi32, _mm256_permute4x64_epi64, _mm256_round_ps,
    _mm256_set1_epi8, _mm256_set1_epi32, _mm256_set1_ps, _mm256_setzero_ps, _mm256_setzero_si256,
    _mm256_slli_epi32, _mm256_srli_epi16, _mm256_storeu_ps, _mm256_storeu_si256, _mm256_sub_ps,
    _mm256_unpackhi_epi8, _mm256_unpacklo_epi8,
};

use half::{bf16, f16};

use super::simd::{
    FP8_WIDE, Factor, LANES, PAIRS, QUADS, Rows, Simd, Wide, each, fp8_by_table, outer, tiles,
};

/// Proof that the processor has AVX2, FMA and F16C.
#[derive(Clone, Copy)]
pub(crate) struct Avx2(());

/// Eight numbers from memory, widened.
pub(crate) trait Load: Sized {
    /// # Safety
    /// The processor has AVX2 and F16C, and eight numbers lie at `x`.
    unsafe fn eight(x: *const Self) -> __m256;
}

impl Load for f32 {
    #[inline(always)]
    unsafe fn eight(x: *const f32) -> __m256 {
        unsafe { _mm256_loadu_ps(x) }
    }
}

impl Load for bf16 {
    #[inline(always)]
    unsafe fn eight(x: *const bf16) -> __m256 {
        let bits = unsafe { _mm_loadu_si128(x.cast::<__m128i>()) };
        unsafe { _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(bits))) }
    }
}

impl Load for f16 {
    #[inline(always)]
    unsafe fn eight(x: *const f16) -> __m256 {
        unsafe { _mm256_cvtph_ps(_mm_loadu_si128(x.cast::<__m128i>())) }
    }
}

type Eight = __m256;

#[target_feature(enable = "avx2,fma,f16c")]
fn compiled_here<T>(job: impl FnOnce() -> T) -> T {
    job()
}

/// A word of two registers from one of one register.
macro_rules! both {
    ($a:ident, $word:expr) => {
        [$a[0], $a[1]].map(|a| unsafe { $word(a) })
    };
    ($a:ident, $b:ident, $word:expr) => {
        unsafe { [$word($a[0], $b[0]), $word($a[1], $b[1])] }
    };
}

impl Simd for Avx2 {
    const NAME: &'static str = "avx2";
    const REGISTERS: usize = 8;
    type F = [Eight; 2];
    type H = [[Eight; 2]; 2];
    type I = [__m256i; 2];
    type W = [__m256i; 2];
    type B = [__m256i; 2];

    fn new() -> Option<Avx2> {
        let has = is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c");
        has.then_some(Avx2(()))
    }

    #[inline(always)]
    fn run<T>(self, job: impl FnOnce() -> T) -> T {
        unsafe { compiled_here(job) }
    }

    #[inline(always)]
    fn splat(self, x: f32) -> Self::F {
        [unsafe { _mm256_set1_ps(x) }; 2]
    }

    #[inline(always)]
    fn load<W: Wide>(self, x: &[W; LANES]) -> Self::F {
        let x = x.as_ptr();
        unsafe { [W::eight(x), W::eight(x.add(8))] }
    }

    #[inline(always)]
    fn halves(self, x: &[bf16; PAIRS]) -> Self::H {
        let start = x.as_ptr().cast::<__m256i>();
        unsafe {
            let (a, b) = (_mm256_loadu_si256(start), _mm256_loadu_si256(start.add(1)));
            let even = |x: __m256i| _mm256_castsi256_ps(_mm256_slli_epi32::<16>(x));
            let high = _mm256_set1_epi32(0xffff_0000_u32 as i32);
            let odd = |x: __m256i| _mm256_castsi256_ps(_mm256_and_si256(x, high));
            [[even(a), even(b)], [odd(a), odd(b)]]
        }
    }

    #[inline(always)]
    fn pair(self, x: [bf16; 2]) -> Self::H {
        [self.splat(x[0].to_f32()), self.splat(x[1].to_f32())]
    }

    #[inline(always)]
    fn fp8(self, x: &[u8; QUADS]) -> [Self::H; 2] {
        let [low, high] = fp8_by_table(x);
        [self.halves(&low), self.halves(&high)]
    }

    #[inline(always)]
    fn fp8_wide(self, x: &[u8; QUADS]) -> [Self::F; 4] {
        let start = x.as_ptr();
        each(
            self.splat(0.0),
            #[inline(always)]
            |i| unsafe {
                [numbers(start.add(LANES * i)), numbers(start.add(LANES * i + LANES / 2))]
            },
        )
    }

    #[inline(always)]
    fn pairs(self, acc: Self::F, a: Self::H, b: Self::H) -> Self::F {
        self.fma(a[1], b[1], self.fma(a[0], b[0], acc))
    }

    #[inline(always)]
    fn narrow(self, o: &mut [bf16; LANES], x: Self::F) {
        let mut wide = [0.0; LANES];
        self.store(&mut wide, x);
        *o = wide.map(bf16::from_f32);
    }

    #[inline(always)]
    fn int(self, x: i32) -> Self::I {
        unsafe { [_mm256_set1_epi32(x); 2] }
    }

    #[inline(always)]
    fn number(self, x: Self::I) -> Self::F {
        unsafe { [_mm256_cvtepi32_ps(x[0]), _mm256_cvtepi32_ps(x[1])] }
    }

    #[inline(always)]
    fn bytes(self, x: &[u8; QUADS]) -> Self::B {
        let start = x.as_ptr().cast::<__m256i>();
        unsafe { [_mm256_loadu_si256(start), _mm256_loadu_si256(start.add(1))] }
    }

    #[inline(always)]
    fn nibbles(self, x: &[u8; QUADS]) -> [Self::B; 2] {
        let x = self.bytes(x);
        unsafe {
            let low = _mm256_set1_epi8(15);
            let high = [_mm256_srli_epi16::<4>(x[0]), _mm256_srli_epi16::<4>(x[1])];
            let low = |x: Self::B| [_mm256_and_si256(x[0], low), _mm256_and_si256(x[1], low)];
            [low(x), low(high)]
        }
    }

    /// In products of 16 bits: `maddubs` would saturate.
    #[inline(always)]
    fn quads(self, acc: Self::I, w: Self::B, x: [i8; 4]) -> Self::I {
        unsafe {
            let x = _mm256_cvtepi8_epi16(_mm_set1_epi32(i32::from_ne_bytes(x.map(|x| x as u8))));
            let zero = _mm256_setzero_si256();
            let quads = |acc: __m256i, w: __m256i| {
                let low = _mm256_madd_epi16(_mm256_unpacklo_epi8(w, zero), x);
                let high = _mm256_madd_epi16(_mm256_unpackhi_epi8(w, zero), x);
                _mm256_add_epi32(acc, _mm256_hadd_epi32(low, high))
            };
            [quads(acc[0], w[0]), quads(acc[1], w[1])]
        }
    }

    #[inline(always)]
    fn words(self, x: &[i8; PAIRS]) -> Self::W {
        let start = x.as_ptr().cast::<__m128i>();
        unsafe {
            let (a, b) = (_mm_loadu_si128(start), _mm_loadu_si128(start.add(1)));
            [_mm256_cvtepi8_epi16(a), _mm256_cvtepi8_epi16(b)]
        }
    }

    #[inline(always)]
    fn word_pair(self, [a, b]: [i16; 2]) -> Self::W {
        self.int(i32::from(a) & 0xffff | i32::from(b) << 16)
    }

    #[inline(always)]
    fn word_pairs(self, acc: Self::I, a: Self::W, b: Self::W) -> Self::I {
        unsafe {
            [
                _mm256_add_epi32(acc[0], _mm256_madd_epi16(a[0], b[0])),
                _mm256_add_epi32(acc[1], _mm256_madd_epi16(a[1], b[1])),
            ]
        }
    }

    #[inline(always)]
    fn ahead<T>(self, x: &[T], at: usize) {
        // A hint: an address that nobody has is no fault.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(x.as_ptr().wrapping_add(at).cast()) };
    }

    #[inline(always)]
    fn store(self, o: &mut [f32; LANES], x: Self::F) {
        let o = o.as_mut_ptr();
        unsafe { _mm256_storeu_ps(o, x[0]) };
        unsafe { _mm256_storeu_ps(o.add(8), x[1]) };
    }

    #[inline(always)]
    fn add(self, a: Self::F, b: Self::F) -> Self::F {
        both!(a, b, _mm256_add_ps)
    }

    #[inline(always)]
    fn sub(self, a: Self::F, b: Self::F) -> Self::F {
        both!(a, b, _mm256_sub_ps)
    }

    #[inline(always)]
    fn mul(self, a: Self::F, b: Self::F) -> Self::F {
        both!(a, b, _mm256_mul_ps)
    }

    #[inline(always)]
    fn div(self, a: Self::F, b: Self::F) -> Self::F {
        both!(a, b, _mm256_div_ps)
    }

    #[inline(always)]
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        unsafe { [_mm256_fmadd_ps(a[0], b[0], c[0]), _mm256_fmadd_ps(a[1], b[1], c[1])] }
    }

    #[inline(always)]
    fn max(self, a: Self::F, b: Self::F) -> Self::F {
        both!(a, b, _mm256_max_ps)
    }

    #[inline(always)]
    fn min(self, a: Self::F, b: Self::F) -> Self::F {
        both!(a, b, _mm256_min_ps)
    }

    #[inline(always)]
    fn round(self, x: Self::F) -> Self::F {
        both!(x, _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>)
    }

    #[inline(always)]
    fn pow2(self, n: Self::F) -> Self::F {
        n.map(|n| {
            let exponent =
                unsafe { _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)) };
            unsafe { _mm256_castsi256_ps(_mm256_slli_epi32::<23>(exponent)) }
        })
    }

    #[inline(always)]
    fn unless_nan(self, x: Self::F, y: Self::F) -> Self::F {
        both!(x, y, |x, y| _mm256_blendv_ps(y, x, _mm256_cmp_ps::<_CMP_UNORD_Q>(x, x)))
    }

    #[inline(always)]
    fn eights(self, o: &mut [i8; LANES], x: Self::F) {
        let mut wide = [0.0; LANES];
        self.store(&mut wide, x);
        for (o, x) in o.iter_mut().zip(wide) {
            *o = x as i8;
        }
    }

    #[inline(always)]
    fn sixteens(self, o: &mut [i16; PAIRS], x: [Self::F; 2], by: Self::F) {
        for (o, x) in o.as_chunks_mut::<LANES>().0.iter_mut().zip(x) {
            let x = self.mul(x, by);
            unsafe {
                // Packed within halves of a register.
                let packed = _mm256_packs_epi32(_mm256_cvtps_epi32(x[0]), _mm256_cvtps_epi32(x[1]));
                let inorder = _mm256_permute4x64_epi64::<0b11_01_10_00>(packed);
                _mm256_storeu_si256(o.as_mut_ptr().cast(), inorder);
            }
        }
    }

    #[inline(always)]
    fn sizes(self, most: Self::F, x: Self::F) -> Self::F {
        unsafe {
            let size = _mm256_set1_epi32(i32::MAX);
            let larger = |most: __m256, x: __m256| {
                let size = _mm256_and_si256(_mm256_castps_si256(x), size);
                _mm256_castsi256_ps(_mm256_max_epi32(_mm256_castps_si256(most), size))
            };
            [larger(most[0], x[0]), larger(most[1], x[1])]
        }
    }

    #[inline(always)]
    fn size(self, x: Self::F) -> f32 {
        let mut wide = [0.0_f32; LANES];
        self.store(&mut wide, x);
        f32::from_bits(wide.into_iter().fold(0, |most, x| most.max(x.abs().to_bits())))
    }

    #[inline(always)]
    fn largest(self, x: Self::F) -> f32 {
        let mut wide = [0.0; LANES];
        self.store(&mut wide, x);
        wide.into_iter().fold(f32::NEG_INFINITY, f32::max)
    }

    #[inline(always)]
    fn sum4(self, x: [Self::F; 4]) -> [f32; 4] {
        [self.sum(x[0]), self.sum(x[1]), self.sum(x[2]), self.sum(x[3])]
    }

    #[inline(always)]
    fn sum(self, x: Self::F) -> f32 {
        unsafe { sum(_mm256_add_ps(x[0], x[1])) }
    }

    #[inline(always)]
    fn dots<W: Wide, X: Wide, const R: usize, const T: usize>(
        self,
        w: [&[W]; R],
        x: [&[X]; T],
    ) -> [[f32; T]; R] {
        let len = x.first().map_or(0, |x| x.len());
        assert!(w.iter().all(|w| w.len() == len) && x.iter().all(|x| x.len() == len));
        let whole = len / 8 * 8;
        let mut sums = [[unsafe { _mm256_setzero_ps() }; T]; R];
        for at in (0..whole).step_by(8) {
            // `at + 8 <= whole <= len`.
            let w: [Eight; R] = each(
                unsafe { _mm256_setzero_ps() },
                #[inline(always)]
                |r| unsafe { W::eight(w[r].as_ptr().add(at)) },
            );
            for t in 0..T {
                let x = unsafe { X::eight(x[t].as_ptr().add(at)) };
                for r in 0..R {
                    sums[r][t] = unsafe { _mm256_fmadd_ps(w[r], x, sums[r][t]) };
                }
            }
        }
        if whole < len {
            for (sums, w) in sums.iter_mut().zip(w) {
                let w = unsafe { rest(&w[whole..]) };
                for (sum, x) in sums.iter_mut().zip(x) {
                    *sum = unsafe { _mm256_fmadd_ps(w, rest(&x[whole..]), *sum) };
                }
            }
        }
        let mut all = [[0.0; T]; R];
        for (all, sums) in all.iter_mut().zip(sums) {
            for (o, x) in all.iter_mut().zip(sums) {
                *o = unsafe { sum(x) };
            }
        }
        all
    }

    #[inline(always)]
    fn products<W: Wide, X: Wide>(
        self,
        w: Rows<'_, W>,
        x: Rows<'_, X>,
        put: impl FnMut(usize, usize, f32),
    ) {
        // Twelve sums, three rows and one column at hand: sixteen registers.
        tiles::<_, _, _, 3, 4, 6>(self, w, x, put);
    }

    #[inline(always)]
    fn accumulate<B: Wide>(self, o: &mut [f32], a: Factor<'_>, b: &[B], j: usize) {
        outer::<_, _, 6, 1>(self, o, a, b, j);
    }
}

/// The numbers of eight FP8 codes.
///
/// # Safety
/// The processor has AVX2, and eight codes lie at `codes`.
#[inline(always)]
unsafe fn numbers(codes: *const u8) -> Eight {
    unsafe {
        let codes = _mm256_cvtepu8_epi32(_mm_loadl_epi64(codes.cast()));
        _mm256_i32gather_ps::<4>(FP8_WIDE.as_ptr(), codes)
    }
}

/// Fewer than eight numbers, and zeros.
///
/// # Safety
/// The processor has AVX.
#[inline(always)]
unsafe fn rest<W: Wide>(x: &[W]) -> Eight {
    let mut eight = [0.0; 8];
    for (o, x) in eight.iter_mut().zip(x) {
        *o = x.load();
    }
    unsafe { _mm256_loadu_ps(eight.as_ptr()) }
}

/// Halves are added until one is left.
///
/// # Safety
/// The processor has AVX.
#[inline(always)]
unsafe fn sum(x: Eight) -> f32 {
    unsafe {
        let x = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
        let x = _mm_add_ps(x, _mm_movehl_ps(x, x));
        _mm_cvtss_f32(_mm_add_ss(x, _mm_shuffle_ps::<1>(x, x)))
    }
}
