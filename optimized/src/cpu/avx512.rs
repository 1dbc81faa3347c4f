//! The words of [`Simd`] in AVX-512: one register for sixteen numbers.
#![expect(unsafe_code, reason = "intrinsics may run only where the processor has them")]
// One argument holds for every block below: an `Avx512` exists only where `new` found the features,
// so that their instructions may be executed; pointers come from references of the length that is
// read or written.
#![expect(
    clippy::undocumented_unsafe_blocks,
    clippy::multiple_unsafe_ops_per_block,
    reason = "argued once, above"
)]
#![expect(clippy::cast_ptr_alignment, reason = "loads that ask for no alignment")]

use std::arch::x86_64::{
    __m256i, __m512, __m512bh, __m512i, _CMP_UNORD_Q, _MM_FROUND_NO_EXC, _MM_FROUND_TO_NEAREST_INT,
    _MM_FROUND_TO_NEG_INF, _MM_HINT_T1, _mm_add_ps, _mm_add_ss, _mm_cvtss_f32, _mm_movehl_ps,
    _mm_prefetch, _mm_shuffle_ps, _mm_storeu_ps, _mm_storeu_si128, _mm256_add_ps,
    _mm256_castps256_ps128, _mm256_extractf128_ps, _mm256_loadu_si256, _mm256_storeu_si256,
    _mm512_add_epi32, _mm512_add_ps, _mm512_and_si512, _mm512_castps_si512, _mm512_castps512_ps256,
    _mm512_castsi512_ps, _mm512_castsi512_si256, _mm512_cmp_ps_mask, _mm512_cvtepi8_epi16,
    _mm512_cvtepi32_epi16, _mm512_cvtepi32_ps, _mm512_cvtepu16_epi32, _mm512_cvtne2ps_pbh,
    _mm512_cvtph_ps, _mm512_cvtps_epi32, _mm512_cvtsepi32_epi8, _mm512_div_ps, _mm512_dpbf16_ps,
    _mm512_dpbusd_epi32, _mm512_dpwssd_epi32, _mm512_extractf32x8_ps, _mm512_extracti64x4_epi64,
    _mm512_fmadd_ps, _mm512_loadu_ps, _mm512_loadu_si512, _mm512_mask_mov_epi32,
    _mm512_mask_mov_ps, _mm512_max_epi32, _mm512_max_ps, _mm512_min_ps, _mm512_mul_ps,
    _mm512_permutex2var_epi8, _mm512_permutex2var_epi16, _mm512_permutexvar_epi64,
    _mm512_reduce_max_epi32, _mm512_reduce_max_ps, _mm512_reduce_ps, _mm512_roundscale_ps,
    _mm512_scalef_ps, _mm512_set1_epi8, _mm512_set1_epi32, _mm512_set1_ps, _mm512_setr_epi64,
    _mm512_setzero_ps, _mm512_shuffle_ps, _mm512_slli_epi32, _mm512_srli_epi16, _mm512_srli_epi32,
    _mm512_storeu_ps, _mm512_storeu_si512, _mm512_sub_ps, _mm512_ternarylogic_epi64,
    _mm512_unpackhi_epi8, _mm512_unpackhi_ps, _mm512_unpacklo_epi8, _mm512_unpacklo_ps,
};

use half::{bf16, f16};

use super::simd::{
    FP8, Factor, LANES, PAIRS, QUADS, Rows, Simd, Table, Wide, each, outer, padded, tiles,
};

/// Proof that the processor has AVX-512 with F, DQ, BW, VL, VNNI, BF16 and VBMI: Zen 4, Sapphire Rapids and
/// later. One that lacks some of it (Skylake, Ice Lake) is served by AVX2.
#[derive(Clone, Copy)]
pub(crate) struct Avx512(());

/// Sixteen numbers from memory, widened.
pub(crate) trait Load: Sized {
    /// # Safety
    /// The processor has AVX-512F, and sixteen numbers lie at `x`.
    unsafe fn sixteen(x: *const Self) -> __m512;
}

impl Load for f32 {
    #[inline(always)]
    unsafe fn sixteen(x: *const f32) -> __m512 {
        unsafe { _mm512_loadu_ps(x) }
    }
}

impl Load for bf16 {
    #[inline(always)]
    unsafe fn sixteen(x: *const bf16) -> __m512 {
        let bits = unsafe { _mm256_loadu_si256(x.cast::<__m256i>()) };
        unsafe { _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(bits))) }
    }
}

impl Load for f16 {
    #[inline(always)]
    unsafe fn sixteen(x: *const f16) -> __m512 {
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(x.cast::<__m256i>())) }
    }
}

/// The words of sixteen bits that come first in lanes, of two vectors.
static EVEN: [i16; PAIRS] = {
    let mut places = [0; PAIRS];
    let mut i = 0;
    while i < PAIRS {
        places[i] = 2 * i as i16;
        i += 1;
    }
    places
};

