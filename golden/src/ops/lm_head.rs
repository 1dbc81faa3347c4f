//! Logits: `logits[n, m] = sum_d x[n, d] * weight[m, d]`, no bias, over the final norm's output.
//!
//! `lm_head.weight`, or the embedding where `tie_word_embeddings` says so. The official bf16 run
//! returns bf16 logits, whose steps near 16 are 0.125: ranks of close tokens are lost.
//! Source: `Qwen3NextForCausalLM.forward` in transformers 5.23.0, `modeling_qwen3_next.py`.

use crate::{Cost, DOMAIN, Dtype, Fill, Number, Op, Rng, Set, Spec, Tensor2, tensor::unwritten};

/// The op.
#[derive(Debug)]
pub struct LmHead;

case! {
    /// `N` tokens of `D` channels, a vocabulary of `M`.
    pub struct Case {
        /// Tokens.
        "N" n,
        /// `vocab_size`.
        "M" m,
        /// `hidden_size`.
        "D" d,
    }
}

tensors! {
    /// Inputs.
    pub struct Inputs<R> {
        /// `[N, D]` after the final norm.
        pub x: Tensor2<R>,
        /// `[M, D]`.
        pub weight: Tensor2<f32>,
    }
}

tensors! {
    /// Outputs.
    pub struct Outputs<R> {
        /// `[N, M]`.
        pub logits: Tensor2<R>,
    }
}

const FILLS: &[Fill] = &[
    Fill { name: DOMAIN, why: "normed activations, logits of standard deviation 1", cites: &[] },
    Fill {
        name: "close-logits",
        why: "pairs of rows that differ in the last bits: logits rounded to bf16 lose the order",
        cites: &[
            "https://github.com/sgl-project/sglang/issues/13708",
            "https://github.com/vllm-project/vllm/issues/42960",
        ],
    },
];

impl Op for LmHead {
    const NAME: &'static str = "lm_head";
    type Case = Case;
    type Inputs<R: Number> = Inputs<R>;
    type Outputs<R: Number> = Outputs<R>;

    fn fills() -> &'static [Fill] {
        FILLS
    }

    fn specs(set: Set) -> Vec<Spec<Case>> {
        let new = |(n, m, d)| Spec::new(Case { n, m, d });
        let mut specs =
            vec![new((1, 1, 1)), new((3, 33, 16)), new((3, 34, 16)).fill("close-logits")];
        if set >= Set::Ci {
            specs.extend([new((5, 1000, 64)), new((5, 100, 77))]);
            specs.extend([(5, 256, 64), (5, 100, 77)].map(|case| new(case).dtype(Dtype::Bf16)));
            specs.push(new((1, 102, 330)).dtype(Dtype::Bf16));
            specs.push(new((5, 100, 77)).dtype(Dtype::F16));
        }
        if set >= Set::Nightly {
            specs.push(new((1, 151_936, 2048)));
        }
        specs
    }

    fn inputs(spec: &Spec<Case>, rng: &mut Rng) -> Inputs {
        let Case { n, m, d } = spec.case;
        let mut weight = rng.normals((m, d), 0.0, (d as f32).sqrt().recip());
        if spec.is("close-logits") {
            for i in (1..m).step_by(2) {
                let twin = weight.row(i - 1).map(|w| w * (1.0 + 1e-4));
                weight.row_mut(i).assign(&twin);
            }
        }
        Inputs { x: spec.round(rng.normals((n, d), 0.0, 1.0)), weight: spec.round(weight) }
    }

    fn unwritten(_: &Spec<Case>, x: &Inputs) -> Outputs {
        Outputs { logits: unwritten((x.x.nrows(), x.weight.nrows())) }
    }

    fn lift<R: Number>(inputs: &Inputs) -> Inputs<R> {
        Inputs::lift(inputs)
    }

    fn cost(spec: &Spec<Case>) -> Cost {
        let [n, m, d] = [spec.case.n, spec.case.m, spec.case.d].map(|size| size as u64);
        Cost { bytes: spec.dtype.size() as u64 * (n * d + m * d) + 4 * n * m, flops: 2 * n * m * d }
    }
}
