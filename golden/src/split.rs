//! A model spread over several devices: what each of them keeps, as a function of the config.
//!
//! The delta rule is cut by groups of a key head, as `in_proj_qkvz` and `in_proj_ba` are packed
//! ([`gdn_layer`](crate::ops::gdn_layer)): a share has some key heads and all value heads that belong to them.
//! Attention is cut by heads of keys and values; where there are more shares than these, several keep the same
//! one and its queries are dealt. Routed experts are dealt whole, a dense MLP by the columns of its width,
//! `lm_head` by the vocabulary. Embedding, norms, routers and gates are everywhere, and so is the shared expert,
//! which the first share computes.
//!
//! So a mixer's or an MLP's output is the sum of what all shares come to, and logits stand side by side.

use std::ops::Range;

use crate::{
    Config,
    config::{Mixer, Mlp},
    names,
};

/// A model cut into so many shares.
#[derive(Clone, Debug, PartialEq)]
pub struct Split {
    whole: Config,
    shares: usize,
}

/// What one of them keeps.
#[derive(Clone, Debug, PartialEq)]
pub struct Share {
    /// Which one.
    pub rank: usize,
    /// Of how many.
    pub ranks: usize,
    /// The model as it computes it: its own heads and its own width of dense layers; experts and vocabulary are
    /// those of the whole.
    pub config: Config,
    /// The routed experts.
    pub experts: Range<usize>,
    /// The tokens that get logits.
    pub vocabulary: Range<usize>,
    /// The heads of keys and values, and how many the whole model has.
    heads: (Range<usize>, usize),
}

/// What a share has of a tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Cut {
    /// All of it.
    Whole,
    /// Some rows, one run of them after another.
    Rows(Vec<Range<usize>>),
    /// Some columns.
    Columns(Range<usize>),
    /// Nothing.
    Elsewhere,
}

/// Names of what is cut by key heads, behind the layer's own.
const OF_KEY_HEADS: [&str; 4] = ["in_proj_qkvz.weight", "in_proj_ba.weight", "A_log", "dt_bias"];

impl Split {
    /// Cuts a model.
    ///
    /// # Errors
    /// Says what does not divide, and into how many it does.
    pub fn new(config: &Config, shares: usize) -> Result<Split, String> {
        match odd(config, shares) {
            None => Ok(Split { whole: config.clone(), shares }),
            Some(odd) => {
                let fit: Vec<_> = Split::fitting(config).iter().map(ToString::to_string).collect();
                Err(format!("{odd}; {} fit", fit.join(", ")))
            }
        }
    }

    /// Into how many a model can be cut.
    pub fn fitting(config: &Config) -> Vec<usize> {
        let most = config.num_attention_heads.max(1);
        (1..=most).filter(|&shares| odd(config, shares).is_none()).collect()
    }

    /// All of them.
    pub fn shares(&self) -> Vec<Share> {
        (0..self.shares).map(|rank| self.share(rank)).collect()
    }

    fn share(&self, rank: usize) -> Share {
        let (c, ranks) = (&self.whole, self.shares);
        let kept = c.num_key_value_heads;
        let heads = if ranks <= kept { own(kept, rank, ranks) } else { one(rank * kept / ranks) };
        let config = Config {
            linear_num_key_heads: c.linear_num_key_heads / ranks,
            linear_num_value_heads: c.linear_num_value_heads / ranks,
            num_attention_heads: c.num_attention_heads / ranks,
            num_key_value_heads: heads.len(),
            intermediate_size: if c.mlp_types.contains(&Mlp::Dense) {
                c.intermediate_size / ranks
            } else {
                c.intermediate_size
            },
            ..c.clone()
        };
        Share {
            rank,
            ranks,
            config,
            experts: own(c.num_experts, rank, ranks),
            vocabulary: own(c.vocab_size, rank, ranks),
            heads: (heads, kept),
        }
    }
}

/// The equal part of `n` that is a rank's.
fn own(n: usize, rank: usize, ranks: usize) -> Range<usize> {
    n / ranks * rank..n / ranks * (rank + 1)
}

fn one(n: usize) -> Range<usize> {
    n..n + 1
}

