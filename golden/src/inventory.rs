//! What a model weighs: counts over its tensors.

use crate::{
    Weights,
    config::{Config, Mixer},
    names::{self, Role},
};

/// Counts of a model.
#[derive(Clone, Debug)]
pub struct Inventory {
    /// Parameters of the main model, scales not counted.
    pub main: u64,
    /// Parameters of the MTP head.
    pub mtp: u64,
    /// Parameters that one token uses, embedding and `lm_head` left out.
    pub active: u64,
    /// Parameters of `lm_head` (or of the embedding, where it is used instead).
    pub head: u64,
    /// Tensors, scales included.
    pub tensors: u64,
    /// Bytes of all tensors.
    pub payload_bytes: u64,
    /// Bytes of weights that one token reads: active ones and `lm_head`.
    pub bytes_per_token: u64,
    /// Bytes of keys and values that one token adds, in 16-bit storage.
    pub kv_bytes_per_token: u64,
    /// Bytes of the states of one sequence: recurrent in f32, convolution windows in 16 bits.
    pub state_bytes: u64,
    /// The same by group of tensors.
    pub groups: Vec<Group>,
    config: Config,
}

/// Tensors of one kind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Group {
    /// What they are.
    pub name: &'static str,
    /// How many, scales included.
    pub tensors: u64,
    /// Their elements, scales not counted.
    pub parameters: u64,
    /// Their bytes, scales included.
    pub bytes: u64,
}

const GROUPS: [&str; 9] = [
    "embedding",
    "lm_head",
    "linear attention",
    "full attention",
    "router",
    "routed experts",
    "shared experts",
    "dense MLP and norms",
    "MTP head",
];

impl Inventory {
    /// Counts the tensors of a model, by name and shape alone.
    pub fn of(weights: &dyn Weights) -> Inventory {
        let c = weights.config();
        let mut groups: Vec<Group> =
            GROUPS.iter().map(|name| Group { name, tensors: 0, parameters: 0, bytes: 0 }).collect();
        let (mut main, mut mtp, mut active, mut active_bytes) = (0, 0, 0_u64, 0_u64);
        let (mut routed, mut routed_bytes) = (0, 0);
        let mut head_bytes = 0;
        let has_mtp = weights.meta(names::MTP_FC).is_some();
        for entry in names::entries(c, has_mtp) {
            let elements = entry.elements();
            let bytes_of = |name: &str| {
                let meta = weights.meta(name)?;
                Some(
                    meta.shape.iter().map(|&n| n as u64).product::<u64>()
                        * meta.dtype.size() as u64,
                )
            };
            let scale = bytes_of(&names::scale_of(&entry.name));
            let bytes = bytes_of(&entry.name).unwrap_or(0) + scale.unwrap_or(0);
            let is_mtp = entry.name.starts_with("mtp.");
            let group = group_of(&entry.name, entry.role);
            groups[group].tensors += 1 + u64::from(scale.is_some());
            groups[group].parameters += elements;
            groups[group].bytes += bytes;
            if is_mtp {
                mtp += elements;
                continue;
            }
            main += elements;
            if entry.role == Role::LmHead
                || (c.tie_word_embeddings && entry.role == Role::Embedding)
            {
                head_bytes = bytes;
            } else if entry.name.contains(".experts.") {
                routed += elements;
                routed_bytes += bytes;
            } else if entry.role != Role::Embedding {
                active += elements;
                active_bytes += bytes;
            }
        }
        // Experts are all of one size: a token uses its share of them.
        let share = |all: u64| {
            if c.num_experts == 0 {
                0
            } else {
                all / c.num_experts as u64 * c.num_experts_per_tok as u64
            }
        };
        active += share(routed);
        active_bytes += share(routed_bytes);
        let full = c.layer_types.iter().filter(|mixer| **mixer == Mixer::Full).count() as u64;
        let linear = c.num_hidden_layers() as u64 - full;
        let recurrent =
            4 * c.linear_num_value_heads * c.linear_key_head_dim * c.linear_value_head_dim;
        let window = 2 * c.conv_dim() * (c.linear_conv_kernel_dim - 1);
        Inventory {
            main,
            mtp,
            active,
            head: (c.vocab_size * c.hidden_size) as u64,
            tensors: groups.iter().map(|group| group.tensors).sum(),
            payload_bytes: groups.iter().map(|group| group.bytes).sum(),
            bytes_per_token: active_bytes + head_bytes,
            kv_bytes_per_token: full * (2 * c.num_key_value_heads * c.head_dim * 2) as u64,
            state_bytes: linear * (recurrent + window) as u64,
            groups,
            config: c.clone(),
        }
    }

    /// Operations of one token at a context of so many tokens: two per active parameter, four per
    /// query channel, head and key seen (scores and values), seven per element of a recurrent state.
    pub fn flops_per_token(&self, context: u64) -> u64 {
        let c = &self.config;
        let full = c.layer_types.iter().filter(|mixer| **mixer == Mixer::Full).count() as u64;
        let linear = c.num_hidden_layers() as u64 - full;
        let attention = 4 * (c.num_attention_heads * c.head_dim) as u64 * full;
        let state =
            (c.linear_num_value_heads * c.linear_key_head_dim * c.linear_value_head_dim) as u64;
        (2 * (self.active + self.head) + 7 * state * linear)
            .saturating_add(attention.saturating_mul(context))
    }
}

fn group_of(name: &str, role: Role) -> usize {
    if name.starts_with("mtp.") {
        return 8;
    }
    match role {
        Role::Embedding => 0,
        Role::LmHead => 1,
        _ if name.contains(".linear_attn.") => 2,
        _ if name.contains(".self_attn.") => 3,
        Role::Router => 4,
        _ if name.contains(".experts.") => 5,
        _ if name.contains(".shared_expert") => 6,
        _ => 7,
    }
}
