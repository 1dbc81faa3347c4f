//! Continuing a prompt, token by token or with drafts of the MTP head.

use std::{ops::ControlFlow, time::Duration};

use golden::{
    Engine, Error, Rng,
    engine::{NOT_FINITE, Rows, Step, Want},
    ops::sampling,
};
use ndarray::{Array2, arr1, s};

use crate::{
    ask::{argmax, next},
    clock,
};

/// How tokens are chosen, and when to stop.
#[derive(Clone, Debug)]
pub struct Options {
    /// Most tokens to generate.
    pub max_new: usize,
    /// 0 is greedy.
    pub temperature: f64,
    /// 0 keeps all.
    pub top_k: usize,
    /// 1 keeps all.
    pub top_p: f64,
    /// Seed of the draws.
    pub seed: u64,
    /// Tokens that end the text; they are generated but nothing follows.
    pub stop: Vec<u32>,
    /// Tokens that the MTP head drafts at a time; 0 is none. Greedy only.
    pub speculate: usize,
}

/// How it went.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// What was generated.
    pub tokens: Vec<u32>,
    /// Time of the prompt.
    pub prefill: Duration,
    /// Time of each step after it.
    pub steps: Vec<Duration>,
    /// Drafts offered at each position of a draft.
    pub drafted: Vec<usize>,
    /// Drafts accepted at each position.
    pub accepted: Vec<usize>,
}

/// Continues `prompt` in an engine, telling each token as it is certain.
///
/// Drafting is exact: the target model's own greedy choice decides every token, the head only says
/// which ones to compute together. Between steps the head's cache holds one entry for each token of
/// the text that has a successor, made from the main model's hidden states.
///
/// # Errors
/// If the engine fails, its logits are [`NOT_FINITE`], or drafts are asked for together with a temperature.
pub fn generate(
    engine: &mut dyn Engine,
    prompt: &[u32],
    options: &Options,
    on_token: &mut dyn FnMut(u32) -> ControlFlow<()>,
) -> Result<Report, Error> {
    if 0 < options.speculate && options.temperature != 0.0 {
        return Err("drafts are verified against greedy choices: --speculate needs --greedy".into());
    }
    if 0 < options.speculate && !engine.has_mtp() {
        return Err("the checkpoint has no MTP head (no mtp.* tensors)".into());
    }
    let mut report = Report {
        drafted: vec![0; options.speculate],
        accepted: vec![0; options.speculate],
        ..Report::default()
    };
    let mut rng = Rng::keyed("generate", options.seed);
    engine.reset(1)?;
    // The choice comes back alone, where an engine makes it.
    let greedy = options.temperature == 0.0 && options.speculate == 0 && engine.chooses();
    let (first, prefill) = clock::time(|| -> Result<Last, Error> {
        // Drafts are made from the hidden state of every token.
        let last = if options.speculate == 0 { Rows::Last } else { Rows::All };
        let step = engine.forward(&[prompt.to_vec()], &Want { last, ..next(greedy) })?;
        let hidden = last_hidden(&step)?;
        if 0 < options.speculate {
            let before = prompt.len() - 1;
            engine.mtp_feed(&[prompt[1..].to_vec()], &hidden.slice(s![..before, ..]).to_owned())?;
        }
        Ok(Last {
            said: Said::of(&step, 0, greedy)?,
            hidden: hidden.slice(s![-1.., ..]).to_owned(),
        })
    });
    report.prefill = prefill;
    let mut last = first?;
    let mut told = |report: &mut Report, token: u32| {
        report.tokens.push(token);
        let over = report.tokens.len() == options.max_new || options.stop.contains(&token);
        on_token(token).is_break() || over
    };
    while report.tokens.len() < options.max_new {
        let token = match &last.said {
            Said::Logits(x) if x.iter().any(|x| !x.is_finite()) => return Err(NOT_FINITE.into()),
            Said::Logits(logits) => choose(logits, options, &mut rng),
            Said::Next(id) => *id,
        };
        if told(&mut report, token) {
            break;
        }
        let room = options.max_new - report.tokens.len();
        let (result, took) =
            clock::time(|| advance(engine, &last, token, options.speculate.min(room - 1), greedy));
        report.steps.push(took);
        let (accepted, offered, new) = result?;
        last = new;
        for (position, drafted) in report.drafted.iter_mut().enumerate().take(offered) {
            *drafted += 1;
            report.accepted[position] += usize::from(position < accepted.len());
        }
        if accepted.into_iter().any(|token| told(&mut report, token)) {
            break;
        }
    }
    Ok(report)
}

/// Where the text stands: what was said after its last token, and the hidden state of that (`[1, D]`, after the
/// final norm).
struct Last {
    said: Said,
    hidden: Array2<f32>,
}

/// What an engine says of the token that follows.
enum Said {
    Logits(Vec<f32>),
    /// The greedy choice.
    Next(u32),
}

impl Said {
    /// Of a row of a step.
    fn of(step: &Step, row: usize, greedy: bool) -> Result<Said, Error> {
        if greedy {
            let id = step.greedy.get(row).ok_or("an engine that chooses returns its choice")?;
            return Ok(Said::Next(*id));
        }
        Ok(Said::Logits(step.logits.row(row).to_vec()))
    }
}