#[target_feature(
    enable = "avx512f,avx512dq,avx512bw,avx512vl,avx512vnni,avx512bf16,avx512vbmi,avx2,fma,f16c"
)]
fn compiled_here<T>(job: impl FnOnce() -> T) -> T {
    job()
}

impl Simd for Avx512 {
    const NAME: &'static str = "avx512";
    const REGISTERS: usize = 32;
    type F = __m512;
    type H = __m512i;
    type I = __m512i;
    type W = __m512i;
    type B = __m512i;

    fn new() -> Option<Avx512> {
        let has = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512vnni")
            && is_x86_feature_detected!("avx512bf16")
            && is_x86_feature_detected!("avx512vbmi")
            && is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c");
        has.then_some(Avx512(()))
    }

    #[inline(always)]
    fn run<T>(self, job: impl FnOnce() -> T) -> T {
        unsafe { compiled_here(job) }
    }

    #[inline(always)]
    fn splat(self, x: f32) -> __m512 {
        unsafe { _mm512_set1_ps(x) }
    }

    #[inline(always)]
    fn load<W: Wide>(self, x: &[W; LANES]) -> __m512 {
        unsafe { W::sixteen(x.as_ptr()) }
    }

    #[inline(always)]
    fn halves(self, x: &[bf16; PAIRS]) -> __m512i {
        unsafe { _mm512_loadu_si512(x.as_ptr().cast()) }
    }

    #[inline(always)]
    fn fp8(self, x: &[u8; QUADS]) -> [__m512i; 2] {
        let codes = self.quarters(unsafe { _mm512_loadu_si512(x.as_ptr().cast()) });
        self.looked_up(&FP8, codes)
    }

    #[inline(always)]
    fn put_fp8(self, o: &mut [bf16; QUADS], x: &[u8; QUADS]) {
        self.put_halves(o, self.fp8(x));
    }

    #[inline(always)]
    fn fp8_wide(self, x: &[u8; QUADS]) -> [__m512; 4] {
        let [a, b] = self.fp8(x);
        unsafe {
            [
                self.wide(_mm512_castsi512_si256(a)),
                self.wide(_mm512_extracti64x4_epi64::<1>(a)),
                self.wide(_mm512_castsi512_si256(b)),
                self.wide(_mm512_extracti64x4_epi64::<1>(b)),
            ]
        }
    }

    #[inline(always)]
    fn pair(self, [a, b]: [bf16; 2]) -> __m512i {
        let both = u32::from(a.to_bits()) | u32::from(b.to_bits()) << 16;
        unsafe { _mm512_set1_epi32(both as i32) }
    }

    #[inline(always)]
    fn pairs(self, acc: __m512, a: __m512i, b: __m512i) -> __m512 {
        unsafe {
            let (a, b) = (
                std::mem::transmute::<__m512i, __m512bh>(a),
                std::mem::transmute::<__m512i, __m512bh>(b),
            );
            _mm512_dpbf16_ps(acc, a, b)
        }
    }

