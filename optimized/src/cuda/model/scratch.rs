//! Room on the device for what a piece computes, used again by every layer.

use golden::{Config, Error, config::Mlp, engine::NOT_FINITE};
use ndarray::{Array2, s};
use zerocopy::IntoBytes;

use super::{seen::numbers, told::Told};
use crate::cuda::{
    device::{self, Buffer, Device},
    engine::{APART, Element, Fast, Sorted},
};

/// Rows of logits that are computed at once.
pub(super) const LOGITS: usize = 128;

/// Makes the buffers of these names.
macro_rules! scratch {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// Intermediates; `N` is as many rows as ever were asked for.
        pub(super) struct Scratch {
            rows: usize,
            sequences: usize,
            /// Counts the times that it was made.
            pub(super) moved: u64,
            $($(#[$doc])* pub(super) $name: Buffer,)*
        }

        const NAMES: &[&str] = &[$(stringify!($name)),*];

        impl Scratch {
            /// In room that is had by name.
            pub(super) fn make(
                room: &mut dyn FnMut(&str) -> Result<Buffer, device::Error>,
            ) -> Result<Scratch, device::Error> {
                $(let $name = room(stringify!($name))?;)*
                Ok(Scratch { rows: 0, sequences: 0, moved: 0, $($name),* })
            }
        }
    };
}

scratch! {
    /// What the device is told of a step.
    told,
    /// `[N, D]` f32, the residual stream.
    x,
    /// `[N, D]` f32, what is added to it next.
    added,
    /// `[N, D]` E, its norm.
    normed,
    /// `[N, HK (2 K + 2 R V)]` E.
    projected,
    /// `[N, 2 HV]` f32.
    gates,
    /// `[N, HK, K]` E each.
    q,
    k,
    /// `[N, HV, V]` E each.
    v,
    z,
    mixed,
    gated,
    /// `[N, HV]` f32.
    g,
    /// `[N, HV]` E.
    beta,
    /// `[N, HQ, 2 H]` E, or with keys and values behind it.
    both,
    /// `[N, HKV, H]` E each.
    keys,
    values,
    /// `[N, HQ, H]` E each.
    queries,
    open,
    attended,
    /// `[N, EXPERTS]` f32, or with what opens the shared expert behind them.
    router,
    /// `[N, A]` i64, or with the shared expert behind them.
    ids,
    /// `[N, A]` f32, likewise.
    weights,
    /// The same of the own experts, where several GPUs have some each.
    own_ids,
    own_weights,
    /// `[RANKS, N, D]` f32, what they add to the stream.
    gathered,
    /// `[N]` f32 each.
    margins,
    opens,
    /// `[N, A + 1, F]` E, of few tokens three times as much; or what a shared expert or a dense layer needs.
    hidden,
    /// `[N, 2 D]` E, what the draft head reads.
    pairs,
    /// `[N, D]` E, what is added to the stream, of kernels that answer so.
    narrow,
    /// `[N, D]` E, the other part of it.
    more,
    /// Workspace of the delta rule for Hopper.
    work,
    /// The same of attention: parts of answers.
    parts,
    /// Tickets of attention, counts of the delta rule: zero between launches.
    tickets,
    /// The same of experts.
    counts,
    offsets,
    tiles,
    n_tiles,
    order,
    passed,
    expert_parts,
    /// `[N]` i64: the expert of all tokens.
    zeros,
    /// `[LOGITS, D]` E, the rows that get logits.
    last,
    /// `[LOGITS, M]` f32.
    logits,
    /// `[LOGITS]` i64, what is chosen among them.
    chosen,
}

impl Scratch {
    /// None yet.
    pub(super) fn none(device: &Device) -> Result<Scratch, device::Error> {
        Scratch::make(&mut |_| device.room(0))
    }

    /// Makes room for so many rows of so many sequences, if there is less.
    pub(super) fn fit(
        &mut self,
        device: &Device,
        c: &Config,
        kinds: (Element, Option<Fast>, usize),
        (rows, sequences): (usize, usize),
    ) -> Result<(), device::Error> {
        if rows <= self.rows && sequences <= self.sequences {
            return Ok(());
        }
        let of = Room::of(c, kinds, (rows.max(self.rows), sequences.max(self.sequences)));
        // What there was goes first.
        self.leave(device)?;
        let made = Scratch::make(&mut |name| device.room(of.bytes(name)))?;
        *self = Scratch { rows: of.n, sequences: of.sequences, moved: self.moved, ..made };
        Ok(())
    }

    /// Gives it back; the next step gets new room, elsewhere.
    pub(super) fn leave(&mut self, device: &Device) -> Result<(), device::Error> {
        *self = Scratch { moved: self.moved + 1, ..Scratch::none(device)? };
        Ok(())
    }

    /// Tells the device of a step.
    pub(super) fn put(&mut self, device: &Device, told: &[i64]) -> Result<(), device::Error> {
        device.put_at(told.as_bytes(), &mut self.told, 0)
    }

    /// Puts rows in place of the residual stream.
    pub(super) fn put_stream(&mut self, device: &Device, x: &[f32]) -> Result<(), device::Error> {
        device.put_at(x.as_bytes(), &mut self.x, 0)
    }

    /// The room that tokens are sorted in.
    pub(super) fn sorted(&self) -> Sorted<'_> {
        Sorted {
            counts: &self.counts,
            offsets: &self.offsets,
            tiles: &self.tiles,
            n_tiles: &self.n_tiles,
            order: &self.order,
            passed: &self.passed,
            parts: &self.expert_parts,
        }
    }

    /// The residual stream.
    pub(super) fn stream(
        &self,
        device: &Device,
        (n, d): (usize, usize),
    ) -> Result<Array2<f32>, Error> {
        Ok(Array2::from_shape_vec((n, d), numbers(device, &self.x, Element::F32, n * d)?)?)
    }

    /// Some rows of the norm at hand.
    pub(super) fn rows(
        &self,
        device: &Device,
        element: Element,
        d: usize,
        rows: &[usize],
    ) -> Result<Array2<f32>, Error> {
        let end = rows.iter().max().map_or(0, |last| last + 1);
        let all =
            Array2::from_shape_vec((end, d), numbers(device, &self.normed, element, end * d)?)?;
        Ok(if rows.len() == end { all } else { all.select(ndarray::Axis(0), rows) })
    }

    /// The experts of `n` tokens, of so many slots each.
    pub(super) fn ids(
        &self,
        device: &Device,
        (n, active, slots): (usize, usize, usize),
    ) -> Result<Array2<i64>, Error> {
        let mut ids = vec![0_i64; n * slots];
        device.get(&self.ids, ids.as_mut_bytes())?;
        let all = Array2::from_shape_vec((n, slots), ids)?;
        Ok(all.slice_move(s![.., ..active]))
    }

    /// The ids that were chosen among the logits at hand, of `v` each.
    pub(super) fn chosen(&self, device: &Device, n: usize, v: usize) -> Result<Vec<u32>, Error> {
        let mut ids = vec![0_i64; n];
        device.get(&self.chosen, ids.as_mut_bytes())?;
        let id = |id: i64| u32::try_from(id).ok().filter(|&id| (id as usize) < v);
        ids.into_iter().map(id).collect::<Option<_>>().ok_or_else(|| NOT_FINITE.into())
    }

    /// The logits at hand.
    pub(super) fn logits(&self, device: &Device, n: usize, v: usize) -> Result<Array2<f32>, Error> {
        let mut logits = vec![0_f32; n * v];
        device.get(&self.logits, logits.as_mut_bytes())?;
        Ok(Array2::from_shape_vec((n, v), logits)?)
    }
}

