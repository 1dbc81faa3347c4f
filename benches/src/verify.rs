//! An engine against a recording: the same prompts, fed the same way, compared tap by tap.

use golden::{
    Engine, Error, View,
    compare::{Bound, Finding, matrices, sketches, views},
    recording::{Kind, Noise, Prompt, Recording},
    sketch,
};
use ndarray::{Array2, Array3, ArrayD, Axis, Ix2, Ix3, Ix4, concatenate, s};

use crate::{
    ask::{Decode, Request, Said, ask},
    judge::same_experts,
};

/// Which rule an engine is held to: a floor and a multiple of the recording's own noise.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rule {
    /// Relative RMS that is always allowed.
    pub rel_rms: f64,
    /// Worst token that is always allowed.
    pub worst_token: f64,
    /// Multiple of the recording's noise that is allowed where that is more.
    pub noise: f64,
    /// Which of the recorded noises: `f64`, how far the official f32 run is from the same code in
    /// double, or `bf16`, how far the official bf16 run is from it.
    pub kind: &'static str,
}

impl Rule {
    /// A computation in `f32`: relative RMS at most `max(2e-5, 4 s)`, worst token `max(1e-4, 4 w)`.
    pub const F32: Rule = Rule { rel_rms: 2e-5, worst_token: 1e-4, noise: 4.0, kind: "f64" };
    /// A computation in `f64`: relative RMS at most `max(1e-5, 2 s)`, worst token `max(1e-4, 2 w)`.
    pub const F64: Rule = Rule { rel_rms: 1e-5, worst_token: 1e-4, noise: 2.0, kind: "f64" };
    /// An emulation of the official code in bf16, held against what that said: relative RMS at most
    /// `2 s`, worst token at most `2 w`, of the noise of bf16.
    pub const BF16: Rule = Rule { rel_rms: 0.0, worst_token: 0.0, noise: 2.0, kind: "bf16" };

    /// The rule for a number type of the reference.
    pub fn of(number: &str) -> Rule {
        match number {
            "f64" => Rule::F64,
            "bf16" => Rule::BF16,
            _ => Rule::F32,
        }
    }

    /// What a tap is called that was recorded for this rule.
    pub(crate) fn tap(self, tap: &str) -> String {
        if self.kind == "bf16" { format!("bf16.{tap}") } else { tap.to_owned() }
    }

    /// The bound for a tap of this noise.
    pub fn bound(self, Noise { rel_rms, worst_token }: Noise) -> Bound {
        Bound::Relative {
            rel_rms: self.rel_rms.max(self.noise * rel_rms),
            worst_token: self.worst_token.max(self.noise * worst_token),
        }
    }
}

/// What verifying one prompt found.
#[derive(Clone, Debug)]
pub struct Verified {
    /// The prompt.
    pub prompt: String,
    /// Tokens fed, over all sequences.
    pub tokens: usize,
    /// One per tap, in the order of the computation: hidden states, states, logits.
    pub findings: Vec<(String, Finding)>,
    /// Tokens whose expert set differs from the recording's, inside the margin of a near tie; the
    /// rest was then computed with the recorded experts.
    pub legal_flips: usize,
    /// The first one outside that margin.
    pub illegal_flip: Option<String>,
}

impl Verified {
    /// Whether everything holds.
    pub fn ok(&self) -> bool {
        self.illegal_flip.is_none() && self.findings.iter().all(|(_, finding)| finding.ok)
    }

    /// The first tap over its bound.
    pub fn first_bad(&self) -> Option<&(String, Finding)> {
        self.findings.iter().find(|(_, finding)| !finding.ok)
    }
}

