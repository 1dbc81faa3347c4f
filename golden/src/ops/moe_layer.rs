//! The sparse MLP as a whole (official `Qwen3NextSparseMoeBlock`):
//! `o = moe_experts(x, moe_router(x)) + shared_expert(x)`.
//!
//! The shared expert is added after the routed sum is complete; treating it as an eleventh expert
//! changes the rounding. Source: transformers 5.23.0, `modeling_qwen3_next.py`.

use crate::{
    Apart, Cost, DOMAIN, Dtype, Fill, Number, Op, Rng, Set, Spec, Tensor1, Tensor2, Tensor3,
    tensor::unwritten,
};

/// The op.
#[derive(Debug)]
pub struct MoeLayer;

case! {
    /// `N` tokens of `D` channels choose `A` of `E` experts of width `F`.
    pub struct Case {
        /// Tokens.
        "N" n,
        /// `hidden_size`.
        "D" d,
        /// `num_experts`.
        "E" e,
        /// `num_experts_per_tok`.
        "A" a,
        /// `moe_intermediate_size`, also of the shared expert.
        "F" f,
    }
}

tensors! {
    /// Inputs.
    pub struct Inputs<R> {
        /// `[N, D]` normed hidden states.
        pub x: Tensor2<R>,
        /// `[E, D]`.
        pub router: Tensor2<f32>,
        /// `[E, F, D]`.
        pub gate_proj: Tensor3<f32>,
        /// `[E, F, D]`.
        pub up_proj: Tensor3<f32>,
        /// `[E, D, F]`.
        pub down_proj: Tensor3<f32>,
        /// `[F, D]`.
        pub shared_gate_proj: Tensor2<f32>,
        /// `[F, D]`.
        pub shared_up_proj: Tensor2<f32>,
        /// `[D, F]`.
        pub shared_down_proj: Tensor2<f32>,
        /// `[1, D]`.
        pub shared_gate: Tensor2<f32>,
        /// `A`.
        pub top_k: usize,
        /// Whether the chosen weights are divided by their sum.
        pub norm_topk_prob: bool,
    }
}

tensors! {
    /// Outputs.
    pub struct Outputs<R> {
        /// `[N, D]`.
        pub o: Tensor2<R>,
        /// `[N, A]` experts, most probable first.
        pub ids: Tensor2<i64>,
        /// `[N, A]` what their outputs are multiplied by.
        pub weights: Tensor2<R>,
        /// `[N]` see [`moe_router`](super::moe_router).
        pub margins: Tensor1<R>,
    }
}

const FILLS: &[Fill] = &[
    Fill { name: DOMAIN, why: "weights of a fresh initialisation", cites: &[] },
    Fill {
        name: "no-renormalise",
        why: "norm_topk_prob false: dividing anyway shows",
        cites: &["https://github.com/1bit-MONSTER/1bit-MONSTER/issues/2134"],
    },
];

/// What comes after the router.
const EXPERTS: &[&str] = &[
    "gate_proj",
    "up_proj",
    "down_proj",
    "shared_gate_proj",
    "shared_up_proj",
    "shared_down_proj",
    "shared_gate",
];

impl Op for MoeLayer {
    const NAME: &'static str = "moe_layer";
    const TOLD: &'static [&'static str] = &["margins"];
    const APART: &'static [Apart] = &[
        Apart { output: "ids", inputs: EXPERTS, why: "experts are chosen before they are asked" },
        Apart {
            output: "weights",
            inputs: EXPERTS,
            why: "experts are weighed before they are asked",
        },
    ];
    type Case = Case;
    type Inputs<R: Number> = Inputs<R>;
    type Outputs<R: Number> = Outputs<R>;

    fn fills() -> &'static [Fill] {
        FILLS
    }

    fn specs(set: Set) -> Vec<Spec<Case>> {
        let new = |(n, d, e, a, f)| Spec::new(Case { n, d, e, a, f });
        let mut specs = vec![
            new((1, 8, 2, 1, 4)),
            new((9, 16, 16, 3, 8)),
            new((9, 16, 16, 3, 8)).fill("no-renormalise"),
        ];
        if set >= Set::Ci {
            specs.extend([
                new((65, 64, 16, 3, 32)),
                new((33, 32, 16, 3, 16)).dtype(Dtype::Bf16),
                new((17, 32, 16, 3, 16)).fill("no-renormalise").dtype(Dtype::Bf16),
                new((33, 32, 16, 3, 16)).dtype(Dtype::F16),
            ]);
        }
        if set >= Set::Nightly {
            specs.push(new((16, 2048, 64, 10, 512)));
        }
        specs
    }

    fn refuse(c: &Case) -> Option<String> {
        (c.e < c.a).then(|| format!("A {} is above E {}", c.a, c.e))
    }

    fn unfelt(spec: &Spec<Case>, input: &str, output: &str) -> Option<&'static str> {
        let one = spec.case.a == 1
            && !spec.is("no-renormalise")
            && matches!((input, output), ("x" | "router", "weights"));
        one.then_some("one expert over its own sum has the weight one")
    }

    fn inputs(spec: &Spec<Case>, rng: &mut Rng) -> Inputs {
        let Case { n, d, e, a, f } = spec.case;
        let (by_d, by_f) = ((d as f32).sqrt().recip(), (f as f32).sqrt().recip());
        Inputs {
            x: spec.round(rng.normals((n, d), 0.0, 1.0)),
            router: spec.round(rng.normals((e, d), 0.0, by_d)),
            gate_proj: spec.round(rng.normals((e, f, d), 0.0, by_d)),
            up_proj: spec.round(rng.normals((e, f, d), 0.0, by_d)),
            down_proj: spec.round(rng.normals((e, d, f), 0.0, by_f)),
            shared_gate_proj: spec.round(rng.normals((f, d), 0.0, by_d)),
            shared_up_proj: spec.round(rng.normals((f, d), 0.0, by_d)),
            shared_down_proj: spec.round(rng.normals((d, f), 0.0, by_f)),
            shared_gate: spec.round(rng.normals((1, d), 0.0, by_d)),
            top_k: a,
            norm_topk_prob: !spec.is("no-renormalise"),
        }
    }

    fn unwritten(_: &Spec<Case>, x: &Inputs) -> Outputs {
        Outputs {
            o: unwritten(x.x.raw_dim()),
            ids: unwritten((x.x.nrows(), x.top_k)),
            weights: unwritten((x.x.nrows(), x.top_k)),
            margins: unwritten(x.x.nrows()),
        }
    }

    fn lift<R: Number>(inputs: &Inputs) -> Inputs<R> {
        Inputs::lift(inputs)
    }

    fn cost(spec: &Spec<Case>) -> Cost {
        let Case { n, d, e, a, f } = spec.case;
        let [n, d, e, a, f] = [n, d, e, a, f].map(|size| size as u64);
        Cost {
            bytes: spec.dtype.size() as u64 * (2 * n * d + 3 * (a + 1) * d * f + e * d),
            flops: n * ((a + 1) * 6 * d * f + 2 * e * d),
        }
    }
}