    #[inline(always)]
    fn narrow(self, o: &mut [bf16; LANES], x: __m512) {
        // `vcvtneps2bf16` would make numbers below the smallest normal zero.
        let wide = unsafe { _mm512_castps_si512(x) };
        unsafe {
            let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(wide), _mm512_set1_epi32(1));
            let bias = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
            let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(x, x);
            let rounded = _mm512_srli_epi32::<16>(_mm512_add_epi32(wide, bias));
            let rounded = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc0));
            _mm256_storeu_si256(o.as_mut_ptr().cast(), _mm512_cvtepi32_epi16(rounded));
        }
    }

    #[inline(always)]
    fn narrow_factors(self, o: &mut [bf16; PAIRS], [low, high]: [__m512; 2]) {
        unsafe {
            let both = _mm512_cvtne2ps_pbh(high, low);
            let both = std::mem::transmute::<__m512bh, __m512i>(both);
            _mm512_storeu_si512(o.as_mut_ptr().cast(), both);
        }
    }

    #[inline(always)]
    fn int(self, x: i32) -> __m512i {
        unsafe { _mm512_set1_epi32(x) }
    }

    #[inline(always)]
    fn number(self, x: __m512i) -> __m512 {
        unsafe { _mm512_cvtepi32_ps(x) }
    }

    #[inline(always)]
    fn bytes(self, x: &[u8; QUADS]) -> __m512i {
        unsafe { _mm512_loadu_si512(x.as_ptr().cast()) }
    }

    #[inline(always)]
    fn nibbles(self, x: &[u8; QUADS]) -> [__m512i; 2] {
        unsafe {
            let (x, low) = (_mm512_loadu_si512(x.as_ptr().cast()), _mm512_set1_epi8(15));
            [_mm512_and_si512(x, low), _mm512_and_si512(_mm512_srli_epi16::<4>(x), low)]
        }
    }

    #[inline(always)]
    fn quads(self, acc: __m512i, w: __m512i, x: [i8; 4]) -> __m512i {
        unsafe {
            _mm512_dpbusd_epi32(acc, w, _mm512_set1_epi32(i32::from_ne_bytes(x.map(|x| x as u8))))
        }
    }

    #[inline(always)]
    fn words(self, x: &[i8; PAIRS]) -> __m512i {
        unsafe { _mm512_cvtepi8_epi16(_mm256_loadu_si256(x.as_ptr().cast())) }
    }

    #[inline(always)]
    fn word_pair(self, [a, b]: [i16; 2]) -> __m512i {
        self.int(i32::from(a) & 0xffff | i32::from(b) << 16)
    }

    #[inline(always)]
    fn word_pairs(self, acc: __m512i, a: __m512i, b: __m512i) -> __m512i {
        unsafe { _mm512_dpwssd_epi32(acc, a, b) }
    }

    #[inline(always)]
    fn ahead<T>(self, x: &[T], at: usize) {
        // A hint: an address that nobody has is no fault.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(x.as_ptr().wrapping_add(at).cast()) };
    }

    #[inline(always)]
    fn store(self, o: &mut [f32; LANES], x: __m512) {
        unsafe { _mm512_storeu_ps(o.as_mut_ptr(), x) };
    }

    #[inline(always)]
    fn add(self, a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_add_ps(a, b) }
    }

    #[inline(always)]
    fn sub(self, a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_sub_ps(a, b) }
    }

    #[inline(always)]
    fn mul(self, a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_mul_ps(a, b) }
    }

    #[inline(always)]
    fn div(self, a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_div_ps(a, b) }
    }

    #[inline(always)]
    fn fma(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }

    #[inline(always)]
    fn max(self, a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_max_ps(a, b) }
    }

    #[inline(always)]
    fn min(self, a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_min_ps(a, b) }
    }

    #[inline(always)]
    fn round(self, x: __m512) -> __m512 {
        unsafe { _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(x) }
    }

    #[inline(always)]
    fn pow2(self, n: __m512) -> __m512 {
        self.scaled(self.splat(1.0), n)
    }

    #[inline(always)]
    fn scaled(self, x: __m512, n: __m512) -> __m512 {
        unsafe { _mm512_scalef_ps(x, n) }
    }

    /// What is left above the next lower integer is 0 of an infinity, which the power makes 0 or infinity of, and
    /// NaN of NaN.
    #[inline(always)]
    fn exp2(self, t: __m512) -> __m512 {
        let f = unsafe { _mm512_reduce_ps::<{ _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC }>(t) };
        // The power is that of the next lower integer.
        self.scaled(self.exp2_of_part(f), t)
    }

    #[inline(always)]
    fn unless_nan(self, x: __m512, y: __m512) -> __m512 {
        unsafe { _mm512_mask_mov_ps(y, _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(x, x), x) }
    }

    #[inline(always)]
    fn eights(self, o: &mut [i8; LANES], x: __m512) {
        unsafe {
            let bytes = _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(x));
            _mm_storeu_si128(o.as_mut_ptr().cast(), bytes);
        }
    }

    /// Numbers from 2^23 to 2^24 have no digits behind the point: in the low half of such a one's bits stands what
    /// was added to 1.5 times 2^23.
    #[inline(always)]
    fn sixteens(self, o: &mut [i16; PAIRS], [low, high]: [__m512; 2], by: __m512) {
        let whole = self.splat(12_582_912.0);
        unsafe {
            let bits = |x| _mm512_castps_si512(_mm512_fmadd_ps(x, by, whole));
            let halves = _mm512_loadu_si512((&raw const EVEN).cast());
            let words = _mm512_permutex2var_epi16(bits(low), halves, bits(high));
            _mm512_storeu_si512(o.as_mut_ptr().cast(), words);
        }
    }

    #[inline(always)]
    fn sizes(self, most: __m512, x: __m512) -> __m512 {
        unsafe {
            let size = _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(i32::MAX));
            _mm512_castsi512_ps(_mm512_max_epi32(_mm512_castps_si512(most), size))
        }
    }

    #[inline(always)]
    fn size(self, x: __m512) -> f32 {
        unsafe {
            let size = _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(i32::MAX));
            f32::from_bits(_mm512_reduce_max_epi32(size) as u32)
        }
    }

    #[inline(always)]
    fn largest(self, x: __m512) -> f32 {
        unsafe { _mm512_reduce_max_ps(x) }
    }

    /// Within quarters of a register first: four vectors become one on the way.
    #[inline(always)]
    fn sum4(self, [a, b, c, d]: [__m512; 4]) -> [f32; 4] {
        unsafe {
            let ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
            let cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
            let all = _mm512_add_ps(
                _mm512_shuffle_ps::<0b01_00_01_00>(ab, cd),
                _mm512_shuffle_ps::<0b11_10_11_10>(ab, cd),
            );
            let half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps::<1>(all));
            let quarter =
                _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps::<1>(half));
            let mut sums = [0.0; 4];
            _mm_storeu_ps(sums.as_mut_ptr(), quarter);
            sums
        }
    }

    /// Halves are added until one is left.
    #[inline(always)]
    fn sum(self, x: __m512) -> f32 {
        unsafe {
            let x = _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps::<1>(x));
            let x = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
            let x = _mm_add_ps(x, _mm_movehl_ps(x, x));
            _mm_cvtss_f32(_mm_add_ss(x, _mm_shuffle_ps::<1>(x, x)))
        }
    }

    #[inline(always)]
    fn dots<W: Wide, X: Wide, const R: usize, const T: usize>(
        self,
        w: [&[W]; R],
        x: [&[X]; T],
    ) -> [[f32; T]; R] {
        let len = x.first().map_or(0, |x| x.len());
        assert!(w.iter().all(|w| w.len() == len) && x.iter().all(|x| x.len() == len));
        let whole = len / LANES * LANES;
        let mut sums = [[unsafe { _mm512_setzero_ps() }; T]; R];
        for at in (0..whole).step_by(LANES) {
            // `at + 16 <= whole <= len`.
            let w: [__m512; R] = each(
                self.splat(0.0),
                #[inline(always)]
                |r| unsafe { W::sixteen(w[r].as_ptr().add(at)) },
            );
            for t in 0..T {
                let x = unsafe { X::sixteen(x[t].as_ptr().add(at)) };
                for r in 0..R {
                    sums[r][t] = unsafe { _mm512_fmadd_ps(w[r], x, sums[r][t]) };
                }
            }
        }
        if whole < len {
            for (sums, w) in sums.iter_mut().zip(w) {
                let w = self.load(&padded(&w[whole..]));
                for (sum, x) in sums.iter_mut().zip(x) {
                    *sum = self.fma(w, self.load(&padded(&x[whole..])), *sum);
                }
            }
        }
        let mut all = [[0.0; T]; R];
        for (all, sums) in all.iter_mut().zip(sums) {
            for (o, sum) in all.iter_mut().zip(sums) {
                *o = self.sum(sum);
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
        // Twenty-four sums, four rows and one column at hand: of thirty-two registers.
        tiles::<_, _, _, 4, 6, 8>(self, w, x, put);
    }

    #[inline(always)]
    fn accumulate<B: Wide>(self, o: &mut [f32], a: Factor<'_>, b: &[B], j: usize) {
        outer::<_, _, 6, 4>(self, o, a, b, j);
    }
}

#[expect(
    clippy::unused_self,
    reason = "a value is the proof that the processor has the instructions"
)]
impl Avx512 {
    /// Sixty-four bytes for [`looked_up`](Self::looked_up), which interleaves bytes within quarters of a
    /// register: eight of them go to each.
    #[inline(always)]
    fn quarters(self, x: __m512i) -> __m512i {
        unsafe { _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7), x) }
    }

    #[inline(always)]
    fn table(self, bytes: &[u8; 128]) -> (__m512i, __m512i) {
        let start = bytes.as_ptr();
        unsafe { (_mm512_loadu_si512(start.cast()), _mm512_loadu_si512(start.add(64).cast())) }
    }

    /// Sixteen bf16 numbers, widened.
    #[inline(always)]
    fn wide(self, x: __m256i) -> __m512 {
        unsafe { _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(x))) }
    }

    /// The bf16 numbers whose bytes a table has, by the low seven bits of each byte, with the sign of
    /// others.
    #[inline(always)]
    fn looked_up(self, Table(high, low): &Table, codes: __m512i) -> [__m512i; 2] {
        unsafe {
            let (high, low) = (self.table(high), self.table(low));
            let sign = _mm512_set1_epi8(-128);
            // a | (b & c)
            let high = _mm512_ternarylogic_epi64::<0xf8>(
                _mm512_permutex2var_epi8(high.0, codes, high.1),
                codes,
                sign,
            );
            let low = _mm512_permutex2var_epi8(low.0, codes, low.1);
            [_mm512_unpacklo_epi8(low, high), _mm512_unpackhi_epi8(low, high)]
        }
    }

    /// Writes sixty-four bf16 numbers.
    #[inline(always)]
    fn put_halves(self, o: &mut [bf16; QUADS], [low, high]: [__m512i; 2]) {
        let start = o.as_mut_ptr().cast::<__m512i>();
        unsafe {
            _mm512_storeu_si512(start, low);
            _mm512_storeu_si512(start.add(1), high);
        }
    }
}
