//! Shared expert, used by every token:
//!
//! `o = sigmoid(gate x) * down( silu(gate_proj x) * (up_proj x) )`, with one gate per token.
//!
//! It is added to the routed sum after that is complete. The same `SwiGLU` without the gate is the
//! MLP of dense layers. Source: `Qwen3NextSparseMoeBlock.forward` and `Qwen3NextMLP` in
//! transformers 5.23.0, `modeling_qwen3_next.py`.

use crate::{Cost, DOMAIN, Dtype, Fill, Number, Op, Rng, Set, Spec, Tensor2, tensor::unwritten};

/// The op.
#[derive(Debug)]
pub struct SharedExpert;

case! {
    /// `N` tokens of `D` channels through an MLP of width `F`.
    pub struct Case {
        /// Tokens.
        "N" n,
        /// `hidden_size`.
        "D" d,
        /// `shared_expert_intermediate_size`.
        "F" f,
    }
}

tensors! {
    /// Inputs.
    pub struct Inputs<R> {
        /// `[N, D]` normed hidden states.
        pub x: Tensor2<R>,
        /// `[F, D]`.
        pub gate_proj: Tensor2<f32>,
        /// `[F, D]`.
        pub up_proj: Tensor2<f32>,
        /// `[D, F]`.
        pub down_proj: Tensor2<f32>,
        /// `[1, D]` `shared_expert_gate`.
        pub gate: Tensor2<f32>,
    }
}

tensors! {
    /// Outputs.
    pub struct Outputs<R> {
        /// `[N, D]`.
        pub o: Tensor2<R>,
    }
}

const FILLS: &[Fill] = &[
    Fill { name: DOMAIN, why: "weights of a fresh initialisation", cites: &[] },
    Fill {
        name: "closed-gate",
        why: "token gates hundreds below and above zero: leaving the gate out, or a sigmoid that overflows, shows",
        cites: &[
            "https://github.com/ROCm/ATOM/issues/755",
            "https://github.com/ollama/ollama/issues/15865",
        ],
    },
];

impl Op for SharedExpert {
    const NAME: &'static str = "shared_expert";
    type Case = Case;
    type Inputs<R: Number> = Inputs<R>;
    type Outputs<R: Number> = Outputs<R>;

    fn fills() -> &'static [Fill] {
        FILLS
    }

    fn specs(set: Set) -> Vec<Spec<Case>> {
        let new = |(n, d, f)| Spec::new(Case { n, d, f });
        let mut specs = vec![new((1, 1, 1)), new((3, 8, 5)), new((9, 16, 12)).fill("closed-gate")];
        if set >= Set::Ci {
            specs.extend([
                new((65, 64, 48)),
                new((33, 64, 32)).dtype(Dtype::Bf16),
                new((33, 64, 32)).fill("closed-gate").dtype(Dtype::Bf16),
                new((1, 330, 76)).dtype(Dtype::Bf16),
                new((33, 64, 32)).dtype(Dtype::F16),
            ]);
        }
        if set >= Set::Nightly {
            specs.push(new((64, 2048, 512)));
        }
        specs
    }

    fn inputs(spec: &Spec<Case>, rng: &mut Rng) -> Inputs {
        let Case { n, d, f } = spec.case;
        let (by_d, by_f) = ((d as f32).sqrt().recip(), (f as f32).sqrt().recip());
        let gate = if spec.is("closed-gate") { 200.0 * by_d } else { by_d };
        Inputs {
            x: spec.round(rng.normals((n, d), 0.0, 1.0)),
            gate_proj: spec.round(rng.normals((f, d), 0.0, by_d)),
            up_proj: spec.round(rng.normals((f, d), 0.0, by_d)),
            down_proj: spec.round(rng.normals((d, f), 0.0, by_f)),
            gate: spec.round(rng.normals((1, d), 0.0, gate)),
        }
    }

    fn unwritten(_: &Spec<Case>, x: &Inputs) -> Outputs {
        Outputs { o: unwritten(x.x.raw_dim()) }
    }

    fn lift<R: Number>(inputs: &Inputs) -> Inputs<R> {
        Inputs::lift(inputs)
    }

    fn cost(spec: &Spec<Case>) -> Cost {
        let [n, d, f] = [spec.case.n, spec.case.d, spec.case.f].map(|size| size as u64);
        Cost {
            bytes: spec.dtype.size() as u64 * (2 * n * d + 3 * d * f + d),
            flops: n * (6 * d * f + 4 * f + 3 * d),
        }
    }
}
