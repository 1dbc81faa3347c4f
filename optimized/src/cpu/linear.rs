//! CPU variants of `linear`.

use std::borrow::Cow;

use golden::{
    Dtype, Plant, Spec, Variant,
    ops::linear::{Case, Inputs, Linear, Outputs},
};
use ndarray::Ix2;
use rayon::prelude::*;

use super::vector::variants;
use super::{
    portable::{Kernel, Only, Planted, Portable, as_stored, pack, packed, unpacked},
    stored::{Stored, widen},
};
use w8a8::{InCodes, W8A8_PLANTS};

pub(crate) mod activations;
pub(crate) mod fast;
pub(crate) mod halves;
pub(crate) mod w8a8;

/// Every CPU variant, plainest first.
#[inline(never)]
pub fn variants() -> &'static [&'static dyn Variant<Linear>] {
    VARIANTS
}

const VARIANTS: &[&dyn Variant<Linear>] = variants!(
    [
        &Portable::new("cpu/portable", pack!(Loaded), as_stored, PLANTS),
        &Only {
            lacks: || None,
            unfit: w8a8::unfit,
            of: Portable::new("cpu/portable-w8a8", pack!(InCodes), w8a8::plan, W8A8_PLANTS),
        },
    ],
    fast::plan,
    VECTOR_PLANTS,
    paired: fast::unpaired,
    fast::paired_plan
);

/// Those that the fast kernels can be told to have: the first, the fourth and the sixth.
#[cfg(target_arch = "x86_64")]
const VECTOR_PLANTS: &[Plant] = &[PLANTS[0], PLANTS[3], PLANTS[5]];

pub(crate) const PLANTS: &[Plant] = &[
    Plant {
        name: "ragged-tail-dropped",
        what: "input channels past the last whole vector are not summed",
        cite: "https://github.com/huggingface/transformers/issues/40963",
    },
    Plant {
        name: "split-k-in-bf16",
        what: "partial sums over blocks of input channels are added up in bf16",
        cite: "https://github.com/sgl-project/sglang/issues/13708",
    },
    Plant {
        name: "transposed-when-square",
        what: "a square weight is read as [in, out]",
        cite: "https://github.com/huggingface/transformers/issues/41036",
    },
    Plant {
        name: "last-row-shifted",
        what: "the last output channel is computed from the weight row before its own",
        cite: "https://github.com/vllm-project/vllm/issues/35504",
    },
    Plant {
        name: "uniform-scale",
        what: "every output is 1.004 times what it should be, as by a scale kept in bf16",
        cite: "https://github.com/sgl-project/sglang/issues/31622",
    },
    Plant {
        name: "last-token-stale",
        what: "the last token's activations are those of the token before it",
        cite: "https://github.com/vllm-project/vllm/issues/28182",
    },
    Plant {
        name: "activations-in-bf16",
        what: "activations are rounded to bf16 on their way into the product, whatever they are stored in",
        cite: "https://github.com/huggingface/transformers/issues/46190",
    },
    Plant {
        name: "activations-per-tensor-int8",
        what: "activations are quantised to 127 steps of their largest, over the whole tensor",
        cite: "https://github.com/vllm-project/vllm/issues/25079",
    },
    Plant {
        name: "denormals-flushed",
        what: "activations below the smallest normal number count as zero",
        cite: "https://github.com/NVIDIA-NeMo/Automodel/issues/2484",
    },
];

/// A problem in memory.
struct Loaded<E> {
    case: Case,
    x: Vec<E>,
    weight: Vec<E>,
    o: Vec<E>,
}

impl<E: Stored> Loaded<E> {
    fn new(spec: &Spec<Case>, x: &Inputs) -> Self {
        let case = spec.case.clone();
        let o = vec![E::NAN; case.n * case.m];
        Loaded { case, x: packed(&x.x), weight: packed(&x.weight), o }
    }
}

impl<E: Stored> Kernel<Linear> for Loaded<E> {
    fn poison(&mut self) {
        self.o.fill(E::NAN);
    }

    fn run(&mut self, plant: Planted) {
        let projection = Projection { x: &self.x, weight: &self.weight, d: self.case.d };
        linear(&mut self.o, &projection, plant);
    }

    fn inputs(&self) -> Inputs {
        let Case { n, m, d } = self.case;
        Inputs { x: unpacked(&self.x, Ix2(n, d)), weight: unpacked(&self.weight, Ix2(m, d)) }
    }

    fn outputs(&self) -> Outputs {
        Outputs { o: unpacked(&self.o, Ix2(self.case.n, self.case.m)) }
    }
}

/// What a projection reads.
pub(crate) struct Projection<'a, X, W> {
    /// `[N, D]`.
    pub(crate) x: &'a [X],
    /// `[M, D]`.
    pub(crate) weight: &'a [W],
    /// Input channels.
    pub(crate) d: usize,
}

/// Tokens that are kept at hand, widened, while the weight passes by.
const TILE: usize = 64;

/// Tokens that meet a row of the weight together.
const TOGETHER: usize = 4;

/// Input channels of one partial sum.
const DEPTH: usize = 512;

/// Products that make a task worth handing over.
const GRAIN: usize = 1 << 16;

