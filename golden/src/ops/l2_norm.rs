//! L2 normalisation of queries and keys: `o = x * rsqrt(sum(x^2) + eps)`.
//!
//! eps is added to the *sum* inside the root: not to the mean (which makes it `D` times larger),
//! not `max(norm, eps)`, not `sqrt(sum) + eps`. At unit scale these agree to 1e-7; at `|x| ~ 1e-3`
//! they differ by tens of percent. Applied after the convolution and its `SiLU`.
//! Source: `l2norm` in transformers 5.23.0, `modeling_qwen3_next.py` (in f32 since 5.18).

use crate::{Cost, DOMAIN, Dtype, Fill, Number, Op, Rng, Set, Spec, Tensor2, tensor::unwritten};

/// The op.
#[derive(Debug)]
pub struct L2Norm;

case! {
    /// `N` rows of `D` channels.
    pub struct Case {
        /// Rows: tokens times heads.
        "N" n,
        /// Channels, `linear_key_head_dim`.
        "D" d,
    }
}

tensors! {
    /// Inputs.
    pub struct Inputs<R> {
        /// `[N, D]` vectors.
        pub x: Tensor2<R>,
        /// Added to the sum of squares, 1e-6.
        pub eps: f64,
    }
}

tensors! {
    /// Outputs.
    pub struct Outputs<R> {
        /// `[N, D]` vectors of length at most one.
        pub o: Tensor2<R>,
    }
}

const FILLS: &[Fill] = &[
    Fill {
        name: DOMAIN,
        why: "rows as the convolution leaves them: mostly small, one sign longer than the other",
        cites: &[],
    },
    Fill {
        name: "tiny-rows",
        why: "rows of norm about 1e-3, where eps is as large as the sum: a misplaced eps shows",
        cites: &[
            "https://github.com/ml-explore/mlx-lm/issues/1624",
            "https://github.com/ggml-org/llama.cpp/issues/28068",
            "https://github.com/vllm-project/vllm/issues/25365",
        ],
    },
    Fill {
        name: "zero-row",
        why: "a row of zeros stays zero; without eps it is NaN, and the answer is \"!!!!\"",
        cites: &["https://github.com/huggingface/transformers/issues/40842"],
    },
    Fill {
        name: "denormals",
        why: "rows below 2^-126, whose squares vanish",
        cites: &["https://github.com/kekzl/imp/issues/28"],
    },
];

impl Op for L2Norm {
    const NAME: &'static str = "l2_norm";
    type Case = Case;
    type Inputs<R: Number> = Inputs<R>;
    type Outputs<R: Number> = Outputs<R>;

    fn fills() -> &'static [Fill] {
        FILLS
    }

    fn specs(set: Set) -> Vec<Spec<Case>> {
        let new = |(n, d)| Spec::new(Case { n, d });
        let mut specs: Vec<_> = [(1, 1), (3, 7), (5, 128)].map(new).to_vec();
        specs.extend(FILLS[1..].iter().map(|fill| new((5, 128)).fill(fill.name)));
        if set >= Set::Ci {
            specs.extend([(65, 16), (273, 24)].map(new));
            let stored = [Dtype::Bf16, Dtype::F16];
            specs.extend(stored.map(|dtype| new((32, 128)).dtype(dtype)));
            specs.push(new((32, 128)).dtype(Dtype::Bf16).fill("tiny-rows"));
        }
        if set >= Set::Nightly {
            specs.push(new((16 * 4096, 128)));
        }
        specs
    }

    fn inputs(spec: &Spec<Case>, rng: &mut Rng) -> Inputs {
        let Case { n, d } = spec.case;
        let scale = match spec.fill.as_str() {
            "tiny-rows" => 1e-3 / (d as f32).sqrt(),
            "denormals" => 1e-39,
            _ => 1.0,
        };
        // What SiLU leaves of a normal value is bounded below by -0.28.
        let mut x = rng.normals((n, d), 0.1, 0.5);
        x.mapv_inplace(|v| v.max(-0.28) * scale);
        if spec.is("zero-row") {
            x.row_mut(n / 2).fill(0.0);
        }
        Inputs { x: spec.round(x), eps: 1e-6 }
    }

    fn unwritten(_: &Spec<Case>, x: &Inputs) -> Outputs {
        Outputs { o: unwritten(x.x.raw_dim()) }
    }

    fn lift<R: Number>(inputs: &Inputs) -> Inputs<R> {
        Inputs::lift(inputs)
    }

    fn cost(spec: &Spec<Case>) -> Cost {
        let elements = (spec.case.n * spec.case.d) as u64;
        Cost { bytes: 2 * spec.dtype.size() as u64 * elements, flops: 3 * elements }
    }
}
