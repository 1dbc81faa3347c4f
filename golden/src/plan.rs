//! Precision plans: where a computation rounds, and to what.
//!
//! A variant declares its plan, and the bound it is held to follows from op, problem and plan alone.
//! What is not declared is `f32`: a kernel that stores an intermediate in bf16 without saying so is
//! held to the bound of one that does not, and fails.

use std::{collections::BTreeMap, fmt, str::FromStr};

use serde::{Deserialize, Serialize};

use crate::Dtype;

mod sums;

pub use sums::Sums;

macro_rules! sites {
    ($($(#[$doc:meta])* $name:ident = $text:literal,)*) => {
        /// A place in the formulas where implementations differ in what they store.
        ///
        /// One name per tensor that an implementation may keep in a narrower type.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(rename_all = "snake_case")]
        pub enum Site { $($(#[$doc])* $name,)* }

        impl Site {
            /// Every site, in the model's order.
            pub const ALL: &'static [Site] = &[$(Site::$name,)*];

            /// The name in a plan.
            pub fn name(self) -> &'static str {
                match self { $(Site::$name => $text,)* }
            }
        }
    };
}

sites! {
    /// The result of a linear layer, but for those of the next two.
    Linear = "linear",
    /// The result of one that decides: the router's, a gate's.
    Decision = "decision",
    /// The result of one inside an expert or a dense MLP.
    ExpertLinear = "expert_linear",
    /// The result of a norm, before its consumer.
    Norm = "norm",
    /// The residual stream after an addition.
    Residual = "residual",
    /// The convolution's sum, before `SiLU`.
    Conv = "conv",
    /// The convolution's output, after `SiLU`.
    ConvOut = "conv_out",
    /// Normalised queries and keys of the delta rule.
    QkNorm = "qk_norm",
    /// The write strength `beta`.
    Beta = "beta",
    /// The log decay `g`.
    Gate = "gate",
    /// The recurrent state between tokens or chunks.
    State = "state",
    /// The chunked form's inverse `(I + A)^-1`.
    WyInverse = "wy_inverse",
    /// The chunked form's `W` and `U`.
    WyVectors = "wy_vectors",
    /// The chunked form's corrected values.
    WyValues = "wy_values",
    /// The chunked form's masked scores.
    WyScores = "wy_scores",
    /// Output of the delta rule before its gate.
    MixerOut = "mixer_out",
    /// Output of attention before its gate.
    AttentionOut = "attention_out",
    /// Cosines and sines.
    RopeTable = "rope_table",
    /// The products of a rotation, before they are added.
    RopeProduct = "rope_product",
    /// Rotated queries and keys.
    Rope = "rope",
    /// Queries as attention reads them.
    Queries = "queries",
    /// Keys as a cache holds them.
    Keys = "keys",
    /// Values as a cache holds them.
    Values = "values",
    /// Attention scores, after the product and after their scale.
    Scores = "scores",
    /// Attention probabilities.
    Probabilities = "probabilities",
    /// A gate's sigmoid, before it multiplies.
    Sigmoid = "sigmoid",
    /// A `SiLU`, before it multiplies.
    Silu = "silu",
    /// A gated value.
    GateOut = "gate_out",
    /// Router logits.
    RouterLogits = "router_logits",
    /// Routing weights.
    RouterWeights = "router_weights",
    /// `silu(gate) * up` inside an expert.
    ExpertHidden = "expert_hidden",
    /// An expert's weighted output.
    ExpertOut = "expert_out",
    /// The routed sum after each expert.
    ExpertSum = "expert_sum",
    /// The routed sum, and that sum with the shared expert.
    MoeOut = "moe_out",
}

impl fmt::Display for Site {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// In which of its equal forms a formula is computed.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize,
)]
#[serde(into = "String", try_from = "String")]
pub enum Form {
    /// As the contract writes it; of the delta rule, token by token.
    #[default]
    Plain,
    /// The delta rule in chunks of so many tokens.
    Chunked(usize),
    /// The same, where the decay between two tokens of a chunk is the difference of two sums of gates
    /// from the start of the chunk, as most kernels and the official code have it. Where the sums are
    /// large and the difference is small it has lost digits: a rounding like any other, to be declared.
    Prefixed(usize),
}

impl fmt::Display for Form {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Form::Plain => f.write_str("plain"),
            Form::Chunked(tokens) => write!(f, "chunked {tokens}"),
            Form::Prefixed(tokens) => write!(f, "chunked {tokens}, prefix sums"),
        }
    }
}

impl FromStr for Form {
    type Err = String;

    fn from_str(s: &str) -> Result<Form, String> {
        let (rest, prefix) = match s.strip_suffix(", prefix sums") {
            Some(rest) => (rest, true),
            None => (s, false),
        };
        let chunk = rest.strip_prefix("chunked ").and_then(|n| n.parse().ok());
        match (s, chunk.filter(|n| (1..=4096).contains(n))) {
            ("plain", _) => Ok(Form::Plain),
            (_, Some(tokens)) if prefix => Ok(Form::Prefixed(tokens)),
            (_, Some(tokens)) => Ok(Form::Chunked(tokens)),
            _ => Err(format!(
                "form {s:?}: expected \"plain\", \"chunked N\" or \"chunked N, prefix sums\", N from 1 to 4096"
            )),
        }
    }
}

impl From<Form> for String {
    fn from(form: Form) -> String {
        form.to_string()
    }
}

impl TryFrom<String> for Form {
    type Error = String;

    fn try_from(s: String) -> Result<Form, String> {
        s.parse()
    }
}

/// A grid of floating-point numbers: what rounding goes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Grid {
    /// 23 bits.
    F32,
    /// 10 bits in the exponent range of f32: what tensor cores read of an f32.
    Tf32,
    /// 10 bits, smallest normal 2^-14.
    F16,
    /// 7 bits.
    Bf16,
    /// 3 bits, smallest normal 2^-6, largest 448 (`float8_e4m3fn`).
    Fp8,
}

