//! Gated RMS norm of the delta rule's output, per value head:
//!
//! `o = x * rsqrt(mean(x^2) + eps) * weight * silu(z)`.
//!
//! The only norm of the model whose weight is *not* zero-centred. Norm first, then weight, then
//! gate; in f32 with one rounding at the end. (The official bf16 run rounds after the norm and
//! after the weight as well; fused kernels do not. The difference is at most 2 bf16 ulp.)
//! Source: `Qwen3NextRMSNormGated.forward` in transformers 5.23.0, `modeling_qwen3_next.py`.

use crate::{
    Cost, DOMAIN, Dtype, Fill, Number, Op, Rng, Set, Spec, Tensor1, Tensor2, tensor::unwritten,
};

/// The op.
#[derive(Debug)]
pub struct RmsNormGated;

case! {
    /// `N` rows of `V` channels.
    pub struct Case {
        /// Rows: tokens times value heads.
        "N" n,
        /// `linear_value_head_dim`.
        "V" v,
    }
}

tensors! {
    /// Inputs.
    pub struct Inputs<R> {
        /// `[N, V]` output of the delta rule.
        pub x: Tensor2<R>,
        /// `[N, V]` raw gate.
        pub z: Tensor2<R>,
        /// `[V]` weight, as it multiplies.
        pub weight: Tensor1<f32>,
        /// `rms_norm_eps`, added to the mean of squares.
        pub eps: f64,
    }
}

tensors! {
    /// Outputs.
    pub struct Outputs<R> {
        /// `[N, V]`.
        pub o: Tensor2<R>,
    }
}

const FILLS: &[Fill] = &[
    Fill {
        name: DOMAIN,
        why: "outputs of the size the delta rule gives (1e-2), normal gates, weights around one",
        cites: &[],
    },
    Fill {
        name: "tiny-rows",
        why: "rows of norm 1e-3, where eps decides",
        cites: &["https://github.com/vllm-project/vllm/issues/25365"],
    },
    Fill {
        name: "zero-centred-weight",
        why: "weights around zero, as if they were stored minus one: an added one is a large factor",
        cites: &[
            "https://github.com/jundot/omlx/issues/1507",
            "https://github.com/jundot/omlx/issues/3750",
        ],
    },
    Fill {
        name: "closed-gate",
        why: "gates of -90 and 90: a sigmoid that overflows is NaN",
        cites: &["https://github.com/ollama/ollama/issues/15865"],
    },
];

impl Op for RmsNormGated {
    const NAME: &'static str = "rms_norm_gated";
    type Case = Case;
    type Inputs<R: Number> = Inputs<R>;
    type Outputs<R: Number> = Outputs<R>;

    fn fills() -> &'static [Fill] {
        FILLS
    }

    fn specs(set: Set) -> Vec<Spec<Case>> {
        let new = |(n, v)| Spec::new(Case { n, v });
        let mut specs: Vec<_> = [(1, 1), (3, 7), (6, 128)].map(new).to_vec();
        specs.extend(FILLS[1..].iter().map(|fill| new((5, 64)).fill(fill.name)));
        if set >= Set::Ci {
            specs.push(new((65 * 4, 24)));
            let stored = [Dtype::Bf16, Dtype::F16];
            specs.extend(stored.map(|dtype| new((64, 128)).dtype(dtype)));
        }
        if set >= Set::Nightly {
            specs.push(new((4096 * 32, 128)));
        }
        specs
    }

    fn inputs(spec: &Spec<Case>, rng: &mut Rng) -> Inputs {
        let Case { n, v } = spec.case;
        let std = if spec.is("tiny-rows") { 1e-3 / (v as f32).sqrt() } else { 1e-2 };
        let mut z = rng.normals((n, v), 0.0, 1.0);
        if spec.is("closed-gate") {
            z.mapv_inplace(|z| 90.0_f32.copysign(z));
        }
        let mean = if spec.is("zero-centred-weight") { 0.0 } else { 1.0 };
        Inputs {
            x: spec.round(rng.normals((n, v), 0.0, std)),
            z: spec.round(z),
            weight: spec.round(rng.normals(v, mean, 0.2)),
            eps: 1e-6,
        }
    }

    fn unwritten(_: &Spec<Case>, x: &Inputs) -> Outputs {
        Outputs { o: unwritten(x.x.raw_dim()) }
    }

    fn lift<R: Number>(inputs: &Inputs) -> Inputs<R> {
        Inputs::lift(inputs)
    }

    fn cost(spec: &Spec<Case>) -> Cost {
        let (n, v, size) = (spec.case.n as u64, spec.case.v as u64, spec.dtype.size() as u64);
        Cost { bytes: size * (3 * n * v + v), flops: 9 * n * v }
    }
}
