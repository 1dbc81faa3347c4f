//! Weight matrices as an engine keeps them: in the type of the checkpoint, in its memory map where it
//! can be, or narrowed.

use std::{fmt, marker::PhantomData, sync::Arc};

use golden::{Case, Dtype, Error, Narrow, Spec, Weights, narrow, weights::Kept};
use half::{bf16, f16};
use zerocopy::{FromBytes, Immutable};

use super::{
    aligned::{Aligned, Arena},
    fp8_dequant::fast::fp8_dequant_row,
    linear::{
        activations::{Reads, View},
        fast::{FEW, Matrix, Source, width},
        halves::{self, Codes, Halves},
    },
    pool::Part,
    quantised::{Bits, Quantised},
    room,
    simd::{Plain, QUADS, Simd, widen},
};

/// Elements of one type: in a checkpoint, or of our own.
#[derive(Clone)]
pub(crate) enum Data<W> {
    Mapped(Kept, PhantomData<W>),
    Own(Vec<W>),
    /// In an arena; clones share it.
    Placed(Arc<Aligned<W>>),
}

impl<W: FromBytes + Immutable + Copy> Data<W> {
    /// A copy of its own.
    pub(crate) fn copied(&self, arena: &Arena) -> Data<W> {
        let mut own = arena.zeros(self.slice().len());
        own.copy_from_slice(self.slice());
        Data::Placed(Arc::new(own))
    }

    pub(crate) fn new(kept: Kept) -> Data<W> {
        if <[W]>::ref_from_bytes(kept.data()).is_ok() {
            return Data::Mapped(kept, PhantomData);
        }
        // The file has them at an odd address.
        let read = |bytes| W::read_from_bytes(bytes).ok();
        Data::Own(kept.data().chunks_exact(size_of::<W>()).filter_map(read).collect())
    }

    pub(crate) fn slice(&self) -> &[W] {
        match self {
            Data::Mapped(kept, _) => <[W]>::ref_from_bytes(kept.data()).unwrap_or(&[]),
            Data::Own(own) => own,
            Data::Placed(own) => own,
        }
    }
}

/// A weight matrix `[M, D]`.
#[derive(Clone)]
pub(crate) struct Weight {
    stored: Stored,
    d: usize,
    /// Whether products are those of bf16 pairs.
    paired: bool,
}

#[derive(Clone)]
enum Stored {
    F32(Data<f32>),
    Bf16(Data<bf16>),
    F16(Data<f16>),
    Fp8(Fp8),
    Quantised(Quantised),
}

/// FP8 codes with a scale per block.
#[derive(Clone)]
struct Fp8 {
    /// `[M, D]`.
    codes: Data<u8>,
    /// `[M / block, D / block]`, rounded up.
    scales: Vec<f32>,
    block: [usize; 2],
}

impl fmt::Debug for Weight {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "weight of {} by {}", self.rows(), self.columns())
    }
}

/// A matrix by name; inner dimensions of one are dropped.
pub(crate) fn matrix(weights: &dyn Weights, name: &str) -> Result<Weight, Error> {
    matrix_of(weights, name, weights.keep(name)?)
}

/// The same, to be narrowed and let go.
pub(crate) fn passing(weights: &dyn Weights, name: &str) -> Result<Weight, Error> {
    matrix_of(weights, name, weights.pass(name)?)
}

fn matrix_of(weights: &dyn Weights, name: &str, kept: Kept) -> Result<Weight, Error> {
    let d: usize = kept.meta.shape[1..].iter().product();
    let stored = match kept.meta.dtype {
        Dtype::F32 => Stored::F32(Data::new(kept)),
        Dtype::Bf16 => Stored::Bf16(Data::new(kept)),
        Dtype::F16 => Stored::F16(Data::new(kept)),
        Dtype::Fp8 => {
            let fp8 = weights.config().fp8.as_ref();
            let block = fp8.ok_or_else(|| {
                format!("{name}: FP8 codes, but config.json has no quantization_config")
            })?;
            let scales = vector(weights, &golden::names::scale_of(name))?;
            Stored::Fp8(Fp8 { codes: Data::new(kept), scales, block: block.weight_block_size })
        }
        other => return Err(format!("{name}: {other} where a float type was expected").into()),
    };
    Ok(Weight { stored, d, paired: false })
}

/// A small tensor by name, widened.
pub(crate) fn vector(weights: &dyn Weights, name: &str) -> Result<Vec<f32>, Error> {
    let raw = weights.fetch(name)?;
    raw.widen()
        .ok_or_else(|| format!("{name}: {} where a float type was expected", raw.dtype).into())
}