impl Grid {
    /// Bits of the fraction.
    #[inline]
    pub fn bits(self) -> u32 {
        match self {
            Grid::F32 => 23,
            Grid::Tf32 | Grid::F16 => 10,
            Grid::Bf16 => 7,
            Grid::Fp8 => 3,
        }
    }

    /// Exponent of the smallest normal number.
    #[inline]
    pub fn min_exponent(self) -> i32 {
        match self {
            Grid::F32 | Grid::Tf32 | Grid::Bf16 => -126,
            Grid::F16 => -14,
            Grid::Fp8 => -6,
        }
    }

    /// The largest number.
    #[inline]
    pub fn max(self) -> f64 {
        match self {
            Grid::F32 | Grid::Tf32 | Grid::Bf16 => f64::from(f32::MAX),
            Grid::F16 => 65504.0,
            Grid::Fp8 => 448.0,
        }
    }

    /// Half the distance of neighbours around `x`: the most that rounding to nearest is off.
    pub fn half_ulp(self, x: f64) -> f64 {
        let x = x.abs();
        let exponent = if x.is_normal() && x.is_finite() {
            (((x.to_bits() >> 52) & 0x7ff) as i32 - 1023).max(self.min_exponent())
        } else {
            self.min_exponent()
        };
        // Above the least power of every grid by far: the exponent's bits are all there is to it.
        f64::from_bits(((exponent - self.bits() as i32 - 1 + 1023) as u64) << 52)
    }

    /// The grid of a storage type, `None` for types that do not round an f32.
    pub fn of(dtype: Dtype) -> Option<Grid> {
        match dtype {
            Dtype::F32 => Some(Grid::F32),
            Dtype::F16 => Some(Grid::F16),
            Dtype::Bf16 => Some(Grid::Bf16),
            Dtype::Fp8 => Some(Grid::Fp8),
            Dtype::F64 | Dtype::I64 | Dtype::U8 => None,
        }
    }

    /// The name in a plan.
    pub fn name(self) -> &'static str {
        match self {
            Grid::F32 => "f32",
            Grid::Tf32 => "tf32",
            Grid::F16 => "f16",
            Grid::Bf16 => "bf16",
            Grid::Fp8 => "fp8",
        }
    }
}

