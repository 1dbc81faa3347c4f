//! The names of tensors in a checkpoint.

/// `[vocab_size, D]`.
pub const EMBED_TOKENS: &str = "model.embed_tokens.weight";
/// `[vocab_size, D]`; absent where the embedding is used instead.
pub const LM_HEAD: &str = "lm_head.weight";
/// `[D]`.
pub const FINAL_NORM: &str = "model.norm.weight";
/// `[D, 2 D]`; its presence says that there is an MTP head.
pub const MTP_FC: &str = "mtp.fc.weight";

/// The scales of a quantised weight.
pub fn scale_of(weight: &str) -> String {
    format!("{weight}_scale_inv")
}
