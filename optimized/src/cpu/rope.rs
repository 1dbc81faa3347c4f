//! CPU variants of `rope`.

use golden::{
    Dtype, Plant, Spec, Tensor1, Variant,
    ops::rope::{Case, Inputs, Outputs, Rope},
};
use ndarray::Ix3;
use rayon::prelude::*;

use super::vector::variants;
use super::{
    portable::{HONEST, Kernel, Planted, Portable, as_stored, pack, packed, unpacked},
    stored::Stored,
};

pub(crate) mod fast;

/// Every CPU variant, plainest first.
#[inline(never)]
pub fn variants() -> &'static [&'static dyn Variant<Rope>] {
    VARIANTS
}

const VARIANTS: &[&dyn Variant<Rope>] = variants!(
    [&Portable::new("cpu/portable", pack!(Loaded), as_stored, PLANTS)],
    as_stored,
    VECTOR_PLANTS
);

/// Those that the fast kernels can be told to have: `turned-backwards`, `yarn-factor-dropped`, `positions-from-one`.
#[cfg(target_arch = "x86_64")]
const VECTOR_PLANTS: &[Plant] = &[PLANTS[2], PLANTS[3], PLANTS[8]];

pub(crate) const PLANTS: &[Plant] = &[
    Plant {
        name: "interleaved-pairs",
        what: "channels 2i and 2i + 1 are turned together in place of i and i + R/2",
        cite: "https://github.com/ggml-org/llama.cpp/pull/16095",
    },
    Plant {
        name: "full-rotation",
        what: "the partial factor is ignored: every channel of the head is turned",
        cite: "https://github.com/jundot/omlx/issues/3347",
    },
    Plant {
        name: "turned-backwards",
        what: "the sine has the other sign",
        cite: "https://github.com/ggml-org/llama.cpp/pull/16095",
    },
    Plant {
        name: "yarn-factor-dropped",
        what: "cosine and sine are not scaled",
        cite: "https://github.com/jundot/omlx/issues/3347",
    },
    Plant {
        name: "yarn-factor-on-all-channels",
        what: "channels that are not turned are scaled too, as if it were a factor of the score",
        cite: "https://github.com/jundot/omlx/issues/3347",
    },
    Plant {
        name: "positions-in-bf16",
        what: "positions are rounded to bf16: beyond 256 neighbours fall together",
        cite: "https://github.com/NVIDIA-NeMo/Automodel/issues/3233",
    },
    Plant {
        name: "frequencies-in-bf16",
        what: "frequencies are rounded to bf16",
        cite: "https://github.com/NVIDIA-NeMo/Automodel/issues/3233",
    },
    Plant {
        name: "angle-in-bf16",
        what: "the angle is rounded to bf16",
        cite: "https://github.com/NVIDIA-NeMo/Automodel/issues/3233",
    },
    Plant {
        name: "positions-from-one",
        what: "the first token stands at position 1",
        cite: "https://github.com/vllm-project/vllm/issues/40738",
    },
    Plant {
        name: "table-in-storage-type",
        what: "cosines and sines are rounded to the storage type, and the plan does not say so",
        cite: "https://github.com/huggingface/transformers/issues/46190",
    },
];

/// A problem in memory.
struct Loaded<E> {
    case: Case,
    x: Vec<E>,
    positions: Vec<i64>,
    inv_freq: Vec<f32>,
    attention_factor: f64,
    table: Vec<f32>,
    o: Vec<E>,
}

impl<E: Stored> Loaded<E> {
    fn new(spec: &Spec<Case>, x: &Inputs) -> Self {
        let case = spec.case.clone();
        Loaded {
            x: packed(&x.x),
            positions: x.positions.to_vec(),
            inv_freq: x.inv_freq.to_vec(),
            attention_factor: x.attention_factor,
            table: vec![f32::NAN; case.n * case.r],
            o: vec![E::NAN; x.x.len()],
            case,
        }
    }

    /// Turns all `H` channels, with frequencies spread over them: a plant.
    fn rotate_all(&mut self, factor: f32) {
        let Case { n, hq, h, r } = self.case;
        let spread: Vec<f32> = (0..h / 2).map(|i| self.inv_freq[i * r / h]).collect();
        let mut wide = vec![f32::NAN; n * 2 * spread.len()];
        table(&mut wide, &self.positions, &spread, factor, HONEST);
        rope(&mut self.o, &self.x, &wide, hq, h, HONEST);
    }
}

impl<E: Stored> Kernel<Rope> for Loaded<E> {
    fn poison(&mut self) {
        self.o.fill(E::NAN);
        self.table.fill(f32::NAN);
    }