impl fmt::Display for Grid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What a projection reads of its activations. Those that decide, the router's and the gates', read them
/// as they are.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize,
)]
#[serde(rename_all = "lowercase")]
pub enum Activations {
    /// As they are.
    #[default]
    F32,
    /// Rounded to bf16.
    Bf16,
    /// Of 32 neighbours in a row, 127 steps of the largest: as llama.cpp's `Q8_0`, the step in f32.
    Int8,
    /// Of 128 neighbours in a row, a group, codes of `float8_e4m3fn` of what they are over a scale in f32, the
    /// largest over 448 (of zeros, zeros: what is divided by is at least 1e-12). Weights are such codes too, one
    /// scale for 128 rows and 128 columns. Products of codes are summed over a group, as [`Plan::sums`]
    /// says, and both scales multiply that sum before it is added to those of other groups. What an
    /// `activation_scheme` of `dynamic` stands for, which official checkpoints in FP8 declare.
    /// Source: `fp8_act_quant` and `w8a8_block_fp8_matmul` of kernels-community/finegrained-fp8, which transformers
    /// 5.23.0 loads; vLLM's `per_token_group_quant_fp8` and `DeepGEMM` differ in what they divide by where all
    /// of a group is below 1e-10 or 1e-4.
    Fp8,
}

impl Activations {
    /// The name in a plan.
    pub fn name(self) -> &'static str {
        match self {
            Activations::F32 => "f32",
            Activations::Bf16 => "bf16",
            Activations::Int8 => "int8",
            Activations::Fp8 => "fp8",
        }
    }
}

/// What a cache keeps of keys and values, beyond what [`Site::Keys`] and [`Site::Values`] say of the
/// numbers that it is given.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize,
)]
#[serde(rename_all = "snake_case")]
pub enum Cache {
    /// The numbers.
    #[default]
    AsStored,
    /// Of each row (a token in a key/value head) 127 steps of the largest number, to the nearest, ties to
    /// even, the step in f32. What attention multiplies are the whole numbers: the step of a key scales
    /// its score, that of a value its probability, and that product is what
    /// [`Site::Probabilities`] rounds.
    Int8,
    /// The same, and what multiplies those whole numbers is counted too, so that products are whole numbers: of each
    /// query 32767 steps of its largest number, and of a query's weights (a probability times the step of its
    /// value) 32767 steps of the largest of [`Cache::COUNTED`] neighbouring keys, both to the nearest, steps
    /// in f32.
    Int8ByInt16,
}

impl Cache {
    /// Keys whose weights are counted in the same steps, from the first of a sequence on.
    pub const COUNTED: usize = 128;

    /// The name in a plan.
    pub fn name(self) -> &'static str {
        match self {
            Cache::AsStored => "as_stored",
            Cache::Int8 => "int8",
            Cache::Int8ByInt16 => "int8_by_int16",
        }
    }
}

/// How a computation rounds.
///
/// ```
/// use golden::plan::{Form, Grid, Plan, Site};
///
/// let plan = Plan { form: Form::Chunked(64), dot: Grid::Bf16, ..Plan::F32 }
///     .round(Site::WyValues, Grid::Bf16);
/// assert_eq!(plan.to_string(), "chunked 64; accumulator f32; dot bf16; wy_values bf16; output f32");
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Plan {
    /// Which form of the formula.
    pub form: Form,
    /// What every operation rounds to.
    pub accumulator: Grid,
    /// What the factors of matrix products and inner products are rounded to.
    pub dot: Grid,
    /// How the sums of those products are rounded.
    pub sums: Sums,
    /// What projections read of their activations.
    pub activations: Activations,
    /// What a cache keeps of keys and values.
    pub cache: Cache,
    /// What outputs are stored in. States are stored in [`state`](Self::state).
    pub output: Grid,
    /// What a recurrent state is stored in when it is an output.
    pub state: Grid,
    /// Intermediates that are stored narrower than the accumulator.
    pub round: BTreeMap<Site, Grid>,
    /// Error of `exp` in units in the last place of f32.
    pub exp_ulps: f64,
    /// The same of `log` and `log1p`.
    pub log_ulps: f64,
    /// The same of `sqrt`, `rsqrt` and division.
    pub root_ulps: f64,
    /// The same of cosine and sine.
    pub trig_ulps: f64,
    /// Whether numbers below the smallest normal may become zero.
    pub flush_to_zero: bool,
}