impl Weight {
    /// A weight of a problem, `[M, D]`, which is what its format can hold already.
    pub(crate) fn of<C: Case>(spec: &Spec<C>, reads: Reads, w: &[f32], d: usize) -> Weight {
        let rows = w.len() / d;
        let quantised = |bits| {
            Stored::Quantised(Quantised::new(bits, (rows, d), &Arena::default(), |i, o| {
                o.copy_from_slice(&w[i * d..][..d]);
            }))
        };
        let stored = match (spec.weights, spec.dtype) {
            (Some(Narrow::Int8), _) => quantised(Bits::Eight),
            (Some(Narrow::Int4), _) => quantised(Bits::Four),
            (Some(Narrow::Fp8), _) => {
                let (mut codes, mut scales) = (Vec::with_capacity(w.len()), Vec::new());
                for rows in w.chunks(narrow::FP8_BLOCK * d) {
                    let own = narrow::fp8_scales(rows, d);
                    for row in rows.chunks(d) {
                        let parts = row.chunks(narrow::FP8_BLOCK).zip(&own);
                        codes.extend(parts.flat_map(|(part, &scale)| {
                            part.iter().map(move |&w| narrow::fp8_code(w, scale))
                        }));
                    }
                    scales.extend(own);
                }
                let block = [narrow::FP8_BLOCK; 2];
                Stored::Fp8(Fp8 { codes: Data::Own(codes), scales, block })
            }
            (None, Dtype::Bf16) => {
                Stored::Bf16(Data::Own(w.iter().map(|&w| bf16::from_f32(w)).collect()))
            }
            (None, Dtype::F16) => {
                Stored::F16(Data::Own(w.iter().map(|&w| f16::from_f32(w)).collect()))
            }
            (None, _) => return Weight::own(w.to_vec(), d),
        };
        Weight { stored, d, paired: reads == Reads::Bf16 }
    }

    /// A narrowed matrix.
    pub(crate) fn quantised(quantised: Quantised) -> Weight {
        let d = quantised.columns();
        Weight { stored: Stored::Quantised(quantised), d, paired: false }
    }

    /// The bytes of a narrowed matrix; none of any other.
    pub(crate) fn narrow_parts(&self) -> [&[u8]; 2] {
        match &self.stored {
            Stored::Quantised(quantised) => quantised.parts(),
            _ => [&[]; 2],
        }
    }

    /// A copy of its own.
    pub(crate) fn copied(&self, arena: &Arena) -> Weight {
        let stored = match &self.stored {
            Stored::F32(data) => Stored::F32(data.copied(arena)),
            Stored::Bf16(data) => Stored::Bf16(data.copied(arena)),
            Stored::F16(data) => Stored::F16(data.copied(arena)),
            Stored::Fp8(Fp8 { codes, scales, block }) => Stored::Fp8(Fp8 {
                codes: codes.copied(arena),
                scales: scales.clone(),
                block: *block,
            }),
            Stored::Quantised(quantised) => Stored::Quantised(quantised.copied(arena)),
        };
        Weight { stored, ..*self }
    }

    /// A matrix in f32.
    pub(crate) fn own(w: Vec<f32>, d: usize) -> Weight {
        Weight { stored: Stored::F32(Data::Own(w)), d, paired: false }
    }

    /// Bytes in memory.
    pub(crate) fn bytes(&self) -> usize {
        let elements = self.rows() * self.d;
        match &self.stored {
            Stored::F32(_) => 4 * elements,
            Stored::Bf16(_) | Stored::F16(_) => 2 * elements,
            Stored::Fp8(fp8) => elements + 4 * fp8.scales.len(),
            Stored::Quantised(quantised) => quantised.bytes(),
        }
    }

    /// The same in fewer bits.
    pub(crate) fn narrowed(self, bits: Bits, arena: &Arena) -> Weight {
        let (rows, d) = (self.rows(), self.columns());
        let stored = Quantised::new(bits, (rows, d), arena, |i, o| self.row(Plain, i, o));
        Weight { stored: Stored::Quantised(stored), d, paired: false }
    }

