//! Holding a candidate's outputs against the bound of its plan.

use std::sync::Arc;

use golden::{
    Plan, Spec, Tensors, View,
    compare::{self, Bound, Finding},
    plan::Grid,
};
use ndarray::{ArrayD, ArrayView1, ArrayViewD, Axis};

use crate::{
    answer::Answer,
    bound::{DECIDE, Output, Outputs, Question, SCREEN},
    dear,
};

/// What a judgement rests on.
pub(crate) struct Case<'a, O: Answer> {
    pub(crate) spec: &'a Spec<O::Case>,
    pub(crate) inputs: &'a O::Inputs<f32>,
    pub(crate) plan: &'a Plan,
}

/// Experts that a candidate chose otherwise.
#[derive(Clone, Debug, Default)]
struct Flips {
    legal: usize,
    illegal: usize,
    /// The first illegal one, or what the closest legal one looked like.
    note: String,
    smallest_margin: f64,
}

impl<O: Answer> Case<'_, O> {
    pub(crate) fn question<'a>(&'a self, experts: Option<&'a ArrayD<i64>>) -> Question<'a, O> {
        Question { spec: self.spec, inputs: self.inputs, plan: self.plan, experts, only: None }
    }

    /// Every output of `got`. Screened with few runs; what fails is decided with many. Problems that
    /// are too dear for that are judged by [`dear`].
    pub(crate) fn judge(&self, got: &O::Outputs<f32>) -> Vec<Finding> {
        self.judged(got).0
    }

    /// The same, with the bound that it was held to; of a problem that is too dear none was derived.
    pub(crate) fn judged(&self, got: &O::Outputs<f32>) -> (Vec<Finding>, Option<Arc<Outputs>>) {
        self.judged_above(dear::TOO_DEAR, got)
    }

    /// The same with another threshold.
    pub(crate) fn judged_above(
        &self,
        threshold: u64,
        got: &O::Outputs<f32>,
    ) -> (Vec<Finding>, Option<Arc<Outputs>>) {
        if dear::is::<O>(self.spec, threshold) {
            return (dear::judge(self, got), None);
        }
        let (findings, bound) = self.with_runs(got, SCREEN);
        if findings.iter().all(|finding| finding.ok) {
            return (findings, Some(bound));
        }
        let (findings, bound) = self.with_runs(got, DECIDE);
        (findings, Some(bound))
    }

    fn with_runs(&self, got: &O::Outputs<f32>, runs: u32) -> (Vec<Finding>, Arc<Outputs>) {
        let got = got.tensors();
        let (mut findings, bound) = self.routed(&got, runs);
        let why = misplaced(&self.question(None).derive(runs), &got);
        let ids = findings.iter_mut().find(|finding| finding.output == "ids");
        if let (Some(ids), Some(why)) = (ids, why) {
            ids.over += 1;
            ids.budget = f64::INFINITY;
            ids.pattern = Some(why);
            ids.ok = false;
        }
        (findings, bound)
    }

    /// The same, but for the order of exact ties.
    fn routed(&self, got: &[(&'static str, View<'_>)], runs: u32) -> (Vec<Finding>, Arc<Outputs>) {
        let derived = self.question(None).derive(runs);
        let chosen = got.iter().find_map(|(name, view)| match view {
            View::I64(ids) if *name == "ids" => Some(ids),
            _ => None,
        });
        let own = derived.iter().find_map(|(name, output)| match output {
            Output::Integers { want, .. } if *name == "ids" => Some(want),
            _ => None,
        });
        if let (Some(chosen), Some(own)) = (chosen, own)
            && chosen.shape() == own.shape()
            && 1 < own.ndim()
            && chosen != own
            && routes(chosen, O::experts(self.inputs))
            && let Some(flips) = flips(chosen, own, &derived)
        {
            if 0 < flips.illegal {
                let mut findings = compare_all(&derived, got, O::TOLD, Some(&flips));
                findings.retain(|f| f.output == "ids");
                return (findings, derived);
            }
            // The swap is legal; everything else has to be right with these experts.
            let experts = chosen.to_owned();
            let forced = self.question(Some(&experts)).derive(runs);
            let mut flips = flips;
            disordered(&forced, &mut flips);
            return (compare_all(&forced, got, O::TOLD, Some(&flips)), forced);
        }
        (compare_all(&derived, got, O::TOLD, None), derived)
    }
}

/// Whether ids are experts at all, so that they can be forced.
pub(crate) fn routes(ids: &ArrayViewD<'_, i64>, experts: usize) -> bool {
    ids.lanes(Axis(ids.ndim() - 1)).into_iter().all(|row| {
        let mut seen = row.to_vec();
        seen.sort_unstable();
        seen.windows(2).all(|pair| pair[0] != pair[1])
            && seen.iter().all(|&id| 0 <= id && (id as usize) < experts)
    })
}