/// Feeds `token` and up to `drafts` drafted tokens; returns those accepted, how many were offered, and
/// where the text then stands.
fn advance(
    engine: &mut dyn Engine,
    last: &Last,
    token: u32,
    drafts: usize,
    greedy: bool,
) -> Result<(Vec<u32>, usize, Last), Error> {
    if drafts == 0 {
        let step = engine.forward(&[vec![token]], &next(greedy))?;
        let hidden = last_hidden(&step)?.clone();
        if engine.has_mtp() && engine.mtp_lengths().first().is_some_and(|&n| 0 < n) {
            engine.mtp_feed(&[vec![token]], &last.hidden)?;
        }
        return Ok((Vec::new(), 0, Last { said: Said::of(&step, 0, greedy)?, hidden }));
    }
    let entries = engine.mtp_lengths().first().copied().unwrap_or(0);
    let mut fed = vec![token];
    let mut hidden = last.hidden.clone();
    for _ in 0..drafts {
        let newest = fed.last().copied().unwrap_or(token);
        let step = engine.mtp(&[vec![newest]], &hidden)?;
        fed.push(argmax(step.logits.row(0).as_slice().unwrap_or(&[])));
        hidden.clone_from(last_hidden(&step)?);
    }
    // Only the first entry was made from a true hidden state.
    engine.mtp_truncate(&[entries + 1])?;
    let step = engine.forward(&[fed.clone()], &Want { rollback: true, ..Want::default() })?;
    let right = |i: usize| fed[i + 1] == argmax(step.logits.row(i).as_slice().unwrap_or(&[]));
    let accepted = (0..drafts).take_while(|&i| right(i)).count();
    if accepted < drafts {
        engine.rollback(&[accepted + 1])?;
    }
    let hidden = last_hidden(&step)?;
    if 0 < accepted {
        engine.mtp_feed(
            &[fed[1..=accepted].to_vec()],
            &hidden.slice(s![..accepted, ..]).to_owned(),
        )?;
    }
    let new = Last {
        said: Said::of(&step, accepted, false)?,
        hidden: hidden.slice(s![accepted..=accepted, ..]).to_owned(),
    };
    Ok((fed[1..=accepted].to_vec(), drafts, new))
}

fn last_hidden(step: &Step) -> Result<&Array2<f32>, Error> {
    step.hidden.last().ok_or_else(|| "an engine returns its last hidden state".into())
}

fn choose(logits: &[f32], options: &Options, rng: &mut Rng) -> u32 {
    if options.temperature == 0.0 {
        return argmax(logits);
    }
    let inputs = sampling::Inputs {
        logits: Array2::from_shape_fn((1, logits.len()), |(_, i)| f64::from(logits[i]))
            .into_shared(),
        uniform: arr1(&[f64::from(rng.uniform(0.0, 1.0))]).into_shared(),
        temperature: options.temperature,
        top_k: options.top_k,
        top_p: options.top_p,
    };
    reference::sampling::<f64>(&inputs).ids[0] as u32
}

#[cfg(test)]
mod tests {
    use std::{ops::ControlFlow, sync::Arc};

    use golden::{config::Preset, synthetic::Synthetic};

    use super::{Options, Report, generate};

    /// A vocabulary so small that drafts are often right.
    fn run(vocab: usize, seed: u64, prompt: &[u32], options: &Options) -> Report {
        let mut config = Preset::Tiny.config(Some(4), None).unwrap();
        config.vocab_size = vocab;
        let mut engine = reference::Model::<f32>::new(Arc::new(Synthetic::new(config, seed)));
        generate(&mut engine, prompt, options, &mut |_| ControlFlow::Continue(())).unwrap()
    }

    fn greedy(max_new: usize, speculate: usize) -> Options {
        Options {
            max_new,
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            seed: 0,
            stop: Vec::new(),
            speculate,
        }
    }

    #[test]
    fn drafting_changes_nothing() {
        let mut accepted = 0;
        for seed in 0..4 {
            for prompt in [&[1_u32][..], &[0, 1], &[2, 1, 0, 1, 2, 2, 1]] {
                let plain = run(3, seed, prompt, &greedy(24, 0));
                assert_eq!(plain.tokens.len(), 24);
                for k in 1..=6 {
                    let drafted = run(3, seed, prompt, &greedy(24, k));
                    assert_eq!(drafted.tokens, plain.tokens, "seed {seed}, {k} drafts");
                    accepted += drafted.accepted.iter().sum::<usize>();
                    assert!(drafted.accepted.iter().zip(&drafted.drafted).all(|(a, d)| a <= d));
                }
            }
        }
        assert!(100 < accepted, "the test has to see accepted drafts, it saw {accepted}");
    }

    #[test]
    fn a_stop_token_ends_the_text_wherever_it_comes() {
        for k in 0..=4 {
            let plain = run(3, 1, &[1, 2], &greedy(24, 0)).tokens;
            let stop = plain[5];
            let first = plain.iter().position(|&token| token == stop).unwrap();
            let options = Options { stop: vec![stop], ..greedy(24, k) };
            assert_eq!(run(3, 1, &[1, 2], &options).tokens, plain[..=first], "{k} drafts");
        }
    }

    #[test]
    fn a_seed_fixes_a_sample() {
        let options = |seed| Options { temperature: 1.0, seed, ..greedy(16, 0) };
        let run = |seed| run(256, 0, &[3], &options(seed)).tokens;
        assert_eq!(run(1), run(1));
        assert_ne!(run(1), run(2));
    }
}