/// Why a model cannot be cut into so many, if so.
fn odd(c: &Config, shares: usize) -> Option<String> {
    if shares == 1 {
        return None;
    }
    let line = |what: &str, got: usize, want: String| {
        Some(format!("{shares} shares: {what} {got}, expected {want}"))
    };
    if shares == 0 {
        return line("of a model", 0, "1 or more".to_owned());
    }
    let has = |mixer| c.layer_types.contains(&mixer);
    let (sparse, dense) = (c.mlp_types.contains(&Mlp::Sparse), c.mlp_types.contains(&Mlp::Dense));
    let kept = c.num_key_value_heads;
    let dealt = [
        (has(Mixer::Linear), "linear_num_key_heads", c.linear_num_key_heads),
        (true, "num_attention_heads", c.num_attention_heads),
        (shares <= kept, "num_key_value_heads", kept),
        (sparse, "num_experts", c.num_experts),
        (dense, "intermediate_size", c.intermediate_size),
        (true, "vocab_size", c.vocab_size),
    ];
    for (counts, what, n) in dealt {
        if counts && !n.is_multiple_of(shares) {
            return line(what, n, format!("a multiple of {shares}"));
        }
    }
    if kept < shares && !shares.is_multiple_of(kept) {
        return line("num_key_value_heads", kept, format!("a divisor of {shares}"));
    }
    // Blocks that share a scale stay whole.
    let [down, across] = c.fp8.as_ref()?.weight_block_size;
    let (key, value) = (c.linear_num_key_heads * c.linear_key_head_dim, c.linear_value_dim());
    let attended = c.num_attention_heads * c.head_dim;
    let blocks = [
        (has(Mixer::Linear), "rows of in_proj_qkvz", 2 * (key + value) / shares, down),
        (has(Mixer::Linear), "columns of out_proj", value / shares, across),
        (true, "rows of q_proj", 2 * attended / shares, down),
        (true, "rows of k_proj", kept.div_ceil(shares) * c.head_dim, down),
        (true, "columns of o_proj", attended / shares, across),
        (dense, "rows of a dense gate_proj", c.intermediate_size / shares, down),
        (dense, "columns of a dense down_proj", c.intermediate_size / shares, across),
    ];
    let cut = blocks.into_iter().find(|(counts, _, n, by)| *counts && !n.is_multiple_of(*by));
    let (_, what, n, by) = cut?;
    line(&format!("{what} in FP8"), n, format!("a multiple of the {by} that share a scale"))
}

impl Share {
    /// The whole model.
    pub fn whole(config: &Config) -> Share {
        Split { whole: config.clone(), shares: 1 }.share(0)
    }

    /// Whether it computes the shared expert.
    pub fn leads(&self) -> bool {
        self.rank == 0
    }

    /// Heads of queries and of keys that the whole model has.
    pub fn heads_of_whole(&self) -> [usize; 2] {
        [self.config.num_attention_heads * self.ranks, self.heads.1]
    }

    /// What it has of a tensor of that name and shape in the whole model; of scales, of the weight's blocks.
    pub fn cut(&self, name: &str, shape: &[usize]) -> Cut {
        if self.ranks == 1 {
            return Cut::Whole;
        }
        let weight = name.strip_suffix("_scale_inv").unwrap_or(name);
        let columns = || shape.last().copied().unwrap_or(1);
        let rows = |n: usize| own(n, self.rank, self.ranks);
        if weight == names::LM_HEAD {
            return Cut::Rows(vec![rows(shape[0])]);
        }
        if let Some((_, rest)) = weight.split_once(".linear_attn.") {
            return match rest {
                "conv1d.weight" => Cut::Rows(self.channels()),
                "out_proj.weight" => Cut::Columns(rows(columns())),
                rest if OF_KEY_HEADS.contains(&rest) => Cut::Rows(vec![rows(shape[0])]),
                _ => Cut::Whole,
            };
        }
        if let Some((_, rest)) = weight.split_once(".self_attn.") {
            return match rest {
                "q_proj.weight" => Cut::Rows(vec![rows(shape[0])]),
                "k_proj.weight" | "v_proj.weight" => {
                    let (Range { start, end }, all) = &self.heads;
                    let [from, to] = [start, end].map(|n| n * shape[0] / all);
                    Cut::Rows(std::iter::once(from..to).collect())
                }
                "o_proj.weight" => Cut::Columns(rows(columns())),
                _ => Cut::Whole,
            };
        }
        match weight.split_once(".mlp.").map(|(_, rest)| rest) {
            Some("gate_proj.weight" | "up_proj.weight") => Cut::Rows(vec![rows(shape[0])]),
            Some("down_proj.weight") => Cut::Columns(rows(columns())),
            Some(rest) => {
                let expert = rest.strip_prefix("experts.").and_then(|rest| rest.split('.').next());
                let here = |expert: &str| expert.parse().is_ok_and(|e| self.experts.contains(&e));
                if expert.is_none_or(here) { Cut::Whole } else { Cut::Elsewhere }
            }
            None => Cut::Whole,
        }
    }