/// Whether two rows of ids name the same experts, in whatever order.
pub(crate) fn same_experts(a: &ArrayView1<'_, i64>, b: &ArrayView1<'_, i64>) -> bool {
    let sorted = |row: &ArrayView1<'_, i64>| {
        let mut ids = row.to_vec();
        ids.sort_unstable();
        ids
    };
    sorted(a) == sorted(b)
}

/// The first two experts whose logits the oracle and the candidate both hold equal, but which the
/// candidate's ids do not take in the order of their index. A near tie may fall either way; an exact
/// one is defined.
fn misplaced(derived: &Outputs, got: &[(&'static str, View<'_>)]) -> Option<String> {
    let find = |wanted: &str| got.iter().find(|(name, _)| *name == wanted).map(|(_, view)| view);
    let (View::I64(ids), View::F32(logits)) = (find("ids")?, find("logits")?) else { return None };
    let want = derived.iter().find_map(|(name, output)| match output {
        Output::Numbers(derived) if *name == "logits" => Some(derived),
        _ => None,
    })?;
    // One row of logits per row of ids: the experts' logits, not those of a vocabulary.
    let [tokens, experts] = want.shape[..] else { return None };
    if ids.ndim() != 2 || ids.len_of(Axis(0)) != tokens || logits.shape() != want.shape {
        return None;
    }
    if !routes(ids, experts) {
        return None;
    }
    for (token, ids) in ids.lanes(Axis(1)).into_iter().enumerate() {
        let equal = |a: usize, b: usize| {
            logits[[token, a]] == logits[[token, b]]
                && want.want[token * experts + a] == want.want[token * experts + b]
        };
        for (place, &id) in ids.iter().enumerate() {
            let before = |lower: usize| ids.iter().take(place).any(|&id| id as usize == lower);
            let id = id as usize;
            if let Some(lower) = (0..id).find(|&lower| equal(lower, id) && !before(lower)) {
                return Some(format!(
                    "token {token}: experts {lower} and {id} have equal logits, and the lower one does not come first"
                ));
            }
        }
    }
    None
}

fn compare_all(
    derived: &Outputs,
    got: &[(&'static str, View<'_>)],
    told: &[&str],
    flips: Option<&Flips>,
) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (name, output) in derived.iter().filter(|(name, _)| !told.contains(name)) {
        let Some((_, got)) = got.iter().find(|(other, _)| other == name) else {
            let want = match output {
                Output::Numbers(d) => ArrayD::zeros(d.shape.clone()),
                Output::Integers { want, .. } => ArrayD::zeros(want.shape()),
            };
            let nothing = ArrayD::zeros(vec![0; want.ndim().max(1)]);
            findings.push(compare::views(
                name,
                &View::F64(want.view()),
                &View::F64(nothing.view()),
                Bound::Exact,
            ));
            continue;
        };
        findings.push(match output {
            Output::Numbers(derived) => derived.compare(name, got),
            Output::Integers { want, runs } => integers(name, want, runs, got, flips),
        });
    }
    findings
}

/// Integers: the oracle's, or legally swapped, or (where nothing is routed by them: sampled tokens)
/// what some run in stochastic arithmetic gave.
fn integers(
    name: &str,
    want: &ArrayD<i64>,
    runs: &[Vec<i64>],
    got: &View<'_>,
    flips: Option<&Flips>,
) -> Finding {
    let exact =
        |want: &ArrayD<i64>| compare::views(name, &View::I64(want.view()), got, Bound::Exact);
    if let Some(flips) = flips {
        let View::I64(ids) = got else { return exact(want) };
        let mut finding = if flips.illegal == 0 {
            compare::views(name, &View::I64(ids.view()), got, Bound::Exact)
        } else {
            exact(want)
        };
        finding.over = flips.illegal;
        finding.pattern = Some(format!(
            "{} legal swaps, {} illegal, smallest margin {:.1e}: {}",
            flips.legal, flips.illegal, flips.smallest_margin, flips.note
        ));
        return finding;
    }
    let View::I64(ids) = got else { return exact(want) };
    let allowed: ArrayD<i64> = ArrayD::from_shape_fn(want.raw_dim(), |index| want[&index]);
    let mut allowed = allowed;
    if ids.shape() == want.shape() {
        for (i, (allowed, &got)) in allowed.iter_mut().zip(ids.iter()).enumerate() {
            if *allowed != got && runs.iter().any(|run| run.get(i) == Some(&got)) {
                *allowed = got;
            }
        }
    }
    exact(&allowed)
}

