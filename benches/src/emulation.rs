//! The official code in bf16, emulated, against what it said in bf16.
//!
//! Two rules hold. *On its own* the emulation is at most twice as far from the recording as the official
//! code in bf16 is from itself in f32. That is the noise of the number type: what rounds nowhere passes
//! as well. *By layer*, each layer fed the recorded stream and the recorded experts, it is at most twice as
//! far from the recording as emulations are from each other that add in other orders, which is nothing but
//! the sums that fall on the other side of a rounding: a rounding too many, or one too few, is above that.

use golden::{
    Engine, Error,
    compare::{Bound, Finding, derived::SPREADS, matrices},
    engine::{Rows, Want},
    recording::{Prompt, Recording},
    tap::{Part, Value},
};
use ndarray::Array2;
use rayon::prelude::*;
use reference::{Emulated, real::Rounding};

use crate::{
    ask::{Decode, ask},
    bisect::streams,
    bound::SCREEN,
    verify::{Rule, Verified, compare, recorded_routing, request},
};

/// Emulations that add in other orders.
pub(crate) const ORDERS: u64 = 4;

/// The longest prompt that is also asked by layer: that is most of the work, and says the same of each.
const LONGEST: usize = 70;

/// Whether the official code was also recorded in bf16.
pub fn has_bf16(recording: &Recording) -> bool {
    recording.manifest.taps.iter().any(|tap| tap.name.contains("/bf16."))
}

/// Holds an emulation of the official code in bf16 against what that said. `make` makes one anew.
///
/// Experts are the recorded ones. They may differ from the emulation's own choice where the logits
/// between which the choice falls are closer than runs in stochastic arithmetic put them.
///
/// # Errors
/// If the recording has nothing in bf16, or the model cannot run.
pub fn verify_bf16(
    make: &(dyn Fn() -> Result<Emulated, Error> + Sync),
    recording: &Recording,
    prompt: &Prompt,
    progress: &mut dyn FnMut(usize, usize) -> bool,
) -> Result<Verified, Error> {
    if !has_bf16(recording) {
        return Err(format!("{}: not recorded in bf16", recording.id()).into());
    }
    let mut engine = make()?;
    let layers = engine.config().num_hidden_layers();
    let recorded = recorded_routing(recording, prompt, Rule::BF16, layers)?;
    let mut request = request(recording, prompt)?;
    request.decode = Decode::No;
    request.forced_routing = Some(recorded.clone());
    let said = ask(&mut engine, &request, progress)?;
    let (legal_flips, illegal_flip) = choices(&mut engine, &request.tokens, &recorded)?;
    let mut findings = compare(recording, prompt, Rule::BF16, &said)?;
    if prompt.tokens <= LONGEST {
        findings.extend(by_layer(make, recording, prompt, layers)?);
    }
    let tokens = request.tokens.iter().map(Vec::len).sum();
    Ok(Verified { prompt: prompt.id.clone(), tokens, findings, legal_flips, illegal_flip })
}

/// What each layer makes of the recorded stream before it.
fn by_layer(
    make: &(dyn Fn() -> Result<Emulated, Error> + Sync),
    recording: &Recording,
    prompt: &Prompt,
    layers: usize,
) -> Result<Vec<(String, Finding)>, Error> {
    let run = |rounding: Rounding| {
        let mut engine = make()?;
        engine.round(rounding);
        let fed = streams(&mut engine, recording, prompt, Rule::BF16, layers)?;
        fed.ok_or_else(|| Error::from("hidden states in bf16 are recorded whole"))
    };
    let own = run(Rounding::Nearest)?;
    let others: Vec<_> =
        (0..ORDERS).into_par_iter().map(|seed| run(Rounding::Order(seed))).collect();
    let others = others.into_iter().collect::<Result<Vec<_>, Error>>()?;
    let mut findings = Vec::new();
    for (layer, fed) in own.iter().enumerate() {
        let name = format!("layer.{layer}");
        let none = Bound::Relative { rel_rms: 0.0, worst_token: 0.0 };
        let (mut rel_rms, mut worst_token) = (0.0_f64, 0.0_f64);
        for other in &others {
            let apart = matrices(&name, &fed.got, &other[layer].got, &none);
            rel_rms = rel_rms.max(2.0 * apart.rel_rms);
            worst_token = worst_token.max(2.0 * apart.worst_token);
        }
        let bound = Bound::Relative { rel_rms, worst_token };
        findings.push((name.clone(), matrices(&name, &fed.want, &fed.got, &bound)));
    }
    Ok(findings)
}