    /// The channels of the convolution, of all that the whole model has: queries, keys and values.
    pub fn channels(&self) -> Vec<Range<usize>> {
        let (c, ranks) = (&self.config, self.ranks);
        let key = c.linear_num_key_heads * c.linear_key_head_dim * ranks;
        let value = c.linear_value_dim() * ranks;
        let of = |from: usize, n: usize| {
            let Range { start, end } = own(n, self.rank, ranks);
            from + start..from + end
        };
        vec![of(0, key), of(key, key), of(2 * key, value)]
    }
}

#[cfg(test)]
mod tests {
    use super::{Cut, Split};
    use crate::{
        Config, Dtype, Weights,
        config::{Mlp, Preset},
        names,
        synthetic::Synthetic,
        weights::Part,
    };

    fn official(dtype: Dtype) -> Config {
        Preset::Official.config(None, None).unwrap().stored_as(dtype)
    }

    #[test]
    fn what_does_not_divide_is_said_in_one_line() {
        for dtype in [Dtype::Bf16, Dtype::Fp8] {
            assert_eq!(Split::fitting(&official(dtype)), [1, 2, 4, 8, 16]);
        }
        let line = |config: &Config, shares| Split::new(config, shares).unwrap_err();
        assert_eq!(
            line(&official(Dtype::Bf16), 3),
            "3 shares: linear_num_key_heads 16, expected a multiple of 3; 1, 2, 4, 8, 16 fit"
        );
        assert_eq!(
            line(&official(Dtype::Bf16), 0),
            "0 shares: of a model 0, expected 1 or more; 1, 2, 4, 8, 16 fit"
        );
        let odd = Config { num_key_value_heads: 8, num_experts: 510, ..official(Dtype::Bf16) };
        assert!(line(&odd, 4).contains("num_experts 510, expected a multiple of 4"));
        // Four shares of three heads of keys cannot each have one, nor two of one.
        let odd =
            Config { num_attention_heads: 48, num_key_value_heads: 3, ..official(Dtype::Bf16) };
        assert!(line(&odd, 4).contains("num_key_value_heads 3, expected a divisor of 4"));
        let mut odd = official(Dtype::Bf16);
        odd.mlp_types[0] = Mlp::Dense;
        assert!(
            line(&Config { intermediate_size: 5121, ..odd }, 2).contains("intermediate_size 5121")
        );
        // 64 columns for each of two.
        let small = Preset::Tiny.config(None, None).unwrap().stored_as(Dtype::Fp8);
        assert_eq!(
            line(&small, 2),
            "2 shares: rows of in_proj_qkvz in FP8 96, expected a multiple of the 128 that share a scale; 1 fit"
        );
    }

    #[test]
    fn shares_are_of_the_official_sizes() {
        let split = Split::new(&official(Dtype::Fp8), 8).unwrap();
        let share = &split.shares()[5];
        let c = &share.config;
        assert_eq!((c.linear_num_key_heads, c.linear_num_value_heads), (2, 4));
        assert_eq!((c.num_attention_heads, c.num_key_value_heads), (2, 1));
        assert_eq!((share.experts.clone(), share.vocabulary.clone()), (320..384, 94_960..113_952));
        let rows = |range| Cut::Rows(vec![range]);
        let cut = |name: &str, shape: &[usize]| share.cut(name, shape);
        assert_eq!(
            cut("model.layers.0.linear_attn.in_proj_qkvz.weight", &[12_288, 2048]),
            rows(7680..9216)
        );
        assert_eq!(
            cut("model.layers.0.linear_attn.in_proj_qkvz.weight_scale_inv", &[96, 16]),
            rows(60..72)
        );
        assert_eq!(cut("model.layers.0.linear_attn.in_proj_ba.weight", &[64, 2048]), rows(40..48));
        assert_eq!(
            cut("model.layers.0.linear_attn.conv1d.weight", &[8192, 1, 4]),
            Cut::Rows(vec![1280..1536, 3328..3584, 6656..7168])
        );
        assert_eq!(
            cut("model.layers.0.linear_attn.out_proj.weight_scale_inv", &[16, 32]),
            Cut::Columns(20..24)
        );
        // Queries 10 and 11 are of the second head of keys, which four shares keep.
        assert_eq!(cut("model.layers.3.self_attn.q_proj.weight", &[8192, 2048]), rows(5120..6144));
        assert_eq!(cut("mtp.layers.0.self_attn.k_proj.weight", &[512, 2048]), rows(256..512));
        assert_eq!(cut("model.layers.3.self_attn.v_proj.weight_scale_inv", &[4, 16]), rows(2..4));
        let expert = |e| format!("model.layers.7.mlp.experts.{e}.down_proj.weight");
        assert_eq!(cut(&expert(383), &[2048, 512]), Cut::Whole);
        assert_eq!(cut(&expert(384), &[2048, 512]), Cut::Elsewhere);
        assert_eq!(
            cut("model.layers.7.mlp.shared_expert.up_proj.weight", &[512, 2048]),
            Cut::Whole
        );
        assert_eq!(cut("model.layers.7.mlp.gate.weight", &[512, 2048]), Cut::Whole);
    }