/// `o[n, m] = sum_d x[n, d] * weight[m, d]`, summed in f32.
///
/// Each row of the weight is read and widened once per tile of tokens. How an element is summed
/// depends on `D` alone. `o`: `[N, M]`.
pub(crate) fn linear<O: Stored, X: Stored, W: Stored>(
    o: &mut [O],
    projection: &Projection<'_, X, W>,
    plant: Planted,
) {
    let (d, m) = (projection.d, projection.weight.len() / projection.d);
    let weight = weight(projection, plant);
    let last_shifted = plant.is("last-row-shifted");
    let scale = if plant.is("uniform-scale") { 1.004 } else { 1.0 };
    let sum = Sum::new(d, plant);
    let mut x = vec![f32::NAN; projection.x.len()];
    widen(&mut x, projection.x);
    spoil_activations(&mut x, d, plant);
    for (o, x) in o.chunks_mut(TILE * m).zip(x.chunks(TILE * d)) {
        let tokens = x.len() / d;
        // [M, tokens]: a task owns whole rows of it, so that one token alone keeps every thread busy.
        let mut columns = vec![f32::NAN; m * tokens];
        columns
            .par_chunks_mut(tokens)
            .enumerate()
            .with_min_len(GRAIN.div_ceil(tokens * d))
            .for_each_init(
                || vec![f32::NAN; d],
                |w, (i, column)| {
                    let i = if last_shifted && i + 1 == m { i.saturating_sub(1) } else { i };
                    widen(w, &weight[i * d..(i + 1) * d]);
                    for (o, x) in column.chunks_mut(TOGETHER).zip(x.chunks(TOGETHER * d)) {
                        sum.tokens(o, x, w);
                    }
                },
            );
        for (token, o) in o.chunks_mut(m).enumerate() {
            for (o, column) in o.iter_mut().zip(columns.chunks(tokens)) {
                *o = O::store(column[token] * scale);
            }
        }
    }
}

/// The weight as the kernel reads it.
fn weight<'a, X, W: Stored>(projection: &Projection<'a, X, W>, plant: Planted) -> Cow<'a, [W]> {
    let (weight, d) = (projection.weight, projection.d);
    if plant.is("transposed-when-square") && weight.len() == d * d {
        return (0..d * d).map(|i| weight[i % d * d + i / d]).collect();
    }
    Cow::Borrowed(weight)
}

/// Faults in how activations are read.
fn spoil_activations(x: &mut [f32], d: usize, plant: Planted) {
    match plant.0 {
        Some("last-token-stale") => {
            let n = x.len() / d;
            x.copy_within((n.max(2) - 2) * d..(n.max(2) - 1) * d, (n - 1) * d);
        }
        Some("activations-in-bf16") => {
            x.iter_mut().for_each(|x| *x = Dtype::Bf16.round(*x));
        }
        Some("activations-per-tensor-int8") => {
            let step = x.iter().fold(0.0_f32, |most, x| most.max(x.abs())) / 127.0;
            x.iter_mut().for_each(|x| *x = (*x / step).round() * step);
        }
        Some("denormals-flushed") => {
            x.iter_mut().filter(|x| x.is_subnormal()).for_each(|x| *x = 0.0);
        }
        _ => {}
    }
}

/// How an inner product over `D` channels is summed: blocks of [`DEPTH`] channels, each in [`LANES`]
/// interleaved partial sums.
struct Sum {
    /// Channels that are summed at all.
    summed: usize,
    /// What becomes of a sum after each block.
    keep: fn(f32) -> f32,
}

impl Sum {
    fn new(d: usize, plant: Planted) -> Sum {
        let ragged = plant.is("ragged-tail-dropped");
        let narrow = plant.is("split-k-in-bf16");
        Sum {
            summed: if ragged { d - d % LANES } else { d },
            keep: if narrow { |sum| Dtype::Bf16.round(sum) } else { |sum| sum },
        }
    }

    /// Up to [`TOGETHER`] tokens with one row of the weight.
    fn tokens(&self, o: &mut [f32], x: &[f32], w: &[f32]) {
        let d = w.len();
        if let Some(o) = o.as_mut_array::<TOGETHER>() {
            *o = self.rows(std::array::from_fn(|i| &x[i * d..(i + 1) * d]), w);
            return;
        }
        for (o, x) in o.iter_mut().zip(x.chunks(d)) {
            [*o] = self.rows([x], w);
        }
    }

    fn rows<const T: usize>(&self, x: [&[f32]; T], w: &[f32]) -> [f32; T] {
        let mut sums = [0.0; T];
        for start in (0..self.summed).step_by(DEPTH) {
            let block = start..(start + DEPTH).min(self.summed);
            let parts = dots(x.map(|x| &x[block.clone()]), &w[block]);
            for (sum, part) in sums.iter_mut().zip(parts) {
                *sum = (self.keep)(*sum + part);
            }
        }
        sums
    }
}

/// Partial sums of an inner product: two vectors of a machine without any extension.
const LANES: usize = 8;

/// `sum_d x_t[d] w[d]` for `T` rows that share `w`, each in the same order whatever `T` is.
pub(crate) fn dots<const T: usize>(x: [&[f32]; T], w: &[f32]) -> [f32; T] {
    let (whole, rest) = w.as_chunks::<LANES>();
    let mut lanes = [[0.0_f32; LANES]; T];
    let x = x.map(|x| x.as_chunks::<LANES>());
    for (i, w) in whole.iter().enumerate() {
        for (lanes, (x, _)) in lanes.iter_mut().zip(&x) {
            for ((sum, x), w) in lanes.iter_mut().zip(&x[i]).zip(w) {
                *sum += x * w;
            }
        }
    }
    for (lanes, (_, x)) in lanes.iter_mut().zip(&x) {
        for ((sum, x), w) in lanes.iter_mut().zip(*x).zip(rest) {
            *sum += x * w;
        }
    }
    lanes.map(|[a, b, c, d, e, f, g, h]| ((a + e) + (c + g)) + ((b + f) + (d + h)))
}
