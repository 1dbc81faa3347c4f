//! What can be said of CUDA variants on any machine: every parameter of every kernel is bound, every fault
//! can be planted. Here, because a unit test that reaches them compiles every kernel a second time.

use golden::{Dtype, Narrow, Op, Rng, Set, Spec, Variant, ops};
use optimized::cuda;

/// One problem of every type that a variant computes; of those of a set, so that optional tensors are missing
/// in some.
fn specs<O: Op>(variant: &dyn Variant<O>) -> Vec<Spec<O::Case>> {
    let mut specs: Vec<Spec<O::Case>> = Vec::new();
    let computed = |spec: &Spec<O::Case>| variant.unfit(spec).is_none();
    for spec in O::specs(Set::Ci).into_iter().filter(computed) {
        let of_its_own = |known: &Spec<O::Case>| {
            (known.dtype, known.weights, &known.fill) != (spec.dtype, spec.weights, &spec.fill)
        };
        if specs.iter().all(of_its_own) {
            specs.push(spec);
        }
    }
    specs
}

fn check<O: Op>(variants: &[&dyn Variant<O>]) {
    let specs = specs::<O>(variants[0]);
    for dtype in [Dtype::F32, Dtype::Bf16, Dtype::F16] {
        assert!(specs.iter().any(|spec| spec.dtype == dtype), "{}: no {dtype}", O::NAME);
    }
    if O::NARROW {
        let narrow = |narrow: &Narrow| specs.iter().any(|spec| spec.weights == Some(*narrow));
        assert!(Narrow::ALL.iter().all(narrow), "{}", O::NAME);
    }
    for variant in variants {
        let specs = self::specs::<O>(*variant);
        let id = format!("{}@{}", O::NAME, variant.name());
        assert!(!specs.is_empty(), "{id}: nothing that it computes is checked");
        assert!(1 < variant.plants().len(), "{id}: hardly a fault can be planted");
        for plant in variant.plants() {
            assert!(variant.planted(plant.name).is_some(), "{id}: no fault {}", plant.name);
        }
        for spec in &specs {
            let inputs = O::inputs(spec, &mut Rng::keyed(&id, 0));
            // Without a GPU that is all that is in the way.
            let why = variant.prepare(spec, &inputs).err().map(|error| error.to_string());
            assert_eq!(why, cuda::gpu().as_ref().err().cloned(), "{id}: {spec}");
        }
    }
}

#[test]
fn kernels_are_bound_to_their_ops() {
    check::<ops::embedding::Embedding>(cuda::embedding::variants());
    check::<ops::rms_norm::RmsNorm>(cuda::rms_norm::variants());
    check::<ops::linear::Linear>(cuda::linear::variants());
    check::<ops::causal_conv1d::CausalConv1d>(cuda::causal_conv1d::variants());
    check::<ops::l2_norm::L2Norm>(cuda::l2_norm::variants());
    check::<ops::gdn_gates::GdnGates>(cuda::gdn_gates::variants());
    check::<ops::gated_delta_rule::GatedDeltaRule>(cuda::gated_delta_rule::variants());
    check::<ops::rms_norm_gated::RmsNormGated>(cuda::rms_norm_gated::variants());
    check::<ops::rope::Rope>(cuda::rope::variants());
    check::<ops::attention::Attention>(cuda::attention::variants());
    check::<ops::moe_router::MoeRouter>(cuda::moe_router::variants());
    check::<ops::moe_experts::MoeExperts>(cuda::moe_experts::variants());
    check::<ops::shared_expert::SharedExpert>(cuda::shared_expert::variants());
    check::<ops::lm_head::LmHead>(cuda::lm_head::variants());
    check::<ops::sampling::Sampling>(cuda::sampling::variants());
    check::<ops::fp8_dequant::Fp8Dequant>(cuda::fp8_dequant::variants());
}