    /// The same, multiplied with activations in bf16; what is neither bf16 nor FP8 is rounded to bf16.
    pub(crate) fn paired(self) -> Weight {
        let d = self.d;
        let stored = match self.stored {
            Stored::F32(_) | Stored::F16(_) => {
                let mut row = vec![0.0; d];
                let mut own = Vec::with_capacity(self.rows() * d);
                for i in 0..self.rows() {
                    self.row(Plain, i, &mut row);
                    own.extend(row.iter().map(|&w| bf16::from_f32(w)));
                }
                Stored::Bf16(Data::Own(own))
            }
            stored => stored,
        };
        Weight { stored, d, paired: true }
    }
}

impl Source for Weight {
    fn rows(&self) -> usize {
        let elements = match &self.stored {
            Stored::F32(data) => data.slice().len(),
            Stored::Bf16(data) => data.slice().len(),
            Stored::F16(data) => data.slice().len(),
            Stored::Fp8(fp8) => fp8.codes.slice().len(),
            Stored::Quantised(quantised) => return quantised.rows(),
        };
        elements / self.d
    }

    fn columns(&self) -> usize {
        self.d
    }

    fn reads(&self) -> Reads {
        match &self.stored {
            Stored::Quantised(_) => Reads::Int8,
            Stored::Bf16(_) if self.paired => Reads::Bf16,
            Stored::Fp8(fp8) if self.paired && fp8.block[1].is_multiple_of(QUADS) => Reads::Bf16,
            _ => Reads::F32,
        }
    }

    fn width(&self, tokens: usize) -> usize {
        let bytes = match &self.stored {
            Stored::F32(_) => 4 * self.d,
            Stored::Bf16(_) | Stored::F16(_) => 2 * self.d,
            Stored::Fp8(_) => self.d,
            Stored::Quantised(quantised) => quantised.bytes() / quantised.rows().max(1),
        };
        width(tokens, self.rows(), bytes)
    }

    #[inline(always)]
    fn products<S: Simd>(&self, s: S, x: View<'_>, part: &mut Part<'_, f32>, room: &mut Vec<f32>) {
        let d = self.d;
        match (&self.stored, x) {
            (Stored::F32(data), View::F32(x)) => {
                Matrix { data: data.slice(), d }.products(s, x, part, room);
            }
            (Stored::Bf16(data), View::F32(x)) => {
                Matrix { data: data.slice(), d }.products(s, x, part, room);
            }
            (Stored::F16(data), View::F32(x)) => {
                Matrix { data: data.slice(), d }.products(s, x, part, room);
            }
            (Stored::Bf16(data), View::Bf16(x)) => {
                halves::products(s, &Halves { data: data.slice(), d }, x, d, part);
            }
            (Stored::Fp8(fp8), View::Bf16(x)) => {
                halves::products_of_codes(s, &fp8.rows(d), x, part);
            }
            (Stored::Fp8(fp8), View::F32(x)) => {
                let columns = part.columns.clone();
                let mut own = room::room(columns.len() * d);
                for (i, row) in columns.zip(own.chunks_exact_mut(d)) {
                    fp8.row(s, d, i, row);
                }
                let rows = Matrix { data: &own[..], d };
                if part.rows.len() <= FEW {
                    rows.few(s, x, part);
                } else {
                    rows.many(s, x, part, room);
                }
            }
            (Stored::Quantised(quantised), View::Int8(codes, parts)) => {
                quantised.products(s, codes, parts, part);
            }
            _ => unreachable!("activations are made ready as `reads` says"),
        }
    }

    #[inline(always)]
    fn row<S: Simd>(&self, s: S, i: usize, o: &mut [f32]) {
        let own = i * self.d..(i + 1) * self.d;
        match &self.stored {
            Stored::F32(data) => o.copy_from_slice(&data.slice()[own]),
            Stored::Bf16(data) => widen(s, o, &data.slice()[own]),
            Stored::F16(data) => widen(s, o, &data.slice()[own]),
            Stored::Fp8(fp8) => fp8.row(s, self.d, i, o),
            Stored::Quantised(quantised) => quantised.row(i, o),
        }
    }
}

impl Fp8 {
    fn rows(&self, d: usize) -> Codes<'_> {
        Codes { data: self.codes.slice(), scales: &self.scales, block: self.block, d }
    }

    /// `code * scale` of its block, rounded to f32.
    #[inline(always)]
    fn row<S: Simd>(&self, s: S, d: usize, i: usize, o: &mut [f32]) {
        let [rows, columns] = self.block;
        let across = d.div_ceil(columns);
        let codes = &self.codes.slice()[i * d..(i + 1) * d];
        fp8_dequant_row(s, o, codes, &self.scales[i / rows * across..][..across], columns);
    }
}