    /// Every element of every tensor is with some share, once but for what all keep, and lies there as it should.
    #[test]
    fn shares_make_up_the_whole() {
        for (preset, shares) in [("tiny", 2), ("ragged", 2), ("tiny", 1)] {
            let whole: Synthetic = format!("synthetic:{preset}").parse().unwrap();
            let split = Split::new(whole.config(), shares).unwrap();
            let parts: Vec<_> =
                split.shares().into_iter().map(|share| Part::new(&whole, share)).collect();
            for entry in names::entries(whole.config(), true) {
                let want = whole.fetch(&entry.name).unwrap();
                let size = want.dtype.size();
                let row = size * entry.shape[1..].iter().product::<usize>();
                let mut got = vec![0xff; want.data.len()];
                let mut written = vec![0; want.data.len()];
                for part in &parts {
                    let cut = part.share().cut(&entry.name, &entry.shape);
                    let Some(meta) = part.meta(&entry.name) else {
                        assert_eq!(cut, Cut::Elsewhere);
                        assert!(part.fetch(&entry.name).is_err());
                        continue;
                    };
                    let own = part.fetch(&entry.name).unwrap();
                    assert_eq!((&own.shape, own.dtype), (&meta.shape, meta.dtype));
                    assert_eq!(own.data.len(), size * meta.shape.iter().product::<usize>());
                    let mut at = 0;
                    let mut take = |from: usize, bytes: usize| {
                        got[from..from + bytes].copy_from_slice(&own.data[at..at + bytes]);
                        written[from..from + bytes].iter_mut().for_each(|n| *n += 1);
                        at += bytes;
                    };
                    match cut {
                        Cut::Whole => take(0, want.data.len()),
                        Cut::Rows(runs) => {
                            runs.iter().for_each(|run| take(run.start * row, run.len() * row));
                        }
                        Cut::Columns(columns) => (0..entry.shape[0]).for_each(|r| {
                            take(r * row + columns.start * size, columns.len() * size);
                        }),
                        Cut::Elsewhere => unreachable!("it has a shape"),
                    }
                    assert_eq!(at, own.data.len());
                }
                assert_eq!(got, *want.data, "{}", entry.name);
                let times = written[0];
                assert!([1, shares].contains(&times) && written.iter().all(|&n| n == times));
            }
        }
    }

    /// What is made on a device of a part's recipe is what the whole recipe makes there.
    #[test]
    fn a_part_of_a_recipe_makes_a_part() {
        let whole: Synthetic = "synthetic:tiny".parse().unwrap();
        let share = Split::new(whole.config(), 2).unwrap().shares().swap_remove(1);
        let part = Part::new(&whole, share);
        for entry in names::entries(whole.config(), true) {
            let Some(recipe) = part.recipe(&entry.name) else {
                let cut = part.share().cut(&entry.name, &entry.shape);
                assert!(matches!(cut, Cut::Elsewhere | Cut::Rows(_)), "{}", entry.name);
                continue;
            };
            let want = part.fetch(&entry.name).unwrap().widen().unwrap();
            let mut got = vec![f32::NAN; want.len()];
            for (run, at, n) in recipe.runs(want.len()) {
                (0..n).for_each(|i| got[at + i] = run.element(i as u64));
            }
            assert_eq!(got, want, "{}", entry.name);
        }
    }
}
