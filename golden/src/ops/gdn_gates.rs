//! Gates of the delta rule, per value head:
//!
//! `beta = sigmoid(b)`, `g = -exp(a_log) * softplus(a + dt_bias)`, so that `g <= 0` is the log of
//! the decay of the state.
//!
//! All of it in f32, whatever the activations are: `exp(a_log)` rounded to bf16 or a `g` stored in
//! it drifts over long contexts. `softplus(x)` is `x` above 20 and `log1p(exp(x))` below;
//! `log(1 + exp(x))` returns exactly 0 below -17 and is 17 % off at -15, which matters for heads
//! that hardly forget. Source: `Qwen3NextGatedDeltaNet.forward` in transformers 5.23.0,
//! `modeling_qwen3_next.py`.

use crate::{
    Apart, Cost, DOMAIN, Dtype, Fill, Number, Op, Rng, Set, Spec, Tensor1, Tensor2,
    tensor::unwritten,
};

/// The op.
#[derive(Debug)]
pub struct GdnGates;

case! {
    /// `N` tokens, `HV` value heads.
    pub struct Case {
        /// Tokens.
        "N" n,
        /// `linear_num_value_heads`.
        "HV" hv,
    }
}

tensors! {
    /// Inputs.
    pub struct Inputs<R> {
        /// `[N, HV]` raw decay projection.
        pub a: Tensor2<R>,
        /// `[N, HV]` raw write-strength projection.
        pub b: Tensor2<R>,
        /// `[HV]` logarithm of the decay rate.
        pub a_log: Tensor1<f32>,
        /// `[HV]` offset of `a`.
        pub dt_bias: Tensor1<f32>,
    }
}

tensors! {
    /// Outputs.
    pub struct Outputs<R> {
        /// `[N, HV]` log decay, at most 0.
        pub g: Tensor2<R>,
        /// `[N, HV]` write strength, in (0, 1).
        pub beta: Tensor2<R>,
    }
}

const FILLS: &[Fill] = &[
    Fill {
        name: DOMAIN,
        why: "rates from U(0.01, 16), offsets around 1, normal projections",
        cites: &[],
    },
    Fill {
        name: "remember",
        why: "a + dt_bias between -20 and -14: log(1 + exp) in f32 loses the gate, log1p does not",
        cites: &["https://github.com/ml-explore/mlx-lm/issues/997"],
    },
    Fill {
        name: "forget",
        why: "a + dt_bias of 20, where softplus turns linear, and of 100, where e^x overflows, at the largest rates",
        cites: &["https://github.com/ggml-org/llama.cpp/issues/19324"],
    },
    Fill {
        name: "extreme-rates",
        why: "a_log of -4.6 and 2.77 only, the ends of the initialisation: rounding them to bf16 shows",
        cites: &[
            "https://github.com/sgl-project/sglang/issues/20741",
            "https://github.com/huggingface/transformers/issues/47831",
        ],
    },
];

impl Op for GdnGates {
    const NAME: &'static str = "gdn_gates";
    const WIDE: &'static [&'static str] = &["a_log", "dt_bias"];
    const APART: &'static [Apart] = &[
        Apart { output: "beta", inputs: &["a", "a_log", "dt_bias"], why: "beta = sigmoid(b)" },
        Apart { output: "g", inputs: &["b"], why: "g is of a and the rates of its head" },
    ];
    type Case = Case;
    type Inputs<R: Number> = Inputs<R>;
    type Outputs<R: Number> = Outputs<R>;

    fn fills() -> &'static [Fill] {
        FILLS
    }

    fn specs(set: Set) -> Vec<Spec<Case>> {
        let new = |(n, hv)| Spec::new(Case { n, hv });
        let mut specs: Vec<_> = [(1, 1), (3, 5), (65, 4)].map(new).to_vec();
        specs.extend(FILLS[1..].iter().map(|fill| new((9, 8)).fill(fill.name)));
        if set >= Set::Ci {
            specs.push(new((273, 32)));
            let stored = [Dtype::Bf16, Dtype::F16];
            specs.extend(stored.map(|dtype| new((65, 32)).dtype(dtype)));
        }
        if set >= Set::Nightly {
            specs.push(new((32768, 32)));
        }
        specs
    }

    fn inputs(spec: &Spec<Case>, rng: &mut Rng) -> Inputs {
        let Case { n, hv } = spec.case;
        let mut a = rng.normals((n, hv), 0.0, 1.0);
        let mut a_log = Tensor1::from_shape_simple_fn(hv, || rng.uniform(0.01, 16.0).ln());
        match spec.fill.as_str() {
            "remember" => a.mapv_inplace(|_| rng.uniform(-21.0, -15.0)),
            "forget" => {
                a.indexed_iter_mut().for_each(|((n, h), a)| {
                    *a = if (n + h).is_multiple_of(4) { 99.0 } else { rng.uniform(17.0, 21.0) };
                });
                a_log.fill(2.77);
            }
            "extreme-rates" => a_log.indexed_iter_mut().for_each(|(i, x)| *x = [-4.6, 2.77][i % 2]),
            _ => {}
        }
        let b = spec.round(rng.normals((n, hv), 0.0, 1.5));
        Inputs { a: spec.round(a), b, a_log, dt_bias: rng.normals(hv, 1.0, 0.1) }
    }

    fn unwritten(_: &Spec<Case>, x: &Inputs) -> Outputs {
        Outputs { g: unwritten(x.a.raw_dim()), beta: unwritten(x.b.raw_dim()) }
    }

    fn lift<R: Number>(inputs: &Inputs) -> Inputs<R> {
        Inputs::lift(inputs)
    }

    fn cost(spec: &Spec<Case>) -> Cost {
        let (n, hv, size) = (spec.case.n as u64, spec.case.hv as u64, spec.dtype.size() as u64);
        Cost { bytes: n * hv * (2 * size + 8) + 8 * hv, flops: 10 * n * hv }
    }
}
