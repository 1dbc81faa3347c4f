//! Rows of an embedding, widened as they are copied.

use golden::{
    Spec,
    ops::embedding::{Case, Embedding, Inputs, Outputs},
};

use crate::cpu::{
    linear::{activations::Reads, fast::Source},
    pool,
    portable::Planted,
    simd::{Simd, Wide},
    vector::{Fast, flat, flat_mut},
    weight::Weight,
};

/// Rows of a task.
const ROWS: usize = 16;

/// `o[n] = table[ids[n]]`. `o`: `[N, D]`; `ids`: `[N]`; `table`: `[M, D]`.
pub(crate) fn embedding<S: Simd>(s: S, o: &mut [f32], ids: &[i64], table: &Weight) {
    let d = table.columns();
    pool::rows(
        s,
        o,
        (d, ROWS),
        #[inline(always)]
        |i, o| table.row(s, ids[i] as usize, o),
    );
}

/// A problem of the op.
pub(crate) struct Packed {
    ids: Vec<i64>,
    table: Weight,
}

impl Fast for Embedding {
    type Packed<E: Wide> = Packed;

    fn pack<E: Wide>(spec: &Spec<Case>, x: &Inputs, _: Reads) -> Packed {
        let table = Weight::of(spec, Reads::F32, &flat(&x.table), spec.case.d);
        Packed { ids: x.ids.to_vec(), table }
    }

    fn run<S: Simd, E: Wide>(s: S, x: &Packed, o: &mut Outputs<f32>, plant: Planted) {
        let d = x.table.columns();
        let written = x.ids.len() - usize::from(plant.is("last-row-unwritten"));
        let o = &mut flat_mut(&mut o.o)[..written * d];
        if plant.is("row-off-by-one") {
            let ids: Vec<i64> = x.ids.iter().map(|id| (id - 1).max(0)).collect();
            return embedding(s, o, &ids, &x.table);
        }
        embedding(s, o, &x.ids, &x.table);
    }
}