/// Tokens of which other experts were recorded, or chosen by an engine, than the emulation would choose: how
/// many of these it might have chosen as well, and the first other.
pub(crate) fn choices(
    engine: &mut Emulated,
    tokens: &[Vec<u32>],
    recorded: &[Option<Array2<i64>>],
) -> Result<(usize, Option<String>), Error> {
    // By how much the largest logit left out is above the smallest one chosen, per layer and token.
    let mut gaps = |rounding: Rounding| -> Result<Vec<(usize, Vec<f64>)>, Error> {
        engine.round(rounding);
        engine.reset(tokens.len())?;
        let forced_routing = Some(recorded.to_vec());
        let want = Want { logits: Rows::None, taps: true, forced_routing, ..Want::default() };
        let step = engine.forward(tokens, &want)?;
        engine.round(Rounding::Nearest);
        let mut all = Vec::new();
        for tap in &step.taps {
            let (Part::Layer(layer), "moe_router", "logits") = (tap.part, &*tap.op, &*tap.tensor)
            else {
                continue;
            };
            let (Value::Numbers(logits), Some(ids)) = (&tap.value, &recorded[layer]) else {
                continue;
            };
            let gap =
                |(logits, ids): (ndarray::ArrayViewD<'_, f64>, ndarray::ArrayView1<'_, i64>)| {
                    let (mut out, mut chosen) = (f64::NEG_INFINITY, f64::INFINITY);
                    for (expert, &logit) in logits.iter().enumerate() {
                        if ids.iter().any(|&id| id as usize == expert) {
                            chosen = chosen.min(logit);
                        } else {
                            out = out.max(logit);
                        }
                    }
                    out - chosen
                };
            all.push((layer, logits.outer_iter().zip(ids.rows()).map(gap).collect()));
        }
        Ok(all)
    };
    let own = gaps(Rounding::Nearest)?;
    if own.iter().all(|(_, gaps)| gaps.iter().all(|&gap| gap <= 0.0)) {
        return Ok((0, None));
    }
    let mut squares: Vec<Vec<f64>> = own.iter().map(|(_, gaps)| vec![0.0; gaps.len()]).collect();
    for seed in 0..SCREEN {
        let runs = gaps(Rounding::Random(u64::from(seed)))?;
        for ((squares, (_, own)), (_, run)) in squares.iter_mut().zip(&own).zip(runs) {
            for ((square, own), run) in squares.iter_mut().zip(own).zip(run) {
                *square += (run - own) * (run - own) / f64::from(SCREEN);
            }
        }
    }
    let (mut legal, mut illegal) = (0, None);
    for ((layer, gaps), squares) in own.iter().zip(&squares) {
        for (token, (&gap, &square)) in gaps.iter().zip(squares).enumerate() {
            if gap <= 0.0 {
                continue;
            }
            if gap <= SPREADS * square.sqrt() {
                legal += 1;
            } else if illegal.is_none() {
                illegal = Some(format!(
                    "layer {layer}, token {token}: an expert that is left out leads by {gap:.3e}, above what that may be off, {:.1e}",
                    SPREADS * square.sqrt()
                ));
            }
        }
    }
    Ok((legal, illegal))
}

#[cfg(test)]
mod tests {
    use std::{path::Path, sync::Arc};

    use golden::{
        Config, Dtype, Plan, Weights,
        plan::{Grid, Site},
        recording::Recording,
        synthetic::Synthetic,
    };
    use reference::Emulated;

    use super::verify_bf16;
    use crate::verify::Verified;

    fn layers() -> (Recording, Arc<dyn Weights>) {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../golden/recordings/layers");
        let recording = Recording::open(&folder).unwrap();
        let source = &recording.manifest.checkpoint;
        let config = Config::parse(&source.config.to_string(), "layers").unwrap();
        let weights = Synthetic::new(config.stored_as(Dtype::F32), source.seed.unwrap());
        (recording, Arc::new(weights))
    }

    /// What these prompts come to.
    fn held(
        make: &(dyn Fn() -> Emulated + Sync),
        recording: &Recording,
        prompts: &[&str],
    ) -> Vec<Verified> {
        let prompts = recording.manifest.prompts.iter().filter(|p| prompts.contains(&&*p.id));
        let verify =
            |prompt| verify_bf16(&|| Ok(make()), recording, prompt, &mut |_, _| true).unwrap();
        prompts.map(verify).collect()
    }

    #[test]
    fn the_official_code_in_bf16_is_emulated() {
        let (recording, weights) = layers();
        let make = || Emulated::hf_bf16(weights.clone(), None);
        let all = held(&make, &recording, &["t3", "t65"]);
        assert!(all.iter().all(Verified::ok), "{:?}", all.iter().map(Verified::first_bad));
        // To the bit, here: no sum falls on the other side of a rounding.
        let exact = all.iter().flat_map(|v| &v.findings).all(|(_, finding)| finding.max_abs == 0.0);
        assert!(exact);
    }

    /// A rounding too few, or one too many, is seen: the rule can fail.
    #[test]
    fn every_rounding_of_the_plan_is_there_and_no_other() {
        let (recording, weights) = layers();
        let caught = |plan: Plan, prompts: &[&str]| {
            let make = || Emulated::hf_bf16(weights.clone(), None).with_plan(plan.clone());
            prompts.iter().any(|&id| !held(&make, &recording, &[id]).iter().all(Verified::ok))
        };
        for &site in Site::ALL {
            let mut plan = Plan::hf_bf16();
            let there = plan.round.remove(&site).is_some();
            if !there {
                plan.round.insert(site, Grid::Bf16);
            }
            // Router logits, queries, keys and values are results that are rounded anyway; the chunked
            // form's own intermediates are none of the recurrent form that the model is computed in.
            let rounded = [Site::RouterLogits, Site::Queries, Site::Keys, Site::Values];
            let inert = rounded.contains(&site) || site.name().starts_with("wy_");
            // Most show in two tokens; a long prompt is asked where they do not.
            let prompts = if inert { &["t2", "t3"][..] } else { &["t2", "t3", "t65"] };
            assert_eq!(caught(plan, prompts), !inert, "{site}: in the plan: {there}");
        }
        // Rotary frequencies that were not cast with the rest: an angle is off by more the later it is.
        let make = || Emulated::hf_bf16(weights.clone(), None).with_frequencies(Dtype::F32);
        assert!(!held(&make, &recording, &["t65"]).iter().all(Verified::ok));
    }
}
