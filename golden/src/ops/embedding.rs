//! Token embedding: `o[n] = table[ids[n]]`, not scaled.
//!
//! Source: `Qwen3NextModel.embed_tokens` in transformers 5.23.0, `modeling_qwen3_next.py`. The MTP
//! head uses the same table. A gather: every implementation is exact.

use crate::{
    Cost, DOMAIN, Dtype, Fill, Number, Op, Rng, Set, Spec, Tensor1, Tensor2, tensor::unwritten,
};

/// The op.
#[derive(Debug)]
pub struct Embedding;

case! {
    /// `N` tokens, a table of `M` rows of `D` channels.
    pub struct Case {
        /// Tokens.
        "N" n,
        /// Rows of the table, `vocab_size`.
        "M" m,
        /// `hidden_size`.
        "D" d,
    }
}

tensors! {
    /// Inputs.
    pub struct Inputs {
        /// `[N]` token ids, each in `0 .. M`.
        pub ids: Tensor1<i64>,
        /// `[M, D]` the table.
        pub table: Tensor2<f32>,
    }
}

tensors! {
    /// Outputs.
    pub struct Outputs<R> {
        /// `[N, D]` rows of the table.
        pub o: Tensor2<R>,
    }
}

const FILLS: &[Fill] = &[
    Fill { name: DOMAIN, why: "ids drawn over the whole table", cites: &[] },
    Fill {
        name: "edge-ids",
        why: "only the first and the last row: an id that is off by one or a table cut at a multiple of 64 shows",
        cites: &["https://github.com/vllm-project/vllm/issues/28182"],
    },
];

impl Op for Embedding {
    const NAME: &'static str = "embedding";
    type Case = Case;
    type Inputs<R: Number> = Inputs;
    type Outputs<R: Number> = Outputs<R>;

    fn fills() -> &'static [Fill] {
        FILLS
    }

    fn specs(set: Set) -> Vec<Spec<Case>> {
        let new = |(n, m, d)| Spec::new(Case { n, m, d });
        let mut specs = vec![new((1, 1, 1)), new((5, 17, 3)), new((5, 17, 3)).fill("edge-ids")];
        if set >= Set::Ci {
            specs.push(new((65, 1000, 64)));
            let stored = [Dtype::Bf16, Dtype::F16];
            specs.extend(stored.map(|dtype| new((33, 1000, 24)).dtype(dtype)));
        }
        if set >= Set::Nightly {
            specs.push(new((273, 151_936, 2048)));
        }
        specs
    }

    fn inputs(spec: &Spec<Case>, rng: &mut Rng) -> Inputs {
        let Case { n, m, d } = spec.case;
        let mut id = || if spec.is("edge-ids") { rng.below(2) * (m - 1) } else { rng.below(m) };
        let ids = (0..n).map(|_| id() as i64).collect();
        Inputs { ids, table: spec.round(rng.normals((m, d), 0.0, 1.0)) }
    }

    fn unwritten(_: &Spec<Case>, x: &Inputs) -> Outputs {
        Outputs { o: unwritten((x.ids.len(), x.table.ncols())) }
    }

    fn lift<R: Number>(inputs: &Inputs) -> Inputs {
        Inputs::lift(inputs)
    }

    fn cost(spec: &Spec<Case>) -> Cost {
        let (n, d) = (spec.case.n as u64, spec.case.d as u64);
        Cost { bytes: 2 * spec.dtype.size() as u64 * n * d + 8 * n, flops: 0 }
    }
}