/// Where the chosen experts differ from the oracle's. A swap is legal where the oracle's margin to
/// the first expert left out is below what the margin itself may be off on either side; an order
/// within the chosen is no swap. `None` if there is no margin to judge by.
fn flips(chosen: &ArrayViewD<'_, i64>, own: &ArrayD<i64>, derived: &Outputs) -> Option<Flips> {
    let margins = derived.iter().find_map(|(name, output)| match output {
        Output::Numbers(derived) if *name == "margins" => Some(derived),
        _ => None,
    })?;
    let allowed = margins.allowed();
    let mut flips = Flips { smallest_margin: f64::INFINITY, ..Flips::default() };
    let last = Axis(own.ndim() - 1);
    for (i, (got, want)) in chosen.lanes(last).into_iter().zip(own.lanes(last)).enumerate() {
        let margin = margins.want.get(i).copied().unwrap_or(f64::INFINITY);
        if same_experts(&got, &want) {
            continue;
        }
        if margin <= 2.0 * allowed.get(i).map_or(0.0, |a| a.0) {
            flips.legal += 1;
            if margin < flips.smallest_margin {
                flips.note = format!("token {i}: experts {got}, oracle {want}");
            }
        } else {
            flips.illegal += 1;
            if flips.illegal == 1 {
                flips.note = format!(
                    "token {i}: experts {got}, oracle {want}, margin {margin:.3e} is above twice what it may be off"
                );
            }
        }
        flips.smallest_margin = flips.smallest_margin.min(margin);
    }
    Some(flips)
}

/// Chosen experts stand in the order of their weights, but for those that are too close to tell.
fn disordered(forced: &Outputs, flips: &mut Flips) {
    let Some(weights) = forced.iter().find_map(|(name, output)| match output {
        Output::Numbers(derived) if *name == "weights" => Some(derived),
        _ => None,
    }) else {
        return;
    };
    let slots = weights.shape.last().copied().unwrap_or(1).max(1);
    let allowed = weights.allowed();
    for (token, (row, allowed)) in weights.want.chunks(slots).zip(allowed.chunks(slots)).enumerate()
    {
        let rises = |i: usize| row[i] + allowed[i].0 + allowed[i + 1].0 < row[i + 1];
        if (0..row.len().saturating_sub(1)).any(rises) {
            flips.illegal += 1;
            flips.note = format!("token {token}: experts are not in the order of their weights");
        }
    }
}

/// What a bound is made of.
#[derive(Clone, Debug, PartialEq)]
pub struct Derivation {
    /// How the candidate rounds.
    pub plan: Plan,
    /// Runs in stochastic arithmetic that the numbers here are of.
    pub runs: u32,
    /// Of each output.
    pub outputs: Vec<Part>,
}

/// What the bound of one output is made of; numbers are shares of the RMS of the answer.
#[derive(Clone, Debug, PartialEq)]
pub struct Part {
    /// The output.
    pub output: &'static str,
    /// What it is stored in; `None` of integers, which have to be equal.
    pub grid: Option<Grid>,
    /// How far runs under the whole plan are from the oracle.
    pub spread: f64,
    /// Half a unit in the last place of what the output is stored in.
    pub half_ulp: f64,
    /// The spread of each source of rounding alone, in the order of the plan.
    pub terms: Vec<(String, f64)>,
}

impl Part {
    /// The source of rounding that alone gives the largest spread.
    pub fn dominant(&self) -> Option<&str> {
        let most = self.terms.iter().max_by(|a, b| a.1.total_cmp(&b.1));
        most.filter(|(_, spread)| 0.0 < *spread).map(|(name, _)| name.as_str())
    }
}

/// What makes a bound: the runs under the whole plan, and under each of its terms alone.
pub(crate) fn derivation<O: Answer>(case: &Case<'_, O>) -> Derivation {
    let derive = |only| Question { only, ..case.question(None) }.derive(SCREEN);
    let terms: Vec<_> =
        case.plan.terms().into_iter().map(|(name, term)| (name, derive(Some(term)))).collect();
    let part = |(at, (name, output)): (usize, &(&'static str, Output))| match output {
        Output::Numbers(derived) => Part {
            output: name,
            grid: Some(derived.grid),
            spread: derived.relative_spread(),
            half_ulp: derived.relative_half_ulp(),
            terms: terms
                .iter()
                .filter_map(|(term, outputs)| match &outputs.get(at)?.1 {
                    Output::Numbers(alone) => Some((term.clone(), alone.relative_spread())),
                    Output::Integers { .. } => None,
                })
                .collect(),
        },
        Output::Integers { .. } => {
            Part { output: name, grid: None, spread: 0.0, half_ulp: 0.0, terms: Vec::new() }
        }
    };
    let all = derive(None);
    let compared = all.iter().enumerate().filter(|(_, (name, _))| !O::TOLD.contains(name));
    Derivation { plan: case.plan.clone(), runs: SCREEN, outputs: compared.map(part).collect() }
}