/// Asks `engine` one prompt of `recording` and compares every tap that both have.
///
/// # Errors
/// If the engine cannot run the prompt, or the recording lacks what its manifest promises.
pub fn verify(
    engine: &mut dyn Engine,
    recording: &Recording,
    prompt: &Prompt,
    rule: Rule,
    progress: &mut dyn FnMut(usize, usize) -> bool,
) -> Result<Verified, Error> {
    let mut request = request(recording, prompt)?;
    let mut said = ask(engine, &request, progress)?;
    let recorded = recorded_routing(recording, prompt, rule, said.routing.len())?;
    let (legal_flips, illegal_flip) = flips(recording, prompt, &said, &recorded)?;
    if 0 < legal_flips && illegal_flip.is_none() {
        request.forced_routing = Some(recorded);
        said = ask(engine, &request, progress)?;
    }
    let findings = compare(recording, prompt, rule, &said)?;
    let tokens = request.tokens.iter().map(Vec::len).sum();
    Ok(Verified { prompt: prompt.id.clone(), tokens, findings, legal_flips, illegal_flip })
}

/// Every tap that was both said and recorded, in the order of the computation.
pub(crate) fn compare(
    recording: &Recording,
    prompt: &Prompt,
    rule: Rule,
    said: &Said,
) -> Result<Vec<(String, Finding)>, Error> {
    let real = recording.real_rows(prompt)?;
    let mut findings = Vec::new();
    for (layer, got) in said.hidden.iter().enumerate() {
        let tap = format!("hidden.{layer}");
        findings.extend(held(recording, prompt, &tap, got, rule)?.map(|finding| (tap, finding)));
    }
    if rule.kind == "bf16" {
        // Of the official run in bf16 hidden states, experts and logits are recorded.
        let logits = held(recording, prompt, "logits", &said.logits, rule)?;
        findings.extend(logits.map(|finding| ("logits".to_owned(), finding)));
        return something(findings, recording, prompt);
    }
    let mut judge = |tap: &str, got: &Array2<f32>, want: Array2<f32>| {
        let bound = rule.bound(recording.noise(&format!("{}/{tap}", prompt.id), rule.kind));
        findings.push((tap.to_owned(), matrices(tap, &want, got, &bound)));
    };
    for (layer, state) in said.states.iter().enumerate() {
        let Some(state) = state else { continue };
        let name = format!("{}/recurrent_state.{layer}", prompt.id);
        if recording.get(&name).is_some() {
            let want = recording.f32(&name)?.into_dimensionality::<Ix4>()?;
            let (b, hv, k, v) = want.dim();
            // One "token" per sequence and head: a head that is wrong is not averaged away.
            let shape = (b * hv, k * v);
            let got = state.recurrent.to_shape(shape)?.to_owned();
            judge(&format!("recurrent_state.{layer}"), &got, want.to_shape(shape)?.to_owned());
        }
        let name = format!("{}/conv_state.{layer}", prompt.id);
        if recording.get(&name).is_some() {
            let want = recording.f32(&name)?.into_dimensionality::<Ix3>()?;
            let (b, c, w) = want.dim();
            let by_column = |x: Array3<f32>| -> Result<Array2<f32>, Error> {
                let x = x.permuted_axes([0, 2, 1]);
                Ok(x.to_shape((b * w, c))?.to_owned())
            };
            judge(
                &format!("conv_state.{layer}"),
                &by_column(state.conv.clone())?,
                by_column(want)?,
            );
        }
    }
    if let Some(want) = rows(recording, prompt, "logits", &real, 0)? {
        judge("logits", &said.logits, want);
    }
    if prompt.kind == Kind::Decode {
        let want =
            recording.f32(&format!("{}/step_logits", prompt.id))?.into_dimensionality::<Ix3>()?;
        let (b, n, v) = want.dim();
        let got: Vec<_> = said.steps.iter().map(|x| x.view()).collect();
        judge("step_logits", &concatenate(Axis(0), &got)?, want.to_shape((b * n, v))?.to_owned());
    }
    if let Some(got) = &said.mtp
        && let Some(want) = rows(recording, prompt, "mtp_logits", &real, 1)?
    {
        judge("mtp_logits", got, want);
    }
    top_logits(recording, prompt, &said.logits, rule, &mut findings)?;
    something(findings, recording, prompt)
}

/// A comparison of nothing proves nothing.
fn something(
    findings: Vec<(String, Finding)>,
    recording: &Recording,
    prompt: &Prompt,
) -> Result<Vec<(String, Finding)>, Error> {
    if findings.is_empty() {
        let id = recording.id();
        return Err(format!("{id}: prompt {}: no tap that can be compared", prompt.id).into());
    }
    Ok(findings)
}

