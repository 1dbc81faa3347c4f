//! Choosing a token from its logits.
//!
//! Temperature 0 is greedy: the largest logit, ties to the lowest id. Otherwise, in this order:
//! `p = softmax(logits / temperature)`; sort by descending probability, ties by id; keep the first
//! `top_k` (0: all); of those keep the shortest prefix whose probability, relative to what `top_k`
//! kept, reaches `top_p` (at least one token); the token is the first whose cumulated probability,
//! relative to what was kept, exceeds `uniform`.
//! Source: the logits processors of transformers 5.23.0 (`TemperatureLogitsWarper`,
//! `TopKLogitsWarper`, `TopPLogitsWarper`), with the order of ties defined.

use crate::{
    Cost, DOMAIN, Dtype, Fill, Number, Op, Rng, Set, Spec, Tensor1, Tensor2, tensor::unwritten,
};

/// The op.
#[derive(Debug)]
pub struct Sampling;

case! {
    /// `N` rows of `M` logits.
    pub struct Case {
        /// Rows.
        "N" n,
        /// `vocab_size`.
        "M" m,
    }
}

tensors! {
    /// Inputs.
    pub struct Inputs<R> {
        /// `[N, M]`.
        pub logits: Tensor2<R>,
        /// `[N]` a draw from `[0, 1)` per row.
        pub uniform: Tensor1<R>,
        /// 0 is greedy.
        pub temperature: f64,
        /// 0 keeps all.
        pub top_k: usize,
        /// 1 keeps all.
        pub top_p: f64,
    }
}

tensors! {
    /// Outputs.
    pub struct Outputs {
        /// `[N]` token ids.
        pub ids: Tensor1<i64>,
    }
}

const FILLS: &[Fill] = &[
    Fill {
        name: DOMAIN,
        why: "temperature 0.7, top-k 20, top-p 0.8, as the model's card recommends",
        cites: &[],
    },
    Fill {
        name: "greedy",
        why: "temperature 0, each row with its largest logit twice: the lower id wins",
        cites: &["https://github.com/vllm-project/vllm/issues/42960"],
    },
    Fill {
        name: "all",
        why: "no truncation, temperature 1",
        cites: &["https://github.com/sgl-project/sglang/issues/27869"],
    },
];

impl Op for Sampling {
    const NAME: &'static str = "sampling";
    const WIDE: &'static [&'static str] = &["uniform"];
    type Case = Case;
    type Inputs<R: Number> = Inputs<R>;
    type Outputs<R: Number> = Outputs;

    fn fills() -> &'static [Fill] {
        FILLS
    }

    fn specs(set: Set) -> Vec<Spec<Case>> {
        let new = |(n, m)| Spec::new(Case { n, m });
        let mut specs =
            vec![new((1, 1)), new((7, 33)), new((7, 33)).fill("greedy"), new((7, 33)).fill("all")];
        if set >= Set::Ci {
            specs.extend([new((65, 1000)), new((129, 33))]);
            let stored = [Dtype::Bf16, Dtype::F16];
            specs.extend(stored.map(|dtype| new((129, 200)).dtype(dtype)));
        }
        if set >= Set::Nightly {
            specs.push(new((4, 151_936)));
        }
        specs
    }

    fn unfelt(spec: &Spec<Case>, input: &str, output: &str) -> Option<&'static str> {
        match (input, output) {
            (_, "ids") if spec.case.m == 1 => Some("the only token is chosen"),
            ("uniform", "ids") if spec.is("greedy") => Some("greedy draws nothing"),
            _ => None,
        }
    }

    fn inputs(spec: &Spec<Case>, rng: &mut Rng) -> Inputs {
        let Case { n, m } = spec.case;
        let mut logits = rng.normals((n, m), 0.0, 2.0);
        let (temperature, top_k, top_p) = match spec.fill.as_str() {
            "greedy" => {
                for mut row in logits.rows_mut() {
                    // Two places of every row, not the same ones: logits that nobody read show.
                    let first = rng.below(m);
                    let second = (first + 1 + rng.below(m.max(2) - 1)) % m;
                    row[first] = 20.0;
                    row[second] = 20.0;
                }
                (0.0, 0, 1.0)
            }
            "all" => (1.0, 0, 1.0),
            _ => (0.7, 20, 0.8),
        };
        Inputs {
            logits: spec.round(logits),
            uniform: rng.uniforms(n, 0.0, 1.0),
            temperature,
            top_k,
            top_p,
        }
    }

    fn unwritten(_: &Spec<Case>, x: &Inputs) -> Outputs {
        Outputs { ids: unwritten(x.logits.nrows()) }
    }

    fn lift<R: Number>(inputs: &Inputs) -> Inputs<R> {
        Inputs::lift(inputs)
    }

    fn cost(spec: &Spec<Case>) -> Cost {
        let elements = (spec.case.n * spec.case.m) as u64;
        Cost { bytes: 4 * elements, flops: 3 * elements }
    }
}
