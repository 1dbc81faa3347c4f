//! Where inside a composite op something is wrong.

use benches::registry::op;

/// Faults of composite kernels, and the op inside that answers wrong.
#[test]
fn a_kernel_is_wrong_in_an_op_inside() {
    for (problem, spec, faults) in [
        (
            "gdn_layer",
            "B2-T9-D24-HK2-HV4-K8-V6-W4",
            &[("dt-bias-dropped", "gdn_gates"), ("q-k-swapped", "gated_delta_rule")][..],
        ),
        (
            "attention_layer",
            "B2-T5-TK9-D24-HQ4-HKV2-H8-R4",
            &[("cache-lost", "attention"), ("positions-restart", "rope")],
        ),
        (
            "moe_layer",
            "N17-D24-E8-A2-F6",
            &[("shared-gate-missing", "shared_expert"), ("last-expert-dropped", "moe_experts")],
        ),
    ] {
        let entry = op(problem).unwrap();
        let honest = entry.bisect(spec, "cpu/portable", None).unwrap();
        assert!(honest.ok() && honest.unknown.is_empty(), "{honest:#?}");
        for &(fault, inside) in faults {
            let report = entry.bisect(spec, "cpu/portable", Some(fault)).unwrap();
            assert_eq!(report.ops.first().map(|op| &*op.op), Some(inside), "{fault}: {report:#?}");
            assert!(report.ops.last().is_some_and(|op| op.op == problem), "{fault}: {report:#?}");
            assert!(report.ops[0].first.is_some() || report.ops[0].finding.over == 0);
        }
    }
}