/// A hidden state, or logits, held against what was recorded of it, whole or in a sketch.
pub(crate) fn held(
    recording: &Recording,
    prompt: &Prompt,
    tap: &str,
    got: &Array2<f32>,
    rule: Rule,
) -> Result<Option<Finding>, Error> {
    let real = recording.real_rows(prompt)?;
    if let Some(want) = rows(recording, prompt, &rule.tap(tap), &real, 0)? {
        let bound = rule.bound(recording.noise(&format!("{}/{tap}", prompt.id), rule.kind));
        return Ok(Some(matrices(tap, &want, got, &bound)));
    }
    sketched(recording, prompt, tap, got, rule)
}

/// A tap of which only a sketch was recorded.
fn sketched(
    recording: &Recording,
    prompt: &Prompt,
    tap: &str,
    got: &Array2<f32>,
    rule: Rule,
) -> Result<Option<Finding>, Error> {
    let full = format!("{}/{tap}", prompt.id);
    let name = format!("{full}.sketch");
    if recording.get(&name).is_none() {
        return Ok(None);
    }
    let want = recording.f64(&name)?.into_raw_vec_and_offset().0;
    let values: Vec<f64> = got.iter().map(|&x| f64::from(x)).collect();
    let mine = sketch::sketch(&full, values.iter().copied());
    // 32 projections estimate a distance to within a factor of two: allow twice the rule.
    let Bound::Relative { rel_rms, worst_token } = rule.bound(recording.noise(&full, rule.kind))
    else {
        return Ok(None);
    };
    let bound = Bound::Relative { rel_rms: 2.0 * rel_rms, worst_token };
    Ok(Some(sketches(tap, &want, &mine, got.len(), bound)))
}

/// The largest logits and the log of the sum of all, where no more was recorded.
pub(crate) fn top_logits(
    recording: &Recording,
    prompt: &Prompt,
    got: &Array2<f32>,
    rule: Rule,
    findings: &mut Vec<(String, Finding)>,
) -> Result<(), Error> {
    let name = |tap: &str| format!("{}/{tap}", prompt.id);
    if recording.get(&name("topk.ids")).is_none() {
        return Ok(());
    }
    let ids = recording.i64(&name("topk.ids"))?.into_dimensionality::<Ix3>()?;
    let (b, t, k) = ids.dim();
    let ids = ids.to_shape((b * t, k))?.to_owned();
    let want = recording
        .f32(&name("topk.logits"))?
        .into_dimensionality::<Ix3>()?
        .to_shape((b * t, k))?
        .to_owned();
    let at = |(row, column): (usize, usize)| {
        got.get((row, ids[[row, column]] as usize)).copied().unwrap_or(f32::NAN)
    };
    let mine = Array2::from_shape_fn((b * t, k), at);
    let bound = rule.bound(recording.noise(&name("logits"), rule.kind));
    findings.push(("topk.logits".to_owned(), matrices("topk.logits", &want, &mine, &bound)));
    let want = recording.f64(&name("logsumexp"))?;
    let mine = ArrayD::from_shape_fn(want.shape(), |index| {
        let row = got.row(index[0] * t + index[1]);
        let max = row.iter().fold(f64::NEG_INFINITY, |m, &x| m.max(f64::from(x)));
        max + row.iter().map(|&x| (f64::from(x) - max).exp()).sum::<f64>().ln()
    });
    findings.push((
        "logsumexp".to_owned(),
        views("logsumexp", &View::F64(want.view()), &View::F64(mine.view()), bound),
    ));
    Ok(())
}

