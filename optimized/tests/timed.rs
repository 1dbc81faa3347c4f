//! The pieces that are timed. Here, because a unit test that reaches them compiles every kernel a
//! second time.

use optimized::cpu::timed::{Cost, pieces};

#[test]
fn costs_are_those_of_the_model() {
    let pieces = pieces();
    let cost = |op: &str, case: &str, format: &str| -> Cost {
        let mut found = pieces
            .iter()
            .filter(|piece| (piece.op, &*piece.case, piece.format) == (op, case, format));
        found.next().unwrap_or_else(|| panic!("{op} {case} {format}")).cost
    };
    // 32 heads of 128 by 128 numbers.
    assert_eq!(cost("gated_delta_rule", "1 token", "f32").changed, 2 << 20);
    assert_eq!(cost("gated_delta_rule", "512 tokens", "f32").changed, 0);
    // Two heads of 256 channels, keys and values, two bytes.
    assert_eq!(cost("attention", "1 token, depth 1024", "bf16").read, 2 << 20);
    assert_eq!(cost("attention", "1 token, depth 1024", "f32").read, 4 << 20);
    // One byte, and a step for each row.
    assert_eq!(cost("attention", "1 token, depth 1024", "int8").read, (1 << 20) + (16 << 10));
    // Three matrices of 512 by 2048.
    assert_eq!(cost("moe_experts", "1 token, 10 of 512", "bf16").read, (10 * 3 * 2) << 20);
    assert_eq!(cost("moe_experts", "512 tokens, 10 of 512", "bf16").read, (512 * 3 * 2) << 20);
    assert_eq!(cost("moe_experts", "1 token, 10 of 512", "int8").read, ((10 * 3) << 20) / 32 * 34);
}

#[test]
fn names_tell_pieces_apart() {
    let mut names: Vec<_> =
        pieces().into_iter().map(|piece| (piece.op, piece.case, piece.format)).collect();
    let all = names.len();
    names.sort_unstable();
    names.dedup();
    assert_eq!(names.len(), all);
}