impl Default for Plan {
    fn default() -> Plan {
        Plan::F32
    }
}

impl Plan {
    /// Everything in f32, elementary functions within 2 units in the last place (what CUDA's
    /// documentation gives for `expf`, `logf`, `rsqrtf`, `sinf` and `cosf`; C libraries are closer).
    pub const F32: Plan = Plan {
        form: Form::Plain,
        accumulator: Grid::F32,
        dot: Grid::F32,
        sums: Sums::Nearest,
        activations: Activations::F32,
        cache: Cache::AsStored,
        output: Grid::F32,
        state: Grid::F32,
        round: BTreeMap::new(),
        exp_ulps: 2.0,
        log_ulps: 2.0,
        root_ulps: 2.0,
        trig_ulps: 2.0,
        flush_to_zero: false,
    };

    /// Activations stored in `dtype`, everything between them in f32.
    pub fn stored(dtype: Dtype) -> Plan {
        Plan { output: Grid::of(dtype).unwrap_or(Grid::F32), ..Plan::F32 }
    }

    /// What the official code rounds when it runs in bf16 with its torch functions: the result of
    /// every torch operation outside the explicit f32 islands (norms, softmax, the delta rule and
    /// its gate). Source: `modeling_qwen3_next.py`, transformers 5.23.0, read operation by operation, and
    /// its answers in bf16, which the emulation gives to the bit where no sum in f32 falls on the other
    /// side of a rounding.
    pub fn hf_bf16() -> Plan {
        use Site::{
            AttentionOut, Beta, Conv, ConvOut, Decision, ExpertHidden, ExpertLinear, ExpertOut,
            ExpertSum, GateOut, Linear, MixerOut, MoeOut, Norm, Probabilities, Residual, Rope,
            RopeProduct, RopeTable, RouterLogits, RouterWeights, Scores, Sigmoid, Silu,
        };
        let sites = [
            Linear,
            Decision,
            ExpertLinear,
            Norm,
            Residual,
            Conv,
            ConvOut,
            Beta,
            MixerOut,
            AttentionOut,
            RopeTable,
            RopeProduct,
            Rope,
            Scores,
            Probabilities,
            Sigmoid,
            Silu,
            GateOut,
            RouterLogits,
            RouterWeights,
            ExpertHidden,
            ExpertOut,
            ExpertSum,
            MoeOut,
        ];
        let plan = Plan { form: Form::Prefixed(64), output: Grid::Bf16, ..Plan::F32 };
        sites.into_iter().fold(plan, |plan, site| plan.round(site, Grid::Bf16))
    }

    /// The largest error of an elementary function that a plan may declare, in units in the last place
    /// of f32. Fast library functions stay within a few such units, those of large arguments within a few
    /// dozen. 64 of them are 2^-18 of the result, still far finer than the half ulp of bf16: what is
    /// coarser is a rounding, and has to be declared as one by its name.
    pub const MOST_ULPS: f64 = 64.0;

    /// Whether every error it declares is one that a bound may follow from.
    ///
    /// # Errors
    /// One line: key, expected, got.
    pub fn check(&self) -> Result<(), String> {
        for (key, ulps) in [
            ("exp_ulps", self.exp_ulps),
            ("log_ulps", self.log_ulps),
            ("root_ulps", self.root_ulps),
            ("trig_ulps", self.trig_ulps),
        ] {
            if !(0.0..=Plan::MOST_ULPS).contains(&ulps) {
                // Of `10000000` and `1e7` the shorter.
                let (plain, scientific) = (ulps.to_string(), format!("{ulps:e}"));
                let got = if scientific.len() < plain.len() { scientific } else { plain };
                let most = Plan::MOST_ULPS;
                return Err(format!("{key}: expected a number from 0 to {most}, got {got}"));
            }
        }
        if self.sums == Sums::Fp22 && self.activations != Activations::Fp8 {
            let got = self.activations.name();
            return Err(format!("sums fp22: expected activations fp8, got {got}"));
        }
        Ok(())
    }

