//! CPU variants of `embedding`.

use golden::{
    Plant, Spec, Variant,
    ops::embedding::{Case, Embedding, Inputs, Outputs},
};
use ndarray::Ix2;
use rayon::prelude::*;

use super::vector::variants;
use super::{
    portable::{Kernel, Planted, Portable, as_stored, pack, packed, unpacked},
    stored::Stored,
};

pub(crate) mod fast;

/// Every CPU variant, plainest first.
#[inline(never)]
pub fn variants() -> &'static [&'static dyn Variant<Embedding>] {
    VARIANTS
}

const VARIANTS: &[&dyn Variant<Embedding>] = variants!(
    [&Portable::new("cpu/portable", pack!(Loaded), as_stored, PLANTS)],
    as_stored,
    VECTOR_PLANTS
);

/// Those that the fast kernels can be told to have: `row-off-by-one`, `last-row-unwritten`.
#[cfg(target_arch = "x86_64")]
const VECTOR_PLANTS: &[Plant] = &[PLANTS[0], PLANTS[3]];

pub(crate) const PLANTS: &[Plant] = &[
    Plant {
        name: "row-off-by-one",
        what: "an id is taken for a count: token 5 reads row 4, and only token 0 reads its own",
        cite: "https://github.com/NVIDIA-NeMo/Megatron-Bridge/issues/1068",
    },
    Plant {
        name: "table-cut-at-64",
        what: "rows past the last multiple of 64 were lost with the padding of the table and read zero",
        cite: "https://github.com/NVIDIA-NeMo/Megatron-Bridge/issues/1068",
    },
    Plant {
        name: "first-row-is-padding",
        what: "token 0 is taken for padding, and its row is zero",
        cite: "https://github.com/huggingface/transformers/issues/46773",
    },
    Plant {
        name: "last-row-unwritten",
        what: "a batch smaller than the captured one: the last row keeps what was in the buffer",
        cite: "https://github.com/vllm-project/vllm/issues/28182",
    },
    Plant {
        name: "scaled",
        what: "rows are multiplied by the root of their width, as other families do",
        cite: "https://github.com/ggml-org/llama.cpp/pull/16095",
    },
];

/// A problem in memory.
struct Loaded<E> {
    case: Case,
    ids: Vec<i64>,
    table: Vec<E>,
    o: Vec<E>,
}

impl<E: Stored> Loaded<E> {
    fn new(spec: &Spec<Case>, x: &Inputs) -> Self {
        let case = spec.case.clone();
        let o = vec![E::NAN; case.n * case.d];
        Loaded { case, ids: x.ids.to_vec(), table: packed(&x.table), o }
    }
}

impl<E: Stored> Kernel<Embedding> for Loaded<E> {
    fn poison(&mut self) {
        self.o.fill(E::NAN);
    }

    fn run(&mut self, plant: Planted) {
        embedding(&mut self.o, &self.ids, &self.table, self.case.d, plant);
    }

    fn inputs(&self) -> Inputs {
        let Case { m, d, .. } = self.case;
        Inputs { ids: self.ids.iter().copied().collect(), table: unpacked(&self.table, Ix2(m, d)) }
    }

    fn outputs(&self) -> Outputs<f32> {
        Outputs { o: unpacked(&self.o, Ix2(self.case.n, self.case.d)) }
    }
}

/// One row per task.
///
/// `o`: `[N, D]`; `ids`: `[N]`; `table`: `[M, D]`.
pub(crate) fn embedding<E: Stored>(
    o: &mut [E],
    ids: &[i64],
    table: &[E],
    d: usize,
    plant: Planted,
) {
    let rows = table.len() / d;
    let kept = if plant.is("table-cut-at-64") { rows - rows % 64 } else { rows };
    let padded = plant.is("first-row-is-padding");
    let back = usize::from(plant.is("row-off-by-one"));
    let written = ids.len() - usize::from(plant.is("last-row-unwritten"));
    o.par_chunks_mut(d).zip(ids).take(written).for_each(|(o, &id)| {
        let row = (id as usize).saturating_sub(back);
        if row < kept && !(padded && row == 0) {
            o.copy_from_slice(&table[row * d..][..d]);
        } else {
            o.fill(E::store(0.0));
        }
    });
    if plant.is("scaled") {
        let root = (d as f32).sqrt();
        o.par_iter_mut().for_each(|o| *o = E::store(o.load() * root));
    }
}
