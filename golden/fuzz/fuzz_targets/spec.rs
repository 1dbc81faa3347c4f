//! The name of a case, as every op reads it: what is accepted prints and reads back, and has a cost.
#![no_main]

use golden::{Op, Spec, ops};
use libfuzzer_sys::fuzz_target;

fn read<O: Op>(text: &str) {
    let Ok(spec) = text.parse::<Spec<O::Case>>() else { return };
    assert_eq!(spec.to_string().parse(), Ok(spec.clone()), "{}", O::NAME);
    if O::check(&spec).is_ok() {
        let _ = O::cost(&spec);
    }
}

fuzz_target!(|text: &str| {
    read::<ops::attention::Attention>(text);
    read::<ops::attention_layer::AttentionLayer>(text);
    read::<ops::causal_conv1d::CausalConv1d>(text);
    read::<ops::embedding::Embedding>(text);
    read::<ops::fp8_dequant::Fp8Dequant>(text);
    read::<ops::gated_delta_rule::GatedDeltaRule>(text);
    read::<ops::gdn_gates::GdnGates>(text);
    read::<ops::gdn_layer::GdnLayer>(text);
    read::<ops::l2_norm::L2Norm>(text);
    read::<ops::linear::Linear>(text);
    read::<ops::lm_head::LmHead>(text);
    read::<ops::model::Model>(text);
    read::<ops::moe_experts::MoeExperts>(text);
    read::<ops::moe_layer::MoeLayer>(text);
    read::<ops::moe_router::MoeRouter>(text);
    read::<ops::mtp::Mtp>(text);
    read::<ops::rms_norm::RmsNorm>(text);
    read::<ops::rms_norm_gated::RmsNormGated>(text);
    read::<ops::rope::Rope>(text);
    read::<ops::sampling::Sampling>(text);
    read::<ops::shared_expert::SharedExpert>(text);
});
