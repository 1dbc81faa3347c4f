//! The tensors of a checkpoint: names, shapes and roles, in one place.
//!
//! Names and shapes are those of the official files (75,944 tensors for the 80B model). Experts are
//! one by one, `in_proj_qkvz` and `q_proj` are packed as [`gdn_layer`](crate::ops::gdn_layer) and
//! [`attention_layer`](crate::ops::attention_layer) say. The MTP head has neither embedding nor
//! `lm_head` of its own.

use crate::{
    Config,
    config::{Mixer, Mlp},
};

/// `[vocab_size, D]`.
pub const EMBED_TOKENS: &str = "model.embed_tokens.weight";
/// `[vocab_size, D]`; absent where the embedding is used instead.
pub const LM_HEAD: &str = "lm_head.weight";
/// `[D]`.
pub const FINAL_NORM: &str = "model.norm.weight";
/// `[D, 2 D]`; its presence says that there is an MTP head.
pub const MTP_FC: &str = "mtp.fc.weight";

/// Whether a tensor is a projection that engines may keep in fewer bits. Routers and gates, which decide,
/// are none; nor are embeddings, norms and convolutions.
pub fn is_projection(name: &str) -> bool {
    const ENDS: [&str; 9] = [
        "in_proj_qkvz",
        "out_proj",
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    ];
    let last = name.strip_suffix(".weight").and_then(|name| name.rsplit('.').next());
    [LM_HEAD, MTP_FC].contains(&name) || last.is_some_and(|last| ENDS.contains(&last))
}

/// The scales of a quantised weight.
pub fn scale_of(weight: &str) -> String {
    format!("{weight}_scale_inv")
}

/// What a tensor is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Role {
    /// Token embedding.
    Embedding,
    /// Logits.
    LmHead,
    /// A zero-centred norm.
    Norm,
    /// The gated norm, not zero-centred.
    GatedNorm,
    /// Logarithm of the decay rates.
    ALog,
    /// Offset of the decay.
    DtBias,
    /// Taps of the convolution.
    Conv,
    /// Reads the normed residual stream (or a gate's input).
    In,
    /// Writes to the residual stream.
    Out,
    /// Logits of the router.
    Router,
}

/// One tensor of a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Official name.
    pub name: String,
    /// Sizes, outermost first.
    pub shape: Vec<usize>,
    /// What it is for.
    pub role: Role,
    /// Whether FP8 checkpoints hold it in FP8, with scales beside it.
    pub quantised: bool,
}

impl Entry {
    /// Elements.
    pub fn elements(&self) -> u64 {
        self.shape.iter().map(|&n| n as u64).product()
    }
}

/// Every tensor of a checkpoint of this config, in the model's order.
pub fn entries(config: &Config, mtp: bool) -> Vec<Entry> {
    let c = config;
    let d = c.hidden_size;
    let mut list = List(Vec::new());
    list.add(EMBED_TOKENS.to_owned(), &[c.vocab_size, d], Role::Embedding, false);
    for layer in 0..c.num_hidden_layers() {
        let prefix = format!("model.layers.{layer}");
        list.layer(c, &prefix, c.layer_types[layer], c.mlp_types[layer]);
    }
    list.add(FINAL_NORM.to_owned(), &[d], Role::Norm, false);
    if !c.tie_word_embeddings {
        list.add(LM_HEAD.to_owned(), &[c.vocab_size, d], Role::LmHead, false);
    }
    if mtp {
        list.add(MTP_FC.to_owned(), &[d, 2 * d], Role::In, false);
        for norm in ["pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm"] {
            list.add(format!("mtp.{norm}.weight"), &[d], Role::Norm, false);
        }
        list.layer(c, "mtp.layers.0", Mixer::Full, mtp_mlp(c));
    }
    list.0
}

/// What follows the mixer of the MTP head's one layer: as in layer 0 of the main model.
pub fn mtp_mlp(config: &Config) -> Mlp {
    config.mlp_types.first().copied().unwrap_or(Mlp::Sparse)
}