    fn run(&mut self, plant: Planted) {
        let factor = self.attention_factor as f32;
        if plant.is("full-rotation") {
            return self.rotate_all(factor);
        }
        table(&mut self.table, &self.positions, &self.inv_freq, factor, plant);
        if plant.is("table-in-storage-type") {
            self.table.iter_mut().for_each(|x| *x = E::store(*x).load());
        }
        rope(&mut self.o, &self.x, &self.table, self.case.hq, self.case.h, plant);
        if plant.is("yarn-factor-on-all-channels") {
            let untouched = self.o.chunks_mut(self.case.h).map(|head| &mut head[self.case.r..]);
            untouched.flatten().for_each(|o| *o = E::store(o.load() * factor));
        }
    }

    fn inputs(&self) -> Inputs {
        let Case { n, hq, h, .. } = self.case;
        Inputs {
            x: unpacked(&self.x, Ix3(n, hq, h)),
            positions: Tensor1::from_vec(self.positions.clone()),
            inv_freq: self.inv_freq.iter().copied().collect(),
            attention_factor: self.attention_factor,
        }
    }

    fn outputs(&self) -> Outputs {
        let Case { n, hq, h, .. } = self.case;
        Outputs { o: unpacked(&self.o, Ix3(n, hq, h)) }
    }
}

/// Cosines, then sines, of every token: `[N, R]`. The angle is rounded to f32 once, as the model
/// defines it.
///
/// `positions`: `[N]`; `inv_freq`: `[R / 2]`.
pub(crate) fn table(
    table: &mut [f32],
    positions: &[i64],
    inv_freq: &[f32],
    factor: f32,
    plant: Planted,
) {
    let angle: fn(f32, f32) -> f32 = match plant.0 {
        Some("positions-in-bf16") => |p, f| Dtype::Bf16.round(p) * f,
        Some("frequencies-in-bf16") => |p, f| p * Dtype::Bf16.round(f),
        Some("angle-in-bf16") => |p, f| Dtype::Bf16.round(p * f),
        Some("positions-from-one") => |p, f| (p + 1.0) * f,
        Some("turned-backwards") => |p, f| -p * f,
        _ => |p, f| p * f,
    };
    let factor = if plant.is("yarn-factor-dropped") { 1.0 } else { factor };
    table.par_chunks_mut(2 * inv_freq.len()).zip(positions).for_each(|(row, &position)| {
        turns(row, position, inv_freq, factor, angle);
    });
}

/// Cosines, then sines, of one token: `[R]`.
fn turns(
    row: &mut [f32],
    position: i64,
    inv_freq: &[f32],
    factor: f32,
    angle: impl Fn(f32, f32) -> f32,
) {
    let (cos, sin) = row.split_at_mut(inv_freq.len());
    for ((cos, sin), &frequency) in cos.iter_mut().zip(sin).zip(inv_freq) {
        // In f64, so that the reduction of a large angle costs nothing.
        let turn = f64::from(angle(position as f32, frequency));
        *cos = turn.cos() as f32 * factor;
        *sin = turn.sin() as f32 * factor;
    }
}

/// One token per task.
///
/// `o`, `x`: `[N, HQ, H]`; `table`: `[N, R]`, cosines first.
pub(crate) fn rope<E: Stored>(
    o: &mut [E],
    x: &[E],
    table: &[f32],
    hq: usize,
    h: usize,
    plant: Planted,
) {
    let r = table.len() / (x.len() / (hq * h));
    let pairs: fn(&mut [E], &[E], &[f32]) =
        if plant.is("interleaved-pairs") { neighbours } else { halves };
    let tokens = o.par_chunks_mut(hq * h).zip(x.par_chunks(hq * h)).zip(table.par_chunks(r));
    tokens.for_each(|((o, x), table)| {
        for (o, x) in o.chunks_exact_mut(h).zip(x.chunks_exact(h)) {
            pairs(&mut o[..r], &x[..r], table);
            o[r..].copy_from_slice(&x[r..]);
        }
    });
}

/// Turns channel `i` with `i + R/2`.
fn halves<E: Stored>(o: &mut [E], x: &[E], table: &[f32]) {
    let half = table.len() / 2;
    let ((cos, sin), (a, b)) = (table.split_at(half), x.split_at(half));
    let (o_a, o_b) = o.split_at_mut(half);
    for (i, (o_a, o_b)) in o_a.iter_mut().zip(o_b).enumerate() {
        let (a, b) = (a[i].load(), b[i].load());
        *o_a = E::store(a * cos[i] - b * sin[i]);
        *o_b = E::store(b * cos[i] + a * sin[i]);
    }
}

/// Turns channel `2i` with `2i + 1`: a plant.
fn neighbours<E: Stored>(o: &mut [E], x: &[E], table: &[f32]) {
    let (cos, sin) = table.split_at(table.len() / 2);
    for (i, (o, x)) in o.chunks_exact_mut(2).zip(x.chunks_exact(2)).enumerate() {
        let (a, b) = (x[0].load(), x[1].load());
        o[0] = E::store(a * cos[i] - b * sin[i]);
        o[1] = E::store(b * cos[i] + a * sin[i]);
    }
}