    /// What flash-linear-attention's chunked kernel rounds for bf16 inputs: normalised queries and
    /// keys, the inverse, `W`, `U`, the corrected values and the scores inside a chunk in bf16, decays
    /// from prefix sums, products of bf16 factors summed in f32, the state kept in f32 and read in bf16
    /// by the products.
    /// Source: `fla/ops/gated_delta_rule/chunk.py` and `wy_fast.py`, flash-linear-attention bc3b101d.
    pub fn fla_bf16(chunk: usize) -> Plan {
        let sites =
            [Site::QkNorm, Site::WyInverse, Site::WyVectors, Site::WyValues, Site::WyScores];
        let plan =
            Plan { form: Form::Prefixed(chunk), dot: Grid::Bf16, output: Grid::Bf16, ..Plan::F32 };
        sites.into_iter().fold(plan, |plan, site| plan.round(site, Grid::Bf16))
    }

    /// Whether nothing is rounded to anything but f32, so that an answer in f32 arithmetic is an answer
    /// under this plan.
    pub fn only_f32(&self) -> bool {
        self.accumulator == Grid::F32
            && self.dot == Grid::F32
            && self.activations == Activations::F32
            && self.cache == Cache::AsStored
            && self.output == Grid::F32
            && self.state == Grid::F32
            && self.round.values().all(|&grid| grid == Grid::F32)
            && !self.flush_to_zero
    }

    /// The same plan with an intermediate stored narrower.
    #[must_use]
    pub fn round(mut self, site: Site, grid: Grid) -> Plan {
        self.round.insert(site, grid);
        self
    }

    /// The same plan on tensor cores that add so many products at once.
    #[must_use]
    pub fn truncated(self, products: usize) -> Plan {
        Plan { sums: Sums::Truncated(products), ..self }
    }

    /// The same plan, activations of projections in FP8 as its weights are.
    #[must_use]
    pub fn w8a8(self) -> Plan {
        Plan { activations: Activations::Fp8, ..self }
    }

    /// The same plan in another form.
    #[must_use]
    pub fn form(self, form: Form) -> Plan {
        Plan { form, ..self }
    }

    /// Its roundings one at a time, each as a plan in which nothing else rounds: which of them makes
    /// the bound.
    pub fn terms(&self) -> Vec<(String, Term)> {
        let mut terms = vec![(format!("{} arithmetic", self.accumulator), Term::Accumulator)];
        if self.dot != self.accumulator {
            terms.push((format!("{} dot factors", self.dot), Term::Dot));
        }
        if self.activations != Activations::F32 {
            let name = format!("{} activations", self.activations.name());
            terms.push((name, Term::Activations));
        }
        if self.cache != Cache::AsStored {
            terms.push((format!("{} cache", self.cache.name()), Term::Cache));
        }
        terms.push(("elementary functions".to_owned(), Term::Functions));
        let sites = self.round.iter();
        terms.extend(sites.map(|(site, grid)| (format!("{site} in {grid}"), Term::Site(*site))));
        terms
    }
}

/// One source of rounding of a plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Term {
    /// Every operation's own rounding.
    Accumulator,
    /// The factors of products.
    Dot,
    /// What projections read.
    Activations,
    /// What a cache keeps.
    Cache,
    /// Exponentials, logarithms, roots, cosines.
    Functions,
    /// A stored intermediate.
    Site(Site),
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}; accumulator {}; dot {}", self.form, self.accumulator, self.dot)?;
        if self.sums != Sums::Nearest {
            write!(f, "; sums {}", self.sums)?;
        }
        if self.activations != Activations::F32 {
            write!(f, "; activations {}", self.activations.name())?;
        }
        if self.cache != Cache::AsStored {
            write!(f, "; cache {}", self.cache.name())?;
        }
        for (site, grid) in &self.round {
            write!(f, "; {site} {grid}")?;
        }
        write!(f, "; output {}", self.output)?;
        if self.state != Grid::F32 {
            write!(f, "; state {}", self.state)?;
        }
        let base = Plan::F32;
        for (name, ulps, usual) in [
            ("exp", self.exp_ulps, base.exp_ulps),
            ("log", self.log_ulps, base.log_ulps),
            ("root", self.root_ulps, base.root_ulps),
            ("trig", self.trig_ulps, base.trig_ulps),
        ] {
            if ulps != usual {
                write!(f, "; {name} within {ulps} ulps")?;
            }
        }
        if self.flush_to_zero {
            f.write_str("; flush to zero")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