struct List(Vec<Entry>);

impl List {
    fn add(&mut self, name: String, shape: &[usize], role: Role, quantised: bool) {
        self.0.push(Entry { name, shape: shape.to_vec(), role, quantised });
    }

    fn layer(&mut self, c: &Config, prefix: &str, mixer: Mixer, mlp: Mlp) {
        let d = c.hidden_size;
        self.add(format!("{prefix}.input_layernorm.weight"), &[d], Role::Norm, false);
        self.add(format!("{prefix}.post_attention_layernorm.weight"), &[d], Role::Norm, false);
        match mixer {
            Mixer::Linear => {
                let name = |tensor: &str| format!("{prefix}.linear_attn.{tensor}");
                let (hv, values) = (c.linear_num_value_heads, c.linear_value_dim());
                self.add(name("in_proj_qkvz.weight"), &[c.conv_dim() + values, d], Role::In, true);
                self.add(name("in_proj_ba.weight"), &[2 * hv, d], Role::In, false);
                self.add(
                    name("conv1d.weight"),
                    &[c.conv_dim(), 1, c.linear_conv_kernel_dim],
                    Role::Conv,
                    false,
                );
                self.add(name("A_log"), &[hv], Role::ALog, false);
                self.add(name("dt_bias"), &[hv], Role::DtBias, false);
                self.add(name("norm.weight"), &[c.linear_value_head_dim], Role::GatedNorm, false);
                self.add(name("out_proj.weight"), &[d, values], Role::Out, true);
            }
            Mixer::Full => {
                let name = |tensor: &str| format!("{prefix}.self_attn.{tensor}.weight");
                let (q, kv) =
                    (c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim);
                self.add(name("q_proj"), &[2 * q, d], Role::In, true);
                self.add(name("k_proj"), &[kv, d], Role::In, true);
                self.add(name("v_proj"), &[kv, d], Role::In, true);
                self.add(name("o_proj"), &[d, q], Role::Out, true);
                self.add(name("q_norm"), &[c.head_dim], Role::Norm, false);
                self.add(name("k_norm"), &[c.head_dim], Role::Norm, false);
            }
        }
        let name = |tensor: &str| format!("{prefix}.mlp.{tensor}.weight");
        match mlp {
            Mlp::Sparse => {
                self.add(name("gate"), &[c.num_experts, d], Role::Router, false);
                for expert in 0..c.num_experts {
                    self.mlp(&format!("{prefix}.mlp.experts.{expert}"), d, c.moe_intermediate_size);
                }
                self.mlp(
                    &format!("{prefix}.mlp.shared_expert"),
                    d,
                    c.shared_expert_intermediate_size,
                );
                self.add(name("shared_expert_gate"), &[1, d], Role::In, false);
            }
            Mlp::Dense => self.mlp(&format!("{prefix}.mlp"), d, c.intermediate_size),
        }
    }

    fn mlp(&mut self, prefix: &str, d: usize, f: usize) {
        self.add(format!("{prefix}.gate_proj.weight"), &[f, d], Role::In, true);
        self.add(format!("{prefix}.up_proj.weight"), &[f, d], Role::In, true);
        self.add(format!("{prefix}.down_proj.weight"), &[d, f], Role::Out, true);
    }
}

/// `modules_to_not_convert` of an FP8 checkpoint of this config: every module with a weight that is
/// not quantised, as the official list has it (embeddings are no linear layers and not listed).
pub fn not_quantised(config: &Config) -> Vec<String> {
    entries(config, true)
        .into_iter()
        .filter(|entry| {
            !entry.quantised && entry.role != Role::Embedding && entry.name != FINAL_NORM
        })
        .map(|entry| {
            entry.name.strip_suffix(".weight").map_or_else(|| entry.name.clone(), str::to_owned)
        })
        .collect()
}
