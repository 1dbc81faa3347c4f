//! Router of a sparse layer:
//!
//! `logits = weight x`, `p = softmax(logits)` over all `E` experts, the `A` largest are chosen, most
//! probable first, ties to the lowest index; `weights = p / sum of the chosen p` if
//! `norm_topk_prob`, else `p`.
//!
//! No bias, no grouping, no scaling factor, softmax in f32. `torch.topk` leaves the order of ties
//! open; karat defines it. Choosing is a discontinuity: `margins` says how close the last chosen
//! expert was to the first one left out (infinite where every expert is chosen), and a swap inside
//! the error of the logits is not a mistake.
//! Source: `Qwen3NextTopKRouter.forward` in transformers 5.23.0, `modeling_qwen3_next.py`.

use crate::{
    Cost, DOMAIN, Dtype, Fill, Number, Op, Rng, Set, Spec, Tensor1, Tensor2, tensor::unwritten,
};

/// The op.
#[derive(Debug)]
pub struct MoeRouter;

case! {
    /// `N` tokens of `D` channels choose `A` of `E` experts.
    pub struct Case {
        /// Tokens.
        "N" n,
        /// `hidden_size`.
        "D" d,
        /// `num_experts`.
        "E" e,
        /// `num_experts_per_tok`.
        "A" a,
    }
}

tensors! {
    /// Inputs.
    pub struct Inputs<R> {
        /// `[N, D]` normed hidden states.
        pub x: Tensor2<R>,
        /// `[E, D]`.
        pub weight: Tensor2<f32>,
        /// `A`.
        pub top_k: usize,
        /// Whether the chosen weights are divided by their sum.
        pub norm_topk_prob: bool,
    }
}

tensors! {
    /// Outputs.
    pub struct Outputs<R> {
        /// `[N, A]` experts, most probable first.
        pub ids: Tensor2<i64>,
        /// `[N, A]` their weights.
        pub weights: Tensor2<R>,
        /// `[N, E]`.
        pub logits: Tensor2<R>,
        /// `[N]` logit of the last chosen expert less that of the first left out.
        pub margins: Tensor1<R>,
    }
}

const FILLS: &[Fill] = &[
    Fill { name: DOMAIN, why: "logits of standard deviation 1", cites: &[] },
    Fill {
        name: "ties",
        why: "pairs of experts with the same row: exact ties at every place, also the last",
        cites: &["https://github.com/huggingface/transformers/issues/45131"],
    },
    Fill {
        name: "hot-expert",
        why: "one expert far above the others for every token: without renormalisation the weights hardly change",
        cites: &["https://github.com/huggingface/transformers/issues/43542"],
    },
    Fill {
        name: "no-renormalise",
        why: "norm_topk_prob false: dividing anyway shows",
        cites: &["https://github.com/1bit-MONSTER/1bit-MONSTER/issues/2134"],
    },
    Fill {
        name: "large-logits",
        why: "logits of hundreds: a softmax without its maximum subtracted overflows",
        cites: &["https://github.com/huggingface/transformers/issues/45120"],
    },
];

impl Op for MoeRouter {
    const NAME: &'static str = "moe_router";
    const TOLD: &'static [&'static str] = &["margins"];
    type Case = Case;
    type Inputs<R: Number> = Inputs<R>;
    type Outputs<R: Number> = Outputs<R>;

    fn fills() -> &'static [Fill] {
        FILLS
    }

    fn specs(set: Set) -> Vec<Spec<Case>> {
        let new = |(n, d, e, a)| Spec::new(Case { n, d, e, a });
        let mut specs: Vec<_> =
            [(1, 4, 1, 1), (3, 8, 4, 4), (7, 16, 16, 3), (9, 16, 20, 3)].map(new).to_vec();
        specs.extend(FILLS[1..].iter().map(|fill| new((9, 16, 16, 3)).fill(fill.name)));
        if set >= Set::Ci {
            specs.extend([
                new((65, 64, 64, 10)),
                new((130, 64, 512, 10)),
                new((33, 64, 64, 8)).dtype(Dtype::Bf16),
                new((9, 16, 16, 3)).fill("ties").dtype(Dtype::Bf16),
                new((70, 136, 52, 6)).dtype(Dtype::Bf16),
                new((33, 64, 60, 4)).dtype(Dtype::F16),
            ]);
        }
        if set >= Set::Nightly {
            specs.push(new((1024, 2048, 512, 10)));
        }
        specs
    }

    fn refuse(c: &Case) -> Option<String> {
        (c.e < c.a).then(|| format!("A {} is above E {}", c.a, c.e))
    }

    fn unfelt(spec: &Spec<Case>, input: &str, output: &str) -> Option<&'static str> {
        let one =
            spec.case.e == 1 && matches!((input, output), ("x" | "weight", "ids" | "weights"));
        one.then_some("the only expert is chosen, with the weight one")
    }

    fn inputs(spec: &Spec<Case>, rng: &mut Rng) -> Inputs {
        let Case { n, d, e, a } = spec.case;
        let scale = if spec.is("large-logits") { 200.0 } else { 1.0 };
        let mut weight = rng.normals((e, d), 0.0, scale / (d as f32).sqrt());
        let mut x = rng.normals((n, d), 0.0, 1.0);
        match spec.fill.as_str() {
            "ties" => (1..e).step_by(2).for_each(|i| {
                let twin = weight.row(i - 1).to_owned();
                weight.row_mut(i).assign(&twin);
            }),
            "hot-expert" => {
                weight.row_mut(e / 2).fill(1.0);
                x.mapv_inplace(|x| x + 1.0);
            }
            _ => {}
        }
        let norm_topk_prob = !spec.is("no-renormalise");
        Inputs { x: spec.round(x), weight: spec.round(weight), top_k: a, norm_topk_prob }
    }

    fn unwritten(_: &Spec<Case>, x: &Inputs) -> Outputs {
        let n = x.x.nrows();
        Outputs {
            ids: unwritten((n, x.top_k)),
            weights: unwritten((n, x.top_k)),
            logits: unwritten((n, x.weight.nrows())),
            margins: unwritten(n),
        }
    }

    fn lift<R: Number>(inputs: &Inputs) -> Inputs<R> {
        Inputs::lift(inputs)
    }

    fn cost(spec: &Spec<Case>) -> Cost {
        let Case { n, d, e, a } = spec.case;
        let [n, d, e, a] = [n, d, e, a].map(|size| size as u64);
        Cost {
            bytes: spec.dtype.size() as u64 * (n * d + e * d) + 12 * n * a,
            flops: n * e * (2 * d + 4),
        }
    }
}
