//! Weight matrices as an engine keeps them: in the type of the checkpoint, in its memory map where it
//! can be.

use std::{fmt, marker::PhantomData};

use golden::{Dtype, Error, Weights, weights::Kept};
use half::{bf16, f16};
use zerocopy::{FromBytes, Immutable};

use super::{
    linear::fast::{Matrix, Source, wide},
    quantised::{Bits, Quantised},
    simd::{Plain, Simd},
};

/// Elements of one type.
pub(crate) struct Data<W> {
    kept: Kept,
    /// The same elements, where the file has them at an odd address.
    copy: Option<Vec<W>>,
    of: PhantomData<W>,
}

impl<W: FromBytes + Immutable> Data<W> {
    fn new(kept: Kept) -> Data<W> {
        let read = |bytes| W::read_from_bytes(bytes).ok();
        let copy = <[W]>::ref_from_bytes(kept.data())
            .is_err()
            .then(|| kept.data().chunks_exact(size_of::<W>()).filter_map(read).collect());
        Data { kept, copy, of: PhantomData }
    }

    pub(crate) fn slice(&self) -> &[W] {
        match &self.copy {
            Some(copy) => copy,
            None => <[W]>::ref_from_bytes(self.kept.data()).unwrap_or(&[]),
        }
    }
}

/// A weight matrix `[M, D]`.
pub(crate) enum Weight {
    F32(Data<f32>, usize),
    Bf16(Data<bf16>, usize),
    F16(Data<f16>, usize),
    Fp8(Fp8),
    Quantised(Quantised),
}

/// FP8 codes with a scale per block.
pub(crate) struct Fp8 {
    /// `[M, D]`.
    codes: Kept,
    /// `[M / block, D / block]`, rounded up.
    scales: Vec<f32>,
    block: [usize; 2],
    d: usize,
}

impl fmt::Debug for Weight {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "weight of {} by {}", self.rows(), self.columns())
    }
}

/// A matrix by name; inner dimensions of one are dropped.
pub(crate) fn matrix(weights: &dyn Weights, name: &str) -> Result<Weight, Error> {
    let kept = weights.keep(name)?;
    let d: usize = kept.meta.shape[1..].iter().product();
    Ok(match kept.meta.dtype {
        Dtype::F32 => Weight::F32(Data::new(kept), d),
        Dtype::Bf16 => Weight::Bf16(Data::new(kept), d),
        Dtype::F16 => Weight::F16(Data::new(kept), d),
        Dtype::Fp8 => {
            let fp8 = weights.config().fp8.as_ref();
            let block = fp8.ok_or_else(|| {
                format!("{name}: FP8 codes, but config.json has no quantization_config")
            })?;
            let scales = vector(weights, &golden::names::scale_of(name))?;
            Weight::Fp8(Fp8 { codes: kept, scales, block: block.weight_block_size, d })
        }
        other => return Err(format!("{name}: {other} where a float type was expected").into()),
    })
}

/// A small tensor by name, widened.
pub(crate) fn vector(weights: &dyn Weights, name: &str) -> Result<Vec<f32>, Error> {
    let raw = weights.fetch(name)?;
    raw.widen()
        .ok_or_else(|| format!("{name}: {} where a float type was expected", raw.dtype).into())
}

/// Does something with whatever a weight is stored in.
macro_rules! stored {
    ($weight:expr, $matrix:ident => $done:expr) => {
        match $weight {
            Weight::F32(data, d) => {
                let $matrix = Matrix { data: data.slice(), d: *d };
                $done
            }
            Weight::Bf16(data, d) => {
                let $matrix = Matrix { data: data.slice(), d: *d };
                $done
            }
            Weight::F16(data, d) => {
                let $matrix = Matrix { data: data.slice(), d: *d };
                $done
            }
            Weight::Fp8($matrix) => $done,
            Weight::Quantised($matrix) => $done,
        }
    };
}

impl Weight {
    /// The same in fewer bits.
    pub(crate) fn narrowed(self, bits: Bits) -> Weight {
        let (rows, d) = (self.rows(), self.columns());
        Weight::Quantised(Quantised::new(bits, rows, d, |i, o| self.row(Plain, i, o)))
    }
}

impl Source for Weight {
    fn rows(&self) -> usize {
        stored!(self, matrix => matrix.rows())
    }

    fn columns(&self) -> usize {
        stored!(self, matrix => matrix.columns())
    }

    #[inline(always)]
    fn products<S: Simd>(
        &self,
        s: S,
        from: usize,
        to: usize,
        x: &[f32],
        put: impl FnMut(usize, usize, f32),
    ) {
        stored!(self, matrix => matrix.products(s, from, to, x, put));
    }

    #[inline(always)]
    fn row<S: Simd>(&self, s: S, i: usize, o: &mut [f32]) {
        stored!(self, matrix => matrix.row(s, i, o));
    }

    #[inline(always)]
    fn widened<'a, S: Simd>(
        &'a self,
        s: S,
        from: usize,
        to: usize,
        room: &'a mut Vec<f32>,
    ) -> &'a [f32] {
        match self {
            Weight::F32(data, d) => wide(s, &data.slice()[from * d..to * d], room),
            Weight::Bf16(data, d) => wide(s, &data.slice()[from * d..to * d], room),
            Weight::F16(data, d) => wide(s, &data.slice()[from * d..to * d], room),
            Weight::Fp8(fp8) => fp8.widened(s, from, to, room),
            Weight::Quantised(quantised) => quantised.widened(s, from, to, room),
        }
    }
}

/// The number of each FP8 code.
static VALUES: std::sync::LazyLock<[f32; 256]> =
    std::sync::LazyLock::new(|| std::array::from_fn(|code| golden::fp8::to_f32(code as u8)));

/// Rows that are widened together where few tokens meet them.
const TOGETHER: usize = 8;

impl Source for Fp8 {
    fn rows(&self) -> usize {
        self.codes.meta.shape[0]
    }

    fn columns(&self) -> usize {
        self.d
    }

    #[inline(always)]
    fn products<S: Simd>(
        &self,
        s: S,
        from: usize,
        to: usize,
        x: &[f32],
        mut put: impl FnMut(usize, usize, f32),
    ) {
        let mut rows = vec![0.0; TOGETHER * self.d];
        for start in (from..to).step_by(TOGETHER) {
            let n = TOGETHER.min(to - start);
            let rows = &mut rows[..n * self.d];
            for (i, row) in rows.chunks_exact_mut(self.d).enumerate() {
                self.row(s, start + i, row);
            }
            let w = Matrix { data: rows, d: self.d };
            w.products(s, 0, n, x, |r, t, sum| put(start - from + r, t, sum));
        }
    }

    /// `code * scale` of its block, rounded to f32.
    #[inline(always)]
    fn row<S: Simd>(&self, _: S, i: usize, o: &mut [f32]) {
        let [rows, columns] = self.block;
        let across = self.d.div_ceil(columns);
        let codes = &self.codes.data()[i * self.d..(i + 1) * self.d];
        let scales = &self.scales[i / rows * across..][..across];
        for ((o, codes), scale) in o.chunks_mut(columns).zip(codes.chunks(columns)).zip(scales) {
            for (o, &code) in o.iter_mut().zip(codes) {
                *o = VALUES[usize::from(code)] * scale;
            }
        }
    }
}