/// The prompt as it was recorded. Decoding is teacher-forced: each step is fed what the official
/// implementation chose.
pub(crate) fn request(recording: &Recording, prompt: &Prompt) -> Result<Request, Error> {
    let tokens = recording.tokens(prompt)?;
    let padding = tokens.iter().map(|row| prompt.tokens - row.len()).collect();
    let decode = if prompt.kind == Kind::Decode {
        let generated =
            recording.i64(&format!("{}/generated", prompt.id))?.into_dimensionality::<Ix2>()?;
        let row =
            |row: ndarray::ArrayView1<'_, i64>| row.iter().map(|&id| u32::try_from(id)).collect();
        Decode::Forced(generated.rows().into_iter().map(row).collect::<Result<_, _>>()?)
    } else {
        Decode::No
    };
    let split = prompt.split.clone().unwrap_or_default();
    Ok(Request {
        tokens,
        padding,
        split,
        decode,
        mtp: prompt.kind == Kind::Mtp,
        forced_routing: None,
    })
}

/// A recorded `[B, T, …]` tap without the rows at left padding (and without the last `drop` rows of
/// the mask, for taps that are shorter than the prompt).
pub(crate) fn rows(
    recording: &Recording,
    prompt: &Prompt,
    tap: &str,
    real: &[usize],
    drop: usize,
) -> Result<Option<Array2<f32>>, Error> {
    let name = format!("{}/{tap}", prompt.id);
    if recording.get(&name).is_none() {
        return Ok(None);
    }
    let x = recording.f32(&name)?.into_dimensionality::<Ix3>()?;
    let t = x.dim().1;
    let kept: Vec<_> =
        real.iter().enumerate().map(|(i, &n)| x.slice(s![i, t - (n - drop).., ..])).collect();
    Ok(Some(concatenate(Axis(0), &kept)?))
}

/// The recorded experts of every layer, `[N, A]`; empty where none were recorded.
pub(crate) fn recorded_routing(
    recording: &Recording,
    prompt: &Prompt,
    rule: Rule,
    layers: usize,
) -> Result<Vec<Option<Array2<i64>>>, Error> {
    let real = recording.real_rows(prompt)?;
    let mut all = Vec::new();
    for layer in 0..layers {
        let name = format!("{}/{}", prompt.id, rule.tap(&format!("routing.{layer}")));
        if recording.get(&name).is_none() {
            all.push(None);
            continue;
        }
        let x = recording.i64(&name)?.into_dimensionality::<Ix3>()?;
        let t = x.dim().1;
        let kept: Vec<_> =
            real.iter().enumerate().map(|(i, &n)| x.slice(s![i, t - n.., ..])).collect();
        all.push(Some(concatenate(Axis(0), &kept)?));
    }
    Ok(all)
}

/// Tokens whose expert sets differ: how many inside the margin of a near tie, and the first outside.
///
/// A swap is legal where the recorded gap to the first expert left out is below ten times the
/// router noise of the recording; recordings with a smaller gap are not committed, so here none is
/// expected.
fn flips(
    recording: &Recording,
    prompt: &Prompt,
    said: &Said,
    recorded: &[Option<Array2<i64>>],
) -> Result<(usize, Option<String>), Error> {
    let noise =
        recording.manifest.router.get("noise").and_then(serde_json::Value::as_f64).unwrap_or(0.0);
    let (mut legal, mut illegal) = (0, None);
    for (layer, (routing, recorded)) in said.routing.iter().zip(recorded).enumerate() {
        let (Some(routing), Some(recorded)) = (routing, recorded) else { continue };
        let name = format!("{}/margin.{layer}", prompt.id);
        let margin = recording.f32(&name)?.into_dimensionality::<Ix2>()?;
        let t = margin.ncols();
        let real = recording.real_rows(prompt)?;
        let margins =
            real.iter().enumerate().flat_map(|(i, &n)| margin.slice(s![i, t - n..]).to_vec());
        for (token, ((got, want), margin)) in
            routing.ids.rows().into_iter().zip(recorded.rows()).zip(margins).enumerate()
        {
            if same_experts(&got, &want) {
                continue;
            }
            if f64::from(margin) <= 10.0 * noise {
                legal += 1;
            } else if illegal.is_none() {
                illegal = Some(format!(
                    "layer {layer}, token {token}: experts {got}, recorded {want}, margin {margin:.3e} \
                     is above ten times the router's noise {noise:.1e}"
                ));
            }
        }
    }
    Ok((legal, illegal))
}
