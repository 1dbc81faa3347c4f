//! Linear projection without bias: `o[n, m] = sum_d x[n, d] * weight[m, d]`.
//!
//! `weight` is `[out, in]`, row-major, as every checkpoint of the family stores it. Bf16 and f16
//! weights are exact in `f32`; FP8 weights enter through [`fp8_dequant`](super::fp8_dequant).
//! Source: `torch.nn.functional.linear`; no linear layer of the model has a bias.

use crate::{
    Cost, DOMAIN, Dtype, Fill, Narrow, Number, Op, Rng, Set, Spec, Tensor2, tensor::unwritten,
};

/// The op.
#[derive(Debug)]
pub struct Linear;

case! {
    /// `N` rows of `D` channels to `M` channels.
    pub struct Case {
        /// Rows.
        "N" n,
        /// Output channels.
        "M" m,
        /// Input channels.
        "D" d,
    }
}

tensors! {
    /// Inputs.
    pub struct Inputs<R> {
        /// `[N, D]` activations.
        pub x: Tensor2<R>,
        /// `[M, D]` weight.
        pub weight: Tensor2<f32>,
    }
}

tensors! {
    /// Outputs.
    pub struct Outputs<R> {
        /// `[N, M]`.
        pub o: Tensor2<R>,
    }
}

const FILLS: &[Fill] = &[
    Fill {
        name: DOMAIN,
        why: "normal activations, weights of standard deviation 1 / sqrt(D)",
        cites: &[],
    },
    Fill {
        name: "integers",
        why: "small integers, whose products and sums are exact in f32: any order of summation gives the same bits",
        cites: &["https://github.com/uxlfoundation/oneDNN/issues/1862"],
    },
    Fill {
        name: "outlier",
        why: "one input channel 1e4 times the others: activations quantised per tensor lose the rest",
        cites: &["https://github.com/sgl-project/sglang/issues/13708"],
    },
    Fill {
        name: "denormals",
        why: "activations below 2^-126: flush to zero shows",
        cites: &["https://github.com/NVIDIA-NeMo/Automodel/issues/2484"],
    },
];

impl Op for Linear {
    const NAME: &'static str = "linear";
    const NARROW: bool = true;
    type Case = Case;
    type Inputs<R: Number> = Inputs<R>;
    type Outputs<R: Number> = Outputs<R>;

    fn fills() -> &'static [Fill] {
        FILLS
    }

    fn specs(set: Set) -> Vec<Spec<Case>> {
        let new = |(n, m, d)| Spec::new(Case { n, m, d });
        let mut specs = vec![new((1, 1, 1)), new((3, 5, 17)), new((5, 64, 64))];
        specs.extend(FILLS[1..].iter().map(|fill| new((3, 5, 48)).fill(fill.name)));
        if set >= Set::Ci {
            specs.extend([(65, 33, 127), (2, 512, 2048), (128, 64, 256)].map(new));
            specs.extend([(5, 64, 64), (65, 33, 127)].map(|case| new(case).dtype(Dtype::Bf16)));
            specs.push(new((5, 64, 64)).fill("outlier").dtype(Dtype::Bf16));
            specs.push(new((140, 200, 72)).dtype(Dtype::Bf16));
            specs.push(new((7, 40, 51)).dtype(Dtype::F16));
            specs.push(new((30, 150, 272)).weights(Narrow::Fp8));
            // One token has kernels of its own, and of eight bits others where rows are long.
            specs.push(new((1, 102, 1050)).dtype(Dtype::Bf16));
            specs.push(new((1, 102, 1050)).weights(Narrow::Int8));
            for narrow in Narrow::ALL {
                let cases = [(1, 48, 64), (3, 17, 33), (13, 100, 300)];
                specs.extend(cases.map(|case| new(case).weights(narrow)));
                specs.push(new((5, 64, 64)).weights(narrow).fill("outlier"));
            }
        }
        if set >= Set::Nightly {
            specs.extend([(1, 12288, 2048), (64, 2048, 4096), (64, 8192, 2048)].map(new));
            specs.extend(Narrow::ALL.map(|narrow| new((1, 12288, 2048)).weights(narrow)));
        }
        specs
    }

    fn inputs(spec: &Spec<Case>, rng: &mut Rng) -> Inputs {
        let Case { n, m, d } = spec.case;
        if spec.is("integers") {
            let mut small =
                |shape| Tensor2::from_shape_simple_fn(shape, || rng.below(9) as f32 - 4.0);
            return Inputs { x: small((n, d)), weight: spec.weight(small((m, d))) };
        }
        let mut x = rng.normals((n, d), 0.0, 1.0);
        match spec.fill.as_str() {
            "outlier" => x.column_mut(d / 2).mapv_inplace(|v| v * 1e4),
            "denormals" => x.mapv_inplace(|v| v * 1e-39),
            _ => {}
        }
        let weight = rng.normals((m, d), 0.0, (d as f32).sqrt().recip());
        Inputs { x: spec.round(x), weight: spec.weight(weight) }
    }

    fn unwritten(_: &Spec<Case>, x: &Inputs) -> Outputs {
        Outputs { o: unwritten((x.x.nrows(), x.weight.nrows())) }
    }

    fn lift<R: Number>(inputs: &Inputs) -> Inputs<R> {
        Inputs::lift(inputs)
    }

    fn cost(spec: &Spec<Case>) -> Cost {
        let [n, m, d] = [spec.case.n, spec.case.m, spec.case.d].map(|size| size as u64);
        let activations = spec.dtype.size() as u64 * (n * d + n * m);
        Cost { bytes: activations + spec.weight_bytes(m, d), flops: 2 * n * m * d }
    }
}