/// How large buffers are.
pub(super) struct Room<'a> {
    pub(super) c: &'a Config,
    pub(super) element: Element,
    pub(super) fast: Option<Fast>,
    /// GPUs that the model is spread over.
    pub(super) ranks: usize,
    pub(super) n: usize,
    pub(super) sequences: usize,
}

impl<'a> Room<'a> {
    /// For so many rows of so many sequences, and some more.
    pub(super) fn of(
        c: &'a Config,
        (element, fast, ranks): (Element, Option<Fast>, usize),
        (rows, sequences): (usize, usize),
    ) -> Room<'a> {
        let (n, sequences) = (rows.next_power_of_two(), sequences.next_power_of_two());
        Room { c, element, fast, ranks, n, sequences }
    }

    /// Bytes of all of them.
    pub(super) fn all(&self) -> u64 {
        NAMES.iter().map(|name| self.bytes(name) as u64).sum()
    }

    pub(super) fn bytes(&self, name: &str) -> usize {
        let Room { c, element, fast, ranks, n, sequences } = *self;
        let (d, e) = (c.hidden_size, element.size());
        let key = c.linear_num_key_heads * c.linear_key_head_dim;
        let (hv, value) = (c.linear_num_value_heads, c.linear_value_dim());
        let (hq, hkv) = (c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim);
        let active = c.num_experts_per_tok;
        let widest = |kind: Mlp| match kind {
            Mlp::Dense => c.intermediate_size,
            Mlp::Sparse => {
                ((active + 1) * c.moe_intermediate_size).max(c.shared_expert_intermediate_size)
            }
        };
        let hidden = c.mlp_types.iter().map(|&kind| widest(kind)).max().unwrap_or(0);
        let of_row = match name {
            "told" => return 8 * Told::len(n, sequences),
            "last" => return LOGITS * d * e,
            "chosen" => return LOGITS * 8,
            "logits" => return LOGITS * c.vocab_size.div_ceil(ranks) * 4,
            "narrow" | "more" | "zeros" | "work" | "parts" | "tickets" | "counts" | "offsets"
            | "tiles" | "n_tiles" | "order" | "passed" | "expert_parts" => {
                return fast.map_or(0, |fast| self.workspace(fast, name));
            }
            "x" | "added" => 4 * d,
            "normed" => e * d,
            "pairs" => 2 * e * d,
            "projected" => e * (c.conv_dim() + value),
            "gates" => 8 * hv,
            "q" | "k" => e * key,
            "v" | "z" | "mixed" | "gated" => e * value,
            "g" => 4 * hv,
            "beta" => e * hv,
            "both" => 2 * e * (hq + hkv),
            "queries" | "open" | "attended" => e * hq,
            "keys" | "values" => e * hkv,
            "router" => 4 * (c.num_experts + 1),
            "own_ids" | "own_weights" | "gathered" if ranks == 1 => 0,
            "ids" | "own_ids" => 8 * (active + 1),
            "weights" | "own_weights" => 4 * (active + 1),
            "gathered" => 4 * ranks * d,
            "margins" | "opens" => 4,
            // Three pieces of each number, of tokens whose experts are read one by one.
            "hidden" => return e * hidden * n.max(3 * n.min(APART)),
            other => unreachable!("no buffer {other}"),
        };
        n * of_row
    }

    /// What kernels for Hopper need.
    fn workspace(&self, fast: Fast, name: &str) -> usize {
        let Room { c, element, n, sequences, .. } = *self;
        let hkv = c.num_key_value_heads;
        let f = c.moe_intermediate_size.max(c.shared_expert_intermediate_size);
        let sizes = (f, c.hidden_size);
        let delta = Fast::delta(n, sequences, c.linear_num_value_heads);
        let attention = fast.attention(sequences, hkv);
        let sorted = Fast::sorted(n * (c.num_experts_per_tok + 1), c.num_experts, sizes);
        match name {
            "narrow" | "more" => n * c.hidden_size * element.size(),
            "zeros" => 8 * n,
            "work" => delta[0],
            "parts" => attention[0],
            "tickets" => attention[1].max(delta[1]),
            "counts" => sorted[0],
            "offsets" => sorted[1],
            "tiles" => sorted[2],
            "n_tiles" => sorted[3],
            "order" => sorted[4],
            "passed" => sorted[5],
            _ => sorted[6],
        }
    }
}
