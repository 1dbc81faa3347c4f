//! Zero-centred RMS norm, with the residual addition that precedes it in a decoder layer:
//!
//! `h = x + residual`, `o = h * rsqrt(mean(h^2) + eps) * (1 + weight)`.
//!
//! Input, post-attention, final, query, key and all MTP norms are of this kind; only the norm of
//! the linear-attention output ([`rms_norm_gated`](super::rms_norm_gated)) is not. The product is
//! taken in the wide type and rounded once at the end (Llama rounds before the weight).
//! Source: `Qwen3NextRMSNorm.forward` in transformers 5.23.0, `modeling_qwen3_next.py`.

use crate::{
    Apart, Cost, DOMAIN, Dtype, Fill, Number, Op, Rng, Set, Spec, Tensor1, Tensor2,
    tensor::unwritten,
};

/// The op.
#[derive(Debug)]
pub struct RmsNorm;

case! {
    /// `N` rows of `D` channels.
    pub struct Case {
        /// Rows.
        "N" n,
        /// Channels: `hidden_size`, or a head dimension.
        "D" d,
    }
}

tensors! {
    /// Inputs.
    pub struct Inputs<R> {
        /// `[N, D]` activations.
        pub x: Tensor2<R>,
        /// `[N, D]` added to `x` first; none for the norms of a head.
        pub residual: Option<Tensor2<R>>,
        /// `[D]` weight, stored minus one.
        pub weight: Tensor1<f32>,
        /// `rms_norm_eps`, added to the mean of squares.
        pub eps: f64,
    }
}

tensors! {
    /// Outputs.
    pub struct Outputs<R> {
        /// `[N, D]` normalised activations.
        pub o: Tensor2<R>,
        /// `[N, D]` the sum `x + residual`, where a residual is given.
        pub h: Option<Tensor2<R>>,
    }
}

const FILLS: &[Fill] = &[
    Fill {
        name: DOMAIN,
        why: "normal activations whose rows differ in scale by 1000; weights around zero",
        cites: &[],
    },
    Fill {
        name: "tiny-rows",
        why: "rows of norm 1e-3, where eps decides: a missing, doubled or misplaced eps shows",
        cites: &[
            "https://github.com/vllm-project/vllm/issues/25365",
            "https://github.com/ml-explore/mlx-lm/issues/1624",
        ],
    },
    Fill {
        name: "small-weight",
        why: "weights of 1e-3: `1 + w` rounded to bf16 loses them, a missing or doubled one is a factor",
        cites: &[
            "https://github.com/InternLM/lmdeploy/issues/4790",
            "https://github.com/kekzl/imp/issues/1289",
        ],
    },
    Fill {
        name: "outlier",
        why: "one channel 1e4 times the others, as the massive activations of trained models",
        cites: &["https://github.com/NVIDIA-NeMo/Automodel/issues/3233"],
    },
];

impl Op for RmsNorm {
    const NAME: &'static str = "rms_norm";
    const APART: &'static [Apart] =
        &[Apart { output: "h", inputs: &["weight"], why: "the sum is taken before the norm" }];
    type Case = Case;
    type Inputs<R: Number> = Inputs<R>;
    type Outputs<R: Number> = Outputs<R>;

    fn fills() -> &'static [Fill] {
        FILLS
    }

    fn specs(set: Set) -> Vec<Spec<Case>> {
        let new = |(n, d)| Spec::new(Case { n, d });
        let mut specs: Vec<_> = [(1, 1), (3, 7), (5, 64)].map(new).to_vec();
        specs.extend(FILLS[1..].iter().map(|fill| new((5, 64)).fill(fill.name)));
        if set >= Set::Ci {
            specs.extend([(2, 256), (65, 2048), (1, 2048)].map(new));
            let stored = [Dtype::Bf16, Dtype::F16];
            specs.extend(stored.map(|dtype| new((33, 256)).dtype(dtype)));
            specs.push(new((33, 256)).dtype(Dtype::Bf16).fill("small-weight"));
        }
        if set >= Set::Nightly {
            specs.push(new((4096, 2048)));
        }
        specs
    }

    fn unfelt(spec: &Spec<Case>, input: &str, output: &str) -> Option<&'static str> {
        let one = spec.case.d == 1 && (input, output) == ("x", "o");
        one.then_some("one channel over its own norm is its sign")
    }

    fn inputs(spec: &Spec<Case>, rng: &mut Rng) -> Inputs {
        let Case { n, d } = spec.case;
        let mut x = rng.normals((n, d), 0.0, 1.0);
        for mut row in x.rows_mut() {
            let scale = 10.0_f32.powf(rng.uniform(-1.5, 1.5));
            row *= if spec.fill == "tiny-rows" { 1e-3 / (d as f32).sqrt() } else { scale };
        }
        if spec.fill == "outlier" {
            x.column_mut(d / 2).mapv_inplace(|v| v * 1e4);
        }
        let std = if spec.fill == "small-weight" { 1e-3 } else { 0.3 };
        let residual = (spec.fill != "tiny-rows").then(|| rng.normals((n, d), 0.0, 1.0));
        Inputs {
            x: spec.round(x),
            residual: residual.map(|r| spec.round(r)),
            weight: spec.round(rng.normals(d, 0.0, std)),
            eps: 1e-6,
        }
    }

    fn unwritten(_: &Spec<Case>, x: &Inputs) -> Outputs {
        Outputs {
            o: unwritten(x.x.raw_dim()),
            h: x.residual.as_ref().map(|residual| unwritten(residual.raw_dim())),
        }
    }

    fn lift<R: Number>(inputs: &Inputs) -> Inputs<R> {
        Inputs::lift(inputs)
    }

    fn cost(spec: &Spec<Case>) -> Cost {
        let (n, d, size) = (spec.case.n as u64, spec.case.d as u64, spec.dtype.size() as u64);
        // Read x and the residual, write both outputs; the residual is absent in one fill only.
        Cost { bytes: size * (4 * n * d + d), flops: 5 * n * d }
    }
}
